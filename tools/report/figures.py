"""The charts of a report: which field of the log, in which unit, with which numbers under it."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from megapatch.models.svg import THIN_PX, Chart, Line, Mark, draw, finite, hollow_px, weight
from megapatch.tools.report.logs import Run, as_float

COLOURS = 6
KIB = 1024.0
BYTES = ((1.0, "bytes"), (KIB, "KiB"), (KIB**2, "MiB"), (KIB**3, "GiB"), (KIB**4, "TiB"))
OUTLIER = 8  # times the median: a step that long would flatten the rest of the chart


@dataclass(frozen=True)
class Figure:
    """One chart: ``key`` is the field of the train lines, ``units`` the factors to choose from, smallest first."""

    key: str
    title: str
    columns: tuple[str, ...]
    units: tuple[tuple[float, str], ...] = ((1.0, ""),)
    from_zero: bool = True
    digits: int = 5
    wide: bool = False


FIGURES = (
    Figure("loss", "Loss", ("first", "last", "min"), ((1.0, "nats per token"),), False, digits=7, wide=True),
    Figure("tokens_per_s", "Throughput", ("first", "last", "min", "median"), ((1.0, "tokens/s"),)),
    Figure("tflops", "Model TFLOP/s, all ranks", ("first", "last", "min", "median"), ((1.0, "TFLOP/s"),)),
    Figure("step_s", "Step time", ("first", "last", "min", "median", "p95", "max"), ((1e-3, "ms"), (1.0, "s"))),
    Figure("peak_memory_bytes", "Peak memory, rank 0", ("first", "last", "min", "max"), BYTES),
    Figure("lr", "Learning rate", ("first", "last", "min", "max")),
    Figure("grad_norm", "Gradient norm", ("first", "last", "min", "max")),
)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: a value that did occur."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "min": min,
    "max": max,
    "median": statistics.median,
    "p95": lambda values: percentile(values, 95),
}


def number(value: float, digits: int = 5) -> str:
    """A number for people: whole ones in full, others with ``digits`` significant digits; 'NaN', 'inf'."""
    if math.isnan(value):
        return "NaN"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return re.sub(r"e([-+])0+", r"e\1", f"{value:,.{digits}g}").replace("e+", "e")


def figure(spec: Figure, runs: Sequence[Run]) -> str:
    """The <figure> element of one chart, or '' when no log has the field."""
    lines = train_lines(spec, runs) + (validation_lines(runs) if spec.key == "loss" else [])
    if not any(not math.isnan(y) for line in lines for y in line.ys) and spec.key != "loss":
        return ""
    factor, unit = _unit(spec, [y for line in lines for y in finite(line.ys)])
    lines = [Line(x.name, x.xs, [y / factor for y in x.ys], x.style, x.width, x.points) for x in lines]
    chart = Chart(
        spec.title,
        unit,
        lines,
        resume_marks(runs),
        spec.from_zero,
        _top(lines) if spec.key == "step_s" else math.inf,
        width=980 if spec.wide else 480,
        height=340 if spec.wide else 250,
    )
    notes = [f"Values in {unit}."] if unit else []
    if chart.top < math.inf:
        notes.append("▲ marks steps that took longer than the axis is high.")
    if spec.key == "loss":
        notes += resume_notes(runs)
    return (
        f"<figure{' class=wide' if spec.wide else ''}><h3>{escape(spec.title)}</h3>{_legend(chart)}"
        f'<div class="plot">{draw(chart)}</div>'
        f"<figcaption>{_numbers(spec, lines)}{_paragraph(notes)}</figcaption></figure>"
    )


def train_lines(spec: Figure, runs: Sequence[Run]) -> list[Line]:
    """One line a run; earlier ones are drawn wider, so that equal curves both show."""
    found = []
    for i, run in enumerate(runs):
        found.append(Line(run.label, *run.series(spec.key), _style(i), _width(i, runs)))
    return found


def validation_lines(runs: Sequence[Run]) -> list[Line]:
    """One line of points a run and split."""
    found = []
    for i, run in enumerate(runs):
        for split in dict.fromkeys(str(line.get("split", "validation")) for line in run.evals):
            lines = [line for line in run.evals if str(line.get("split", "validation")) == split]
            losses = [as_float(line["loss"]) for line in lines]
            found.append(
                Line(
                    f"{run.label}, {split}", [line["step"] for line in lines], losses, _style(i), _width(i, runs), True
                )
            )
    return found


def _width(i: int, runs: Sequence[Run]) -> float:
    return THIN_PX + 2.8 * min(3, len(runs) - 1 - i)


def _style(i: int) -> str:
    return f"c{i % COLOURS}" + (" dashed" if i >= COLOURS else "")


def resume_marks(runs: Sequence[Run]) -> list[Mark]:
    """Where runs were resumed."""
    return [
        Mark(step, f"{run.label} resumed at step {step:,}", _style(i))
        for i, run in enumerate(runs)
        for step in run.resumed_at
    ]


def resume_notes(runs: Sequence[Run]) -> list[str]:
    """One sentence for each run that was resumed or ran steps twice."""
    found = []
    for run in runs:
        at = ", ".join(f"{step:,}" for step in run.resumed_at)
        count, difference = run.reruns()
        losses = f"; {count:,} steps were run twice, " if count else ""
        if count:
            losses += "with equal losses" if difference == 0 else f"their losses differ by up to {number(difference)}"
        if at:
            found.append(f"{run.label}: resumed at step {at} (dashed line){losses}.")
        elif count:
            found.append(f"{run.label}{losses.replace('; ', ': ')}.")
    return found


def _unit(spec: Figure, values: Sequence[float]) -> tuple[float, str]:
    largest = statistics.median(values) if spec.key == "step_s" and values else max(values, default=0.0)
    return [unit for unit in spec.units if unit[0] <= largest or unit == spec.units[0]][-1]


def _top(lines: Sequence[Line]) -> float:
    values = [y for line in lines for y in finite(line.ys)]
    middle = statistics.median(values) if values else 0.0
    outliers = sum(value > OUTLIER * middle for value in values)
    return OUTLIER / 2 * middle if middle > 0 and 0 < outliers <= max(1, len(values) // 20) else math.inf


def _legend(chart: Chart) -> str:
    entries = [(_swatch(line), line.name) for line in chart.lines if len(line.xs)]
    if chart.marks:
        entries.append(
            ('<svg width="22" height="16"><line class="mark" x1="11" x2="11" y1="1" y2="15"/></svg>', "resumed")
        )
    if len(entries) < 2:
        return ""
    return '<ul class="legend">' + "".join(f"<li>{mark}{escape(name)}</li>" for mark, name in entries) + "</ul>"


def _swatch(line: Line) -> str:
    circle = (
        f'<circle class="hollow {line.style}" cx="11" cy="8" r="{min(hollow_px(line), 7):.1f}"/>' if line.points else ""
    )
    width = THIN_PX if line.points else line.width
    path = f'<path class="line {line.style} {weight(line)}" stroke-width="{width}" d="M1 8L21 8"/>'
    return f'<svg width="22" height="16">{path}{circle}</svg>'


def _numbers(spec: Figure, lines: Sequence[Line]) -> str:
    """A table: one row a line, one column a statistic; 'not finite' counts what could not be drawn."""
    rows = []
    for line in lines:
        values = finite(line.ys)
        cells = [f"<td>{number(STATISTICS[c](values), spec.digits) if values else '–'}</td>" for c in spec.columns]
        if line.points or spec.key == "loss":
            lowest = line.xs[line.ys.index(min(values))] if values else "–"
            cells.append(f"<td>{lowest:,}</td>" if values else "<td>–</td>")
        missing = len(line.ys) - len(values)
        note = f" <em>({missing:,} not finite)</em>" if missing else ""
        rows.append(f"<tr><th scope=row>{escape(line.name)}{note}</th>{''.join(cells)}</tr>")
    heads = list(spec.columns) + (["min at step"] if spec.key == "loss" else [])
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    return f'<table class="numbers"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _paragraph(notes: Sequence[str]) -> str:
    return f"<p>{escape(' '.join(notes))}</p>" if notes else ""
