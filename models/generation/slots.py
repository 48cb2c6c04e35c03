"""Which sequence is in which slot of the cache, and what of its prompt another slot holds already."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megapatch.models.generation.sequences import Growing, common
from megapatch.models.layers.kv_cache import KeyValueCache

_WORTH = 8  # tokens in common that are copied rather than read again


class Reading(NamedTuple):
    """A part of a prompt, to be read in one pass."""

    sequence: Growing
    start: int
    length: int

    @property
    def ends(self) -> bool:
        """Whether it is the last part of the prompt."""
        return self.start + self.length == len(self.sequence.prompt)

    @property
    def wanted(self) -> range:
        """Which of its tokens need logits."""
        return range(max(0, min(self.sequence.unscored - self.start, self.length)), self.length)


class Slots:
    """Fills slots from what waits; those in use are the first ones."""

    def __init__(
        self,
        cache: KeyValueCache,
        waiting: Iterator[Growing],
        draft: KeyValueCache | None = None,
        content: Sequence[Growing | None] = (),
    ) -> None:
        """``draft``: the cache of a draft model, in which a sequence has the same slot; ``content``: who is in both."""
        self.cache, self.waiting, self.draft = cache, waiting, draft
        self.active: list[Growing | None] = []
        self.content = list(content) or [None] * cache.slots  # whose keys are there, ended or not
        self.shared_tokens = 0  # that were copied instead of read

    def sequences(self) -> list[Growing]:
        """Those in use, in order of their slots."""
        return [sequence for sequence in self.active if sequence]

    def admit(self) -> None:
        """Put what waits into free slots, first come, first served; close the gaps that remain."""
        for slot in range(self.cache.slots):
            if slot < len(self.active) and self.active[slot]:
                continue
            fresh = next(self.waiting, None)
            if fresh is None:
                break
            self.active[slot : slot + 1] = [fresh]
            self._place(fresh, slot)
        self._close_gaps()

    def _place(self, fresh: Growing, slot: int) -> None:
        fresh.slot = slot
        found = [(self._common(fresh, other), other.slot == slot, -other.slot, other) for other in self._others()]
        fresh.shared, _, _, fresh.source = max(found, key=lambda one: one[:3], default=(0, False, 0, None))
        if fresh.shared:
            self._share(fresh)
        else:
            fresh.source = None
        self.content[slot] = fresh

    def _others(self) -> list[Growing]:
        return [sequence for sequence in self.content if sequence]

    def _common(self, fresh: Growing, other: Growing) -> int:
        """Tokens of a new prompt that another sequence's slot holds, or will when its prompt is read."""
        there = other.prompt if other.reading else [*other.prompt, *other.token_ids][: other.cached]
        return min(common(fresh.prompt, there, _WORTH), fresh.unscored)

    def share(self) -> None:
        """Copy what has been read to those who waited for it (before anything ends)."""
        for sequence in self.sequences():
            if sequence.source:
                self._share(sequence)

    def _share(self, fresh: Growing) -> None:
        """Take the tokens in common from where they are; when they are being read, later."""
        source = fresh.source
        assert source is not None
        if source.reading and source.cached < fresh.shared:
            return
        fresh.source = None
        if self.cache.holds(source.cached, fresh.shared):
            fresh.cached, fresh.drafted = fresh.shared, min(source.drafted, fresh.shared)
            if source.slot != fresh.slot:
                self._copy(source.slot, fresh)
            self.shared_tokens += fresh.shared

    def _close_gaps(self) -> None:
        """Have the last sequences move into free slots."""
        for slot in range(len(self.active)):
            while self.active and self.active[-1] is None:
                self.active.pop()
            if slot < len(self.active) and self.active[slot] is None:
                last = self.active.pop()
                assert last is not None
                before, last.slot = last.slot, slot
                self._copy(before, last)
                self.active[slot] = self.content[slot] = last

    def _copy(self, slot: int, sequence: Growing) -> None:
        """Bring what a sequence has in the caches from a slot to its own."""
        self.cache.copy(slot, sequence.slot, sequence.cached)
        if self.draft:
            self.draft.copy(slot, sequence.slot, sequence.drafted)

    def readings(self, most_tokens: int, most_rows: int) -> list[Reading]:
        """Parts of prompts to be read in one pass of so many tokens, of which so many rows of logits are wanted."""
        parts: list[Reading] = []
        for sequence in self.sequences():
            if not sequence.reading or sequence.source:
                continue
            without = max(0, sequence.unscored - sequence.cached)  # tokens that need no logits
            length = min(len(sequence.prompt) - sequence.cached, most_tokens, without + most_rows)
            if length <= 0:
                break
            parts.append(Reading(sequence, sequence.cached, length))
            most_tokens, most_rows = most_tokens - length, most_rows - len(parts[-1].wanted)
        return parts

    def retire(self) -> list[Growing]:
        """Take out the sequences that have ended; their keys stay until the slot is taken."""
        ended = [sequence for sequence in self.sequences() if sequence.finish_reason]
        for sequence in ended:
            self.active[sequence.slot] = None
        return ended


def wanted_logits(
    parts: list[Reading],
) -> tuple[list[int], list[tuple[int, Growing]], list[tuple[int, Growing, int]]]:
    """Places of tokens whose logits are needed; which of these rows choose a token; which score a known one."""
    places: list[int] = []
    rows: list[tuple[int, Growing]] = []
    scored: list[tuple[int, Growing, int]] = []
    before = 0
    for part in parts:
        sequence, start, length = part
        for i in part.wanted:
            if start + i + 1 < len(sequence.prompt):
                scored.append((len(places), sequence, sequence.prompt[start + i + 1]))
            elif sequence.request.sampling.max_new_tokens:
                rows.append((len(places), sequence))
            places.append(before + i)
        before += length
    return places, rows, scored
