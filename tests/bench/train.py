"""Seconds and memory of a step of mp-pretrain, of transformers with torch's AdamW, and of megatron-core's local spec.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python tests/bench/train.py --rounds 5 --steps 2 [--precision bf16]

The sides are processes of their own, which make steps in turn: forward, backward, clipping at 1, AdamW (transformers':
fused), over the same samples and weights: a random Qwen3 of 107 million parameters. Prints one JSON object: for each
side median seconds of a step, tokens/s, peak memory, the last loss; and how many times faster ours is. --precision bf16
is bf16 with fp32 masters: ours and core's as they do, transformers' with autocast, as its Trainer does; pure bf16,
without masters, is a side too. --profile SIDE prints where one side spends its time.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 32768
LR, DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
SIDES = ("ours", "transformers", "core")
Step = Callable[[], float]  # makes a step; its loss


def main() -> int:
    """Run the comparison."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=2, help="per round and side")
    made.add_argument("--seq-length", type=int, default=512)
    made.add_argument("--micro-batch-size", type=int, default=2)
    made.add_argument("--global-batch-size", type=int, default=4)
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--hidden", type=int, default=768)
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--side", nargs="+", help="the sides to measure")
    made.add_argument("--profile", metavar="SIDE", help="print where one side spends its time, and stop")
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--work", metavar="SIDE", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.work:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        count = make_model(args)
        if args.profile:
            profile(SIDE[args.profile](args), args.steps)
        else:
            print(json.dumps(compare(args) | {"parameters": count}))
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of all sides in alternation; what came of them."""
    names = args.side or [*SIDES, *(["transformers, pure bf16"] if args.precision == "bf16" else [])]
    sides = {name: start(name, args.folder) for name in names}
    found: dict[str, list[dict]] = {name: [ask(side)] for name, side in sides.items()}  # memory and state are made
    for _ in range(args.rounds):
        for name, side in sides.items():
            found[name] += [ask(side) for _ in range(args.steps)]
    for side in sides.values():
        side.communicate("")
    tokens = args.global_batch_size * args.seq_length
    table = {}
    for name, steps in found.items():
        seconds = statistics.median(step["seconds"] for step in steps[1:])
        memory = round(steps[-1]["peak_bytes"] / 1e9, 2)
        table[name] = {"step_s": round(seconds, 3), "tokens_per_s": round(tokens / seconds), "peak_gb": memory}
        table[name] |= {"loss": steps[-1]["loss"]}
    ours = table.get("ours", {}).get("step_s")
    faster = {name: round(row["step_s"] / ours, 2) for name, row in table.items() if ours and name != "ours"}
    return {"sides": table, "ours_is_faster": faster, "precision": args.precision}


def start(name: str, folder: Path) -> subprocess.Popen:
    """A process for one side, with the options of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--work", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(side: subprocess.Popen) -> dict[str, Any]:
    """One step of a side."""
    assert side.stdin and side.stdout
    side.stdin.write("step\n")
    side.stdin.flush()
    return json.loads(side.stdout.readline())


def work(args: argparse.Namespace) -> None:
    """A side's process: a step for each line of stdin, a JSON line for each step."""
    with contextlib.redirect_stdout(sys.stderr):
        step = SIDE[args.work](args)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}), flush=True)


def profile(step: Step, steps: int) -> None:
    """The most expensive operators of a few steps."""
    import torch

    step()
    with torch.profiler.profile() as found:
        for _ in range(steps):
            step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=45))


