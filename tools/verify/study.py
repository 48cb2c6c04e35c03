"""Two or three models run in step, unit by unit: where they depart, and how large the errors of bf16 are."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megapatch.tools.verify.by_transformers import PLAIN
from megapatch.tools.verify.points import CHOICE, KEY, QUERY
from megapatch.tools.verify.stream import CHAINED, ISOLATED, Engine, Pass, Step, Unit

log = logging.getLogger(__name__)


def in_step(engines: Sequence[Engine]) -> Iterator[tuple[Step, ...]]:
    """The same unit of every engine, one after the other; each also runs on the first one's input."""
    shared = set.intersection(*(set(engine.units.values()) for engine in engines))
    for engine in engines:  # such as a norm without weights, which no rule tells of
        engine.units = {path: unit for path, unit in engine.units.items() if unit in shared}
    with ExitStack() as stack:
        first, *others = [stack.enter_context(Pass(engine)) for engine in engines]
        while (step := first.next()) is not None:
            steps = [step, *(other.next(step.input) for other in others)]
            units = [None if s is None else s.unit for s in steps]
            assert len(set(units)) == 1, f"the engines run different units: {units}"
            yield tuple(s for s in steps if s is not None)
        assert all(other.next() is None for other in others), "an engine has more units than the first"


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far a tensor is from another: the largest difference, the largest value, and the relative L2 distance."""
    found, expected = found.float(), expected.float()
    apart = found - expected
    return {
        "max_abs_diff": apart.abs().max().item(),
        "max_abs": expected.abs().max().item(),
        "relative_l2": _ratio(apart.norm().item(), expected.norm().item()),
    }


def _ratio(error: float, of: float) -> float:
    return 0.0 if error == 0 else error / of if of else float("inf")


def departs(said: dict[str, float], atol: float) -> bool:
    """Is the largest difference beyond ``atol``, or ``atol`` of the largest value where that is above 1? NaN is."""
    return not said["max_abs_diff"] <= atol * max(1.0, said["max_abs"])


@dataclass
class Gate:
    """The fp32 comparison: a row for each unit, and the first place where the target departs."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    first: dict[str, Any] | None = None
    grown: dict[str, Any] | None = None  # the first unit beyond the tolerance only because differences add up


def gate(reference: Engine, target: Engine, atol: float) -> Gate:
    """Compare two engines unit by unit; each unit of the target gets the reference's input, and its own."""
    made, count = Gate(), sum(isinstance(unit, int) for unit in reference.units.values())
    for ours, theirs in in_step([reference, target]):
        made.rows.append(_unit(ours, theirs))
        place = name(ours.unit) + (f" of {count}" if isinstance(ours.unit, int) else "")
        alone, chained = (made.rows[-1][kind] for kind in (ISOLATED, CHAINED))
        log.info("%s: alone %s, chained %s", place, _said(alone), _said(chained))
        if ours.unit == 0 and ours.input is not None and theirs.input is not None:
            entered = difference(theirs.input, ours.input)  # whatever a family adds to embeddings, or does to them
            if departs(entered, atol) and not any(departs(row[ISOLATED], atol) for row in made.rows[:-1]):
                made.first = _where("embedding", "") | entered
        if departs(alone, atol):
            made.rows[-1] |= _experts(ours, theirs, atol)
        if made.grown is None and departs(chained, atol):
            made.grown = {**_where(ours.unit, "output"), **chained, "how": "differences of earlier layers add up"}
    made.first = made.first or _named(made.rows, atol)
    return made


def _unit(ours: Step, theirs: Step) -> dict[str, Any]:
    expected = ours.outputs[CHAINED]
    chained = difference(theirs.outputs[CHAINED], expected)
    alone = difference(theirs.outputs[ISOLATED], expected) if ISOLATED in theirs.outputs else chained
    points = {name: difference(*_pair(name, theirs, ours)) for name in common(ours, theirs)}
    return {**_where(ours.unit, "output"), ISOLATED: alone, CHAINED: chained, "points": points}


def _said(found: dict[str, float]) -> str:
    return f"{found['max_abs_diff']:.1e} of {found['max_abs']:.2g}"


def name(unit: Unit) -> str:
    """A unit as people say it, layers from 0."""
    return f"layer {unit}" if isinstance(unit, int) else unit


def _where(unit: Unit, submodule: str) -> dict[str, Any]:
    if isinstance(unit, int):
        return {"layer": unit, "submodule": submodule}
    return {"layer": None, "submodule": unit}


