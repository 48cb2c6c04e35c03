"""What takes the place of functions while a model runs on tensors without content.

Where a GPU has one kernel and a CPU several operators, one operator that keeps what the kernel keeps, makes what it
makes, and reads and writes about as much; a routing of tokens to experts that is known beforehand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy
import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import random as core_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor

from megapatch.models.device import Device
from megapatch.models.layers import cross_entropy, norm
from megapatch.models.planning.meter import Meter, replaced

aten = torch.ops.aten


class Pretended(Device):
    """A GPU, as the configuration of a model sees it; its tensors say that they lie on a CPU.

    torch built without a GPU cannot run autograd for tensors of one, not even without content.
    """

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")

    def config(self) -> dict[str, Any]:
        """As on a GPU: activations and residual sums are fused, and what was sent on is given back."""
        fused = dict.fromkeys(("bias_activation_fusion", "bias_dropout_fusion", "deallocate_pipeline_outputs"), True)
        return super().config() | fused


class FusedNorm(torch.autograd.Function):
    """An RMS norm in one kernel: keeps its input and one number per token, as F.rms_norm does on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return grads[0] + x, torch.empty_like(weight), None


def swiglu(y: Tensor) -> Tensor:
    """[t, 2f] -> [t, f]"""
    gate, up = y.chunk(2, -1)
    return gate * up


def weighted_swiglu(y: Tensor, weights: Tensor) -> Tensor:
    """[t, 2f], [t, 1] -> [t, f]"""
    return swiglu(y)


def swiglu_back(grad: Tensor, y: Tensor) -> Tensor:
    """[t, f], [t, 2f] -> [t, 2f]"""
    out = torch.empty_like(y)
    for part, other in zip(out.chunk(2, -1), y.chunk(2, -1), strict=True):
        torch.mul(grad, other, out=part)
    return out


def weighted_swiglu_back(grad: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[t, f], [t, 2f], [t, 1] -> [t, 2f], [t, 1]"""
    return swiglu_back(grad, y), torch.empty_like(weights)


KERNELS: dict[tuple[Any, str], Any] = {
    (norm, "_RMSNorm"): FusedNorm,
    (fused_bias_swiglu, "swiglu"): swiglu,
    (fused_bias_swiglu, "swiglu_back"): swiglu_back,
    (fused_bias_swiglu, "weighted_swiglu"): weighted_swiglu,
    (fused_bias_swiglu, "weighted_swiglu_back"): weighted_swiglu_back,
}


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Bytes that flash-attention 2 has while it goes backward (mha_bwd): gradients of queries summed in fp32, and with
    grouped heads the gradients of keys and values of every query head."""
    wide = 4 * q.numel()
    grouped = 2 * k.numel() // k.shape[1] * q.shape[1] * k.element_size()
    return wide + (grouped if k.shape[1] != q.shape[1] else 0)


def workspace(device: Device) -> dict[Any, Callable[..., int]]:
    """Operators that hold more than their results while they run, and how many bytes."""
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return {backward: _flash_backward} if isinstance(device, Pretended) else {}


@contextmanager
def standing_in(device: Device, meter: Meter, load: float) -> Iterator[None]:
    """All of these in their places."""
    names: dict[tuple[Any, str], Any] = {
        (core_random, "_get_all_rng_states"): lambda: (None, None, None),
        (core_random, "_set_all_rng_states"): lambda *states: None,
        (type(core_random.get_cuda_rng_tracker()), "fork"): lambda tracker, name=None: nullcontext(),
        (torch.UntypedStorage, "copy_"): lambda storage, source, non_blocking=None: storage,
        (GlobalMemoryBuffer, "get_tensor"): _shared(meter),
        (cross_entropy, "_blocks"): _one_block(meter),
        (moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale"): None,
        (MoEAlltoAllTokenDispatcher, "preprocess"): _balanced(meter, load),
    }
    losses = moe_utils.get_moe_layer_wise_logging_tracker()  # for so many layers as the last model had
    losses.clear()
    with replaced(names | (KERNELS if isinstance(device, Pretended) else {})):
        yield
    losses.clear()


def converted(self: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Module._apply for tensors without content, which torch would swap and cannot."""
    for module in self.modules():
        for parameter in module._parameters.values():
            if parameter is not None and (made := function(parameter.detach())).dtype != parameter.dtype:
                parameter.data = made
        module._buffers.update({name: x if x is None else function(x) for name, x in module._buffers.items()})
    return self


def _shared(meter: Meter) -> Callable[..., Tensor]:
    """Buffers for what is gathered of a sequence: one for all layers."""
    get = GlobalMemoryBuffer.get_tensor

    def get_tensor(buffer: Any, *args: Any, **named: Any) -> Tensor:
        found: Tensor = get(buffer, *args, **named)
        meter.share(found)
        meter.shared = sum(x.untyped_storage().nbytes() for x in buffer.buffer.values())
        return found

    return get_tensor


def _one_block(meter: Meter) -> Callable[[Tensor], Iterator[slice]]:
    """Of the equal blocks of logits that the loss takes one after the other, the first, counted as often."""

    def blocks(logits: Tensor) -> Iterator[slice]:
        size = min(max(1, cross_entropy._NUMBERS // logits.shape[1]), logits.shape[0])
        meter.times = logits.shape[0] / size
        yield slice(0, size)
        meter.times = 1.0

    return blocks


def _balanced(meter: Meter, load: float) -> Callable[..., Any]:
    """Every expert gets the same number of tokens; those of this rank ``load`` times as many, if there are others."""

    def preprocess(self: Any, routing_map: Tensor) -> numpy.ndarray:
        tokens, experts = routing_map.shape
        chosen = tokens * self.config.moe_router_topk
        each = numpy.full(experts, chosen // experts)
        each[: chosen % experts] += 1
        meter.chosen = self.num_out_tokens = chosen
        local, ranks = self.num_local_experts, self.ep_size * self.tp_size
        mine = each[self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        got = numpy.ceil(mine * load).astype(int) if self.ep_size > 1 else mine
        if ranks > 1:
            self.input_splits = each.reshape(self.ep_size, local).sum(1)
            self.output_splits = numpy.full(self.ep_size, got.sum())
            self.output_splits_tp = numpy.full(self.tp_size, got.sum() * self.ep_size)
        self.num_global_tokens_per_local_expert = numpy.tile(got, (ranks, 1))
        chunks = numpy.arange(experts * self.tp_size)
        self.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
        self.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()
        return got * ranks

    return preprocess
