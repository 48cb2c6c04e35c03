"""How long mp-convert takes beside cp of the same bytes, and how much memory: python tests/bench/convert.py --help"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models import family, hf_files
from megapatch.models.cli import Common, opt, run
from megapatch.models.shapes import num_parameters, part_shapes, sizes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 1_000_000_000
CONVERT = """
import sys, time
from megapatch.tools.convert.convert import main
start = time.perf_counter()
status = main(sys.argv[1:])
took = time.perf_counter() - start
print(took, open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
sys.exit(status)
"""
HOLES = """
import os
real, none = os.write, bytes(1 << 21)
def write(file, data):
    if bytes(data) == none[: len(data)] and len(data) > 4096:
        os.ftruncate(file, os.lseek(file, len(data), os.SEEK_CUR))
        return len(data)
    return real(file, data)
os.write = write
"""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Alternate cp -r (and sync of every file) with mp-convert in both directions and with casts.

    The model is a bf16 Llama of random weights. Prints a line of JSON for each: seconds of the process and of its work
    (without the start of the interpreter) as medians of the rounds, ratios to cp, and peak resident memory.
    """

    folder: Path = opt("where to work; needs five times --gigabytes, and is removed at the end")
    gigabytes: float = opt("size of the model, in 1e9 bytes", 2.0)
    rounds: int = opt("how often each is measured", 5)
    jobs: int = opt("files written at the same time (mp-convert's -j)", 4)
    sparse: bool = opt("only the peak memory for a model that is all holes, so that it takes no room", False)


def make_model(folder: Path, size_bytes: float, holes: bool = False) -> None:
    """A Hugging Face folder with random weights in bf16, or holes."""
    layer = num_parameters(CONFIG | {"num_hidden_layers": 2}) - num_parameters(CONFIG | {"num_hidden_layers": 1})
    rest = num_parameters(CONFIG | {"num_hidden_layers": 1}) - layer
    config = CONFIG | {"num_hidden_layers": max(1, round((size_bytes / 2 - rest) / layer))}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    letters = sizes(config)
    shapes = {
        name: shape
        for placed in family.placed_rules(config)
        for name, shape in zip(placed.hf, part_shapes(placed.rule, letters), strict=True)
    }
    counts = {name: 2 * prod(shape) for name, shape in shapes.items()}
    files = hf_files.shards(counts, SHARD_BYTES)
    for file, names in files.items():
        header, _, total = hf_files.header([(name, "bfloat16", shapes[name]) for name in names])
        with (folder / file).open("wb") as out:
            out.write(header)
            for left in range(0 if holes else total - len(header), 0, -(1 << 24)):
                out.write(weights(min(left, 1 << 24)))
            out.truncate(total)
    count = sum(prod(shape) for shape in shapes.values())
    (folder / hf_files.INDEX).write_bytes(hf_files.index_json(files, counts, count))


def weights(count: int) -> bytes:
    """Random bf16 numbers of the size that weights have, from 2**-15 to 2**-5."""
    bits = np.frombuffer(os.urandom(count), np.uint16)
    return ((bits & 0x81FF) + 0x3800 + (bits >> 9 & 3) * 0x100).astype(np.uint16).tobytes()


def measure(*command: str) -> tuple[float, float, float]:
    """Seconds of a process; of its work, and megabytes at its peak, as it prints them last (0 if it does not)."""
    os.sync()
    start = time.perf_counter()
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    took = time.perf_counter() - start
    return took, float(said[-2]) if said else took, int(said[-1]) / 1000 if said else 0.0


def commands(options: Options, work: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, name of the one it is compared with, and command of each measurement."""
    convert = (sys.executable, "-c", CONVERT, "-j", str(options.jobs), "--force", "--source")
    model, core, wide, half = (str(work / name) for name in ("hf", "core", "wide", "half"))
    copied = work / "copied"
    copy = f"rm -rf '{copied}' && cp -r '{model}' '{copied}' && sync '{copied}'/*"
    yield "cp", "cp", ("sh", "-c", copy)
    yield "hf_to_core", "cp", (*convert, model, "--target", core)
    yield "core_to_hf", "cp", (*convert, core, "--target", str(work / "back"))
    yield "core_to_hf_unverified", "cp", (*convert, core, "--target", str(work / "back"), "--skip-digests")
    yield "bf16_to_fp32", "hf_to_core", (*convert, half, "--target", wide, "--dtype", "fp32")
    yield "bf16_to_fp16", "hf_to_core", (*convert, model, "--target", wide, "--dtype", "fp16")


def bench(options: Options) -> None:
    """Measure, and print the figures."""
    work = options.folder / "megapatch-bench-convert"
    shutil.rmtree(work, ignore_errors=True)
    try:
        (_sparse if options.sparse else _speed)(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sparse(options: Options, work: Path) -> None:
    """Peak memory only; holes stay holes in the target too, by a write of this bench's own."""
    make_model(work / "hf", options.gigabytes * 1e9, holes=True)
    total = sum(path.stat().st_size for path in (work / "hf").iterdir())
    for name, target in (("hf", "core"), ("core", "back")):
        command = (sys.executable, "-c", HOLES + CONVERT, "-j", str(options.jobs), "--source", str(work / name))
        _, took, peak = measure(*command, "--target", str(work / target))
        found = {"from": name, "gigabytes": round(total / 1e9, 1), "work_s": round(took, 1), "peak_mb": round(peak)}
        print(json.dumps(found), flush=True)


def _speed(options: Options, work: Path) -> None:
    make_model(work / "hf", options.gigabytes * 1e9)
    make_model(work / "half", options.gigabytes * 0.5e9)  # that in fp32 is as large
    planned = list(commands(options, work))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name, *_ in planned}
    for _ in range(options.rounds):
        for name, _, command in planned:
            found[name].append(measure(*command))
            took, busy, peak = found[name][-1]
            print(f"{name}: {took:.2f} s, work {busy:.2f} s, {peak:.0f} MB", file=sys.stderr)
    same = all(path.read_bytes() == (work / "back" / path.name).read_bytes() for path in (work / "hf").glob("*.json"))
    total = sum(path.stat().st_size for path in (work / "hf").iterdir())
    print(json.dumps({"gigabytes": round(total / 1e9, 3), "rounds": options.rounds, "json_files_equal": same}))
    for name, other, _ in planned:
        took, busy = (statistics.median(run[n] for run in found[name]) for n in (0, 1))
        ratios = [mine[1] / theirs[1] for mine, theirs in zip(found[name], found[other], strict=True)]
        said: dict[str, Any] = {"what": name, "s": round(took, 3), "work_s": round(busy, 3)}
        said[f"work_to_{other}"] = round(statistics.median(ratios), 2)
        said["range"] = [round(min(ratios), 2), round(max(ratios), 2)]
        print(json.dumps(said | {"peak_mb": round(max(run[2] for run in found[name]))}))


def main(argv: list[str] | None = None) -> int:
    """Exit status."""
    return run(Options, bench, prog="bench-convert", argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
