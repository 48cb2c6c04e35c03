"""How far a run is: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megapatch.models.request import Request

if TYPE_CHECKING:
    from megapatch.models.generation.engine import Statistics
    from megapatch.models.generation.sequences import Completion

log = logging.getLogger(__name__)
EVERY_S = 10.0


def most_tokens(request: Request) -> int:
    """Tokens that a request reads and generates, at most; the last one is not read."""
    return len(request.prompt) + max(0, request.sampling.max_new_tokens - 1)


def _tokens(statistics: "Statistics") -> int:
    return statistics.prefill_tokens + statistics.shared_tokens + statistics.decode_tokens


class Progress:
    """Tokens read and generated, of as many as there may be; what ends early is taken off."""

    def __init__(self, most: Sequence[int], what: str = "prompts", quiet: bool = False) -> None:
        """``most``: tokens of each, at most; ``quiet``: for processes that tell nothing."""
        self._most, self._left = most, sum(most)
        self._what, self._quiet = what, quiet
        self.num_done = self._tokens = 0
        self._started = self._told = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            self._bar = tqdm(total=self._left, unit=" tokens", unit_scale=True, desc=self._so_far(), leave=False)

    def _so_far(self) -> str:
        return f"{self.num_done} of {len(self._most)} {self._what}"

    def on_step(self, statistics: "Statistics") -> None:
        """Tell, every now and then."""
        self._step(_tokens(statistics))

    def _step(self, tokens: int) -> None:
        self._tokens = tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._tokens - self._bar.n)
        elif now - self._told >= EVERY_S and not self._quiet:
            self._told = now
            rate = self._tokens / max(now - self._started, 1e-9)
            left = timedelta(seconds=round(max(0, self._left - self._tokens) / max(rate, 1e-9)))
            log.info("%s done, %.1f tokens/s, at most %s left", self._so_far(), rate, left)

    def done(self, completion: "Completion") -> None:
        """One more has ended, perhaps early."""
        self.num_done += 1
        used = len(completion.request.prompt) + max(0, len(completion.token_ids) - 1)
        self._left -= self._most[completion.number] - used
        if self._bar is not None:
            self._bar.total = self._left
            self._bar.set_description_str(self._so_far())

    def following(self, before: "Statistics") -> Callable[["Statistics"], None]:
        """``on_step`` for an engine that has run before, with these statistics."""
        start = _tokens(before)

        def on_step(statistics: "Statistics") -> None:
            self._step(_tokens(statistics) - start)

        return on_step

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def closing_line(statistics: "Statistics") -> str:
    """Tokens and rates of a whole run."""
    prefill, decode = (
        f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s"
        for tokens, seconds in (
            (statistics.prefill_tokens, statistics.prefill_s),
            (statistics.decode_tokens, statistics.decode_s),
        )
    )
    drafted = f"; {statistics.accepted_tokens:,} of {statistics.proposed_tokens:,} drafted tokens accepted"
    return f"prefill: {prefill}; decode: {decode}{drafted if statistics.proposed_tokens else ''}"
