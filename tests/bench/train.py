"""Seconds and memory of a step of mp-pretrain, of transformers with torch's AdamW, and of megatron-core's local spec.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python tests/bench/train.py --rounds 15 [--precision bf16] [--seq-length 256]

The sides (train_sides.py) are processes of their own, which make a step in turn, a round: forward, backward, clipping
at 1, AdamW (transformers': fused), over the same samples and weights: a random Qwen3 of 107 million parameters; with
--vocabulary 151936 --hidden 512 --layers 8 of 104 million with Qwen3's own vocabulary. Prints one JSON object: for each
side median and best seconds of a step, and processor seconds, tokens/s, peak memory, the last loss; and how many times
longer than ours a side takes: quartiles of the rounds' ratios, in time and in processor time, which other processes of
the machine disturb less. The side "floor" is only the products with weights, by the faster library: no trainer whose
products are exact takes less. --precision bf16 is bf16 with fp32 masters: ours and core's as they do, transformers'
with autocast, as its Trainer does; pure bf16, without masters, is a side too. --profile SIDE prints where one side
spends its time.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_sides

SIDES = ("ours", "transformers", "core", "floor")


def main() -> int:
    """Run the comparison."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=15, help="steps of each side")
    made.add_argument("--seq-length", type=int, default=512)
    made.add_argument("--micro-batch-size", type=int, default=2)
    made.add_argument("--global-batch-size", type=int, default=4)
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--hidden", type=int, default=768)
    made.add_argument("--vocabulary", type=int, default=32768)
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
        count = train_sides.make_model(args)
        if args.profile:
            profile(train_sides.SIDE[args.profile](args), args.rounds)
        else:
            print(json.dumps(compare(args) | {"parameters": count}))
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of a step of each side; what came of them."""
    names = args.side or [*SIDES, *(["transformers, pure bf16"] if args.precision == "bf16" else [])]
    sides = {name: start(name, args.folder) for name in names}
    for side in sides.values():
        ask(side)  # memory and state are made
    found: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, side in sides.items():
            found[name].append(ask(side))
    for side in sides.values():
        side.communicate("")
    tokens = args.global_batch_size * args.seq_length
    table = {name: summary(steps, tokens) for name, steps in found.items()}
    others = [name for name in names if name != "ours"] if "ours" in names else []
    longer = {name: {clock: ratios(found, name, clock) for clock in ("seconds", "cpu_seconds")} for name in others}
    return {"sides": table, "times_ours": longer, "precision": args.precision, "seq_length": args.seq_length}


def summary(steps: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """A side's row of the table."""
    wall, cpu = (statistics.median(step[clock] for step in steps) for clock in ("seconds", "cpu_seconds"))
    made = {
        "step_s": round(wall, 3),
        "best_s": round(min(step["seconds"] for step in steps), 3),
        "cpu_s": round(cpu, 3),
    }
    return made | {
        "tokens_per_s": round(tokens / wall),
        "peak_gb": round(steps[-1]["peak_bytes"] / 1e9, 2),
        "loss": steps[-1]["loss"],
    }


def ratios(found: dict[str, list[dict]], name: str, clock: str) -> list[float]:
    """Quartiles, over the rounds, of how many times longer than ours a side's step took."""
    each = [theirs[clock] / ours[clock] for theirs, ours in zip(found[name], found["ours"], strict=True)]
    return [round(x, 2) for x in (statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each)]


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
        step = train_sides.SIDE[args.work](args)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        loss = step()
        row = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu, "loss": loss}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(row | {"peak_bytes": peak}), flush=True)


def profile(step: train_sides.Step, steps: int) -> None:
    """The most expensive operators of a few steps."""
    import torch

    step()
    with torch.profiler.profile() as found:
        for _ in range(steps):
            step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=45))


if __name__ == "__main__":
    raise SystemExit(main())
