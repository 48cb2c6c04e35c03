"""Speculation: a small model proposes the next tokens, the large one checks several in a pass.

What a token is, is a function of the logits, of what came before it, and of the request's random number at its place.
So a proposal is accepted when it is the very token that the large model chooses there, greedy or sampled, and the
answers are those that it gives alone.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from megapatch.models.generation.agreement import Agreement
from megapatch.models.generation.executors import Executor
from megapatch.models.generation.sequences import Growing
from megapatch.models.layers.kv_cache import KeyValueCache
from megapatch.models.sampling import Row

Forward = Callable[[Executor, KeyValueCache, Tensor, Sequence[int]], Tensor | None]


class Drafts:
    """Proposes up to ``tokens`` tokens for each sequence, with a cache of its own."""

    def __init__(
        self,
        executor: Executor,
        cache: KeyValueCache,
        tokens: int,
        prefill_tokens: int,
        forward: Forward,
        agreement: Agreement,
    ) -> None:
        self.executor, self.cache, self.tokens, self.prefill_tokens = executor, cache, tokens, prefill_tokens
        self.forward, self.agreement = forward, agreement

    def propose(self, active: Sequence[Growing]) -> list[list[int]]:
        """What may follow each sequence, which must have a token to go on from; nothing close to its end."""
        ahead: dict[Growing, list[int]] = {sequence: [] for sequence in active}
        while asked := [s for s in active if len(ahead[s]) < min(self.tokens, s.room - 1)]:
            self._step(asked, ahead)
        return [ahead[sequence] for sequence in active]

    def _step(self, asked: list[Growing], ahead: dict[Growing, list[int]]) -> None:
        """Read what is new to the small model, as much as one pass may; a proposal for those that are through."""
        parts: list[tuple[Growing, list[int]]] = []
        room = self.prefill_tokens
        for sequence in asked:
            new = [*sequence.prompt, *sequence.token_ids, *ahead[sequence]][sequence.drafted :][:room]
            room -= len(new)
            if new:
                parts.append((sequence, new))
        ends: list[int] = []
        rows: list[tuple[int, Row]] = []
        end = -1
        for sequence, new in parts:
            end += len(new)
            if sequence.drafted + len(new) == sequence.length + len(ahead[sequence]):
                rows.append((len(ends), sequence.row(ahead[sequence])))
            ends.append(end)
        slots, starts = [s.slot for s, _ in parts], [s.drafted for s, _ in parts]
        positions = self.cache.read(slots, starts, [len(new) for _, new in parts], ends)
        logits = self.forward(self.executor, self.cache, positions, [token for _, new in parts for token in new])
        for sequence, new in parts:
            sequence.drafted += len(new)
        through = [parts[at][0] for at, _ in rows]
        for sequence, found in zip(through, self.agreement.told(logits, rows, [], 0), strict=True):
            ahead[sequence].append(found.token)
