"""Options of every kind of training: what is saved when, and what happens when something goes wrong."""

from dataclasses import dataclass

from megapatch.models.cli import opt
from megapatch.models.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class ReliabilityOptions(Parallel):
    """How a training run guards against losing work."""

    save_interval: int = opt("steps between checkpoints; 0: only at the end", 0)
    async_save: bool = opt(
        "write checkpoints beside the training, from a copy in the host's memory (weights and optimizer once more)",
        False,
    )
    no_save: bool = opt("write no checkpoints, for a run that is only measured, whatever --save-interval says", False)
    keep: int = opt("newest checkpoints to keep; 0 keeps all", 0)
    max_nan: int = opt("steps in a row with a loss or gradient that is not finite to skip before giving up", 3)
    timeout_s: float = opt("seconds to wait for another rank before giving up", 1800.0)
    watchdog_s: float = opt(
        "seconds without a sign of life from a rank, or without progress, until the run ends itself, names the rank "
        "and writes where each rank is to stderr and SAVE/stacks; 0: no watchdog",
        600.0,
    )
    log_sample_ids: bool = opt(
        "log which samples each step read over all ranks, of which documents, and from which token on", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("save_interval", "keep", "max_nan", "watchdog_s"):
            if not getattr(self, flag) >= 0:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: must be 0 or more")
        if not self.timeout_s > 0:
            raise ValueError(f"--timeout-s {self.timeout_s}: must be above 0")
