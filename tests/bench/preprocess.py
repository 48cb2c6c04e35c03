"""mp-preprocess beside Megatron-LM's preprocess_data.py on real text: python tests/bench/preprocess.py --help"""

import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import psutil
from real_text import collect, cut

from megapatch.models.cli import Common, UserError, opt, run

TOOL = [sys.executable, "-m", "megapatch.tools.preprocess.preprocess"]
TRAIN = [sys.executable, "-m", "megapatch.tools.preprocess.train_tokenizer"]
START = "start"  # the name of the input of three documents
GOALS = (  # name, size in MB, how often less CPU than Megatron-LM's
    ("gigatoken", 68, 25),
    ("gigatoken", 269, 35),
    ("tokenizers", 68, 2.5),
)
LINE = "{:>6} {:24} {:>18} {:>18} {:>8} {:>8} {:>8}"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Time mp-preprocess with each engine and Megatron-LM's scripts in turns, and compare their files byte by byte.

    The text is documentation, man pages and sources that this machine has, the tokenizer one of 32,768 tokens learned
    from it. Every sample is a line of JSON on stdout; a table with medians and ranges goes to stderr.
    """

    megatron_lm: Optional[Path] = opt("checkout of Megatron-LM core_v0.16.1 (its packages may be on PYTHONPATH)", None)
    megatron_lm_fast: Optional[Path] = opt("checkout of Megatron-LM with tools/preprocess_data_fast.py", None)
    folder: Optional[Path] = opt(
        "where to work, kept (default: a temporary folder); text and tokenizer are made once", None
    )
    megabytes: list[float] = opt("sizes of the JSON lines, in 1e6 bytes", [68.0, 269.0], nargs="+")
    rounds: int = opt("how often each is measured", 3)
    cores: int = opt("cores and worker processes for each", 2)
    engines: list[str] = opt("engines of mp-preprocess", ["gigatoken", "tokenizers"], nargs="*")
    seed: int = opt("order of the text", 1)
    vocab_size: int = opt("tokens of the tokenizer", 32_768)
    resident: bool = opt("measure memory (all processes together, ten times a second) instead of time", False)


@dataclass(frozen=True)
class Command:
    """What is measured: ``{prefix}`` in its arguments is where it writes; ``suffix`` is what it adds to that."""

    name: str
    argv: list[str]
    suffix: str
    path: str = ""

    def of(self, prefix: Path) -> list[str]:
        return [word.format(prefix=prefix) for word in self.argv]


@dataclass(frozen=True)
class Sample:
    """One run: seconds, and megabytes of the largest process, or of all together where that is measured."""

    megabytes: float
    name: str
    cpu_s: float
    wall_s: float
    largest_mb: float
    resident_mb: float = 0.0
    resident_mb: float = 0.0
    load: float = 0.0


def commands(options: Options, corpus: Path, tokenizer: Path) -> Iterator[Command]:
    """Each program on one input; the first is what the others are compared with."""
    shared = ["--input", str(corpus), "--output-prefix", "{prefix}"]
    theirs = [*shared, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod"]
    if options.megatron_lm:
        script = str(options.megatron_lm / "tools" / "preprocess_data.py")
        argv = [sys.executable, script, *theirs, "--workers", str(options.cores)]
        yield Command("preprocess_data", argv, "_text_document", str(options.megatron_lm))
    if options.megatron_lm_fast:
        script = str(options.megatron_lm_fast / "tools" / "preprocess_data_fast.py")
        argv = [sys.executable, script, *theirs, "--use-gigatoken"]
        yield Command("preprocess_data_fast", argv, "_text_document", str(options.megatron_lm_fast))
    ours = [*TOOL, *shared, "--tokenizer", str(tokenizer), "--workers", str(options.cores), "--force"]
    for engine in options.engines:
        yield Command(engine, [*ours, "--engine", engine], "")


def measure(command: Command, prefix: Path, megabytes: float, resident: bool) -> Sample:
    """Run it once; processor seconds are user and system of all its processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if command.path:
        environment["PYTHONPATH"] = f"{command.path}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryFile() as said:
        os.sync()
        started = time.perf_counter()
        process = subprocess.Popen(command.of(prefix), stdout=said, stderr=said, env=environment)
        watch = Watch(process.pid, resident)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait again
        wall_s = time.perf_counter() - started
        peak = watch.finish()
        if process.returncode:
            said.seek(0)
            raise UserError(f"{command.name}: exit status {process.returncode}: {said.read()[-2000:].decode()}")
    cpu_s = used.ru_utime + used.ru_stime
    return Sample(megabytes, command.name, cpu_s, wall_s, used.ru_maxrss / 1e3, peak / 1e6, os.getloadavg()[0])


