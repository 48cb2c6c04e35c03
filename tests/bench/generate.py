"""Tokens per second of the generation engine against transformers' generate, in alternation in one process.

    OMP_NUM_THREADS=2 python tests/bench/generate.py --batch-sizes 1 8 32 --rounds 2

Prints one JSON object for each batch size: tokens/s of both (prompt included in the time), their ratio, and the share
of tokens that are the same. The model is a random Llama, by default of 125 million parameters.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megapatch.models import device, parallel

BOTH = ("megapatch", "transformers")


def main() -> int:
    """Run the comparison."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--prompt-tokens", type=int, default=128)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=2, help="the best round counts")
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--hidden", type=int, default=768)
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = made.parse_args()
    found = device.start()
    layout = parallel.Parallel()
    parallel.start(layout, found)
    device.seed_everything(0, 0)
    theirs, ours, vocab = models(args, layout, found)
    for batch in args.batch_sizes:
        print(json.dumps(compare(theirs, ours, vocab, batch, args)), flush=True)
    parallel.stop()
    return 0


def models(args: argparse.Namespace, layout: parallel.Parallel, found: device.Device) -> tuple[Any, Any, int]:
    """The same weights as a transformers model and as ours, and the vocabulary size."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from megapatch.models.build import DTYPES, ModelOptions, build
    from megapatch.models.load import load_hf

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 192),
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = AutoModelForCausalLM.from_config(config).to(DTYPES[args.precision]).to(found.torch).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        hf = json.loads((Path(folder) / "config.json").read_text())
        chunks = build(hf, ModelOptions(layout, found, args.precision))
        load_hf(chunks, Path(folder), hf)
    return theirs, chunks[0], config.vocab_size


def compare(theirs: Any, ours: Any, vocab: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Best times of both, and how far the texts agree."""
    from megapatch.models.generation.engine import Engine
    from megapatch.models.request import Request, Sampling

    prompts = torch.randint(1, vocab, (batch, args.prompt_tokens))
    requests = [Request(prompt, Sampling(max_new_tokens=args.new_tokens)) for prompt in prompts.tolist()]
    engine = Engine(ours, vocab_size=vocab, max_length=args.prompt_tokens + args.new_tokens, batch_size=batch)

    def with_megapatch() -> list[list[int]]:
        return [completion.token_ids for completion in engine.generate(requests)]

    @torch.no_grad()
    def with_transformers() -> list[list[int]]:
        ids = prompts.to(theirs.device)
        new = args.new_tokens
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return out[:, args.prompt_tokens :].tolist()

    times: dict[str, list[float]] = {name: [] for name in BOTH}
    results: dict[str, list[list[int]]] = {}
    runs: dict[str, Callable[[], list[list[int]]]] = {"megapatch": with_megapatch, "transformers": with_transformers}
    for _ in range(args.rounds):
        for name in BOTH:
            started = time.perf_counter()
            results[name] = runs[name]()
            times[name].append(time.perf_counter() - started)
    rates = {name: batch * args.new_tokens / min(times[name]) for name in BOTH}
    same = torch.tensor(results["megapatch"]) == torch.tensor(results["transformers"])
    return {
        "batch_size": batch,
        **{f"{name}_tokens_per_s": round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["megapatch"] / rates["transformers"], 3),
        "same_tokens": round(same.float().mean().item(), 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())
