"""mp-check: a statement about JSON-lines files, checked; the line it prints goes into mp-report's table of checks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megapatch.models.cli import FAILED, OK, Common, UserError, opt, run

EXAMPLES = """examples:
  mp-check --name 'loss after resume' --equal straight/log.jsonl resumed/log.jsonl --where event=train \\
      --key step --fields loss grad_norm >>checks.jsonl
  mp-check --name 'held-out loss fell' --falls run/log.jsonl --where event=eval --key step --fields loss

Of several lines with the same key the last one counts: a resumed run repeats steps.
prints {"check", "ok", "found", "expected", "detail"}; exit status 1 when it does not hold"""


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Common):
    """Check that two JSON-lines files hold the same values, to the bit, or that a value falls within one file."""

    name: str = opt("what is claimed, for the report")
    equal: Optional[list[Path]] = opt("two files whose fields must be equal", None, nargs=2, type=Path, metavar="FILE")
    falls: Optional[Path] = opt(
        "file in which the last value of the field must be below the first", None, metavar="FILE"
    )
    where: Optional[str] = opt("read only lines with this value", None, metavar="FIELD=VALUE")
    key: str = opt("field that names a line", "step")
    fields: list[str] = opt("fields to look at", nargs="+")

    def __post_init__(self) -> None:
        if (self.equal is None) == (self.falls is None):
            raise ValueError("give one of --equal FILE FILE and --falls FILE")
        if self.falls and len(self.fields) != 1:
            raise ValueError("--falls looks at one field; give one in --fields")
        if self.where and "=" not in self.where:
            raise ValueError(f"--where {self.where}: expected FIELD=VALUE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-check; returns the exit status."""
    return run(CheckOptions, check, prog="mp-check", epilog=EXAMPLES, argv=argv)


def check(options: CheckOptions) -> int:
    """Check, print the line, and return the exit status."""
    if options.equal:
        result = equal(options, *(read(path, options) for path in options.equal))
    else:
        assert options.falls is not None
        result = falls(options, read(options.falls, options))
    print(json.dumps({"check": options.name, **result}, ensure_ascii=False))
    return OK if result["ok"] else FAILED


def read(path: Path, options: CheckOptions) -> dict[Any, list[Any]]:
    """The fields of each line that is asked for, by key, in order of the file (UserError for what is missing)."""
    field, _, value = (options.where or "").partition("=")
    found: dict[Any, list[Any]] = {}
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); expected one object a line") from error
        if options.where and str(line.get(field)) != value:
            continue
        missing = [name for name in (options.key, *options.fields) if name not in line]
        if missing:
            raise UserError(f"{path}:{number}: no {missing[0]!r}; found {', '.join(line)}")
        found[line[options.key]] = [line[name] for name in options.fields]
    if not found:
        raise UserError(f"{path}: no line{f' with {options.where}' if options.where else ''}; nothing to check")
    return found


def equal(options: CheckOptions, first: dict[Any, list[Any]], second: dict[Any, list[Any]]) -> dict[str, Any]:
    """Whether both have the same keys and values."""
    assert options.equal is not None
    different = [key for key in first | second if first.get(key) != second.get(key)]
    total = len(first | second)
    found = f"{total - len(different)} of {total} equal"
    detail = f"{', '.join(options.fields)} of {options.equal[0]} and {options.equal[1]}"
    if different:
        key = different[0]
        detail += f"; {options.key} {key}: {first.get(key)} and {second.get(key)}"
    return {"ok": not different, "found": found, "expected": f"{total} of {total} equal", "detail": detail}


def falls(options: CheckOptions, values: dict[Any, list[Any]]) -> dict[str, Any]:
    """Whether the last value is below the first."""
    series = [(key, fields[0]) for key, fields in values.items()]
    (first_key, first), (last_key, last) = series[0], series[-1]
    ok = len(series) > 1 and first is not None and last is not None and last < first
    detail = f"{options.fields[0]} of {options.falls}: {first} at {options.key} {first_key}, {last} at {last_key}"
    return {"ok": ok, "found": last, "expected": f"below {first}", "detail": detail}


if __name__ == "__main__":
    raise SystemExit(main())
