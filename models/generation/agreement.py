"""One process of a group chooses tokens, and all have its answer: no rounding can lead two apart."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapatch.models.generation.sequences import Told
from megapatch.models.sampling import Choice, Row, choose, known

Rows = Sequence[tuple[int, Row]]  # a row of the logits, and how a token is chosen from it
Scored = Sequence[tuple[int, int]]  # a row of the logits, and the token that is known to follow


class Agreement:
    """The processes that make the same calls; ``has_logits`` on those that see the last layers."""

    def __init__(self, group: dist.ProcessGroup, has_logits: bool, device: torch.device) -> None:
        self.group, self.device = group, device
        self.chooser = self.least(group.rank() if has_logits else group.size())

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.group.size() == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def told(self, logits: Tensor | None, rows: Rows, scored: Scored, top: int) -> list[Told]:
        """A token for each of ``rows``, then what the model says of the ``scored``; logits [r, v] where there are any.

        ``top``: how many of the most probable tokens are told.
        """
        table = torch.empty(len(rows) + len(scored), 3 + 2 * top, dtype=torch.float64, device=self.device)
        if self.group.rank() == self.chooser and len(table):
            assert logits is not None
            chosen = choose(_taken(logits, [at for at, _ in rows]), [row for _, row in rows], top)
            given = known(_taken(logits, [at for at, _ in scored]), [token for _, token in scored], top)
            table = torch.cat([_table(chosen), _table(given)])
        if self.group.size() > 1 and len(table):
            dist.broadcast(table, dist.get_global_rank(self.group, self.chooser), self.group)
        return list(_told(table, top))


def default_group(config: Any) -> dist.ProcessGroup:
    """The processes that share a model: its tensor, pipeline and expert parallelism."""
    if config.expert_model_parallel_size > 1:
        return parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    return parallel_state.get_model_parallel_group()


def _taken(logits: Tensor, rows: list[int]) -> Tensor:
    """Rows of [r, v]; no copy when they are all."""
    return logits if rows == list(range(len(logits))) else logits[rows]


def _table(choice: Choice) -> Tensor:
    """[r, 3+2k] in fp64, which holds ids exactly: token, its log-probabilities, best tokens, theirs."""
    first = choice.tokens, choice.logprobs, choice.sampling_logprobs
    return torch.cat([torch.stack([x.double() for x in first], -1), choice.top_tokens, choice.top_logprobs], -1)


def _told(table: Tensor, top: int) -> Iterator[Told]:
    for token, logprob, sampling_logprob, *best in table.tolist():
        tokens = map(int, best[:top])
        yield Told(int(token), logprob, sampling_logprob, dict(zip(tokens, best[top:], strict=True)))
