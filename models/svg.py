"""Line charts as inline SVG: nice ticks, gaps at NaN, and as many points as there are pixels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

LARGEST = 1e100  # beyond it a value is treated as not finite: axes would overflow
FONT_PX = 12
DIGIT_PX = 6.9  # of a 12 px digit, for the left margin
THIN_PX = 1.6  # an ordinary curve
DENSE = 1000  # points; noise of longer lines is drawn paler, so that validation points stand out
DOTS_BELOW = 40  # lines with fewer points also show them
ROW_PX = 18  # of a legend
FOOT, HEAD = "foot", "head"  # marks that are short, at the x axis and at the top
SHORT_PX = 7
TITLE_PX = 20
PLAIN_STYLE = """svg{background:#fff;font-family:system-ui,sans-serif}text{fill:#3d444d}.unit{font-style:italic}
.grid{stroke:#e9ecef}.axis{stroke:#5b6470}.line{fill:none;stroke:var(--c)}.dot{fill:var(--c)}
.dashed{stroke-dasharray:6 4}.dotted{stroke-dasharray:2 3}.hollow{fill:#fff;stroke:var(--c);stroke-width:1.6}
.mark{stroke:var(--c);stroke-width:1.5;stroke-dasharray:4 3}.foot,.head{stroke-dasharray:none}.skipped{--c:#a8141c}
.c0{--c:#1f6fd6}.c1{--c:#d9660f}.c2{--c:#12866b}.c3{--c:#a23bb0}.c4{--c:#8a6d00}.c5{--c:#c8244f}"""


@dataclass(frozen=True)
class Line:
    """One curve; ``style`` names its colour class, ``points`` draws circles on it."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    width: float = THIN_PX
    points: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x`` with a tooltip; ``place``: FOOT, HEAD, or '' for the whole height."""

    x: float
    text: str
    style: str
    place: str = ""


@dataclass(frozen=True)
class Chart:
    """What to draw, in user units; ``top`` cuts the y axis there and shows what lies above as triangles."""

    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    from_zero: bool = False
    top: float = math.inf
    width: int = 480
    height: int = 250
    x_label: str = "step"


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def finite(values: Iterable[float]) -> list[float]:
    """The values that can be drawn."""
    return [v for v in values if abs(v) < LARGEST]


def draw(chart: Chart) -> str:
    """The chart as an <svg> element; one without a finite value says so."""
    shown = [(x, y) for line in chart.lines for x, y in zip(line.xs, line.ys, strict=True) if abs(y) < LARGEST]
    if not shown:
        return _frame(chart, [_text(chart.width / 2, chart.height / 2, "no finite values to show", "middle")])
    y_ticks = nice_ticks(*_y_range(chart, [y for _, y in shown]), count=5)
    labels = tick_labels(y_ticks)
    left = 14 + DIGIT_PX * max(map(len, labels))
    y = Axis(y_ticks[0], y_ticks[-1], chart.height - 42, 30)
    low, high = _x_range([x for x, _ in shown] + [mark.x for mark in chart.marks])
    x = Axis(low, high, left, chart.width - 24)
    body = [_text(4, 14, chart.unit, "start", "unit")]
    body += _y_grid(x, y, y_ticks, labels)
    body += _x_ticks(x, y, chart.x_label)
    apart = {(mark.place, mark.style, int(x(mark.x))): mark for mark in chart.marks}  # one a pixel
    body += [_mark(mark, x, y) for mark in apart.values()]
    for line in chart.lines:
        body += _line(line, x, y)
    return _frame(chart, body)


def _y_range(chart: Chart, values: list[float]) -> tuple[float, float]:
    low, high = min(values), min(max(values), chart.top)
    return (min(0.0, low) if chart.from_zero else low), high


def _x_range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 1, high + 1
    return (0 if 0 <= low <= 0.2 * high else low), high


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` steps of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.05 * abs(low) or 1.0
        low, high = (low if low == 0 else low - pad), high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Short labels with the same unit and decimals for all ticks: 0.5, 12,000, 1.5M, 2e-4."""
    largest, step = max(map(abs, ticks)), ticks[1] - ticks[0]
    power, suffix = 0, ""
    if largest >= 1e15 or largest < 1e-3:
        power = math.floor(math.log10(largest))
        suffix = f"e{power}"
    elif largest >= 1e6:
        power, suffix = next((p, s) for p, s in ((12, "T"), (9, "G"), (6, "M")) if largest >= 10**p)
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    unit = 10.0**power
    return ["0" if abs(t) < step / 2 else f"{t / unit:,.{decimals}f}{suffix}" for t in ticks]


def _y_grid(x: Axis, y: Axis, ticks: Sequence[float], labels: Sequence[str]) -> list[str]:
    found = []
    for tick, label in zip(ticks, labels, strict=True):
        at = y(tick)
        kind = "axis" if tick == ticks[0] else "grid"
        found.append(f'<line class="{kind}" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        found.append(_text(x.start - 7, at + 4, label, "end"))
    return found


def _x_ticks(x: Axis, y: Axis, name: str) -> list[str]:
    count = max(2, int((x.end - x.start) / 70))
    ticks = nice_ticks(x.low, x.high, count)
    labels = tick_labels(ticks)
    found = [_text((x.start + x.end) / 2, y.start + 36, name, "middle", "unit")]
    for tick, label in zip(ticks, labels, strict=True):
        if not x.low <= tick <= x.high or tick != int(tick):
            continue
        at = x(tick)
        label = f"{tick:,.0f}" if abs(tick) < 1e6 else label
        found.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.start + 4:.1f}"/>')
        found.append(_text(at, y.start + 18, label, "middle"))
    return found


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    at = x(mark.x)
    top = y.start - SHORT_PX if mark.place == FOOT else y.end
    bottom = y.end + SHORT_PX if mark.place == HEAD else y.start
    look = f"mark {mark.style} {mark.place}".strip()
    line = f'<line class="{look}" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}">'
    return f"{line}<title>{escape(mark.text)}</title></line>"


def _line(line: Line, x: Axis, y: Axis) -> list[str]:
    count = len(finite(line.ys))
    look = f"{line.style} {weight(line)}".strip()
    found = []
    for part in segments(line.xs, line.ys):
        path = thin_out([(x(step), y(min(value, y.high))) for step, value in part])
        if len(path) > 1:
            d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in path)
            found.append(f'<path class="line {look}" stroke-width="{THIN_PX if line.points else line.width}" d="{d}"/>')
        if line.points or count <= DOTS_BELOW or len(path) == 1:
            kind, radius = ("hollow", hollow_px(line)) if line.points else ("dot", 2.4)
            found += [
                f'<circle class="{kind} {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:.1f}"/>' for a, b in path
            ]
        above = thin_out([(x(step), y.end) for step, value in part if value > y.high])
        found += [f'<path class="dot {line.style}" d="M{a - 4:.1f} {b + 7:.1f}l4 -7l4 7z"/>' for a, b in above]
    return found


def weight(line: Line) -> str:
    """The class that lets later curves show: 'band' for wide lines, 'dense' for long ones, '' for others."""
    return (
        "band"
        if line.width > THIN_PX and not line.points
        else "dense"
        if len(line.ys) > DENSE and not line.points
        else ""
    )


def hollow_px(line: Line) -> float:
    """Radius of a line's circles: larger for wide lines, so that equal points both show."""
    return 3.2 + 0.75 * (line.width - THIN_PX)


def segments(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Runs of points to be joined: broken at values that are not finite and where x does not increase."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        drawable = abs(y) < LARGEST
        if found[-1] and (not drawable or x <= found[-1][-1][0]):
            found.append([])
        if drawable:
            found[-1].append((x, y))
    return [part for part in found if part]


def thin_out(pixels: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most four points a pixel column: its first, lowest, highest and last, so that no spike is lost."""
    columns: dict[int, list[int]] = {}
    for i, (at, _) in enumerate(pixels):
        columns.setdefault(int(at), []).append(i)
    kept: list[int] = []
    for inside in columns.values():
        lowest = min(inside, key=lambda i: pixels[i][1])
        highest = max(inside, key=lambda i: pixels[i][1])
        kept += sorted({inside[0], lowest, highest, inside[-1]})
    return [pixels[i] for i in kept]


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(chart: Chart, body: Iterable[str]) -> str:
    size = f'viewBox="0 0 {chart.width} {chart.height}"'
    label = escape(f"{chart.title} by {chart.x_label}")
    return f'<svg class="chart" {size} font-size="{FONT_PX}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def standalone(chart: Chart) -> str:
    """The chart as a file of its own: with title, colours and a legend below, and nothing from outside."""
    return sheet([chart])


def sheet(charts: Sequence[Chart]) -> str:
    """Charts as one file, those that fit side by side; each with its title above and its legend below."""
    width = max(chart.width for chart in charts)
    body, x, y, deep = [], 0, 0, 0
    for chart in charts:
        if x + chart.width > width:
            x, y, deep = 0, y + deep, 0
        body.append(f'<g transform="translate({x} {y})">{_titled(chart)}</g>')
        x += chart.width
        deep = max(deep, TITLE_PX + chart.height + ROW_PX * len(chart.lines) + ROW_PX)
    head = f"<style>{PLAIN_STYLE}</style><title>{escape(', '.join(chart.title for chart in charts))}</title>"
    size = f'viewBox="0 0 {width} {y + deep}" font-size="{FONT_PX}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{head}{"".join(body)}</svg>\n'


def _titled(chart: Chart) -> str:
    """Title, chart and legend, one below the other."""
    rows = [_text(chart.width / 2, 16, chart.title, "middle")]
    for i, line in enumerate(chart.lines):
        y = TITLE_PX + chart.height + ROW_PX * (i + 0.5)
        rows.append(f'<path class="line {line.style}" stroke-width="2" d="M16 {y:.1f}h24"/>')
        if line.points:
            rows.append(f'<circle class="hollow {line.style}" cx="28" cy="{y:.1f}" r="{hollow_px(line):.1f}"/>')
        rows.append(_text(48, y + 4, line.name, "start"))
    place = f'y="{TITLE_PX}" width="{chart.width}" height="{chart.height}"'
    return draw(chart).replace("<svg ", f"<svg {place} ", 1) + "".join(rows)
