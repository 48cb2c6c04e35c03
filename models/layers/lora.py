"""Low-rank adapters in a built model: beside megatron-core's linear layers, in any layout of tensor parallelism.

Of lora_A [parts*r, in] and lora_B [out, r], the one that meets the axis along which the weight is cut is cut like it;
the other is whole on every process. What is communicated is r wide.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megapatch.models.cuts import HALVES, Region, cut_of, regions
from megapatch.models.load import unwrapped
from megapatch.models.lora import A, B, Lora, Start, Target, part_of_rows, targets
from megapatch.models.shapes import Layout


class _Adapted:
    """What both kinds of linear layer with an adapter have; their class is set by ``attach``."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_mask: Tensor | None  # [out, parts, 1]: 1 where the row of the weight is of the part; None: all of it is of one
    lora: Lora
    halves: bool
    _axes: ClassVar[dict[str, int]]  # on which each is cut
    tp_group: Any
    sequence_parallel: bool
    training: bool

    def narrowed(self, x: Tensor, apart: bool) -> Tensor:
        """[s, b, in] -> A x, [s, b, parts*r]; ``apart``: the processes hold different parts of x."""
        if self.lora.dropout and self.training:
            with get_cuda_rng_tracker().fork() if apart else nullcontext():
                x = F.dropout(x, self.lora.dropout)
        return F.linear(x, self.lora_A)

    def widened(self, narrow: Tensor) -> Tensor:
        """[s, b, parts*r] -> B, row by row with its part's share, times the scale, [s, b, out]"""
        wide = self.lora_B if self.lora_mask is None else (self.lora_B[:, None] * self.lora_mask).flatten(1)
        return F.linear(narrow, wide) * self.lora.scale

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core shards the layer, and the adapter beside it."""
        made = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = {A: self.lora_A, B: self.lora_B}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        made |= make_sharded_tensors_for_checkpoint(own, prefix, self._axes, sharded_offsets, **groups)
        if self.halves:
            made[prefix + B] = apply_swiglu_sharded_factory(
                made[prefix + B], sharded_offsets, metadata.get("singleton_local_shards", False)
            )
        return made


class AdaptedColumn(_Adapted, ColumnParallelLinear):
    """W x + B A x with rows of W and B on each process."""

    _axes: ClassVar = {B: 0}

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] (with sequence parallelism a part of s) -> [s, b, out/tp], and the bias to add."""
        output, bias = super().forward(input_, *args, **kwargs)
        narrow = self.narrowed(input_, apart=self.sequence_parallel)
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.tp_group)
        return output + self.widened(narrow), bias


class AdaptedRow(_Adapted, RowParallelLinear):
    """W x + B A x with columns of W and A on each process."""

    _axes: ClassVar = {A: 1}

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in/tp] -> [s, b, out] (with sequence parallelism a part of s), and the bias to add."""
        output, bias = super().forward(input_)
        narrow = self.narrowed(input_, apart=self.tp_group.size() > 1)
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        return output + self.widened(reduce(narrow, group=self.tp_group)), bias


_ADAPTED = {ColumnParallelLinear: AdaptedColumn, RowParallelLinear: AdaptedRow}


def attach(chunks: Sequence[torch.nn.Module], layout: Layout, start: Start, *, recompute: bool) -> None:
    """Freeze the chunks of a model and give them adapters with these first values; only they can be trained."""
    by_layer: dict[int | None, list[Target]] = {}
    for target in targets(layout, start.lora):
        by_layer.setdefault(target.placed.layer, []).append(target)
    for chunk in chunks:
        chunk.requires_grad_(False)
        model = unwrapped(chunk)
        for layer in model.decoder.layers:
            for target in by_layer.get(layer.layer_number - 1, []):
                _adapt(layer.get_submodule(target.module), layout, target, start)
        if recompute and model.pre_process:  # megatron-core's recomputed layers learn only if their input asks for it
            model.embedding.register_forward_hook(_ask_for_gradients)


def _ask_for_gradients(module: Any, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _adapt(linear: Any, layout: Layout, target: Target, start: Start) -> None:
    """Make a linear layer one with an adapter (its class changes, as torch's parametrizations do it)."""
    kind = _ADAPTED.get(type(linear))
    assert kind is not None and not getattr(linear, "gather_output", False), f"{target.module}: {type(linear)}"
    core, ((rows, columns), blocks) = target.placed.rule.core, layout.packed(target.placed)
    size, rank = linear.tp_group.size(), linear.tp_group.rank()
    cut = cut_of(core, linear.config.gated_linear_unit, size)
    held = regions(cut, rows, columns, rank, size)
    found = {part: torch.zeros(rows, start.lora.rank) for part in range(len(target.placed.hf))}
    for part, name in zip(target.parts, target.names(), strict=True):
        found[part] = start.b(name, sum(block.rows for block in blocks if block.part == part))
    left = torch.cat([found[b.part][b.start : b.start + b.rows] for b in blocks])
    right = torch.cat([start.a(name, columns) for name in target.names()])
    parts = torch.tensor(part_of_rows(layout, target.placed))
    mine = torch.cat([parts[r.row : r.row + r.rows] for r in held])
    linear.__class__ = kind
    linear.lora, linear.halves = start.lora, cut == HALVES
    like = linear.weight
    linear.lora_A = _parameter(_columns(right, held[0]), like)
    linear.lora_B = _parameter(torch.cat([left[r.row : r.row + r.rows] for r in held]), like)
    mask = (mine[:, None] == torch.tensor(target.parts)).to(like)[..., None]  # [out, parts, 1]
    linear.register_buffer("lora_mask", None if mask.all() else mask, persistent=False)
    for name in (A, B) if size > 1 else ():
        parameter = getattr(linear, name)
        if name in kind._axes:
            set_tensor_model_parallel_attributes(parameter, True, kind._axes[name], 1)
        else:  # with sequence parallelism its gradient is of a part of the tokens
            parameter.sequence_parallel = linear.sequence_parallel


def _columns(whole: Tensor, region: Region) -> Tensor:
    return whole[:, region.column : region.column + region.columns]


def _parameter(values: Tensor, like: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.to(like.device, like.dtype).contiguous())
