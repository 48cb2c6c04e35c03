"""mp-report: one self-contained HTML page from training logs, checks and pipeline steps."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megapatch.models.cli import FAILED, OK, Common, opt, run

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-report --log run=out/log.jsonl --output report.html
  mp-report runs/lr1e-4 runs/lr3e-4 --output compared.html
  mp-report run --charts loss lr grad_norm --output curves.svg
  mp-report --log straight=a.jsonl --log killed=b.jsonl --checks checks.jsonl --steps steps.jsonl --title Quickstart

exit status: 0 the page is written and every check holds; 1 a check failed (the page is written) or a file cannot
be read (nothing is written; the message starts with FILE:LINE); 2 wrong usage."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Make one self-contained HTML page (inline charts, no scripts, nothing fetched) from JSON-lines files."""

    runs: list[Path] = opt(
        "folders of runs (with log.jsonl), or logs; drawn on the same axes, named after their folders",
        [],
        flags=["runs"],
        nargs="*",
        type=Path,
        metavar="RUN",
    )
    refresh: Optional[int] = opt("seconds after which a browser that shows the page reads it again", None)
    log: list[str] = opt(
        "training log of mp-pretrain or mp-sft, and the name of its curves; may be given again to overlay runs",
        [],
        nargs="+",
        repeat=True,
        metavar="LABEL=FILE",
    )
    charts: list[str] = opt(
        "draw these fields of the log only, for example: loss loss_of lr grad_norm tokens_per_s peak_memory_bytes "
        "(default: all that are there)",
        [],
        nargs="+",
        metavar="FIELD",
    )
    checks: Optional[Path] = opt(
        'what was verified: lines {"check": text, "ok": bool} and, if you like, "found", "expected", "detail"',
        None,
        metavar="FILE",
    )
    steps: Optional[Path] = opt(
        'pipeline steps: lines {"step": text, "seconds": number, "command": text}', None, metavar="FILE"
    )
    title: str = opt("heading of the page", "Training report")
    output: Path = opt(
        "page to write, replaced when complete; - for stdout; FILE.svg: the charts alone, as one picture",
        Path("report.html"),
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        """Check what argparse cannot."""
        for entry in self.log:
            label, equals, path = entry.partition("=")
            if not (label.strip() and equals and path):
                raise ValueError(f"--log {entry!r}: expected LABEL=FILE, for example run={entry or 'log.jsonl'}")
        labels = [entry.partition("=")[0] for entry in self.log]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"--log: label {twice[0]!r} is given twice; each log needs its own")
        if self.output.suffix == ".svg" and not (self.runs or self.log):
            raise ValueError(f"--output {self.output}: a picture shows charts; give a RUN or --log")
        if not (self.runs or self.log or self.checks or self.steps):
            raise ValueError("nothing to report; give a RUN, --log, --checks or --steps")


def named(options: Options) -> list[tuple[str, Path]]:
    """Label and log of every run; runs of one name are told apart by their paths."""
    logs = [path / "log.jsonl" if path.is_dir() else path for path in options.runs]
    names = [path.parent.name or path.stem for path in map(Path.absolute, logs)]
    found = [(name if names.count(name) == 1 else str(path), path) for name, path in zip(names, logs, strict=True)]
    return found + [(label, Path(path)) for label, _, path in (entry.partition("=") for entry in options.log)]


def report(options: Options) -> int:
    """Write the page; FAILED when a check does not hold."""
    from megapatch.models.commit import staged_file
    from megapatch.tools.report.figures import chosen, picture
    from megapatch.tools.report.logs import read_checks, read_run, read_steps
    from megapatch.tools.report.page import page

    runs = [read_run(label, path) for label, path in named(options)]
    for each in runs:
        if each.unknown:
            log.warning("%s: %d lines with events that mp-report does not know are not shown", each.path, each.unknown)
    checks = read_checks(options.checks) if options.checks else []
    steps = read_steps(options.steps) if options.steps else []
    if options.output.suffix == ".svg":
        text = picture(runs, chosen(options.charts))
    else:
        text = page(options.title, runs, checks, steps, options.refresh, chosen(options.charts))
    html = text.encode("utf-8", "backslashreplace")  # JSON may hold lone surrogates
    if options.output == Path("-"):
        sys.stdout.buffer.write(html)
        sys.stdout.buffer.flush()
    else:
        with staged_file(options.output) as stage:
            stage.write_bytes(html)
        print(options.output)
    failed = [check["check"] for check in checks if not check["ok"]]
    for name in failed:
        log.error("check failed: %s", name)
    return FAILED if failed else OK


def main(argv: Sequence[str] | None = None) -> int:
    """mp-report."""
    return run(Options, report, prog="mp-report", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
