"""Tokens per second of the generation engine against transformers' generate, taking turns of a few steps.

    OMP_NUM_THREADS=2 python tests/bench/generate.py llama --batch-sizes 1 8 32 --rounds 5
    OMP_NUM_THREADS=2 python tests/bench/generate.py llama --mixed 48 --rounds 3
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/bench/generate.py llama --tp 2 --batch-sizes 8

Prints one JSON object for each batch size: how many times as fast ours is (the median of the rounds, of wall and of
processor time), the prompt included; tokens/s of both; the share of tokens that are the same (all of them in fp32, or
it fails); of the time that reading all weights takes, the share of a step of ours; and the largest difference between
log-probabilities of the first prompt's tokens in the batch and alone. Models are random, by default a Llama of 125
million parameters. --mixed: so many requests of different lengths, transformers' in batches with padding. --tp: ours in
so many processes of a thread each, transformers' in one of as many threads, one after the other.

On a busy machine, threads that spin between kernels wait for cores that others have, and both sides become slow and
uneven; OMP_WAIT_POLICY=passive has them sleep instead, which on a quiet machine costs up to a quarter of the speed.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from turns import Tick, Turns

from megapatch.models import device, parallel

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "moe": ("mixtral", SIZES | {"num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mla": (
        "deepseek_v3",
        SIZES
        | {"num_hidden_layers": 6, "num_key_value_heads": 12, "q_lora_rank": 384, "kv_lora_rank": 256}
        | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "moe_intermediate_size": 512}
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
}
_TIE = 1e-4  # of log-probabilities
Prompts = list[tuple[list[int], int]]  # token ids, tokens to add


def main() -> int:
    """Run the comparison."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", choices=MODELS)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--mixed", type=int, help="requests of mixed lengths, at the first batch size (default 8)")
    made.add_argument("--prompt-tokens", type=int, default=128)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--layers", type=int)
    made.add_argument("--tp", type=int, default=1)
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--executor", choices=["auto", "lean", "module"], default="auto")
    args = made.parse_args()
    found = device.start()
    layout = parallel.Parallel(tp=args.tp)
    parallel.start(layout, found)
    device.seed_everything(0, 0)
    theirs, ours = models(args, layout, found)
    if args.tp > 1:
        for batch in args.batch_sizes:
            cut(theirs, ours, batch, args)
    elif args.mixed:
        batch = args.batch_sizes[0] if args.batch_sizes != [1, 8, 32] else 8
        print(json.dumps(compare(theirs, ours, mixed(args.mixed), batch, args)), flush=True)
    else:
        for batch in args.batch_sizes:
            ids = torch.randint(1, SIZES["vocab_size"], (batch, args.prompt_tokens)).tolist()
            prompts = [(prompt, args.new_tokens) for prompt in ids]
            print(json.dumps(compare(theirs, ours, prompts, batch, args)), flush=True)
    parallel.stop()
    return 0


def mixed(count: int) -> Prompts:
    """Requests of 16 to 96 tokens, for 4 to 160 more, half of them for less than 34."""
    drawn = random.Random(0)
    lengths = [(drawn.randint(16, 96), min(160, max(4, int(drawn.expovariate(1 / 48))))) for _ in range(count)]
    return [([drawn.randrange(1, SIZES["vocab_size"]) for _ in range(length)], new) for length, new in lengths]


