"""From prompts to completions with log-probabilities, on the modules and weights that train.

One engine, in process: prompts are read whole, then every sequence grows by one token a step; a slot is refilled as
soon as its sequence ends. All processes of a group must make the same calls with the same requests; the tokens are
chosen by the first of them and sent to the others, so that no rounding can lead two processes apart.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.layers.kv_cache import KeyValueCache
from megapatch.models.load import unwrapped
from megapatch.models.request import Request
from megapatch.models.sampling import choose, uniform
from megapatch.models.tokenizer import Tokenizer

_PREFILL_TOKENS = 4096  # prompts are read together up to so many tokens
_CONTEXT_TOKENS = 8  # of the prompt, shown to the decoder: whether a text starts with a space depends on them


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    number: int  # of the request, from 0
    request: Request
    token_ids: list[int]  # the token or tokens that ended it included
    text: str | None  # without what ended it; None when the engine has no tokenizer
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]  # of each token, under the model's own distribution
    sampling_logprobs: list[float]  # of each token, under the distribution it was drawn from


@dataclass
class Statistics:
    """Tokens and seconds so far."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


class Engine:
    """Continues prompts with a model built by ``build.build``, live: training steps in between are seen."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        vocab_size: int,
        max_length: int,
        batch_size: int = 8,
        tokenizer: Tokenizer | None = None,
        group: dist.ProcessGroup | None = None,
        on_step: Callable[[Statistics], None] | None = None,
    ) -> None:
        """``max_length``: tokens of the longest prompt with its completion; ``group``: default tensor parallelism's.

        ``on_step`` is called after every forward pass.
        """
        self.model: Any = unwrapped(model)
        config: Any = self.model.config
        for flag, size in {"pp": config.pipeline_model_parallel_size, "cp": config.context_parallel_size}.items():
            if size > 1:
                raise UserError(f"--{flag} {size}: generation runs with --{flag} 1; use --tp to cut the model")
        self.vocab_size, self.max_length, self.batch_size = vocab_size, max_length, batch_size
        self.tokenizer, self.on_step = tokenizer, on_step
        self.group = group or parallel_state.get_tensor_model_parallel_group()
        self.multiple: int = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.statistics = Statistics()

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The completions, in the order of the requests."""
        return sorted(self.run(requests), key=lambda completion: completion.number)

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """The completions, each as it finishes. The model is in evaluation mode until the last one is taken."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield from self._run(enumerate(requests))
        finally:
            self.model.train(was_training)

    def _run(self, waiting: Iterator[tuple[int, Request]]) -> Iterator[Completion]:
        device = next(self.model.parameters()).device
        cache = KeyValueCache(self.batch_size, self.max_length, device, self.multiple)
        active: list[_Sequence] = []  # the sequence in slot i of the cache
        while True:
            started = time.perf_counter()
            fresh = self._admit(waiting, self.batch_size - len(active))
            if fresh:
                slots = range(len(active), len(active) + len(fresh))
                self._prefill(cache, slots, fresh, started)
                active += fresh
            elif active:
                self._decode(cache, active, started)
            else:
                return
            if self.on_step:
                self.on_step(self.statistics)
            yield from _retire(active, cache)

    def _admit(self, waiting: Iterator[tuple[int, Request]], free: int) -> "list[_Sequence]":
        """New sequences for the free slots, as many as one pass should read."""
        fresh: list[_Sequence] = []
        tokens = 0
        while len(fresh) < free and tokens < _PREFILL_TOKENS:
            number, request = next(waiting, (0, None))
            if request is None:
                break
            if reason := request.problem(self.vocab_size, self.max_length):
                raise UserError(f"request {number}: {reason}")
            fresh.append(_Sequence(number, request, self.max_length, self.tokenizer))
            tokens += len(request.prompt)
        return fresh

    def _prefill(self, cache: KeyValueCache, slots: range, fresh: "list[_Sequence]", started: float) -> None:
        lengths = [len(sequence.request.prompt) for sequence in fresh]
        positions = cache.prefill(slots, lengths)
        self._step(cache, positions, [token for sequence in fresh for token in sequence.request.prompt], fresh)
        self.statistics.prefill_tokens += sum(lengths)
        self.statistics.prefill_s += time.perf_counter() - started

    def _decode(self, cache: KeyValueCache, active: "list[_Sequence]", started: float) -> None:
        positions = cache.decode([sequence.length - 1 for sequence in active])
        self._step(cache, positions, [sequence.token_ids[-1] for sequence in active], active)
        self.statistics.decode_tokens += len(active)
        self.statistics.decode_s += time.perf_counter() - started

    @torch.no_grad()  # not inference_mode: megatron-core keeps its rotary angles, and training could not use them
    def _step(
        self, cache: KeyValueCache, positions: Tensor, tokens: Sequence[int], sequences: "list[_Sequence]"
    ) -> None:
        """One forward pass over ``tokens``, and the next token of every sequence."""
        ids = torch.zeros(positions.shape, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        logits = self.model(
            ids.to(positions.device), positions, None, inference_context=cache, runtime_gather_output=True
        )[0, :, : self.vocab_size]  # [r, v]
        choices = self._choose(logits, sequences)
        for sequence, token, logprob, sampling_logprob in zip(sequences, *choices, strict=True):
            sequence.add(int(token), logprob, sampling_logprob)

    def _choose(self, logits: Tensor, sequences: "list[_Sequence]") -> list[list[float]]:
        """Tokens, log-probabilities and sampling log-probabilities, chosen by the first process of the group."""
        chosen = torch.empty(3, len(sequences), dtype=torch.float64, device=logits.device)  # holds ids exactly
        if self.group.rank() == 0:
            choice = choose(logits, [s.request.sampling for s in sequences], [s.draw() for s in sequences])
            for row, values in zip(chosen, (choice.tokens, choice.logprobs, choice.sampling_logprobs), strict=True):
                row.copy_(values)
        if self.group.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(self.group, 0), self.group)
        return chosen.tolist()


@dataclass
class _Sequence:
    """A completion while it grows."""

    number: int
    request: Request
    max_length: int
    tokenizer: Tokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    text: str = ""

    def __post_init__(self) -> None:
        assert self.tokenizer or not self.request.sampling.stop, "stop strings need a tokenizer"
        self._stream: Any = None
        if self.tokenizer:
            self._stream = self.tokenizer.stream(skip_special_tokens=True)
            context = self.request.prompt[-_CONTEXT_TOKENS:]
            if not self.tokenizer.decode(context).endswith("\ufffd"):  # or its half character would show in our text
                for token in context:
                    self._stream.push(token)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what has followed."""
        return len(self.request.prompt) + len(self.token_ids)

    def draw(self) -> float:
        """The random number of the next token."""
        return uniform(self.request.sampling.seed, self.request.key, self.request.sample, len(self.token_ids))

    def add(self, token: int, logprob: float, sampling_logprob: float) -> None:
        """Append a token, and see whether it ends the sequence."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        sampling = self.request.sampling
        if token in sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif self._stream and self._show(self._stream.push(token)):
            self.finish_reason = "stop"
            return
        elif len(self.token_ids) == sampling.max_new_tokens or self.length == self.max_length:
            self.finish_reason = "length"
        if self.finish_reason and self._stream and self._show(self._stream.finish().rstrip("\ufffd")):
            self.finish_reason = "stop"

    def _show(self, piece: str) -> bool:
        """Append to the text; True, and the text cut before it, when a stop string is complete."""
        stops = self.request.sampling.stop
        before = len(self.text)
        self.text += piece
        start = max(0, before - max(map(len, stops), default=0) + 1)  # it may have begun in earlier pieces
        found = [at for stop in stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            number=self.number,
            request=self.request,
            token_ids=self.token_ids,
            text=self.text if self.tokenizer else None,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            sampling_logprobs=self.sampling_logprobs,
        )


def _retire(active: list[_Sequence], cache: KeyValueCache) -> list[Completion]:
    """Take out the sequences that have ended; the last ones move into their slots."""
    ended = []
    for slot in reversed(range(len(active))):
        if active[slot].finish_reason:
            ended.append(active[slot].completion())
            last = active.pop()
            if slot < len(active):
                cache.move(len(active), slot)
                active[slot] = last
    return ended[::-1]
