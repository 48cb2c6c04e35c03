"""Seconds per training step of mp-pretrain against a plain PyTorch loop over the transformers model, in alternation.

    OMP_NUM_THREADS=2 python tests/bench/train.py --rounds 5 --steps 4

Prints one JSON object: median seconds of both, their ratio, tokens/s, the difference of the last losses. Same
weights, same samples, AdamW, clipping at 1, gradient accumulation. The model is a random Llama of 9 million parameters.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models

from megapatch.models import cli, device, parallel
from megapatch.models.indexed_data import write_index
from megapatch.trainer.options import PretrainOptions

VOCABULARY = 8192
LR, DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0


def main() -> int:
    """Run the comparison."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=4, help="per round and side")
    made.add_argument("--seq-length", type=int, default=512)
    made.add_argument("--micro-batch-size", type=int, default=2)
    made.add_argument("--global-batch-size", type=int, default=4)
    made.add_argument("--layers", type=int, default=6)
    made.add_argument("--hidden", type=int, default=320)
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--profile", choices=["ours", "theirs"], help="print where one side spends its time, and stop")
    args = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, count = sides(args, Path(folder))
        if args.profile:
            profile(ours if args.profile == "ours" else theirs, args.steps)
        else:
            print(json.dumps(compare(ours, theirs, args) | {"parameters": count}))
        parallel.stop()
    return 0


def compare(ours: Callable[[], float], theirs: Callable[[], float], args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds per step of both sides."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses = {}
    for step in (ours, theirs):  # memory is allocated, state is made
        step()
    for _ in range(args.rounds):
        for name, step in (("ours", ours), ("theirs", theirs)):
            for _ in range(args.steps):
                start = time.perf_counter()
                losses[name] = step()
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    tokens = args.global_batch_size * args.seq_length
    return {
        **{f"{name}_step_s": round(value, 4) for name, value in median.items()},
        "ours_over_theirs": round(median["ours"] / median["theirs"], 3),
        "ours_tokens_per_s": round(tokens / median["ours"]),
        "loss_difference": abs(losses["ours"] - losses["theirs"]),
        "precision": args.precision,
    }


def profile(step: Callable[[], float], steps: int) -> None:
    """The most expensive operators of a few steps."""
    step()
    with torch.profiler.profile() as found:
        for _ in range(steps):
            step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))


def sides(args: argparse.Namespace, folder: Path) -> tuple[Callable[[], float], Callable[[], float], int]:
    """A function for one step of each side, which returns the loss, and the number of parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=True,
    )
    net = AutoModelForCausalLM.from_config(config)
    net.save_pretrained(folder / "model")
    trainer = our_trainer(args, folder)
    net = net.to({"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision])

    def ours() -> float:
        trainer._one_step()
        return trainer.records.sinks[-1].loss

    return ours, their_step(net, trainer, args), sum(p.numel() for p in net.parameters())


class LastLoss:
    """A sink that keeps the last loss."""

    loss = 0.0

    def write(self, record: dict) -> None:
        self.loss = record.get("loss", self.loss)

    def close(self) -> None:
        pass


def our_trainer(args: argparse.Namespace, folder: Path) -> Any:
    """mp-pretrain up to its first step, on random tokens."""
    found = device.start()
    from megapatch.trainer.pretrain import make_plan, prepare

    steps = args.rounds * args.steps + args.steps + 2
    made = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    made.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text('{"eos_token": "0"}')
    count = steps * args.global_batch_size * args.seq_length + 1
    np.random.default_rng(0).integers(0, VOCABULARY, count, np.uint16).tofile(folder / "data.bin")
    write_index(folder / "data.idx", np.array([count], np.int64), np.dtype(np.uint16))
    words = f"--model {folder}/model --data-path {folder}/data --save {folder}/run --train-iters {steps} --split 1"
    words += f" --lr {LR} --lr-schedule constant --weight-decay {DECAY} --clip-grad {CLIP} --log-interval {steps}"
    words += f" --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --precision {args.precision}"
    for name in ("seq_length", "micro_batch_size", "global_batch_size"):
        words += f" --{name.replace('_', '-')} {getattr(args, name)}"
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(words.split())
    trainer, records = prepare(options, found, make_plan(options))
    records.sinks.append(LastLoss())
    return trainer


def their_step(net: Any, trainer: Any, args: argparse.Namespace) -> Callable[[], float]:
    """A usual training loop's step over the same samples; in bf16 without fp32 masters, as such loops do."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    norms = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    count = args.global_batch_size // args.micro_batch_size
    position = 0
    net.train()

    def step() -> float:
        nonlocal position
        total = 0.0
        for batch in trainer.train(position)():
            logits = net(input_ids=batch["tokens"]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        position += args.global_batch_size
        return total

    return step


if __name__ == "__main__":
    raise SystemExit(main())
