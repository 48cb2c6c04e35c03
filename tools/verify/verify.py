"""mp-verify: do two model folders compute the same, layer by layer? And how large are the errors of bf16?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megapatch.models.cli import FAILED, OK, Common, opt, run

EXAMPLES = """examples:
  mp-verify --source Qwen3-0.6B --target qwen3-core                    # a conversion, against transformers
  mp-verify --source run --target exported --tokens 2048 --atol 1e-4
  mp-verify --source Qwen3-0.6B --target qwen3-core --precision bf16 --align hf --plot errors.svg --details rows.jsonl

Both models run the same random tokens in step, with one layer of one of them in memory at a time, so that any size of
model works. Of two folders, the one that transformers runs is the reference.

--precision fp32 (a gate): each layer of the target runs on the input of the reference ("alone"), so that a fault shows
in its own layer, and on its own ("chained"), where differences add up. Those of a faithful conversion are roundings:
about 1e-6 of the largest value. A unit departs where the largest difference is beyond --atol (times the largest value
where that is above 1); the first that does is named with its submodule: norms, q_proj, k_proj, v_proj, query and key
after the rotary embedding, result of attention, projection, choice of the router, activation, linear layers.

--precision bf16 (a report): distances are relative L2. The reference in bf16 is itself wrong by some error from its own
fp32; the error of the target divided by that is the ratio, and at most --ratio passes. The noise floor is the
reference in bf16 against itself with another order of summation: a unit that is no further from the reference than
that says nothing and passes.
--align hf: the target with the order of rounding of Hugging Face ("hf order"), and with one source at a time put back.

stdout is one JSON line: check, ok, found, expected (for mp-report --checks), compared (layers, or only logits),
first_departure (layer from 0, submodule, max_abs_diff), max_abs_diff, mean_abs_diff, max_abs_logit and same_argmax
(share of positions) of the logits; with bf16 also worst_ratio, and at the logits error_reference, error_target,
noise_floor.
"""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Common):
    """Compare two model folders layer by layer on the same random tokens; exit status 1 when they differ.

    A core checkpoint runs on megatron-core, a Hugging Face folder on transformers unless --engine says otherwise.
    """

    source: Path = opt("a Hugging Face folder or a core checkpoint")
    target: Path = opt("the folder to compare with it")
    precision: Literal["fp32", "bf16"] = opt("fp32: a gate; bf16: errors against the reference's own", "fp32")
    atol: float = opt("with fp32, the largest difference of a logit or of a layer's output that still passes", 1e-4)
    ratio: float = opt("with bf16, the largest ratio of errors that still passes", 1.25)
    align: Literal["none", "hf"] = opt(
        "with bf16, the sources of rounding to tell apart; hf: against its order", "none"
    )
    tokens: int = opt("tokens to run through both", 256)
    seed: int = opt("of the random tokens", 0)
    engine: Literal["auto", "core"] = opt("what runs Hugging Face folders; auto: transformers", "auto")
    device: Literal["auto", "cpu", "gpu"] = opt("what to compute on", "auto")
    details: Optional[Path] = opt("write a JSON line for each layer and stream to this file", None)
    plot: Optional[Path] = opt("write the error of each layer to this SVG file", None)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"--tokens {self.tokens}: must be at least 1")
        if self.align != "none" and self.precision != "bf16":
            raise ValueError("--align needs --precision bf16: in fp32 there is no order of rounding to tell apart")


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-verify; returns the exit status."""
    return run(VerifyOptions, verify, prog="mp-verify", epilog=EXAMPLES, argv=argv)


def verify(options: VerifyOptions) -> int:
    """Compare, print the result, and return the exit status."""
    from megapatch.models import device, parallel

    found = device.start(options.device)
    from megapatch.tools.verify import outcome
    from megapatch.tools.verify.sides import Sides

    sides = Sides(options.source, options.target, options.engine, found)
    try:
        parallel.start(parallel.Parallel(), found)
        ids = sides.tokens(options.tokens, options.seed)
        work = outcome.gate if options.precision == "fp32" else outcome.report
        result = work(options, sides, ids)
    finally:
        parallel.stop()
    print(json.dumps(result, ensure_ascii=False))
    return OK if result["ok"] else FAILED


if __name__ == "__main__":
    raise SystemExit(main())
