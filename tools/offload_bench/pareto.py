"""Which ways to save memory are worth it: nobody else needs less of the device and is as fast. Table and plot."""

from collections.abc import Sequence
from typing import Any

from megapatch.models import svg

Row = dict[str, Any]
MIB = 2**20
CURVES = {
    "optimizer": "optimizer in host memory, share",
    "recompute": "recomputation",
    "activations": "activations in host memory, layers",
}


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with 'dominated': the name of a point that needs less of the device and is faster, or None."""
    return [row | {"dominated": next((o["point"] for o in rows if _better(o, row)), None)} for row in rows]


def _better(one: Row, other: Row) -> bool:
    if "error" in one or "error" in other:
        return False
    gains = other["device_bytes"] - one["device_bytes"], one["tokens_per_s"] - other["tokens_per_s"]
    return min(gains) >= 0 and max(gains) > 0


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table, for HEADS."""
    if "error" in row:
        return (row["point"], "failed", *[""] * (len(HEADS) - 3), row["error"][:60])
    seconds = ("forward_backward_s", "d2h_wait_s", "adam_s", "h2d_wait_s", "exposed_s")
    verdict = "other losses!" if row["same_loss"] is False else f"worse than {row['dominated']}"
    return (
        row["point"],
        f"{row['device_bytes'] / MIB:,.0f}",
        f"{row['host_bytes'] / MIB:,.0f}",
        f"{row['tokens_per_s']:,.0f}",
        *(f"{1e3 * row[name]:.0f}" for name in seconds),
        verdict if row["same_loss"] is False or row["dominated"] else "",
    )


HEADS = ("point", "device MiB", "host MiB", "tokens/s", "fwd+bwd ms", "d2h", "adam", "h2d", "exposed", "")


def plot(rows: Sequence[Row], title: str) -> str:
    """An SVG: tokens a second against memory of the device; dominated points as circles."""
    good = [row for row in rows if "error" not in row]
    lines = [_line(kind, [row for row in good if row["kind"] == kind], f"c{i}") for i, kind in enumerate(CURVES)]
    if worse := sorted((row for row in good if row["dominated"]), key=lambda row: -row["device_bytes"]):
        lines.append(_curve("needs more memory than another that is as fast", worse, "c5", points=True))
    drawn = [line for line in lines if line.xs]
    chart = svg.Chart(
        title, "tokens/s", drawn, from_zero=True, width=640, height=340, x_label="MiB on the device, at most"
    )
    return svg.standalone(chart)


def _line(kind: str, rows: Sequence[Row], style: str) -> svg.Line:
    ordered = sorted(rows, key=lambda row: row["device_bytes"])
    return _curve(f"{CURVES[kind]}: {', '.join(row['setting'] for row in ordered)} (left to right)", ordered, style)


def _curve(name: str, rows: Sequence[Row], style: str, *, points: bool = False) -> svg.Line:
    xs, ys = [row["device_bytes"] / MIB for row in rows], [row["tokens_per_s"] for row in rows]
    return svg.Line(name, xs, ys, style, width=8 if points else svg.THIN_PX, points=points)
