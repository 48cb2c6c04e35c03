"""Weights on a CPU: their products by the fastest library, their gradients added to the buffers without a detour."""

from collections.abc import Callable
from typing import Any

import torch

from megapatch.models.layers.products import Linear, lookup
from megapatch.models.patches import Patch


def gradient_hook(self: Any, parameter: torch.nn.Parameter) -> Callable[..., None]:
    """What data parallelism does when a parameter's gradient is there; None: it is in the buffer already."""

    def hook(*_: Any) -> None:
        if parameter not in self.param_to_bucket_group:
            return
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
            parameter.grad = None
        if self.ddp_config.overlap_grad_reduce:
            self.param_to_bucket_group[parameter].register_grad_ready(parameter, self.force_all_reduce)

    return hook


PRODUCTS = (
    Patch(
        "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",
        Linear,
        "a2f6825a10f3",
        "upstream multiplies by MKL, and adds gradients to their buffer in a pass of its own unless Apex is there",
    ),
    Patch(
        "megatron.core.tensor_parallel.layers:VocabParallelEmbedding.forward",
        lookup,
        "efb6ff221727",
        "the gradient of a table is as large as the table, for a few rows that were read",
    ),
    Patch(
        "megatron.core.distributed:DistributedDataParallel._make_backward_post_hook",
        gradient_hook,
        "7cb975df73c5",
        "with --overlap-grad-reduce upstream refuses gradients that are in their buffer before the hook runs",
    ),
)
