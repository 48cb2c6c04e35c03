"""Options of the trainer: where the optimizer's state lies. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, Optional

from megapatch.models.cli import opt
from megapatch.models.planning.stages import AHEAD, default_chunk
from megapatch.models.space import count

AUTO = "auto"
SMALLEST = 64


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """What Adam keeps in host memory."""

    offload_optimizer: Optional[str] = opt(
        "share of Adam's moments and fp32 masters that lies in host memory, 0 to 1; or auto: as little as lets the run "
        "fit the device's memory (or --device-memory-gib), followed step by step. Results are the same to the bit",
        None,
        metavar="FRACTION|auto",
    )
    offload_engine: Literal["auto", "cpu", "stream"] = opt(
        "where that share is updated: cpu, by the host's processors; stream, on the device, to which it comes and from "
        "which it goes; auto: what is faster by a measurement at the start",
        "auto",
    )
    offload_chunk: Optional[int] = opt(
        "elements that are moved and updated at once, such as 8Mi (default: a sixteenth of a rank's, from 1Mi to 16Mi "
        "with the engine cpu, to 4Mi with stream, of which three are on the device)",
        None,
        type=count,
    )

    @property
    def offload_fraction(self) -> float | None:
        """The static share; None: automatic, or nothing is offloaded."""
        return None if self.offload_optimizer in (None, AUTO) else float(self.offload_optimizer)  # type: ignore[arg-type]

    @property
    def least_offloaded(self) -> float:
        """The share that is surely offloaded at need: all of it, where it is automatic."""
        return 1.0 if self.offload_optimizer == AUTO else self.offload_fraction or 0.0

    def streamed_bytes(self, parameters: int) -> int:
        """Bytes on the device for chunks on their way, of a rank of so many parameters, where --offload-engine asks."""
        if not self.least_offloaded or self.offload_engine != "stream":
            return 0
        return AHEAD * 3 * 4 * min(parameters, self.offload_chunk or default_chunk("stream", parameters))

    def refuse_offload(self) -> None:
        """ValueError where options do not go together."""
        given = self.offload_optimizer
        refused = {
            f"--offload-optimizer {given}: must be a number from 0 to 1, or auto": not _is_fraction(given),
            "--offload-engine needs --offload-optimizer": given is None and self.offload_engine != AUTO,
            "--offload-chunk needs --offload-optimizer": given is None and self.offload_chunk is not None,
            f"--offload-chunk {self.offload_chunk}: must be at least {SMALLEST}": (
                self.offload_chunk is not None and self.offload_chunk < SMALLEST
            ),
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)


def _is_fraction(text: str | None) -> bool:
    if text is None or text == AUTO:
        return True
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
