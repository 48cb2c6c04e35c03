"""What megatron-core 0.16.1 needs replaced to run without a GPU or without Transformer Engine."""

import logging
from typing import Any

import torch

from megapatch.models.patches import Patch, apply


def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """The state of the CPU's generator: the one that dropout draws from here."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the state of the CPU's generator."""
    torch.default_generator.set_state(new_state)


def splits_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A CPU tensor as it is, or as numpy: gloo takes split sizes as integers, not as a tensor."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


CPU_PATCHES = (
    Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        get_rng_state,
        "aa26caaa069c",
        "the random number tracker must fork the generator that the device draws from, on a CPU the default one",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        set_rng_state,
        "b179c9d95438",
        "the random number tracker must fork the generator that the device draws from, on a CPU the default one",
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        splits_to_host,
        "8fc5847a887d",
        "the all-to-all dispatcher turns split sizes into integers only when they are on a GPU",
    ),
)


def name_missing_te_gemm() -> None:
    """moe_utils reads ``te_general_gemm`` even where Transformer Engine is absent and the name was never set."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def quiet_rng_warning() -> None:
    """The tracker warns when the CPU's generator moves inside a fork; here the CPU is the device."""
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def install() -> None:
    """Apply all of the above."""
    apply(CPU_PATCHES)
    quiet_rng_warning()
