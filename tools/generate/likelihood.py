"""Log-likelihoods of given tokens, by the engine that generates."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megapatch.models.request import Request, Sampling

if TYPE_CHECKING:
    from megapatch.models.generation.sequences import Completion

_FORCE = 1e9  # added to the logit of the last token, which is thereby chosen; what is told of it is told without


class Pair(NamedTuple):
    """Tokens, at least one, and what follows them."""

    context: Sequence[int]
    target: Sequence[int]


@dataclass(frozen=True)
class Scored:
    """What the model says of a target."""

    logprobs: list[float]  # natural, of each token
    greedy: bool  # whether each was the most probable one

    @property
    def total(self) -> float:
        """Of all tokens together."""
        return sum(self.logprobs)


def request(pair: Pair) -> Request:
    """Read all but the last token, and choose that one: so a pair may be one token longer than the model's longest."""
    *read, last = [*pair.context, *pair.target]
    assert read and pair.target, "a pair has a context and a target"
    sampling = Sampling(max_new_tokens=1, prompt_logprobs=True, top_logprobs=1, logit_bias={last: _FORCE})
    return Request(read, sampling, scored_from=len(pair.context))


def score(
    engine: Any, pairs: Iterable[Pair], done: Callable[["Completion"], None] = lambda _: None
) -> Iterator[tuple[int, Scored]]:
    """The number of each pair, and what is said of its target, in the order in which they are finished."""
    sizes: list[int] = []

    def requests() -> Iterator[Request]:
        for pair in pairs:
            sizes.append(len(pair.target))
            yield request(pair)

    for completion in engine.run(requests()):
        done(completion)
        yield completion.number, _scored(completion, sizes[completion.number])


def _scored(completion: "Completion", size: int) -> Scored:
    tokens = [*completion.request.prompt, *completion.token_ids][-size:]
    logprobs = [*completion.prompt_logprobs, *completion.logprobs][-size:]
    tops = [*completion.prompt_top_logprobs, *completion.top_logprobs][-size:]
    # a token as probable as the one named first is as greedy a choice
    greedy = all(logprob >= max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))
    assert len(tokens) == len(logprobs) == size
    return Scored(logprobs, greedy)


def encode_pair(encode: Callable[[str], list[int]], context: str, target: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows, cut from those of both together; blanks between belong to the target."""
    bare = context.rstrip()
    whole, before = encode(context + target), encode(bare)
    return whole[: len(before)], whole[len(before) :]
