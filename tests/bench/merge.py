"""mp-merge-data beside megatron-core's IndexedDatasetBuilder.add_index: python tests/bench/merge.py --help"""

import filecmp
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.indexed_data import bin_path, idx_path, write_index

CORE = """
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
import numpy

def work(output, *inputs):
    builder = IndexedDatasetBuilder(output + ".bin", dtype=numpy.uint16)
    for prefix in inputs:
        builder.add_index(prefix)
    builder.finalize(output + ".idx")
"""
TOOL = """
from megapatch.tools.preprocess.merge_data import Options, merge
from pathlib import Path
import megapatch.tools.preprocess.pairs.append
import megapatch.tools.preprocess.pairs.merge_plan
import megapatch.tools.preprocess.run.progress

def work(output, *inputs):
    merge(Options(input=list(inputs), output_prefix=Path(output), skip_digests=%s))
"""
TIMED = """
import json, re, resource, sys, time

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before, start, cpu = kib("VmRSS"), time.perf_counter(), time.process_time()
open("/proc/self/clear_refs", "w").write("5")
work(*sys.argv[1:])
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"wall_s": wall, "cpu_s": cpu, "grown_mib": (kib("VmHWM") - before) / 1024}))
"""
WAYS = {"megatron-core": CORE, "mp-merge-data": TOOL % False, "mp-merge-data --skip-digests": TOOL % True}


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Merge the same pairs in turns and compare the files: seconds and memory of the work, without the imports.

    Every sample is a line of JSON on stdout; medians go to stderr. mp-merge-data also makes its files durable (fsync).
    """

    folder: Path = opt("where to work", Path(tempfile.gettempdir()))
    documents: int = opt("documents in all", 8_000_000)
    inputs: int = opt("pairs that they are in", 4)
    tokens: int = opt("tokens of a document", 20)
    rounds: int = opt("how often each is measured", 3)


def pairs(options: Options, folder: Path) -> list[str]:
    """The pairs to merge; lengths vary around the mean."""
    chance, made = np.random.default_rng(0), []
    for i in range(options.inputs):
        prefix = folder / f"input{i}"
        lengths = chance.integers(1, 2 * options.tokens, options.documents // options.inputs, dtype=np.int32)
        chance.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16).tofile(bin_path(prefix))
        write_index(idx_path(prefix), lengths, np.dtype(np.uint16))
        made.append(str(prefix))
    return made


def bench(options: Options) -> None:
    """Measure, and print the figures."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        inputs = pairs(options, folder)
        for _ in range(options.rounds):
            for way, code in WAYS.items():
                output = folder / way.replace(" ", "")
                for path in folder.glob(f"{output.name}.*"):
                    path.unlink()
                words = [sys.executable, "-c", code + TIMED, str(output), *inputs]
                done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps({"way": way, **found[way][-1]}), flush=True)
            for end in (".bin", ".idx"):
                paths = [folder / (way.replace(" ", "") + end) for way in WAYS]
                if not all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:]):
                    raise UserError(f"{end}: the files differ")
    for way, samples in found.items():
        median = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        each = median["grown_mib"] * 2**20 / options.documents
        print(
            f"{way:30} {median['wall_s']:6.2f} s, {median['cpu_s']:6.2f} CPU-s, {median['grown_mib']:6.0f} MiB, "
            f"{each:6.1f} bytes a document",
            file=sys.stderr,
        )


if __name__ == "__main__":
    raise SystemExit(run(Options, bench, prog="merge.py"))
