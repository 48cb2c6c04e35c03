"""Compare mp-preprocess with the loop most people write, run in turns on the Python standard library's sources.

The loop: transformers' tokenizer document by document, and megatron-core's IndexedDatasetBuilder, in one process.
Prints the best wall and processor seconds of each and their ratios, and stops when the files differ.

    python tests/bench/preprocess.py --rounds 3 --workers 1 2 4
"""

import argparse
import filecmp
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

SOURCES = Path(sysconfig.get_path("stdlib"))
FOLDERS = ("asyncio", "email", "idlelib", "json", "test", "unittest")


def loop(corpus: Path, tokenizer: Path, prefix: Path) -> None:
    """The usual way, on JSON lines, with an end-of-document token."""
    import json

    import torch
    import transformers
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(encoder)))
    with corpus.open("rb") as file:
        for line in file:
            ids = [*encoder(json.loads(line)["text"], add_special_tokens=False).input_ids, encoder.eos_token_id]
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def write_corpus(path: Path) -> int:
    """The sources as JSON lines; bytes."""
    import json

    paths = [*SOURCES.glob("*.py"), *(one for folder in FOLDERS for one in (SOURCES / folder).rglob("*.py"))]
    with path.open("w") as file:
        for one in sorted(paths):
            try:
                text = one.read_bytes().decode()
            except UnicodeDecodeError:
                continue  # test data of the interpreter in other encodings
            if text:
                file.write(json.dumps({"text": text}) + "\n")
    return path.stat().st_size


def measured(argv: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a command and its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(folder: Path, rounds: int, workers: list[int]) -> None:
    """Run everything in turns and print a table."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tok"
    num_bytes = write_corpus(corpus)
    tool = [sys.executable, "-m", "megapatch.tools.preprocess.preprocess", "--input", str(corpus)]
    train = [sys.executable, "-m", "megapatch.tools.preprocess.train_tokenizer", "--input", str(corpus)]
    measured([*train, "--vocab-size", "8192", "--output", str(tokenizer)])
    commands = {"loop": [sys.executable, __file__, "--loop", str(corpus), str(tokenizer), str(folder / "loop")]}
    for count in workers:
        name = f"mp-preprocess, {count} workers"
        more = ["--tokenizer", str(tokenizer), "--append-eod", "--force", "--workers", str(count)]
        commands[name] = [*tool, *more, "--output-prefix", str(folder / f"ours{count}")]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, argv in commands.items():
            times[name].append(measured(argv))
    for count in workers:
        for suffix in ("bin", "idx"):
            same = filecmp.cmp(folder / f"loop.{suffix}", folder / f"ours{count}.{suffix}", shallow=False)
            assert same, f"ours{count}.{suffix} differs from the loop's"
    report(num_bytes, times)


def report(num_bytes: int, times: dict[str, list[tuple[float, float]]]) -> None:
    """Print the best of each command and how many times faster than the loop it is."""
    best = {name: tuple(map(min, zip(*runs, strict=True))) for name, runs in times.items()}
    print(f"{num_bytes / 1e6:.1f} MB of JSON lines; the files are the same bytes")
    for name, (wall_s, cpu_s) in best.items():
        ratios = f"{best['loop'][0] / wall_s:.2f}x wall, {best['loop'][1] / cpu_s:.2f}x processor"
        print(f"{name:26} {wall_s:6.2f} s wall {cpu_s:6.2f} s processor {num_bytes / 1e6 / wall_s:6.2f} MB/s  {ratios}")


def main() -> int:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times each command runs; the best counts (default: 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="worker counts (default: 1 2 4)")
    parser.add_argument("--loop", nargs=3, metavar=("CORPUS", "TOKENIZER", "PREFIX"), help="only run the loop")
    options = parser.parse_args()
    if options.loop:
        loop(*map(Path, options.loop))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.rounds, options.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
