"""Options of mp-offload-bench, and what is measured where they say nothing. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megapatch.models.cli import Common, opt
from megapatch.models.space import count, short

MEASURES = ("bandwidth", "adam", "overlap", "sweep")
LINK_SIZES = tuple(2**power for power in range(16, 31, 2))  # 64 KiB to 1 GiB
EMULATED_SIZES = (2**20, 2**24)  # of a link between two parts of the same memory
MEMORY_SIZES = (256 << 20,)
CHUNKS = tuple(2**power for power in range(14, 25, 2))  # 16 Ki to 16 Mi elements
NUMEL, QUICK_NUMEL = 32 << 20, 16 << 20
NEEDS = {  # option: parts of --measure of which it needs one
    "sizes": ("bandwidth",),
    "chunks": ("adam",),
    "numel": ("adam", "overlap"),
    "threads": ("bandwidth", "adam"),
    "rounds": ("bandwidth", "adam", "overlap"),
    "quick": ("bandwidth", "adam", "overlap"),
    "ranks": ("adam", "sweep"),
    **dict.fromkeys(("steps", "fractions", "device_memory_gib", "recompute", "activations", "timeout_s"), ("sweep",)),
}


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Measure what offloading costs on this machine: link, host memory, CPU Adam, what runs beside what; and, with the
    trainer itself, what each way to save memory saves and costs."""

    measure: list[str] = opt(
        f"what to measure, of {', '.join(MEASURES)}", ["bandwidth", "adam", "overlap"], nargs="+", choices=MEASURES
    )
    numel: Optional[int] = opt(
        f"parameters in the Adam step, such as 64Mi (default: {short(NUMEL)}, with --quick {short(QUICK_NUMEL)})",
        None,
        type=count,
    )
    chunks: list[int] = opt(
        "elements in one chunk of the Adam step, such as 4Mi (default: 16Ki to 16Mi)", [], nargs="+", type=count
    )
    sizes: list[int] = opt(
        "bytes of one buffer, such as 64KiB (default: transfers of 64KiB to 1GiB, without a GPU of 1MiB and "
        "16MiB; memory arrays of 256MiB)",
        [],
        nargs="+",
        type=count,
    )
    threads: list[int] = opt(
        "CPU threads (default: 1, 2, 4, ... up to what torch would use, which OMP_NUM_THREADS limits)",
        [],
        nargs="+",
        type=count,
    )
    rounds: Optional[int] = opt(
        "rounds; the smallest time counts (default: 7, with --quick 3, fewer once the Adam steps took 40 or 5 seconds)",
        None,
        type=count,
    )
    ranks: int = opt("processes: Adam is also measured with so many at once; the sweep trains with them", 1)
    link_gb_per_s: Optional[float] = opt("without a GPU: emulate a link of this many GB/s in each direction", None)
    quick: bool = opt("smaller defaults: under 10 seconds, rougher figures", False)

    output: Optional[Path] = opt("for the sweep: folder for results, logs and the plot; a sweep goes on in it", None)
    steps: int = opt("for the sweep: optimizer steps of each point; the first two are not timed", 6)
    fractions: list[str] = opt(
        "for the sweep: values of --offload-optimizer, beside 0",
        ["0.25", "0.5", "0.75", "1", "auto"],
        nargs="*",
        metavar="FRACTION",
    )
    device_memory_gib: Optional[float] = opt(
        "for the sweep's point auto: memory of the device to fit, in GiB; without a GPU there is no such point "
        "unless this is given",
        None,
    )
    recompute: list[str] = opt(
        "for the sweep: values of --recompute, points of their own", ["full"], nargs="*", metavar="KIND"
    )
    activations: list[str] = opt(
        "for the sweep: values of --offload-activations, points of their own", [], nargs="*", metavar="LAYERS"
    )
    timeout_s: float = opt("for the sweep: seconds that a point may take", 3600.0)

    def __post_init__(self) -> None:
        """Check what argparse cannot."""
        for field in dataclasses.fields(self):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            parts = NEEDS.get(field.name, self.measure)
            if getattr(self, field.name) != default and not set(parts) & set(self.measure):
                flag = "--" + field.name.replace("_", "-")
                raise ValueError(f"{flag} has no effect without {' or '.join(parts)} in --measure")
        if ("sweep" in self.measure) != (self.output is not None):
            raise ValueError("--measure sweep and --output need each other")
        if self.steps < 1 or self.ranks < 1:
            raise ValueError("--steps and --ranks must be at least 1")
        for fraction in self.fractions:
            if fraction != "auto" and not _is_share(fraction):
                raise ValueError(f"--fractions {fraction}: must be numbers from 0 to 1, or auto")
        for flag, value in (("--timeout-s", self.timeout_s), ("--device-memory-gib", self.device_memory_gib)):
            if value is not None and not value > 0:
                raise ValueError(f"{flag} {value:g}: must be above 0")
        if self.link_gb_per_s is not None and not self.link_gb_per_s > 0:
            raise ValueError(f"--link-gb-per-s {self.link_gb_per_s}: must be above 0")

    @property
    def rate(self) -> float | None:
        """Bytes a second of the link to emulate."""
        return self.link_gb_per_s and self.link_gb_per_s * 1e9


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
