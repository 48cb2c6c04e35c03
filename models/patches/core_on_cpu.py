"""What megatron-core 0.16.1 needs replaced to run without a GPU or without Transformer Engine."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

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


_even_gather, _even_reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim


def gather_first_dim(
    x: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """[n, ...] -> [sum of n over ranks, ...]; uneven parts are padded on the way."""
    if output_split_sizes is None or group.size() == 1:
        return _even_gather(x, group, None, use_global_buffer)
    most = max(output_split_sizes)
    out = x.new_empty((group.size() * most, *x.shape[1:]))
    dist.all_gather_into_tensor(out, _padded(x, most), group=group)
    return torch.cat([part[:n] for part, n in zip(out.split(most), output_split_sizes, strict=True)])


def reduce_scatter_first_dim(
    x: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """[sum of n over ranks, ...] -> this rank's [n, ...], summed; uneven parts are padded on the way."""
    if input_split_sizes is None or group.size() == 1:
        return _even_reduce_scatter(x, group, None, use_global_buffer)
    most = max(input_split_sizes)
    sizes = [int(n) for n in input_split_sizes]
    parts = torch.cat([_padded(part, most) for part in x.split(sizes)])
    out = x.new_empty((most, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, parts, group=group)
    return out[: sizes[group.rank()]]


def _padded(x: Tensor, rows: int) -> Tensor:
    """[n, ...] -> [rows, ...], zeros after the end."""
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, int(rows) - x.shape[0]])


def keep_inputs_only(self: Any, fp8: Any = False) -> None:
    """A checkpoint that discards its output; ``fp8``: whether the function multiplies in 8 bits."""
    self.fp8 = bool(fp8)
    self.run_function = self.ctx = self.outputs = None
    self.fwd_cpu_rng_state = self.fwd_cuda_rng_state = self.fwd_cuda_rng_state_tracker = None


NO_ENGINE_PATCH = Patch(
    "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
    keep_inputs_only,
    "72036565b771",
    "its default, False, is taken for FP8 ('is not None'), and asks Transformer Engine, which is not there",
)
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
    Patch(
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        gather_first_dim,
        "44633fe36d60",
        "gloo gathers equal parts only; experts with --etp get unequal numbers of tokens",
    ),
    Patch(
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        reduce_scatter_first_dim,
        "7322068fab71",
        "gloo scatters equal parts only; experts with --etp get unequal numbers of tokens",
    ),
)


def tell_missing_engine() -> None:
    """Without Transformer Engine moe_utils still reads ``te_general_gemm``; latent attention believes it is there."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not isinstance(multi_latent_attention.TELinear, type):  # made of stand-ins for the missing package
        multi_latent_attention.HAVE_TE = False
    apply((NO_ENGINE_PATCH,))
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
