"""A completion while it grows, and what is told of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megapatch.models.request import Request
from megapatch.models.sampling import Row, uniform
from megapatch.models.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # of the prompt, shown to the decoder: whether a text starts with a space depends on them


class Told(NamedTuple):
    """What the model says of one token."""

    token: int
    logprob: float  # under the model's own distribution
    sampling_logprob: float  # under the distribution that it was drawn from
    top: dict[int, float]  # the most probable tokens at its place and their log-probabilities, best first


@dataclass(frozen=True)
class Piece:
    """A token of a completion as soon as it is there, for a reader who waits."""

    number: int  # of the request
    request: Request  # ``request.sample`` is the number of the completion
    token: int
    text: str  # that is certain now: what may become half a character or a stop string is held back
    finish_reason: Literal["stop", "length"] | None


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    number: int  # of the request, from 0
    request: Request  # ``request.sample`` is the number of the completion
    token_ids: list[int]  # the token or tokens that ended it included
    text: str | None  # without what ended it; None when the engine has no tokenizer
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]  # of each token, under the model's own distribution
    sampling_logprobs: list[float]  # of each token, under the distribution it was drawn from
    stop: int | str | None = None  # the token or string that ended it
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # at the place of each token, best first
    prompt_logprobs: list[float] = field(default_factory=list)  # of the prompt's tokens from ``scored_from`` on
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass(eq=False)
class Growing:
    """One sample of a request: what is there of it, and how much of that the cache holds."""

    number: int
    request: Request
    max_length: int
    tokenizer: Tokenizer | None
    slot: int = -1
    cached: int = 0  # tokens of prompt and completion that the cache holds
    drafted: int = 0  # that the cache of a draft model holds
    source: "Growing | None" = None  # whose prompt is being read, and begins as this one's
    shared: int = 0  # tokens that the two have in common
    told: list[Told] = field(default_factory=list)
    told_of_prompt: list[Told] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop: int | str | None = None
    text: str = ""

    def __post_init__(self) -> None:
        assert self.tokenizer or not self.request.sampling.stop, "stop strings need a tokenizer"
        self.prompt = list(self.request.prompt)
        self._shown = self._sought = 0  # characters that were told, and from which on stop strings are looked for
        self._stream: Any = None
        if self.tokenizer:
            self._stream = self.tokenizer.stream(skip_special_tokens=True)
            context = self.prompt[-_CONTEXT_TOKENS:]
            if not self.tokenizer.decode(context).endswith("\ufffd"):  # or its half character would show in our text
                for token in context:
                    self._stream.push(token)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what has followed."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def reading(self) -> bool:
        """Whether there is more of the prompt to read."""
        return self.cached < len(self.prompt)

    @property
    def unscored(self) -> int:
        """How many of the prompt's first tokens need no logits."""
        request = self.request
        return request.scored_from - 1 if request.sampling.prompt_logprobs else len(self.prompt) - 1

    @property
    def last(self) -> int:
        """The token that came last, whose place in the cache comes next."""
        return self.token_ids[-1]

    @property
    def room(self) -> int:
        """How many tokens there may be yet."""
        return min(self.request.sampling.max_new_tokens - len(self.token_ids), self.max_length - self.length)

    def row(self, ahead: Sequence[int] = ()) -> Row:
        """How the next token is chosen, should ``ahead`` come before it."""
        sampling = self.request.sampling
        step = len(self.token_ids) + len(ahead)
        draw = uniform(sampling.seed, self.request.key, self.request.sample, step) if sampling.temperature else 0.0
        return Row(sampling, draw, self.prompt, [*self.token_ids, *ahead] if ahead else self.token_ids)

    def end_of_prompt(self) -> None:
        """All of the prompt is read; that may be all that was asked for."""
        if self.request.sampling.max_new_tokens == 0:
            self.finish_reason = "length"

    def add_of_prompt(self, told: Told) -> None:
        """What the model says of the prompt's next token."""
        self.told_of_prompt.append(self._asked(told))

    def _asked(self, told: Told) -> Told:
        """Without alternatives that only a neighbour asked for."""
        return told._replace(top=dict(list(told.top.items())[: self.request.sampling.top_logprobs]))

    def add(self, told: Told) -> None:
        """Append a token, and see whether it ends the sequence."""
        self.told.append(self._asked(told) if told.top else told)
        self.token_ids.append(told.token)
        sampling, count = self.request.sampling, len(self.token_ids)
        if told.token in sampling.stop_token_ids and count > sampling.min_new_tokens:
            self.finish_reason, self.stop = "stop", told.token
        elif self._stream and self._show(self._stream.push(told.token)):
            return
        elif self.room == 0:
            self.finish_reason = "length"
        if self.finish_reason and self._stream:
            self._show(self._stream.finish().rstrip("\ufffd"))

    def _show(self, text: str) -> bool:
        """Append to the text; True, and the text cut before it, when a stop string is complete."""
        stops = self.request.sampling.stop
        before = len(self.text)
        self.text += text
        if len(self.token_ids) < self.request.sampling.min_new_tokens:
            self._sought = len(self.text)
        start = max(self._sought, before - max(map(len, stops), default=0) + 1)  # it may have begun in earlier pieces
        found = [(at, stop) for stop in stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            at, self.stop = min(found)
            self.text, self.finish_reason = self.text[:at], "stop"
        return bool(found)

    def piece(self) -> Piece:
        """The last token, with the text that has become certain."""
        end = len(self.text)
        if not self.finish_reason:
            end -= max((_begun(self.text, stop) for stop in self.request.sampling.stop), default=0)
        text, self._shown = self.text[self._shown : end], max(self._shown, end)
        return Piece(self.number, self.request, self.token_ids[-1], text, self.finish_reason)

    def completion(self) -> Completion:
        """What there is, when it has ended."""
        assert self.finish_reason is not None
        tops, prompt_tops = ([t.top for t in told if t.top] for told in (self.told, self.told_of_prompt))
        return Completion(
            number=self.number,
            request=self.request,
            token_ids=self.token_ids,
            text=self.text if self.tokenizer else None,
            finish_reason=self.finish_reason,
            logprobs=[told.logprob for told in self.told],
            sampling_logprobs=[told.sampling_logprob for told in self.told],
            stop=self.stop,
            top_logprobs=tops,
            prompt_logprobs=[told.logprob for told in self.told_of_prompt],
            prompt_top_logprobs=prompt_tops,
        )


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def common(a: Sequence[int], b: Sequence[int], worth: int) -> int:
    """How many first tokens two sequences have in common; 0 when not ``worth``."""
    if a[:worth] != b[:worth]:
        return 0
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low if low >= worth else 0


OnPiece = Callable[[Piece], None]
