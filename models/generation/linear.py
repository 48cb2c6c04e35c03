"""Linear layers of the lean executor: a layer's own weight, or on a CPU a copy in the order that kernels read.

oneDNN's kernels for few rows are two to three times as fast on weights that were packed for them; the copy is made
anew when a weight's bits have changed, as they do with an optimizer's step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

_ROWS_TO_PACK = {torch.float32: 2, torch.bfloat16: 1}  # from so many on, packed weights are faster
_PACKED_FOR = 8  # rows: what the order of a packed weight is chosen for


def can_pack(weight: Tensor) -> bool:
    """Whether there are kernels for packed weights of this type here."""
    mkldnn = getattr(torch.ops, "mkldnn", None)
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.dtype not in _ROWS_TO_PACK:
        return False
    return weight.dtype == torch.float32 or bool(mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear:
    """x [t, h] -> x W^T + b [t, f]; with a group, W is cut along h and the processes' results are summed.

    One row is a vector: kernels for a matrix and a vector come a fifth closer to what memory can give.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, group: dist.ProcessGroup | None = None, packed: bool = True
    ) -> None:
        self.weight, self.bias, self.group = weight, bias, group
        self.packed: Tensor | None = None
        self.rows_to_pack = _ROWS_TO_PACK[weight.dtype] if packed and can_pack(weight) else None
        self._bits = torch.empty(0, dtype=torch.int64)

    def refresh(self) -> None:
        """Pack the weight again if its bits have changed."""
        if self.rows_to_pack is None:
            return
        bits = _sums_of_bits(self.weight)
        if not torch.equal(bits, self._bits):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _PACKED_FOR)
            self._bits = bits

    def __call__(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self._product(x, self.bias)
        out = self._product(x, None)
        dist.all_reduce(out, group=self.group)
        return out if self.bias is None else out.add_(self.bias)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` [t, f] + x W^T + b, in one kernel where there is one."""
        if self.packed is None or self.group is not None or len(x) < (self.rows_to_pack or 0):
            return residual + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is None or len(x) < (self.rows_to_pack or 0):
            return F.linear(x[0], self.weight, bias)[None] if len(x) == 1 else F.linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class ModuleLinear:
    """The module itself, which does more than a product: adapters, unit rows, another package's layer."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def refresh(self) -> None:
        """Nothing is kept of its weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """[t, h] -> [t, f]"""
        out, bias = self.module(x[:, None])
        return (out if bias is None else out + bias)[:, 0]

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` [t, f] + the layer's output."""
        return residual + self(x)


_CUT: dict[type, Callable[[Any], bool]] = {  # megatron-core's own layers: whether W is cut along h
    ColumnParallelLinear: lambda module: False,
    RowParallelLinear: lambda module: module.tp_group.size() > 1,
}


def linear(module: Any, packed: bool) -> Linear | ModuleLinear:
    """The product of a linear layer of a model."""
    plain = type(module) in _CUT and not (module._forward_hooks or module._forward_pre_hooks)
    if not plain or module.weight is None:
        return ModuleLinear(module)
    return Linear(module.weight, module.bias, module.tp_group if _CUT[type(module)](module) else None, packed)


def _sums_of_bits(weight: Tensor) -> Tensor:
    """A number for each row [f], of which some change when bits of the weight do, except by a rare accident."""
    row_bytes = weight.shape[1] * weight.itemsize
    words = next(kind for kind in (torch.int64, torch.int32, torch.int16) if row_bytes % kind.itemsize == 0)
    return weight.detach().contiguous().view(words).sum(1, dtype=torch.int64)
