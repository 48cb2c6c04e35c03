"""One rank's share of a global batch of conversations as tensors, and what is counted over all ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.packed_rows import Row, share_of_rank
from megapatch.trainer.data.gpt_data import FIELDS
from megapatch.trainer.data.sources import BySource
from megapatch.trainer.tuning.sft_data import Blend
from megapatch.trainer.tuning.sft_options import SftOptions

COUNTED = ("weight", "trained_tokens", "tokens", "conversations")


def token_weights(row: Row, normalisation: str) -> tuple[np.ndarray, float]:
    """What the loss of each token of a row counts, float32 [s], and the sum that a mean divides by."""
    mask = row.loss_mask.astype(np.float64)
    if normalisation == "token":
        return row.loss_mask, float(mask.sum())
    sums = np.add.reduceat(mask, row.cu_seqlens[:-1])  # no label belongs to the next conversation
    each = np.where(sums > 0, sums, 1)
    return (mask / np.repeat(each, np.diff(row.cu_seqlens))).astype(np.float32), float((sums > 0).sum())


class GlobalBatch:
    """This rank's micro-batches of the samples from ``first`` on, as often as called; every rank must make one."""

    def __init__(self, blend: Blend, first: int, losses: BySource, *, options: SftOptions, vocab_size: int) -> None:
        """``losses`` are told of the forward passes."""
        self.options, self.losses, self.device = options, losses, losses.sums.device
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        width = options.micro_batch_size
        starts = range(first + rank * width, first + options.global_batch_size, size * width)
        samples = [[blend[i] for i in range(start, start + width)] for start in starts]
        self.passes = [[row for _, row in some] for some in samples]
        self.which = [[which for which, _ in some] for some in samples]
        self.weights = [[token_weights(row, options.loss_normalisation) for row in rows] for rows in self.passes]
        self._count(blend, [which for some in self.which for which in some])
        for start, rows in zip(starts, self.passes, strict=True):
            largest = max(int(row.tokens.max()) for row in rows)
            if largest >= vocab_size:
                raise UserError(
                    f"{', '.join(blend.names)}: token {largest} in samples {start} to {start + width - 1}, the model's "
                    f"vocabulary ends at {vocab_size - 1}; run mp-preprocess-chat with the model's tokenizer"
                )

    def _count(self, blend: Blend, sources: list[int]) -> None:
        """Sums over all ranks."""
        rows = [row for rows in self.passes for row in rows]
        trained = [float((row.loss_mask > 0).sum()) for row in rows]
        lengths = [blend.sets[which].data.lengths[row.conversations] for which, row in zip(sources, rows, strict=True)]
        by_source = np.bincount(sources, trained, len(blend.sets))
        weight = sum(weight for weights in self.weights for _, weight in weights)
        mine = [weight, sum(trained), float(sum(map(np.sum, lengths))), float(sum(map(len, lengths))), *by_source]
        found = torch.tensor(mine, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(found, group=parallel_state.get_data_parallel_group())
        self.counts = dict(zip(COUNTED, found.tolist(), strict=False))
        self.sources = dict(zip(blend.names, map(round, found.tolist()[len(COUNTED) :]), strict=True))

    @property
    def said(self) -> dict[str, Any]:
        """For the log of a step."""
        options = self.options
        fill = self.counts["tokens"] / (options.global_batch_size * options.seq_length)
        found: dict[str, Any] = {name: round(self.counts[name]) for name in ("trained_tokens", "conversations")}
        found["fill"] = fill
        if len(self.sources) > 1:
            found["trained_tokens_of"] = self.sources
        return found

    def __call__(self) -> Iterator[dict[str, Any]]:
        for rows, weights, which in zip(self.passes, self.weights, self.which, strict=True):
            fields = _fields(rows, weights, which)
            batch = self._packed(rows, fields) if self.options.packing else self._padded(fields)
            source = batch.pop("source")
            yield batch | {"weighing": self._weighing(batch["tokens"], source)}

    def _weighing(self, tokens: Tensor, source: Tensor) -> dict[str, Any]:
        """What trainer.step scales by: megatron-core divides by the places of the global batch, we by its weights."""
        places = self.options.global_batch_size * self.options.seq_length
        weight = self.counts["weight"]
        return {
            "scale": places / weight if weight else 0.0,
            "count": torch.tensor(tokens.numel(), dtype=torch.int, device=self.device),
            "watch": self.losses.watching(source),
        }

    def _packed(self, rows: list[Row], fields: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """Rows joined into one, [1, rows x s/cp], with the boundaries of their conversations."""
        starts = np.arange(len(rows), dtype=np.int32) * self.options.seq_length
        inner = [row.cu_seqlens[1:] + start for row, start in zip(rows, starts, strict=True)]
        bounds = np.concatenate([np.zeros(1, np.int32), *inner])
        places: Any = slice(None)
        if self.options.cp > 1:
            places = share_of_rank(bounds, parallel_state.get_context_parallel_rank(), self.options.cp)
        batch = {name: self._tensor(np.concatenate(parts)[places])[None] for name, parts in fields.items()}
        ends, longest = self._tensor(bounds), max(row.max_seqlen for row in rows)
        return batch | {"packed": PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)}

    def _padded(self, fields: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """One conversation a row, [rows, s/cp]."""
        batch = {name: self._tensor(np.stack(parts)) for name, parts in fields.items()}
        return get_batch_on_this_cp_rank(batch)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


def _fields(rows: list[Row], weights: list[tuple[np.ndarray, float]], which: list[int]) -> dict[str, list[np.ndarray]]:
    """Each of FIELDS of every row, what its tokens count, and the set that it is of."""
    found = {name: [getattr(row, name) for row in rows] for name in FIELDS}
    sources = [np.full(len(row.tokens), number) for row, number in zip(rows, which, strict=True)]
    return found | {"loss_mask": [mask for mask, _ in weights], "source": sources}
