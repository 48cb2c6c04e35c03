"""pread and write with a buffer against copy_file_range: python tests/bench/engines.py --help"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megapatch.models.cli import Common, opt, run

PLACES = {"aligned": (0, 0), "unaligned": (139, 1216)}  # byte offsets in source and target; pages are of 4096
Engine = Callable[[int, int, int, int], None]  # source, target (descriptors), offset in the source, bytes


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Copy a range of a file, alternating engines, with fsync; prints seconds (median of the rounds) as JSON lines.

    Two folders on different file systems show what works across them.
    """

    source: Path = opt("folder for the file that is read")
    target: Path = opt("folder for the file that is written")
    gigabytes: float = opt("size of the range, in 1e9 bytes", 1.0)
    rounds: int = opt("how often each is measured", 5)
    cold: bool = opt("drop the source from the page cache before each", False)


def buffered(source: int, target: int, offset: int, count: int, digest: bool = False) -> None:
    """Through a buffer of 2 MiB, with xxh3 on the way if asked."""
    buffer, state = memoryview(bytearray(2 << 20)), xxhash.xxh3_128()
    for at in range(0, count, len(buffer)):
        view = buffer[: os.preadv(source, [buffer[: count - at]], offset + at)]
        if digest:
            state.update(view)
        os.write(target, view)


def digested(source: int, target: int, offset: int, count: int) -> None:
    """As mp-convert does it."""
    buffered(source, target, offset, count, digest=True)


def kernel(source: int, target: int, offset: int, count: int) -> None:
    """Inside the kernel; no digest."""
    while count:
        moved = os.copy_file_range(source, target, min(count, 1 << 30), offset)
        offset, count = offset + moved, count - moved


ENGINES: dict[str, Engine] = {"buffer": buffered, "buffer and xxh3": digested, "copy_file_range": kernel}


def timed(engine: Engine, paths: tuple[Path, Path], place: str, count: int, cold: bool) -> float | str:
    """Seconds of copy and fsync, or why it cannot be."""
    paths[1].unlink(missing_ok=True)
    source, target = os.open(paths[0], os.O_RDONLY), os.open(paths[1], os.O_RDWR | os.O_CREAT)
    try:
        if cold:
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(target, PLACES[place][1], os.SEEK_SET)
        start = time.perf_counter()
        engine(source, target, PLACES[place][0], count)
        os.fsync(target)
        return time.perf_counter() - start
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(source)
        os.close(target)


def bench(options: Options) -> None:
    """Measure, and print the figures."""
    count = int(options.gigabytes * 1e9)
    paths = options.source / "megapatch-bench-source", options.target / "megapatch-bench-target"
    try:
        with paths[0].open("wb") as file:
            for left in range(count + 4096, 0, -(1 << 24)):
                file.write(os.urandom(min(left, 1 << 24)))
            os.fsync(file.fileno())
        cases = [(name, place) for place in PLACES for name in ENGINES]
        rounds = [
            [timed(ENGINES[name], paths, place, count, options.cold) for name, place in cases]
            for _ in range(options.rounds)
        ]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    for (name, place), *found in zip(cases, *rounds, strict=True):
        seconds = [took for took in found if isinstance(took, float)]
        said = {"s": round(statistics.median(seconds), 3)} if seconds else {"error": found[0]}
        print(json.dumps({"engine": name, "place": place, **said}))


def main(argv: list[str] | None = None) -> int:
    """Exit status."""
    return run(Options, bench, prog="bench-engines", argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
