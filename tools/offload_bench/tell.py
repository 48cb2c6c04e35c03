"""Rows as tables, and what they mean for the user."""

from collections.abc import Iterable, Sequence
from typing import Any

from megapatch.models.space import short
from megapatch.tools.offload_bench.pareto import HEADS, cells

Row = dict[str, Any]
KNEE = 0.9  # of the best rate
NOISY = 1.25  # median over smallest time
DIRECTIONS = {"h2d": "host to device", "d2h": "device to host", "both": "both at once"}


def tables(rows: Sequence[Row]) -> str:
    """One table for each part that has rows."""
    found = []
    for part, heads, of_row in (
        ("memory", ("host memory", "array", "threads", "GB/s"), _memory_cells),
        ("link", ("host <-> device", "memory", "transfer", "GB/s"), _link_cells),
        ("resident", ("host memory", "asked for", "resident", "x"), _resident_cells),
        ("adam", ("AdamW step", "chunk", "threads", "GB/s", "ms/billion", "x floor"), _adam_cells),
        ("contention", ("ranks at once", "threads each", "GB/s in all", "x floor", "x alone"), _contention_cells),
        ("overlap", ("beside products", "alone ms", "products ms", "both ms", "efficiency"), _overlap_cells),
        ("sweep", HEADS, cells),
    ):
        lines = [of_row(row) for row in rows if row["part"] == part]
        if lines:
            found.append(_table([heads, *lines]))
    return "\n\n".join(found)


def _memory_cells(row: Row) -> tuple[str, ...]:
    return row["operation"], short(row["bytes"]) + "B", str(row["threads"]), _rate(row)


def _link_cells(row: Row) -> tuple[str, ...]:
    kind = "pinned" if row["pinned"] else "emulated" if row.get("emulated") else "pageable"
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


def _resident_cells(row: Row) -> tuple[str, ...]:
    asked, taken = row["bytes"], row["resident_bytes"]
    return row["kind"], short(asked) + "B", short(taken) + "B", f"{taken / asked:.2f}"


def _contention_cells(row: Row) -> tuple[str, ...]:
    return str(row["ranks"]), str(row["threads"]), _rate(row), f"{row['x_floor']:.2f}", f"{row['x_alone']:.2f}"


def _overlap_cells(row: Row) -> tuple[str, ...]:
    times = (f"{1e3 * row[name]:.1f}" for name in ("alone_s", "products_s", "beside_s"))
    return row["operation"], *times, f"{row['efficiency']:.2f}"


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
    told = [*_memory_meaning(rows), *_link_meaning(rows), *_resident_meaning(rows), *_adam_meaning(adam)]
    return [*told, *_contention_meaning(rows), *_overlap_meaning(rows), *_sweep_meaning(rows), *_noise(adam)]


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


def _resident_meaning(rows: Iterable[Row]) -> Iterable[str]:
    found = {row["kind"]: row["resident_bytes"] / row["bytes"] for row in rows if row["part"] == "resident"}
    if "torch" in found:
        yield f"Pinned memory: torch's takes {found['torch']:.2f} x what is asked for, ours {found['exact']:.2f} x."


def _contention_meaning(rows: Iterable[Row]) -> Iterable[str]:
    if found := [row for row in rows if row["part"] == "contention"]:
        most = max(found, key=lambda row: row["ranks"])
        yield (
            f"{most['ranks']} ranks at once: each Adam step takes {most['x_alone']:.2f} x as long as with "
            f"{found[0]['ranks']}, {most['x_floor']:.2f} x the floor of all at once."
        )


def _overlap_meaning(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        if row["part"] == "overlap":
            where = ", emulated on a CPU whose cores do both" if row["emulated"] else ""
            yield f"Beside matrix products {max(0.0, row['efficiency']):.0%} of {row['operation']} is hidden{where}."


def _sweep_meaning(rows: Sequence[Row]) -> Iterable[str]:
    found = [row for row in rows if row["part"] == "sweep"]
    if not found or "error" in found[0]:
        return
    base = found[0]
    for row in (row for row in found if "error" not in row):
        if row["dominated"] is None and row["device_bytes"] < base["device_bytes"]:
            saved, rate = base["device_bytes"] - row["device_bytes"], row["tokens_per_s"] / base["tokens_per_s"]
            change = f"{1 - rate:.0%} fewer" if rate < 1 else f"{rate - 1:.0%} more"
            yield f"{' '.join(row['flags'])}: saves {short(saved)}B of the device, {change} tokens/s."
        if row["same_loss"] is False:
            yield f"{row['point']}: its losses are not those of {base['point']}."


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
