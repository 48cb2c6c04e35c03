"""Communication that runs beside computation: options, and what they ask of the device before it starts.

Between pipeline stages, sends and receives run beside computation wherever stages are interleaved (--vpp).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from megapatch.models.cli import UserError, opt

if TYPE_CHECKING:
    from megapatch.models.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class OverlapOptions:
    """Which communication does not wait for computation, nor computation for it."""

    use_distributed_optimizer: bool = opt("cut optimizer state over data-parallel ranks", False)
    overlap_grad_reduce: bool = opt("reduce gradients while the backward pass runs", False)
    overlap_param_gather: bool = opt("gather parameters while the forward pass runs", False)
    ddp_bucket_size: Optional[int] = opt(
        "parameters reduced or gathered at once, if not the larger of 40 million and 1 million x data-parallel ranks",
        None,
    )
    tp_comm_overlap: bool = opt(
        "split matrix products so that --tp communication runs beside them (needs Transformer Engine)", False
    )

    def refuse_overlap(self, parallel: "Parallel") -> None:
        """ValueError where options do not go together."""
        refused = {
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce": (
                self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce)
            ),
            "--ddp-bucket-size needs --overlap-grad-reduce; without it gradients are reduced in one piece": (
                self.ddp_bucket_size is not None and not self.overlap_grad_reduce
            ),
            f"--ddp-bucket-size {self.ddp_bucket_size}: must be at least 1": self.ddp_bucket_size is not None
            and self.ddp_bucket_size < 1,
            "--tp-comm-overlap needs --tp above 1 and --sequence-parallel": (
                self.tp_comm_overlap and not parallel.sequence_parallel
            ),
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)

    def overlap_config(self, *, engine: bool, why_not: str) -> dict[str, Any]:
        """TransformerConfig fields; UserError where the layers are not Transformer Engine's, and why they are not."""
        if self.tp_comm_overlap and not engine:
            raise UserError(f"--tp-comm-overlap: only Transformer Engine splits matrix products, and {why_not}")
        return {"tp_comm_overlap": True} if self.tp_comm_overlap else {}


def connections(parallel: "Parallel") -> tuple[int, str]:
    """Queues from the host to a GPU (its driver's 'max connections') that a layout wants, and why.

    With one queue kernels start in the order in which they are launched: megatron-core relies on it so that the
    communication of --tp and --cp starts before the matrix product beside it. But one queue makes reductions of
    gradients wait for all computation launched before (NVIDIA/Megatron-LM issues 827 and 1468).
    """
    for flag, size in (("--tp", parallel.tp), ("--cp", parallel.cp)):
        if size > 1:
            return 1, f"{flag} {size}: communication must start in the order of its launch"
    if parallel.ep > 1:
        return 32, f"--ep {parallel.ep}: exchange of tokens and reduction of gradients run beside computation"
    return 8, "no --tp, --cp or --ep: reduction of gradients runs beside computation"