def make_model(args: argparse.Namespace) -> int:
    """FOLDER/model with a tokenizer, and data; the number of parameters."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, Qwen3Config

    from megapatch.models.indexed_data import write_index

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 192),
        head_dim=64,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=True,
    )
    net = AutoModelForCausalLM.from_config(config)
    net.save_pretrained(args.folder / "model")
    made = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    made.save(str(args.folder / "model" / "tokenizer.json"))
    (args.folder / "model" / "tokenizer_config.json").write_text('{"eos_token": "0"}')
    row = np.random.default_rng(0).integers(1, VOCABULARY, args.seq_length)
    count = num_steps(args) * args.global_batch_size * args.seq_length + 1
    np.resize(row.astype(np.uint16), count).tofile(args.folder / "data.bin")  # all samples are one: order is nothing
    write_index(args.folder / "data.idx", np.array([count], np.int64), np.dtype(np.uint16))
    return sum(p.numel() for p in net.parameters())


def num_steps(args: argparse.Namespace) -> int:
    """Steps of a side in all."""
    return args.rounds * args.steps + args.steps + 2


class LastLoss:
    """A sink that keeps the last loss."""

    loss = 0.0

    def write(self, record: dict) -> None:
        self.loss = record.get("loss", self.loss)

    def close(self) -> None:
        pass


def our_trainer(args: argparse.Namespace) -> Any:
    """mp-pretrain up to its first step."""
    from megapatch.models import cli, device
    from megapatch.trainer.options import PretrainOptions

    found = device.start()
    from megapatch.trainer.pretrain import make_plan, prepare

    folder, steps = args.folder, num_steps(args)
    words = f"--model {folder}/model --data-path {folder}/data --save {folder}/run-{os.getpid()} --train-iters {steps}"
    words += f" --split 1 --lr {LR} --lr-schedule constant --weight-decay {DECAY} --clip-grad {CLIP}"
    words += f" --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --precision {args.precision} --log-interval {steps}"
    for name in ("seq_length", "micro_batch_size", "global_batch_size"):
        words += f" --{name.replace('_', '-')} {getattr(args, name)}"
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(words.split())
    trainer, records = prepare(options, found, make_plan(options))
    records.sinks.append(LastLoss())
    return trainer


def our_step(args: argparse.Namespace) -> Step:
    """A step of mp-pretrain."""
    trainer = our_trainer(args)

    def step() -> float:
        trainer._one_step()
        return trainer.records.sinks[-1].loss

    return step


def core_step(args: argparse.Namespace) -> Step:
    """The same with megatron-core's own layers, loss and optimizer step, on the CPU that our patches give it."""
    from megapatch.models import device

    device.start()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megapatch.models import build
    from megapatch.trainer import optimizer_state, session
    from megapatch.trainer import step as step_module

    def block_spec(config: Any, *_: Any) -> TransformerBlockSubmodules:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
        return TransformerBlockSubmodules([layer] * config.num_layers, WrappedTorchNorm)

    def update(session: Any) -> float | None:
        done, norm, _ = session.optimizer.step()
        session.schedule.step(increment=session.options.global_batch_size)
        return float(norm) if done else None

    build.spec.block_spec = block_spec  # type: ignore[assignment]
    step_module.update = update
    allocate = optimizer_state.allocate

    def unfused(optimizer: Any) -> None:
        allocate(optimizer)
        for group in optimizer.param_groups:
            group |= {"fused": None, "foreach": None}

    session.optimizer_state.allocate = unfused
    return our_step(args)


def their_step(args: argparse.Namespace, pure: bool = False) -> Step:
    """A usual training loop's step over the same samples; with ``pure``, weights are bf16 and have no masters."""
    import torch
    from transformers import AutoModelForCausalLM

    batches = their_batches(args)
    net = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.bfloat16 if pure else torch.float32)
    matrices = [p for p in net.parameters() if p.dim() > 1]
    norms = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    count = args.global_batch_size // args.micro_batch_size
    net.train()

    def step() -> float:
        total = 0.0
        for _ in range(count):
            tokens, labels = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16" and not pure):
                logits = net(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def their_batches(args: argparse.Namespace) -> Any:
    """Tokens and labels [b, s], read here so that nothing of megatron-core is in memory."""
    import numpy as np
    import torch

    row = np.fromfile(args.folder / "data.bin", np.uint16, args.seq_length + 1).astype(np.int64)
    rows = torch.from_numpy(row).expand(args.micro_batch_size, -1)
    while True:
        yield rows[:, :-1], rows[:, 1:]


SIDE: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ours": our_step,
    "transformers": their_step,
    "transformers, pure bf16": lambda args: their_step(args, pure=True),
    "core": core_step,
}

if __name__ == "__main__":
    raise SystemExit(main())
