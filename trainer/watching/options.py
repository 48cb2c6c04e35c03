"""Options of every kind of training: what is shown of a run while it goes, and planned for it before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megapatch.models.cli import opt
from megapatch.models.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class Watching(Parallel):
    """What a training run tells of itself."""

    log_file: Optional[Path] = opt("JSON-lines log, if not SAVE/log.jsonl", None)
    log_interval: int = opt("steps between lines on stderr; the log has every step", 1)
    tensorboard: Optional[Path] = opt("folder for TensorBoard (needs the extra 'tb')", None)
    wandb: Optional[str] = opt("Weights & Biases project (needs the extra 'wandb')", None)
    report_interval: float = opt(
        "seconds between updates of SAVE/report.html, which mp-report writes beside the training; 0: none", 0.0
    )
    peak_tflops: Optional[float] = opt(
        "peak of one device in TFLOP/s, for the MFU in the log; known for bf16, dense, from NVIDIA's data sheets: "
        "A100 312, H100 SXM 989.5, H100 PCIe 756.5, H200 989.5, H200 NVL 835.5; on other devices, in fp32 and on a "
        "CPU no MFU is told without it",
        None,
    )
    profile_steps: Optional[str] = opt(
        "steps to profile, counted from 1, both ends included: traces (Chrome's JSON) and a table of operators and of "
        "communication go to SAVE/profile",
        None,
        metavar="FIRST:LAST",
    )
    profile_ranks: list[int] = opt("ranks to profile", [0], nargs="+", metavar="RANK")

    dry_run: bool = opt(
        "print the resolved configuration, who owns what, sizes, memory and FLOPs as JSON, a table to stderr; and stop",
        False,
    )
    dry_run_rank: Optional[int] = opt(
        "with --dry-run: also build this rank's part of the model, without memory, and count its parameters", None
    )
    world_size: Optional[int] = opt(
        "processes that the run is for: another number of them is refused, and --dry-run plans for so many", None
    )
    device_memory_gib: Optional[float] = opt(
        "memory of one device in GiB: a run whose estimate is above does not start, nor does its --dry-run end well",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile_steps is not None:
            self.profiled()
        if self.dry_run_rank is not None and not self.dry_run:
            raise ValueError("--dry-run-rank needs --dry-run")
        for flag, least in {"peak_tflops": 0, "device_memory_gib": 0, "world_size": 0}.items():
            value = getattr(self, flag)
            if value is not None and not value > least:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be above {least}")
        if not self.report_interval >= 0:
            raise ValueError(f"--report-interval {self.report_interval}: must be 0 or more")
        if any(rank < 0 for rank in self.profile_ranks):
            raise ValueError("--profile-ranks: ranks are counted from 0")
        if self.profile_steps is None and self.profile_ranks != [0]:
            raise ValueError("--profile-ranks needs --profile-steps")

    def profiled(self) -> range:
        """The steps that --profile-steps names, counted from 1; none without it."""
        if self.profile_steps is None:
            return range(0)
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"--profile-steps {self.profile_steps}: expected FIRST:LAST, for example 5:6")
        return range(int(first), int(last) + 1)
