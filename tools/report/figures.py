"""The charts of a report: which field of the log, in which unit, with which numbers under it."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from megapatch.models.cli import UserError
from megapatch.models.svg import FOOT, HEAD, THIN_PX, Chart, Line, draw, finite, hollow_px, sheet, weight
from megapatch.tools.report.lines import lines_of, marks, notes, number, source_lines, validation_lines
from megapatch.tools.report.logs import Run

KIB = 1024.0
BYTES = ((1.0, "bytes"), (KIB, "KiB"), (KIB**2, "MiB"), (KIB**3, "GiB"), (KIB**4, "TiB"))
OUTLIER = 8  # times the median: a step that long would flatten the rest of the chart


NATS, PERCENT, SECONDS = ((1.0, "nats per token"),), ((0.01, "%"),), ((1e-3, "ms"), (1.0, "s"))
LOSS, RANGE, SPEED = ("first", "last", "min"), ("first", "last", "min", "max"), ("first", "last", "min", "median")
MEMORY = (("memory_bytes", "held"), ("largest_peak_memory_bytes", "peak of the largest rank"))


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
    also: tuple[tuple[str, str], ...] = ()  # further fields in the same chart, and their names
    optional: bool = True  # a log without it lacks nothing

    @property
    def lowest(self) -> bool:
        """Whether the step of the lowest value is told."""
        return self.wide


FIGURES = (
    Figure("loss", "Loss", LOSS, NATS, False, digits=7, wide=True, optional=False),
    Figure("loss_of", "Loss by source", LOSS, NATS, False, digits=7, wide=True),
    Figure("mtp_1_loss", "Loss of the token after the next", LOSS, NATS, False, digits=7),
    Figure("tokens_per_s", "Throughput", SPEED, ((1.0, "tokens/s"),), optional=False),
    Figure("tflops", "Model TFLOP/s, all ranks", SPEED, ((1.0, "TFLOP/s"),), optional=False),
    Figure("mfu", "MFU", SPEED, PERCENT),
    Figure("step_s", "Step time", (*SPEED, "p95", "max"), SECONDS, optional=False),
    Figure("peak_memory_bytes", "Peak memory, rank 0", RANGE, BYTES, also=MEMORY, optional=False),
    Figure("offload_fraction", "Optimizer state in host memory, rank 0", RANGE, PERCENT),
    Figure("offload_exposed_s", "Optimizer step that hides behind nothing, rank 0", (*SPEED, "max"), SECONDS),
    Figure("lr", "Learning rate", RANGE, optional=False),
    Figure("grad_norm", "Gradient norm", RANGE, optional=False),
    Figure("fill", "Rows filled with conversations", (*SPEED, "max"), PERCENT),
    Figure("trained_tokens", "Tokens trained on, of a step", (*SPEED, "max"), ((1.0, "tokens"),)),
    Figure("expert_balance", "Busiest expert, by the average", (*RANGE, "median"), ((1.0, "x"),)),
    Figure("tokens_dropped", "Tokens dropped, of a step and all layers", RANGE, ((1.0, "tokens"),)),
    Figure("load_balancing_loss", "Balancing loss of routers", RANGE),
    Figure("seq_load_balancing_loss", "Balancing loss of routers, by sequence", RANGE),
    Figure("router_z_loss", "z-loss of routers", RANGE),
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


def chart_of(spec: Figure, runs: Sequence[Run]) -> Chart | None:
    """One chart, None when no log has the field."""
    if spec.key == "loss_of":
        lines = source_lines(runs)
    else:
        lines = lines_of(spec.key, spec.also, runs) + (validation_lines(runs) if spec.key == "loss" else [])
    if spec.key != "loss" and all(math.isnan(y) for line in lines for y in line.ys):
        return None
    factor, unit = _unit(spec, [y for line in lines for y in finite(line.ys)])
    lines = [replace(line, ys=[y / factor for y in line.ys]) for line in lines]
    return Chart(
        spec.title,
        unit,
        lines,
        marks(runs),
        spec.from_zero,
        _top(lines) if spec.key == "step_s" else math.inf,
        width=980 if spec.wide else 480,
        height=340 if spec.wide else 250,
    )


def figure(spec: Figure, runs: Sequence[Run]) -> str:
    """The <figure> element of one chart, or '' when no log has the field."""
    chart = chart_of(spec, runs)
    if chart is None:
        return ""
    said = [f"Values in {chart.unit}."] if chart.unit else []
    if chart.top < math.inf:
        said.append("▲ marks steps that took longer than the axis is high.")
    if spec.key == "loss":
        said += notes(runs)
    return (
        f"<figure{' class=wide' if spec.wide else ''}><h3>{escape(spec.title)}</h3>{_legend(chart)}"
        f'<div class="plot">{draw(chart)}</div>'
        f"<figcaption>{_numbers(spec, chart.lines)}{_paragraph(said)}</figcaption></figure>"
    )


def chosen(keys: Sequence[str]) -> Sequence[Figure]:
    """The charts of these fields, in order; all of them for none (UserError for a field that has no chart)."""
    known = {spec.key: spec for spec in FIGURES}
    if unknown := [key for key in keys if key not in known]:
        raise UserError(f"--charts {unknown[0]}: no such chart; there are {', '.join(known)}")
    return [known[key] for key in keys] or FIGURES


def picture(runs: Sequence[Run], specs: Sequence[Figure]) -> str:
    """Charts as one SVG file."""
    drawn = [chart for spec in specs if (chart := chart_of(spec, runs))]
    if not drawn:
        raise UserError(
            f"--charts {' '.join(spec.key for spec in specs)}: not in the logs, so there is nothing to draw"
        )
    return sheet(drawn)


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
    entries += [(_tick(place), name) for place, name in MARKS.items() if any(m.place == place for m in chart.marks)]
    if len(entries) < 2:
        return ""
    return '<ul class="legend">' + "".join(f"<li>{mark}{escape(name)}</li>" for mark, name in entries) + "</ul>"


MARKS = {"": "resumed", FOOT: "saved", HEAD: "step skipped"}


def _tick(place: str) -> str:
    top, bottom = (9 if place == FOOT else 1), (8 if place == HEAD else 15)
    look = f"mark{' skipped' * (place == HEAD)} {place}".strip()
    return f'<svg width="22" height="16"><line class="{look}" x1="11" x2="11" y1="{top}" y2="{bottom}"/></svg>'


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
        if line.points or spec.lowest:
            lowest = line.xs[line.ys.index(min(values))] if values else "–"
            cells.append(f"<td>{lowest:,}</td>" if values else "<td>–</td>")
        missing = len(line.ys) - len(values)
        note = f" <em>({missing:,} not finite)</em>" if missing else ""
        rows.append(f"<tr><th scope=row>{escape(line.name)}{note}</th>{''.join(cells)}</tr>")
    heads = list(spec.columns) + (["min at step"] if spec.lowest else [])
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    return f'<table class="numbers"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _paragraph(notes: Sequence[str]) -> str:
    return f"<p>{escape(' '.join(notes))}</p>" if notes else ""
