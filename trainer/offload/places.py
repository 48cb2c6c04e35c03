"""Where megatron-core's optimizers keep what a rank updates: shards of gradient and parameter buffers."""

from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megapatch.trainer.offload.chunks import Shard, Span


def shards(part: Any, wrapped: list[Any]) -> list[Shard]:
    """What ``part`` updates on this rank, last layers first; ``wrapped``: model chunks with their buffers."""
    return list(_of_buckets(part) if isinstance(part, DistributedOptimizer) else _of_buffers(part, wrapped))


def _of_buckets(part: DistributedOptimizer) -> Iterator[Shard]:
    """A rank's share of each bucket."""
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (of_buckets,) = ranges.values()
        rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
        for bucket, found in zip(buffer.buckets, of_buckets, strict=True):
            spans = [
                Span(
                    parameter,
                    part.model_param_group_index_map[parameter][0],
                    place["gbuf_local"].start,
                    place["gbuf_local"].end,
                    place["param"].start,
                )
                for parameter, place in found["param_map"].items()
            ]
            if spans:
                gradient, weights = (data.view(-1).chunk(size)[rank] for data in (bucket.grad_data, bucket.param_data))
                yield Shard(sorted(spans, key=lambda span: span.start), gradient, weights)


def _of_buffers(part: Any, wrapped: list[Any]) -> Iterator[Shard]:
    """Whole buffers: every data-parallel rank updates all of them; parameters lie apart."""
    groups = group_of(part)
    for buffer in (b for model in wrapped for b in (*model.buffers, *model.expert_parallel_buffers)):
        spans = [
            Span(parameter, groups[parameter], start, stop, 0)
            for parameter, (start, stop, _) in buffer.param_index_map.items()
            if parameter in groups
        ]
        if spans:
            yield Shard(sorted(spans, key=lambda span: span.start), buffer.grad_data.view(-1), None)


def group_of(part: Any) -> dict[Any, int]:
    """The parameter group of each of the model's parameters, for an optimizer that is not distributed."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        both = zip(part.float16_groups, part.fp32_from_fp32_groups, strict=True)
        return {parameter: i for i, kinds in enumerate(both) for kind in kinds for parameter in kind}
    return {parameter: i for i, group in enumerate(part.optimizer.param_groups) for parameter in group["params"]}
