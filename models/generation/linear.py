"""Linear layers of the lean executor: a layer's own weight, or on a CPU a copy in the order that kernels read.

oneDNN's kernels for few rows are two to three times as fast on weights that were packed for them; the copy is made
anew when a weight's bits have changed, as they do with an optimizer's step.
"""

import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

_SENT_TO_ALL = 1 << 19  # bytes that a process sends at most so; more was not measured, and all_reduce sends less
_MANY = 16  # rows: what the order of a packed weight is chosen for, where it is not for one
_FEWEST = {torch.float32: 2, torch.bfloat16: 1}  # rows that a weight packed for many serves better than an unpacked one


def can_pack(weight: Tensor) -> bool:
    """Whether there are kernels for packed weights of this type here."""
    mkldnn = getattr(torch.ops, "mkldnn", None)
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.dtype not in _FEWEST:
        return False
    return weight.dtype == torch.float32 or bool(mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear:
    """x [t, h] -> x W^T + b [t, f]; with a group, W is cut along h and the processes' results are summed."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, group: dist.ProcessGroup | None = None, pack_for: int = 0
    ) -> None:
        """``pack_for``: tokens that most passes have; 0: never pack."""
        self.weight, self.bias, self.group = weight, bias, group
        self.packed: Tensor | None = None
        self.packs = bool(pack_for) and can_pack(weight)
        alone = pack_for == 1 and weight.dtype == torch.float32  # the order for one row is no good for more
        fewest = _FEWEST.get(weight.dtype, 1)
        self.pack_for, self.rows = (1, range(1, 2)) if alone else (_MANY, range(fewest, sys.maxsize))
        self._bits = torch.empty(0, dtype=torch.int64)

    @property
    def copy_bytes(self) -> int:
        """Of the packed copy; before there is one, of the weight, which it exceeds by little."""
        if self.packed is None:
            return self.weight.nbytes if self.packs else 0
        return int(torch.ops.mkldnn._nbytes(self.packed))

    def refresh(self) -> None:
        """Pack the weight again if its bits have changed."""
        if not self.packs:
            return
        bits = _sums_of_bits(self.weight)
        if not torch.equal(bits, self._bits):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), self.pack_for)
            self._bits = bits

    def __call__(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self._product(x, self.bias)
        out = summed(self._product(x, None), self.group)
        return out if self.bias is None else out.add_(self.bias)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` [t, f] + x W^T + b, in one kernel where there is one."""
        if self.packed is None or self.group is not None or len(x) not in self.rows:
            return residual + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is None or len(x) not in self.rows:
            return F.linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class ModuleLinear:
    """The module itself, which does more than a product: adapters, unit rows, another package's layer."""

    copy_bytes = 0

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


def linear(module: Any, pack_for: int) -> Linear | ModuleLinear:
    """The product of a linear layer of a model."""
    plain = type(module) in _CUT and not (module._forward_hooks or module._forward_pre_hooks)
    if not plain or module.weight is None:
        return ModuleLinear(module)
    return Linear(module.weight, module.bias, module.tp_group if _CUT[type(module)](module) else None, pack_for)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every process's ``x``, which it may change; the same bits in all of them.

    gloo's all_reduce goes around a ring twice, and each step of it wakes a thread: for little, sending all to everybody
    takes a third of the time (two processes, 3 to 400 KB).
    """
    size, mine = group.size(), group.rank()
    if x.device.type != "cpu" or x.nbytes * (size - 1) > _SENT_TO_ALL:
        dist.all_reduce(x, group=group)
        return x
    parts = [x if other == mine else torch.empty_like(x) for other in range(size)]
    others = [other for other in range(size) if other != mine]
    under_way = [dist.isend(x, group=group, group_dst=other) for other in others]
    under_way += [dist.irecv(parts[other], group=group, group_src=other) for other in others]
    for work in under_way:
        assert work is not None, "only a process outside the group has nothing to do"
        work.wait()
    return reduce(torch.add, parts)


def _sums_of_bits(weight: Tensor) -> Tensor:
    """A number for each row [f], of which some change when bits of the weight do, except by a rare accident."""
    row_bytes = weight.shape[1] * weight.itemsize
    words = next(kind for kind in (torch.int64, torch.int32, torch.int16) if row_bytes % kind.itemsize == 0)
    return weight.detach().contiguous().view(words).sum(1, dtype=torch.int64)
