"""The HTML page of a report, from what was read: banner, checks, charts, runs, pipeline steps."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from megapatch.models.cli import versions
from megapatch.tools.report.figures import FIGURES, Figure, figure
from megapatch.tools.report.lines import number
from megapatch.tools.report.logs import Run, as_float
from megapatch.tools.report.style import CSS

Lines = Sequence[dict[str, Any]]


def page(
    title: str,
    runs: Sequence[Run],
    checks: Lines,
    steps: Lines,
    refresh: int | None = None,
    specs: Sequence[Figure] = FIGURES,
) -> str:
    """A whole HTML document; the same input gives the same bytes."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        banner(checks),
        section("What was verified", checks_table(checks) if checks else ""),
        section("Training", charts(runs, specs) if runs else ""),
        section("Data", data_table(runs)),
        section("Differences between the runs", differences(runs)),
        section("Runs", runs_table(runs) + "".join(map(config, runs)) if runs else ""),
        section("Pipeline", steps_table(steps) if steps else ""),
        "<footer>mp-report · " + escape(" · ".join(f"{k} {v}" for k, v in versions().items())) + "</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + (f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "")
        + f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and what stands under it, or '' where there is nothing."""
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def banner(checks: Lines) -> str:
    """The verdict in one line; failed checks are named."""
    failed = [check["check"] for check in checks if not check["ok"]]
    if not checks:
        return '<div class="banner none">Nothing was verified: no checks were given.</div>'
    if not failed:
        counted = "The check holds" if len(checks) == 1 else f"All {len(checks):,} checks hold"
        return f'<div class="banner good">✓ {counted}</div>'
    counted = f"{len(failed):,} of {len(checks):,} check{'s' * (len(checks) > 1)} FAILED"
    return f'<div class="banner bad">✗ {counted}<p>{escape("; ".join(failed))}</p></div>'


def checks_table(checks: Lines) -> str:
    """One row a check; columns that no check fills are left out."""
    columns = [c for c in ("found", "expected", "detail") if any(check.get(c) is not None for check in checks)]
    rows = []
    for check in checks:
        verdict = (
            '<span class="badge good">✓ holds</span>' if check["ok"] else '<span class="badge bad">✗ FAILED</span>'
        )
        cells = [verdict, escape(check["check"]), *(as_text(check.get(c)) for c in columns)]
        rows.append(cells)
    return table(["", "check", *columns], rows)


def as_text(value: Any) -> str:
    """A JSON value as escaped HTML: strings as they are, null as nothing, the rest as JSON."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f'<span class="any">{escape(text)}</span>'


def charts(runs: Sequence[Run], specs: Sequence[Figure]) -> str:
    """All figures that have data, and a line that names those that have none."""
    drawn = [(spec, figure(spec, runs)) for spec in specs]
    absent = [spec.title for spec, html in drawn if not html and not spec.optional]
    note = f"<p>Not in the logs: {escape('; '.join(absent))}.</p>" if absent else ""
    return f'<div class="figures">{"".join(html for _, html in drawn)}</div>{note}'


def runs_table(runs: Sequence[Run]) -> str:
    """One row a training log: what ran, on how much, for how long."""
    heads = ["run", "log", "parameters", "ranks", "steps", "samples", "saved", "resumed at", "started (UTC)", "took"]
    rows = []
    for run in runs:
        start = run.starts[0] if run.starts else {}
        numbers = [run.train[0]["step"], run.train[-1]["step"]] if run.train else []
        samples = run.train[-1].get("consumed_samples") if run.train else None
        rows.append(
            [
                f"<strong>{escape(run.label)}</strong>",
                f"<code>{escape(run.path)}</code>",
                _parameters(start),
                _count(start.get("world_size")),
                "\u00a0to\u00a0".join(f"{n:,}" for n in numbers) or "none",
                _count(samples),
                f"{len(run.saved_at):,}×",
                ", ".join(f"{n:,}" for n in run.resumed_at) or "–",
                _date(min(run.times)) if run.times else "–",
                duration(max(run.times) - min(run.times)) if run.times else "–",
            ]
        )
    return table(heads, rows)


