"""Rows as tables, and what they mean for the user."""

from collections.abc import Iterable, Sequence
from typing import Any

from megapatch.models.space import short

Row = dict[str, Any]
KNEE = 0.9  # of the best rate
NOISY = 1.25  # median over smallest time
DIRECTIONS = {"h2d": "host to device", "d2h": "device to host", "both": "both at once"}


def tables(rows: Sequence[Row]) -> str:
    """One table for each part that has rows."""
    found = []
    for part, heads, cells in (
        ("memory", ("host memory", "array", "threads", "GB/s"), _memory_cells),
        ("link", ("host <-> device", "memory", "transfer", "GB/s"), _link_cells),
        ("adam", ("AdamW step, fp32", "chunk", "threads", "GB/s", "ms/billion", "x floor"), _adam_cells),
    ):
        lines = [cells(row) for row in rows if row["part"] == part]
        if lines:
            found.append(_table([heads, *lines]))
    return "\n\n".join(found)


def _memory_cells(row: Row) -> tuple[str, ...]:
    return row["operation"], short(row["bytes"]) + "B", str(row["threads"]), _rate(row)


def _link_cells(row: Row) -> tuple[str, ...]:
    kind = "pinned" if row["pinned"] else "pageable"
    return DIRECTIONS[row["operation"]], kind, short(row["bytes"]) + "B", _rate(row)


def _adam_cells(row: Row) -> tuple[str, ...]:
    chunk = "-" if row["kernel"] == "floor" else short(row["chunk"])
    return (
        row["kernel"],
        chunk,
        str(row["threads"]),
        _rate(row),
        f"{row['ms_per_billion']:.0f}",
        f"{row['x_floor']:.2f}",
    )


def _rate(row: Row) -> str:
    return f"{row['bytes_per_s'] / 1e9:.1f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    found = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        found.append("  ".join(cells))
    found.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(found)


def meaning(rows: Sequence[Row]) -> list[str]:
    """Sentences for the user, from the rows alone."""
    adam = [row for row in rows if row["part"] == "adam"]
    return [*_memory_meaning(rows), *_link_meaning(rows), *_adam_meaning(adam), *_noise(adam)]


def _memory_meaning(rows: Iterable[Row]) -> Iterable[str]:
    memory = [row for row in rows if row["part"] == "memory"]
    if memory:
        best = max(memory, key=lambda row: row["bytes_per_s"])
        yield (
            f"Host memory: up to {_rate(best)} GB/s ({best['operation']}, {_threads(best)}); "
            "all ranks of a machine share it."
        )


def _link_meaning(rows: Iterable[Row]) -> Iterable[str]:
    link = [row for row in rows if row["part"] == "link"]
    for direction, words in DIRECTIONS.items():
        pinned = [row for row in link if row["operation"] == direction and row["pinned"]]
        if not pinned:
            continue
        rate = max(row["bytes_per_s"] for row in pinned)
        pageable = max(row["bytes_per_s"] for row in link if row["operation"] == direction and not row["pinned"])
        yield (
            f"Link, {words}: {rate / 1e9:.1f} GB/s pinned, {pageable / 1e9:.1f} GB/s pageable; the knee is at "
            f"{short(knee(pinned))}B: smaller pinned transfers get less than {KNEE:.0%} of the rate."
        )


def knee(rows: Iterable[Row]) -> int:
    """The smallest transfer, in bytes, that reaches 90% of the best rate."""
    rows = list(rows)
    best = max(row["bytes_per_s"] for row in rows)
    return min(row["bytes"] for row in rows if row["bytes_per_s"] >= KNEE * best)


def _adam_meaning(rows: Sequence[Row]) -> Iterable[str]:
    fused = [row for row in rows if row["kernel"] == "fused"]
    if not fused:
        return
    best = min(fused, key=lambda row: row["seconds"])
    alike = [row for row in rows if row["threads"] == best["threads"]]
    yield (
        f"CPU Adam: {best['ms_per_billion']:.0f} ms per billion parameters with {_threads(best)} and chunks of "
        f"{short(best['chunk'])} elements (fused), {best['x_floor']:.2f} x the memory floor of "
        f"{best['ms_per_billion'] / best['x_floor']:.0f} ms."
    )
    enough = min(row["chunk"] for row in alike if row["kernel"] == "fused" and row["seconds"] <= best["seconds"] / KNEE)
    yield f"Chunks of {short(enough)} elements or more cost at most {1 / KNEE - 1:.0%} over the best chunk size."
    for name in ("foreach", "for-loop"):
        slow = next(row for row in alike if row["kernel"] == name)
        yield f"{name} takes {slow['seconds'] / best['seconds']:.1f} x the time of the fused step."
    yield from _scaling(fused, best)


def _scaling(fused: Sequence[Row], best: Row) -> Iterable[str]:
    """What more threads bring, at the best chunk size."""
    by_threads = sorted((row for row in fused if row["chunk"] == best["chunk"]), key=lambda row: row["threads"])
    if len(by_threads) > 1:
        last, before = by_threads[-1], by_threads[-2]
        gain = before["seconds"] / last["seconds"]
        verdict = "memory is the limit, more threads will not help" if gain < 1.15 else "memory is not yet the limit"
        yield f"From {before['threads']} to {_threads(last)} the step gets {gain:.2f} x as fast: {verdict}."


def _noise(rows: Sequence[Row]) -> Iterable[str]:
    """A warning when the floor itself did not repeat."""
    worst = max((row["median_seconds"] / row["seconds"] for row in rows if row["kernel"] == "floor"), default=1.0)
    if worst > NOISY:
        yield f"Rough figures: the floor's median time is {worst:.2f} x its smallest; was other work running?"


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