def common(ours: Step, theirs: Step) -> list[str]:
    """The submodules that both sides show in the same shape, in the order in which the target runs them."""
    return [n for n, v in theirs.points.items() if n in ours.points and ours.points[n].shape == v.shape]


def _pair(name: str, theirs: Step, ours: Step) -> tuple[Tensor, Tensor]:
    """A point of both sides. Rotated channels of a head may lie in another order, so they are sorted."""
    pair = theirs.points[name], ours.points[name]
    return (pair[0].sort(-1)[0], pair[1].sort(-1)[0]) if name in (QUERY, KEY) else pair


def _named(rows: Sequence[dict[str, Any]], atol: float) -> dict[str, Any] | None:
    """The first unit that departs, by its first submodule that does; 'output' where none does by itself."""
    for row in (row for row in rows if departs(row[ISOLATED], atol)):
        where = {"layer": row["layer"], "submodule": row["submodule"]}
        for point, found in row["points"].items():
            if departs(found, atol) and point not in _unlike(rows, atol):
                experts = {"experts": row["experts"]} if point == "mlp" and "experts" in row else {}
                return where | {"submodule": point} | found | experts
        return where | row[ISOLATED]
    return None


def _unlike(rows: Sequence[dict[str, Any]], atol: float) -> set[str]:
    """Points that depart in every layer whose output agrees: the engines mean other things by them."""
    agreeing = [row["points"] for row in rows if row["points"] and not departs(row[ISOLATED], atol)]
    names = {name for points in agreeing for name in points}
    return {n for n in names if all(departs(points[n], atol) for points in agreeing if n in points)}


def _experts(ours: Step, theirs: Step, atol: float) -> dict[str, list[int]]:
    """Experts that every departing token goes to, where the router's choice is known."""
    if "mlp" not in common(ours, theirs) or CHOICE not in theirs.points:
        return {}
    found, expected, chosen = theirs.points["mlp"], ours.points["mlp"], theirs.points[CHOICE] > 0  # [b,s,h], [b,s,e]
    apart = ~((found - expected).abs().amax(-1) <= atol * max(1.0, expected.abs().max().item()))  # [b, s]
    share = (chosen & apart[..., None]).sum((0, 1)) / apart.sum()
    return {"experts": [int(n) for n in (share == 1).nonzero().flatten()]}


@dataclass(frozen=True)
class Errors:
    """bf16: for each unit, relative L2 distances; streams are ways of rounding on megatron-core."""

    units: list[Unit]
    reference: list[float]  # the reference's own bf16 from its fp32
    target: list[float]  # the target's bf16 from the reference's fp32
    floor: list[float]  # the reference's bf16 from itself with another order of summation (empty: not to be had)
    from_reference: dict[str, list[float]]  # stream -> distance from the reference's bf16
    from_truth: dict[str, list[float]]  # stream -> distance from the reference's fp32

    @property
    def judged(self) -> list[int]:
        """The units whose target is further from the reference's bf16 than that is from itself: beyond the noise."""
        apart = self.from_reference[CHAINED]
        return [i for i in range(len(self.units)) if not self.floor or not apart[i] <= self.floor[i]]

    @property
    def ratios(self) -> list[float]:
        """target / reference for each unit."""
        return [_ratio(ours, own) if ours else 0.0 for ours, own in zip(self.target, self.reference, strict=True)]


def errors(truth: Engine, own: Engine, target: Engine) -> Errors:
    """Run the reference in fp32 and bf16 and the target in bf16, with its streams, in step."""
    made = Errors([], [], [], [], {}, {})
    for exact, rounded, found in in_step([truth, own, target]):
        if exact.input is None:
            continue  # the embedding only looks up
        expected, mine = exact.outputs[CHAINED], rounded.outputs[CHAINED]
        made.units.append(exact.unit)
        made.reference.append(difference(mine, expected)["relative_l2"])
        if PLAIN in rounded.outputs:
            made.floor.append(difference(rounded.outputs[PLAIN], mine)["relative_l2"])
        for stream in (CHAINED, *target.streams):
            out = found.outputs[stream]
            made.from_reference.setdefault(stream, []).append(difference(out, mine)["relative_l2"])
            made.from_truth.setdefault(stream, []).append(difference(out, expected)["relative_l2"])
        made.target.append(made.from_truth[CHAINED][-1])
        log.info(
            "%s: error %.2e, of the reference's own bf16 %.2e, ratio %.2f",
            *(name(exact.unit), made.target[-1], made.reference[-1], made.ratios[-1]),
        )
    return made
