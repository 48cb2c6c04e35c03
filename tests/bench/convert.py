"""How long mp-convert takes beside cp of the same bytes, and how much memory: python tests/bench/convert.py --help"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapatch.models import family, hf_files
from megapatch.models.cli import Common, opt, run
from megapatch.models.shapes import num_parameters, part_shapes, sizes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
SHARD_BYTES = 300_000_000
CODE = (
    "import sys; from megapatch.tools.convert.convert import main; status = main(sys.argv[1:]); "
    "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]); sys.exit(status)"
)


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Alternate cp -r (with fsync of every file) and mp-convert in both directions, as whole processes.

    The model is a Llama of random bytes. Prints a line of JSON: seconds (median of the rounds), ratios to cp, and peak
    resident memory.
    """

    folder: Path = opt("where to work; needs four times --gigabytes, and is removed at the end")
    gigabytes: float = opt("size of the model, in 1e9 bytes", 1.0)
    rounds: int = opt("how often each is measured", 5)


def make_model(folder: Path, size_bytes: float) -> None:
    """A Hugging Face folder with random bytes for weights."""
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
    counts = {name: 2 * int.__mul__(*shape) if len(shape) == 2 else 2 * shape[0] for name, shape in shapes.items()}
    files = hf_files.shards(counts, SHARD_BYTES)
    for file, names in files.items():
        header, _, total = hf_files.header([(name, "bfloat16", shapes[name]) for name in names])
        with (folder / file).open("wb") as out:
            out.write(header)
            for left in range(total - len(header), 0, -(1 << 24)):
                out.write(os.urandom(min(left, 1 << 24)))
    (folder / hf_files.INDEX).write_bytes(hf_files.index_json(files, counts, sum(counts.values()) // 2))


def measure(*command: str) -> tuple[float, float]:
    """Seconds of a process, and the number that it prints last (kB at peak) as megabytes."""
    os.sync()
    start = time.perf_counter()
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return time.perf_counter() - start, int(said[-1]) / 1000 if said else 0.0


def bench(options: Options) -> None:
    """Measure, and print the figures."""
    work = options.folder / "megapatch-bench-convert"
    model, core, back, copied = (work / name for name in ("hf", "core", "back", "copied"))
    shutil.rmtree(work, ignore_errors=True)
    make_model(model, options.gigabytes * 1e9)
    convert = (sys.executable, "-c", CODE, "--force", "--source")
    commands = {
        "cp": ("sh", "-c", f"cp -r '{model}' '{copied}' && sync '{copied}'/*"),
        "hf_to_core": (*convert, str(model), "--target", str(core)),
        "core_to_hf": (*convert, str(core), "--target", str(back)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for path in (core, back, copied):
            shutil.rmtree(path, ignore_errors=True)
        for name, command in commands.items():
            took, peak = measure(*command)
            seconds[name].append(took)
            peaks[name].append(peak)
            print(f"{name}: {took:.2f} s, {peak:.0f} MB", file=sys.stderr)
    same = all(path.read_bytes() == (back / path.name).read_bytes() for path in model.glob("*.json"))
    total = sum(path.stat().st_size for path in model.iterdir())
    shutil.rmtree(work)
    said: dict[str, Any] = {"gigabytes": round(total / 1e9, 3), "json_files_equal": same}
    for name in commands:
        middle = statistics.median(seconds[name])
        said[name] = {"s": round(middle, 3), "to_cp": round(middle / statistics.median(seconds["cp"]), 2)}
        said[name]["peak_mb"] = round(max(peaks[name]))
    print(json.dumps(said))


def main(argv: list[str] | None = None) -> int:
    """Exit status."""
    return run(Options, bench, prog="bench-convert", argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