class Watch:
    """The most memory that a process and all below it have at one time, shared pages counted once; 0 if not asked."""

    def __init__(self, pid: int, wanted: bool) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(pid,)) if wanted else None
        if self._thread:
            self._thread.start()

    def _look(self, pid: int) -> None:
        while not self._ended.wait(0.1):
            total = 0
            try:
                root = psutil.Process(pid)
                for process in (root, *root.children(recursive=True)):
                    total += process.memory_full_info().pss
            except psutil.Error:
                continue  # one of them ended while it was looked at
            self.peak = max(self.peak, total)

    def finish(self) -> int:
        """The peak in bytes."""
        self._ended.set()
        if self._thread:
            self._thread.join()
        return self.peak


def prepare(options: Options, folder: Path) -> tuple[dict[float, Path], Path]:
    """The inputs by size in MB, 0 for three documents, and the tokenizer; what is there already is used again."""
    largest = max(options.megabytes)
    corpus = folder / f"text-{options.seed}-{largest:g}.jsonl"
    if not corpus.exists():
        collect(corpus, largest * 1e6, options.seed)
    inputs = {}
    for megabytes in (0, *options.megabytes):
        inputs[megabytes] = folder / f"input-{options.seed}-{megabytes:g}.jsonl"
        cut(corpus, inputs[megabytes], megabytes * 1e6)
    inputs[0].write_text("".join(json.dumps({"text": f"Document number {i}."}) + "\n" for i in range(3)))
    tokenizer = folder / f"tokenizer-{options.seed}-{largest:g}-{options.vocab_size}"
    if not tokenizer.exists():
        learned = folder / "learned.jsonl"
        cut(corpus, learned, 30e6)
        vocabulary = ["--vocab-size", str(options.vocab_size), "--output", str(tokenizer)]
        subprocess.run([*TRAIN, "--input", str(learned), *vocabulary], check=True)
    return inputs, tokenizer


def compare(options: Options, folder: Path) -> list[Sample]:
    """All samples; files that differ are a UserError."""
    inputs, tokenizer = prepare(options, folder)
    samples = []
    for megabytes, corpus in inputs.items():
        crew = list(commands(options, corpus, tokenizer))
        for _ in range(options.rounds):
            for command in crew:
                sample = measure(command, folder / command.name, megabytes, options.resident)
                print(json.dumps(vars(sample)), flush=True)
                samples.append(sample)
        first, *others = ([folder / f"{one.name}{one.suffix}.{kind}" for kind in ("bin", "idx")] for one in crew)
        for other in others:
            for one, two in zip(first, other, strict=True):
                if not filecmp.cmp(one, two, shallow=False):
                    raise UserError(f"{two}: differs from {one}, on {corpus}")
    return samples


def table(samples: list[Sample]) -> Iterator[str]:
    """A line for each program and size: median and range of the seconds, and how often less than the first program."""
    yield LINE.format("MB", "", "CPU s", "wall s", "MB/s", "CPU", "MB RAM")
    for megabytes in dict.fromkeys(one.megabytes for one in samples):
        here = [one for one in samples if one.megabytes == megabytes]
        base = statistics.median(one.cpu_s for one in here if one.name == here[0].name)
        for name in dict.fromkeys(one.name for one in here):
            mine = [one for one in here if one.name == name]
            cpu, wall = ([getattr(one, field) for one in mine] for field in ("cpu_s", "wall_s"))
            rate = f"{megabytes / statistics.median(wall):.1f}"
            memory = max(one.resident_mb or one.largest_mb for one in mine)
            less = f"{base / statistics.median(cpu):.1f}x"
            yield LINE.format(f"{megabytes:g}", name, _range(cpu), _range(wall), rate, less, f"{memory:.0f}")


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def goals(samples: list[Sample]) -> Iterator[str]:
    """Whether the figures are what they should be, for those that were measured beside Megatron-LM's script."""
    for name, megabytes, wanted in GOALS:
        found = {
            one: [s.cpu_s for s in samples if s.name == one and s.megabytes == megabytes]
            for one in ("preprocess_data", name)
        }
        if all(found.values()):
            ratio = statistics.median(found["preprocess_data"]) / statistics.median(found[name])
            holds = "yes" if ratio >= wanted else "NO"
            yield f"{name}, {megabytes} MB: {ratio:.1f}x less CPU; wanted {wanted}x: {holds}"


def bench(options: Options) -> None:
    """Measure, compare and print."""
    allowed = sorted(os.sched_getaffinity(0))
    if options.cores > len(allowed):
        raise UserError(f"--cores {options.cores}: {len(allowed)} are there")
    os.sched_setaffinity(0, allowed[-options.cores :])
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        samples = compare(options, options.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            samples = compare(options, Path(folder))
    for line in (*table(samples), *goals(samples)):
        print(line, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the measurement; the exit status."""
    return run(Options, bench, prog="bench/preprocess.py", argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