def _parameters(start: dict[str, Any]) -> str:
    """Of the model, and how many of them are trained where that is another number, as with LoRA."""
    total, trained = start.get("parameters"), start.get("trained_parameters")
    return _count(total) + (f", {_count(trained)} trained" if trained not in (None, total) else "")


def data_table(runs: Sequence[Run]) -> str:
    """One row a set of conversations of mp-sft, a resumed run's once; '' for other runs."""
    rows: dict[tuple[str, ...], None] = {}
    for run in runs:
        for about in run.data:
            cells = [as_text(about.get(c)) if c in WORDS else _count(about.get(c)) for c in DATA]
            rows[tuple([escape(run.label), *cells])] = None
    return table(["run", *(name.replace("_", " ").replace("percent", "%") for name in DATA)], rows) if rows else ""


WORDS = ("split", "prefix")
DATA = (*WORDS, "conversations", "rows", "tokens", "trained_tokens", "fill_percent", "truncated", "lost_tokens")


def differences(runs: Sequence[Run]) -> str:
    """Options whose values are not the same in all runs; '' for one run."""
    settings = [(run.starts[0].get("config") or {}) if run.starts else {} for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    unlike = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
    rows = [[f"<code>{escape(str(key))}</code>", *(as_text(each.get(key)) for each in settings)] for key in unlike]
    return table(["option", *(escape(run.label) for run in runs)], rows) if rows else ""


def _count(value: Any) -> str:
    found = as_float(value)
    return "–" if found != found else number(found)


def _date(unix: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):  # not a time of this calendar
        return number(unix)


def duration(seconds: float) -> str:
    """Seconds as people say it: 0.52 s, 12.3 s, 4 min 10 s, 3 h 5 min."""
    gap = "\u00a0"  # no line break before a unit
    if seconds < 60:
        return f"{seconds:.2f}{gap}s" if seconds < 10 else f"{seconds:.1f}{gap}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{gap}min {rest}{gap}s" if minutes < 60 else f"{minutes // 60:,}{gap}h {minutes % 60}{gap}min"


def config(run: Run) -> str:
    """The configuration a run was started with, folded."""
    settings = run.starts[0].get("config") if run.starts else None
    if not isinstance(settings, dict) or not settings:
        return ""
    rows = [[f"<code>{escape(str(key))}</code>", f"<code>{as_text(value)}</code>"] for key, value in settings.items()]
    return (
        f"<details><summary>Configuration of {escape(run.label)}</summary>{table(['option', 'value'], rows)}</details>"
    )


def steps_table(steps: Lines) -> str:
    """One row a pipeline step, with its share of the total time as a bar."""
    total = sum(step["seconds"] for step in steps)
    rows = [
        [
            escape(step["step"]),
            f"{step['seconds']:,.2f}",
            _bar(step["seconds"] / total if total else 0.0),
            f"<code>{as_text(step.get('command'))}</code>",
        ]
        for step in steps
    ]
    rows.append(["<strong>total</strong>", f"<strong>{total:,.2f}</strong>", "", ""])
    return table(["step", "seconds", "share", "command"], rows, numeric=1)


def _bar(part: float) -> str:
    rects = f'<rect class="rest" width="100" height="10"/><rect width="{100 * part:.1f}" height="10"/>'
    label = f"{part:.0%} of the time"
    shape = 'viewBox="0 0 100 10" preserveAspectRatio="none"'
    return f'<svg class="bar" {shape} role="img" aria-label="{label}">{rects}</svg>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = -1) -> str:
    """A table of cells that are HTML already; column ``numeric`` is aligned to the right."""
    kinds = [" class=number" if i == numeric else "" for i in range(len(heads))]
    head = "".join(f"<th scope=col{kind}>{name}</th>" for kind, name in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table><tr>{head}</tr>{body}</table></div>'
