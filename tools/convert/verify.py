"""mp-verify: do two model folders give the same logits?"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megapatch.models.cli import FAILED, OK, Common, UserError, opt, run

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-verify --source Qwen3-0.6B --target qwen3-core          # a conversion, against transformers
  mp-verify --source run --target exported --tokens 2048 --atol 1e-4
prints one JSON line: check, ok, found, expected (for mp-report --checks), max_abs_diff, mean_abs_diff, max_abs_logit,
  same_argmax (share of positions)
"""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Common):
    """Compare the logits of two model folders in fp32, on the same random tokens; exit status 1 when they differ.

    A core checkpoint runs on megatron-core, a Hugging Face folder on transformers unless --engine says otherwise.
    """

    source: Path = opt("a Hugging Face folder or a core checkpoint")
    target: Path = opt("the folder to compare with it")
    atol: float = opt("largest difference of a logit that still passes", 1e-4)
    tokens: int = opt("tokens to run through both", 256)
    seed: int = opt("of the random tokens", 0)
    engine: Literal["auto", "core"] = opt("what runs Hugging Face folders; auto: transformers", "auto")
    device: Literal["auto", "cpu", "gpu"] = opt("what to compute on", "auto")

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"--tokens {self.tokens}: must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-verify; returns the exit status."""
    return run(VerifyOptions, verify, prog="mp-verify", epilog=EXAMPLES, argv=argv)


def verify(options: VerifyOptions) -> int:
    """Compare, print the result, and return the exit status."""
    from megapatch.models import device, parallel

    found = device.start(options.device)
    from megapatch.models.load import hf_folder

    configs = [_config(hf_folder(folder)) for folder in (options.source, options.target)]
    if configs[0]["vocab_size"] != configs[1]["vocab_size"]:
        sizes = f"{configs[0]['vocab_size']} and {configs[1]['vocab_size']}"
        raise UserError(f"{options.target}: vocab_size differs from {options.source} ({sizes}); not the same model")
    try:
        parallel.start(parallel.Parallel(), found)
        first = _logits(options, options.source, configs[0], found)
        result = compare(first, _logits(options, options.target, configs[1], found))
    finally:
        parallel.stop()
    largest = result["max_abs_diff"]
    claim = {
        "check": f"logits of {options.source} and {options.target} are equal",
        "ok": largest <= options.atol,
        "found": f"largest difference {largest:.2g} over {options.tokens} tokens",
        "expected": f"at most {options.atol:.2g}",
    }
    print(json.dumps(claim | result, ensure_ascii=False))
    return OK if claim["ok"] else FAILED


def _config(folder: Path) -> dict[str, Any]:
    from megapatch.models import hf_files

    return hf_files.config(folder)


def _logits(options: VerifyOptions, folder: Path, hf: dict[str, Any], device: Any) -> "Tensor":
    """fp32 logits [b, s, v] of a folder's model on the random tokens."""
    import torch

    from megapatch.models import core_files

    length = min(options.tokens, hf.get("max_position_embeddings") or options.tokens)
    rows = -(-options.tokens // length)
    ids = torch.randint(hf["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(options.seed))
    by_core = options.engine == "core" or core_files.is_core(folder)
    log.info("%s: running on %s", folder, "megatron-core" if by_core else "transformers")
    with torch.no_grad():
        logits = (_core_logits if by_core else _transformers_logits)(folder, hf, ids.to(device.torch), device)
    return logits.float().flatten(0, 1)[: options.tokens].cpu()


def _core_logits(folder: Path, hf: dict[str, Any], ids: "Tensor", device: Any) -> "Tensor":
    from megapatch.models.build import ModelOptions, build
    from megapatch.models.device import seed_everything
    from megapatch.models.load import load_weights
    from megapatch.models.parallel import Parallel

    seed_everything(0, 0)
    (model,) = build(hf, ModelOptions(Parallel(), device))
    load_weights([model], folder, hf)
    positions = ids.new_tensor(range(ids.shape[1])).expand_as(ids)
    return model.eval()(ids, positions, None)[..., : hf["vocab_size"]]


def _transformers_logits(folder: Path, hf: dict[str, Any], ids: "Tensor", device: Any) -> "Tensor":
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device.torch).eval()(ids).logits


def compare(first: "Tensor", second: "Tensor") -> dict[str, float]:
    """How far two sets of logits [tokens, v] are apart."""
    difference = (first - second).abs()
    return {
        "max_abs_diff": difference.max().item(),
        "mean_abs_diff": difference.mean().item(),
        "max_abs_logit": first.abs().max().item(),
        "same_argmax": (first.argmax(-1) == second.argmax(-1)).float().mean().item(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
