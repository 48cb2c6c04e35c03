"""How long training is held by a checkpoint, written at once and with --async-save: a model of a given width.

python tests/bench/saves.py --folder /tmp/saves
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from trainer_runs import arguments, corpus, events, log_of, model

EVERY = 10


def gaps(records: list[dict]) -> dict[int, float]:
    """Seconds from the record of one step to that of the next, by step."""
    steps = [r for r in records if r["event"] == "train"]
    return {b["step"]: b["ts"] - a["ts"] for a, b in itertools.pairwise(steps)}


def measure(folder: Path, name: str, extra: str, steps: int) -> dict[str, Any]:
    """Run, and look at the steps after each save."""
    words = arguments(folder, "wide", name, f"--train-iters {steps} --save-interval {EVERY} --keep 1 {extra}")
    command = [sys.executable, "-m", "megapatch.trainer.pretrain", *words]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    records = log_of(folder / name)
    took, saves = gaps(records), [r for r in events(records, "save") if r["step"] + EVERY <= steps]
    after = [sum(took[s["step"] + n] for n in range(1, EVERY)) for s in saves]
    alone = [took[n] for n in took if n < EVERY and n > 2]
    return {
        "step alone, s": statistics.median(alone),
        "nine steps from a save on, s": statistics.median(after),
        "save, s": statistics.median(s["seconds"] for s in saves),
        "held, s": statistics.median(s["held_s"] for s in saves),
        "slowest step, s": max(took[n] for n in took if n > EVERY),
    }


def main() -> int:
    """Run both kinds, alternating; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--hidden", type=int, default=512)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    corpus(args.folder)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": 8}
    model(args.folder, "wide", **sizes)
    for turn in range(2):
        for kind, extra in (("at once", ""), ("--async-save", "--async-save")):
            found = measure(args.folder, f"{turn} {kind}".replace(" ", "-"), extra, args.steps)
            print(kind, "  ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