def models(args: argparse.Namespace, layout: parallel.Parallel, found: device.Device) -> tuple[Any, Any]:
    """The same weights as a transformers model and as ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megapatch.models.build import DTYPES, ModelOptions, build
    from megapatch.models.load import load_hf

    kind, sizes = MODELS[args.model]
    config = AutoConfig.for_model(kind, **sizes | ({"num_hidden_layers": args.layers} if args.layers else {}))
    theirs = AutoModelForCausalLM.from_config(config).to(DTYPES[args.precision]).to(found.torch).eval()
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box)  # transformers writes in the first process only
        theirs.save_pretrained(box[0])
        dist.barrier()
        hf = json.loads((Path(box[0]) / "config.json").read_text())
        chunks = build(hf, ModelOptions(layout, found, args.precision))
        load_hf(chunks, Path(box[0]), hf)
        dist.barrier()
    return theirs, chunks


def compare(theirs: Any, ours: Any, prompts: Prompts, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times of both over some rounds, and how far the texts agree."""
    from megapatch.models.generation.engine import Engine
    from megapatch.models.request import Request, Sampling

    requests = [Request(prompt, Sampling(max_new_tokens=new)) for prompt, new in prompts]
    longest = max(len(prompt) + new for prompt, new in prompts)
    engine = Engine(ours, vocab_size=SIZES["vocab_size"], max_length=longest, batch_size=batch, executor=args.executor)

    logprobs: list[float] = []  # of the first request

    def with_megapatch(tick: Tick) -> list[list[int]]:
        engine.on_step = lambda _: tick()
        done = engine.generate(requests)
        logprobs[:] = done[0].logprobs
        return [completion.token_ids for completion in done]

    weights = [weight for weight in theirs.parameters() if weight is not theirs.get_input_embeddings().weight]
    sides = {
        "megapatch": with_megapatch,
        "transformers": lambda tick: with_transformers(theirs, prompts, batch, tick),
        "reading": lambda tick: reading(weights, max(new for _, new in prompts) // 4, tick),
    }
    rounds, same, shares = [], 1.0, []
    for number in range(args.rounds + 1):
        before = engine.statistics.decode_s, engine.statistics.passes
        turns = Turns(sides).run()
        pairs = zip(turns.results["megapatch"], turns.results["transformers"], strict=True)
        same = statistics.mean(a == b for mine, other in pairs for a, b in zip(mine, other, strict=True))
        assert same == 1 or args.precision != "fp32", f"only {same:.4f} of the tokens are the same"
        step = (engine.statistics.decode_s - before[0]) / (engine.statistics.passes - before[1])
        if number:  # the first round packs weights and allocates
            rounds.append(turns)
            shares.append(turns.results["reading"]() / step)
    engine.on_step = None
    (alone,) = engine.generate(requests[:1])
    found = {
        "batch_size": batch,
        "same_tokens": round(same, 4),
        "alone_differs_by": max(abs(a - b) for a, b in zip(logprobs, alone.logprobs, strict=True)),
    }
    return summary(rounds, shares, sum(new for _, new in prompts)) | found


def cut(theirs: Any, ours: Any, batch: int, args: argparse.Namespace) -> None:
    """Print the ratio of the times of both, where ours is cut over processes."""
    from megapatch.models.generation.engine import complete
    from megapatch.models.request import Sampling

    drawn = random.Random(0)
    prompts = [[drawn.randrange(1, SIZES["vocab_size"]) for _ in range(args.prompt_tokens)] for _ in range(batch)]
    longest, ratios = args.prompt_tokens + args.new_tokens, []
    for _ in range(args.rounds):
        dist.barrier()
        started = time.perf_counter()
        settings = {"vocab_size": SIZES["vocab_size"], "max_length": longest, "batch_size": batch}
        found = complete(ours, prompts, Sampling(max_new_tokens=args.new_tokens, top_logprobs=2), **settings)
        seconds = time.perf_counter() - started
        dist.barrier()
        if dist.get_rank() == 0:
            torch.set_num_threads(args.tp)
            started = time.perf_counter()
            expected = with_transformers(theirs, [(prompt, args.new_tokens) for prompt in prompts], batch, lambda: None)
            ratios.append((time.perf_counter() - started) / seconds)
            torch.set_num_threads(1)
            for (one,), wanted in zip(found, expected, strict=True):
                assert args.precision != "fp32" or agrees(one, wanted), (one.token_ids, wanted)
    if dist.get_rank() == 0:
        each = [round(ratio, 2) for ratio in ratios]
        print(json.dumps({"tp": args.tp, "batch_size": batch, "times_as_fast": statistics.median(each), "each": each}))


def agrees(found: Any, expected: list[int]) -> bool:
    """Whether two texts are the same up to a token that is as probable as the next best one, where sums may differ."""
    pairs = zip(found.token_ids, expected, found.top_logprobs, strict=True)
    first = next((list(best.values()) for mine, other, best in pairs if mine != other), None)
    return first is None or first[0] - first[1] < _TIE


def summary(rounds: list[Turns], shares: list[float], tokens: int) -> dict[str, Any]:
    """Medians over rounds."""

    def median(value: Callable[[Turns], float], digits: int) -> float:
        return round(statistics.median(map(value, rounds)), digits)

    return {
        "times_as_fast": median(lambda r: r.seconds["transformers"] / r.seconds["megapatch"], 3),
        "of_processor_time": median(lambda r: r.cpu_seconds["transformers"] / r.cpu_seconds["megapatch"], 3),
        "each_round": [round(r.seconds["transformers"] / r.seconds["megapatch"], 2) for r in rounds],
        "megapatch_tokens_per_s": median(lambda r: tokens / r.seconds["megapatch"], 1),
        "transformers_tokens_per_s": median(lambda r: tokens / r.seconds["transformers"], 1),
        "share_of_bandwidth": round(statistics.median(shares), 3),
    }


@torch.no_grad()
def with_transformers(model: Any, prompts: Prompts, batch: int, tick: Tick) -> list[list[int]]:
    """Greedy completions, in batches with padding on the left."""

    def each_step(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        tick()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    found = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        longest, new = (max(sizes) for sizes in zip(*((len(prompt), new) for prompt, new in some), strict=True))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in some], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in some]).to(ids.device)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=[each_step],
        )
        found += [row[longest : longest + n].tolist() for row, (_, n) in zip(out, some, strict=True)]
    return found


@torch.no_grad()
def reading(weights: list[torch.Tensor], times: int, tick: Tick) -> Callable[[], float]:
    """Seconds that reading all weights once takes: the limit of a step."""
    words = [weight.view(-1).view(torch.float32) for weight in weights if weight.numel() % 2 == 0]
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        for word in words:
            word.sum()
        seconds.append(time.perf_counter() - started)
        tick()
    return lambda: statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
