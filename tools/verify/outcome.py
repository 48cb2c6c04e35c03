"""What mp-verify says: one JSON line for the result, rows of details, a table, a plot, and one line on what departs."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.commit import staged_file
from megapatch.models.svg import Chart, Line, standalone
from megapatch.tools.verify import study
from megapatch.tools.verify.by_transformers import Unlike
from megapatch.tools.verify.sides import Sides
from megapatch.tools.verify.stream import CHAINED, ISOLATED
from megapatch.tools.verify.switches import streams
from megapatch.tools.verify.verify import VerifyOptions

log = logging.getLogger(__name__)
STYLES, DASHES = 6, ("", " dashed", " dotted")  # classes of colours and of strokes in models/svg.py


def gate(options: VerifyOptions, sides: Sides, ids: Tensor) -> dict[str, Any]:
    """The fp32 comparison: logits, and every unit."""
    sides.tell()
    try:
        engines = [sides.engine(side, ids, "fp32") for side in (0, 1)]
    except Unlike as reason:
        log.warning("ONLY THE LOGITS ARE COMPARED, not layer by layer: %s", reason)
        _refuse_outputs(options, str(reason))
        made, logits = study.Gate(), [sides.whole_logits(side, ids) for side in (0, 1)]
    else:
        made = study.gate(engines[sides.reference], engines[1 - sides.reference], options.atol)
        logits = [engine.logits for engine in engines]
        _details(options.details, made.rows)
        _plot(options, "difference from the reference", "relative L2", _gate_lines(made.rows))
    result = compare(*(_tokens(x, options.tokens) for x in logits))
    largest = result["max_abs_diff"]
    ok = largest <= options.atol and made.first is None
    first = made.first or (None if ok else made.grown)
    if first:
        log.error("first departure: %s", _place(first))
    found = f"largest difference {largest:.2g} over {options.tokens} tokens"
    return {
        "check": f"logits of {options.source} and {options.target} are equal",
        "ok": ok,
        "found": found + (f"; first departure: {_place(first)}" if first else ""),
        "expected": f"at most {options.atol:.2g}",
        "compared": "layers" if made.rows else "logits",
        "first_departure": first,
        **result,
    }


def _tokens(logits: Tensor, count: int) -> Tensor:
    return logits.float().flatten(0, 1)[:count].cpu()


def _place(said: dict[str, Any]) -> str:
    layer = "" if said["layer"] is None else f"layer {said['layer']}, "
    experts = f" (experts {', '.join(map(str, said['experts']))})" if said.get("experts") else ""
    how = f" ({said['how']})" if "how" in said else ""
    where = f"{layer}{said['submodule']}{experts}"
    return f"{where}: {said['max_abs_diff']:.2g} of {said['max_abs']:.2g}{how}"


def compare(first: Tensor, second: Tensor) -> dict[str, float]:
    """How far two sets of logits [tokens, v] are apart."""
    difference = (first - second).abs()
    return {
        "max_abs_diff": difference.max().item(),
        "mean_abs_diff": difference.mean().item(),
        "max_abs_logit": first.abs().max().item(),
        "same_argmax": (first.argmax(-1) == second.argmax(-1)).float().mean().item(),
    }


def report(options: VerifyOptions, sides: Sides, ids: Tensor) -> dict[str, Any]:
    """The bf16 comparison: the target's error over the reference's own; with --align, sources of rounding too."""
    sides.tell()
    align, reference, target = options.align == "hf", sides.reference, 1 - sides.reference
    if align and sides.on_core[reference] == sides.on_core[target]:
        raise UserError("--align hf compares megatron-core with transformers: give a core checkpoint and a folder")
    try:
        truth = sides.engine(reference, ids, "fp32", rounded=True)
        own = sides.engine(reference, ids, "bf16")
        other = sides.engine(target, ids, "bf16", own_spec=align)
    except Unlike as reason:
        raise UserError(f"--precision bf16 compares layer by layer, which cannot be done here: {reason}") from reason
    other.streams = streams(other) if align else {}
    errors = study.errors(truth, own, other)
    _details(options.details, _error_rows(errors))
    _plot(options, "error in bf16", "relative L2", _error_lines(errors, align))
    if align:
        for line in table(errors):
            log.info(line)
    worst = max(errors.judged or range(len(errors.units)), key=lambda i: errors.ratios[i])
    place, ratio = study.name(errors.units[worst]), errors.ratios[worst]
    noise = "" if errors.judged else "; no unit is beyond the noise floor"
    return {
        "check": f"bf16 errors of {sides.folders[target]} are those of {sides.folders[reference]}",
        "ok": not errors.judged or ratio <= options.ratio,
        "found": f"at most {ratio:.3g} times the reference's own error from fp32, at {place}{noise}",
        "expected": f"at most {options.ratio:.3g} beyond the noise floor",
        "compared": "layers",
        "worst_ratio": ratio,
        "worst_unit": errors.units[worst],
        "units_beyond_noise": len(errors.judged),
        "error_reference": errors.reference[-1],
        "error_target": errors.target[-1],
        "noise_floor": errors.floor[-1] if errors.floor else None,
        **compare(*(_tokens(engine.logits, options.tokens) for engine in (own, other))),
    }


def _error_rows(errors: study.Errors) -> Iterable[dict[str, Any]]:
    for i, unit in enumerate(errors.units):
        floor = errors.floor[i] if errors.floor else None
        row = {"unit": unit, "error_reference": errors.reference[i], "error_target": errors.target[i]}
        yield row | {"ratio": errors.ratios[i], "noise_floor": floor}
        for stream in errors.from_truth:
            distances = {"from_reference": errors.from_reference[stream][i], "from_fp32": errors.from_truth[stream][i]}
            yield {"unit": unit, "stream": stream, **distances}


def table(errors: study.Errors) -> list[str]:
    """The ablation as lines of text: distances at the first, middle and last layer and the logits."""
    layers = [i for i, unit in enumerate(errors.units) if isinstance(unit, int)]
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1], len(errors.units) - 1})
    head = [study.name(errors.units[i]).removeprefix("output_").replace("layer", "layer") for i in shown[:-1]]
    rows = [("from the reference's bf16", [*head, "logits"], "from its fp32", [*head, "logits"])]
    if errors.floor:
        rows.append(("reference: plain attention", _cells(errors.floor, shown), "", []))
    rows.append(("reference", ["0"] * len(shown), "", _cells(errors.reference, shown)))
    for stream, distances in errors.from_reference.items():
        name = "core as it is" if stream == CHAINED else stream
        rows.append((name, _cells(distances, shown), "", _cells(errors.from_truth[stream], shown)))
    return [
        f"{name:46}" + "".join(f"{c:>10}" for c in left) + f"  {mid:14}" + "".join(f"{c:>10}" for c in right)
        for name, left, mid, right in rows
    ]


def _cells(values: Sequence[float], shown: Sequence[int]) -> list[str]:
    return [f"{values[i]:.2e}" if values[i] else "0" for i in shown]


def _refuse_outputs(options: VerifyOptions, reason: str) -> None:
    for flag, path in (("--details", options.details), ("--plot", options.plot)):
        if path is not None:
            raise UserError(f"{flag} {path}: there are no layers to show: {reason}")


def _details(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    if path is not None:
        with staged_file(path) as stage:
            stage.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _gate_lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    layers = [row for row in rows if row["layer"] is not None]
    return {kind: [row[kind]["relative_l2"] for row in layers] for kind in (ISOLATED, CHAINED)}


def _error_lines(errors: study.Errors, align: bool) -> dict[str, list[float]]:
    layers = [i for i, unit in enumerate(errors.units) if isinstance(unit, int)]
    lines = {
        "reference bf16, from its fp32": errors.reference,
        "target bf16, from the reference's fp32": errors.target,
    }
    if errors.floor:
        lines["noise floor: the reference from itself"] = errors.floor
    if align:
        lines |= {f"{s}, from the reference's bf16": v for s, v in errors.from_reference.items() if s != CHAINED}
    return {name: [values[i] for i in layers] for name, values in lines.items()}


def _plot(options: VerifyOptions, title: str, unit: str, lines: dict[str, list[float]]) -> None:
    if options.plot is None:
        return
    drawn = [
        Line(name, range(len(ys)), ys, f"c{i % STYLES}{DASHES[i // STYLES % 3]}")
        for i, (name, ys) in enumerate(lines.items())
    ]
    chart = Chart(title, unit, drawn, from_zero=True, width=760, height=360, x_label="layer")
    with staged_file(options.plot) as stage:
        stage.write_text(standalone(chart))
