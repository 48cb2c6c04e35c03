"""The curves and marks of a chart, from the logs: which run has which colour, what is told of it in words."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from megapatch.models.svg import FOOT, HEAD, THIN_PX, Line, Mark
from megapatch.tools.report.logs import Run, as_float

COLOURS = 6
DASHES = ("", " dashed", " dotted")
NAMED = 4  # skipped steps that are told one by one


def number(value: float, digits: int = 5) -> str:
    """A number for people: whole ones in full, others with ``digits`` significant digits; 'NaN', 'inf'."""
    if math.isnan(value):
        return "NaN"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return re.sub(r"e([-+])0+", r"e\1", f"{value:,.{digits}g}").replace("e+", "e")


def lines_of(key: str, also: Sequence[tuple[str, str]], runs: Sequence[Run]) -> list[Line]:
    """One line a run, wider for earlier ones, so that equal curves both show; and one for each field of ``also``."""
    found = []
    for i, run in enumerate(runs):
        found.append(Line(run.label, *run.series(key), style(i), _width(i, runs)))
        for further, name in also:
            xs, ys = _known(*run.series(further))
            if ys:
                found.append(Line(f"{run.label}, {name}", xs, ys, f"c{i % COLOURS} dotted"))
    return found


def validation_lines(runs: Sequence[Run]) -> list[Line]:
    """One line of points a run and split."""
    found = []
    for i, run in enumerate(runs):
        for split, lines in _splits(run):
            steps, losses = [line["step"] for line in lines], [as_float(line["loss"]) for line in lines]
            found.append(Line(f"{run.label}, {split}", steps, losses, style(i), _width(i, runs), True))
    return found


def source_lines(runs: Sequence[Run]) -> list[Line]:
    """One line a run and source, and one of points for each split; a colour a source, dashes a run."""
    names = list(dict.fromkeys(name for run in runs for line in run.train + run.evals for name in line["loss_of"]))
    short = [PurePath(name).name for name in names]
    found = []
    for i, run in enumerate(runs):
        for number, name in enumerate(names):
            label = f"{run.label}, {short[number] if short.count(short[number]) == 1 else name}"
            look = f"c{number % COLOURS}{DASHES[i % len(DASHES)]}"
            for more, lines in [("", run.train), *((f", {split}", lines) for split, lines in _splits(run))]:
                met = [line for line in lines if name in line["loss_of"]]  # not every batch has each source
                xs, ys = [line["step"] for line in met], [as_float(line["loss_of"][name]) for line in met]
                if ys:
                    found.append(Line(label + more, xs, ys, look, THIN_PX, bool(more)))
    return found


def _splits(run: Run) -> Iterator[tuple[str, list]]:
    """The evaluations of each split."""
    for split in dict.fromkeys(str(line.get("split", "validation")) for line in run.evals):
        yield split, [line for line in run.evals if str(line.get("split", "validation")) == split]


def _known(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[int], list[float]]:
    """Without the steps that have no value."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y == y]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _width(i: int, runs: Sequence[Run]) -> float:
    return THIN_PX + 2.8 * min(3, len(runs) - 1 - i)


def style(i: int) -> str:
    """The colour of run ``i``."""
    return f"c{i % COLOURS}" + (" dashed" if i >= COLOURS else "")


def marks(runs: Sequence[Run]) -> list[Mark]:
    """Where runs were resumed, where they saved, and which steps they skipped."""
    found = []
    for i, run in enumerate(runs):
        found += [Mark(step, f"{run.label} saved step {step:,}", style(i), FOOT) for step in run.saved_at]
        found += [Mark(step, f"{run.label} resumed at step {step:,}", style(i)) for step in run.resumed_at]
        found += [
            Mark(step, f"{run.label} skipped step {step:,}: {what} not finite", "skipped", HEAD)
            for step, what in run.skipped.items()
        ]
    return found


def notes(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run that was resumed or ran steps twice, that skipped steps, and that moved state."""
    return [note for run in runs for note in (_resumes(run), _skips(run), _moves(run)) if note]


def _resumes(run: Run) -> str:
    at = ", ".join(f"{step:,}" for step in run.resumed_at)
    count, difference = run.reruns()
    equal = "with equal losses" if difference == 0 else f"their losses differ by up to {number(difference)}"
    losses = f"{count:,} steps were run twice, {equal}" if count else ""
    if at:
        return f"{run.label}: resumed at step {at} (dashed line)" + (f"; {losses}." if losses else ".")
    return f"{run.label}: {losses}." if losses else ""


def _skips(run: Run) -> str:
    if not run.skipped:
        return ""
    named = ", ".join(f"{step:,} ({what})" for step, what in list(run.skipped.items())[:NAMED])
    more = f" and {len(run.skipped) - NAMED:,} more" if len(run.skipped) > NAMED else ""
    return f"{run.label}: steps skipped, for numbers that are not finite: {named}{more}."


def _moves(run: Run) -> str:
    if not run.moves:
        return ""
    named = ", ".join(_move(line) for line in run.moves[:NAMED])
    more = f" and {len(run.moves) - NAMED:,} more" if len(run.moves) > NAMED else ""
    return f"{run.label}: optimizer state moved, by its share in host memory: {named}{more}."


def _move(line: dict) -> str:
    """Step, reason, stage of the pipeline, shares before and after."""
    before, after = (f"{number(100 * as_float(line.get(name)), 3)} %" for name in ("fraction_before", "fraction"))
    stage = f", stage {line['stage']}" if line.get("stage") else ""
    return f"step {line.get('step', '?')} ({line.get('reason')}{stage}: {before} to {after})"
