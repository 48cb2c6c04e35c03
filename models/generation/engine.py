"""From prompts to completions with log-probabilities, on the modules and weights that train.

One engine, in process. Prompts are read, in parts where they are long; then every sequence grows by one token a step,
and a slot is refilled as soon as its sequence ends. All processes of a group make the same calls with the same
requests; the tokens are chosen by one of them and sent to the others, so that no rounding can lead two apart.

    for completion in Engine(chunks, vocab_size=size, max_length=4096).run([Request([1, 2, 3])]):
        print(completion.token_ids, completion.logprobs)
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.generation.agreement import Agreement, default_group
from megapatch.models.generation.drafts import Drafts
from megapatch.models.generation.executors import Executor, ExecutorKind, chunks_of, evaluating, executor_for
from megapatch.models.generation.memory import Memory, weights_bytes
from megapatch.models.generation.sequences import Completion, Growing, OnPiece, Told
from megapatch.models.generation.slots import Reading, Slots, wanted_logits
from megapatch.models.layers.kv_cache import KeyValueCache
from megapatch.models.load import unwrapped
from megapatch.models.request import Request, Sampling
from megapatch.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_LOGITS = 1 << 26  # numbers of one pass, at most, where all tokens of prompts need logits


@dataclass
class Statistics:
    """Tokens and seconds so far."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    shared_tokens: int = 0  # of prompts: copied from another sequence's keys and values, not read again
    decode_tokens: int = 0
    decode_s: float = 0.0
    passes: int = 0
    proposed_tokens: int = 0  # by a draft model
    accepted_tokens: int = 0  # of these


class Engine:
    """Continues prompts with a model built by ``build.build``, live: training steps in between are seen."""

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        *,
        vocab_size: int,
        max_length: int,
        batch_size: int = 8,
        cache_bytes: int | None = None,
        prefill_tokens: int = 4096,
        executor: ExecutorKind = "auto",
        packed: bool = True,
        keep: bool = False,
        tokenizer: Tokenizer | None = None,
        group: dist.ProcessGroup | None = None,
        draft: torch.nn.Module | Sequence[torch.nn.Module] | None = None,
        draft_tokens: int = 4,
        on_step: Callable[[Statistics], None] | None = None,
        on_piece: OnPiece | None = None,
    ) -> None:
        """``model``: this process's chunk or chunks of it; ``max_length``: tokens of the longest prompt with its
        completion; ``batch_size``: sequences that grow at once, fewer where their keys and values would be more than
        ``cache_bytes`` (of this process); ``prefill_tokens``: of prompts, read in one pass.

        ``executor``: lean where the layout lets it, module for megatron-core's own forward pass; ``packed``: the lean
        one may keep a copy of the weights that CPU kernels read faster, where free memory holds it (see ``memory``).
        ``keep``: keys and values stay from run to run, for prompts that go on from earlier ones: while weights stay.
        ``group``: the processes that make the same calls; by default those that share a model and its experts.
        ``draft``: a smaller model at the same layout that proposes up to ``draft_tokens`` tokens at a time; what is
        answered stays the same, and comes sooner where it often guesses right.
        ``on_step`` is called after every forward pass, ``on_piece`` with every token.
        """
        self.given = [*chunks_of(model), *chunks_of(draft)]
        self.chunks, drafting = ([unwrapped(chunk) for chunk in chunks_of(one)] for one in (model, draft))
        self.draft_tokens, self.budgeted = draft_tokens, cache_bytes is not None
        config = self.chunks[0].config
        if config.context_parallel_size > 1:
            raise UserError(
                f"--cp {config.context_parallel_size}: generation runs with --cp 1; use --tp or --pp to cut the model"
            )
        self.vocab_size, self.max_length, self.prefill_tokens = vocab_size, max_length, prefill_tokens
        self.tokenizer, self.on_step, self.on_piece = tokenizer, on_step, on_piece
        self.keep = keep
        self._kept: tuple[KeyValueCache, Drafts | None, list[Growing | None]] | None = None
        self.device = next(self.chunks[0].parameters()).device
        group = group or default_group(config)
        self.agreement = Agreement(group, self.chunks[-1].post_process, self.device)
        self.multiple: int = config.tensor_model_parallel_size if config.sequence_parallel else 1
        checked = batch_size * (1 + draft_tokens if drafting else 1)  # tokens of most passes
        self._executors(executor, drafting, (checked, batch_size) if packed else (0, 0))
        if drafting:
            self._check_draft(drafting)
        self.batch_size = self.agreement.least(self._fitting(batch_size, cache_bytes))
        if not self.agreement.least(int(not (crowded := self.memory.crowded))):
            log.warning("%s", crowded or "packed copies of weights do not fit on all processes: going on without")
            self._executors(executor, drafting, (0, 0))
        self.statistics = Statistics()

    def _executors(self, kind: ExecutorKind, drafting: list[Any], pack_for: tuple[int, int]) -> None:
        """Of the model and of the draft; ``pack_for``: tokens that most of their passes have, 0 for no copies."""
        self.executor = executor_for(self.chunks, kind, pack_for[0])
        self.draft = executor_for(drafting, kind, pack_for[1]) if drafting else None

    @property
    def memory(self) -> Memory:
        """What this process holds, or will when all sequences have the longest length."""
        executors = [self.executor, *([self.draft] if self.draft else [])]
        chunks = [unwrapped(chunk) for chunk in self.given]
        copies = sum(one.copy_bytes for one in executors)
        return Memory(weights_bytes(chunks), copies, self.batch_size * self._sequence_bytes())

    def _sequence_bytes(self) -> int:
        """Of the keys and values of one sequence of the longest length."""
        kept = [*self.executor.kept, *(self.draft.kept if self.draft else [])]
        numbers = sum(one.numbers * one.positions(self.max_length) for one in kept)
        return numbers * self.chunks[0].config.params_dtype.itemsize

    def _check_draft(self, drafting: list[Any]) -> None:
        """Refuse what proposals cannot be undone in, or be made with (UserError)."""
        assert self.draft is not None
        if self.draft_tokens < 1:
            raise UserError(f"draft tokens {self.draft_tokens}: must be at least 1")
        windows = [kept.window for kept in (*self.executor.kept, *self.draft.kept) if kept.window]
        if min(windows, default=self.max_length) < self.max_length:
            raise UserError(
                f"a draft model: with sliding windows of {min(windows)} tokens, only for texts that are no longer; "
                f"they may have {self.max_length}"
            )
        if drafting[-1].post_process and drafting[-1].vocab_size < self.vocab_size:
            raise UserError(f"a draft model of {drafting[-1].vocab_size} tokens; the model has {self.vocab_size}")

    def _fitting(self, batch_size: int, cache_bytes: int | None) -> int:
        """How many sequences of the longest length fit into a budget (UserError: not one)."""
        if cache_bytes is None:
            return batch_size
        each = self._sequence_bytes()
        if each > cache_bytes:
            raise UserError(
                f"cache budget of {cache_bytes:,} bytes: keys and values of one sequence of {self.max_length:,} tokens "
                f"need {each:,}; give more, ask for shorter texts, or cut the model over more processes"
            )
        return min(batch_size, cache_bytes // each)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The completions, in the order of the requests and their samples."""
        return sorted(self.run(requests), key=lambda completion: (completion.number, completion.request.sample))

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """The completions, each as it finishes. The model is in evaluation mode until the last one is taken.

        Requests are read as slots become free. Weights must not change before the last completion is taken.
        """
        with evaluating(self.given):
            for executor in (self.executor, self.draft):
                if executor:
                    executor.refresh()
            yield from self._run(self._growing(requests))

    def _growing(self, requests: Iterable[Request]) -> Iterator[Growing]:
        """A sequence for each sample of each request."""
        for number, request in enumerate(requests):
            if reason := request.problem(self.vocab_size, self.max_length):
                raise UserError(f"request {number}: {reason}")
            for one in request.samples():
                yield Growing(number, one, self.max_length, self.tokenizer)

    def _cache(self) -> KeyValueCache:
        return KeyValueCache(self.batch_size, self.max_length, self.device, self.multiple, self.budgeted)

    def _run(self, waiting: Iterator[Growing]) -> Iterator[Completion]:
        cache, drafts, content = self._kept or (self._cache(), self._drafts(), [])
        self._kept = None  # a run that is broken off leaves nothing
        slots = Slots(cache, waiting, drafts.cache if drafts else None, content)
        shared_before = self.statistics.shared_tokens
        while True:
            started = time.perf_counter()
            slots.admit()
            if parts := slots.readings(self.prefill_tokens, max(1, _LOGITS // self.vocab_size)):
                self._read(cache, parts, started)
                slots.share()
            elif active := slots.sequences():
                self._decode(cache, active, drafts, started)
            else:
                self._kept = (cache, drafts, slots.content) if self.keep else None
                return
            self.statistics.passes += 1
            self.statistics.shared_tokens = shared_before + slots.shared_tokens
            if self.on_step:
                self.on_step(self.statistics)
            yield from [sequence.completion() for sequence in slots.retire()]

    def _drafts(self) -> Drafts | None:
        if self.draft is None:
            return None
        made = self._cache(), self.draft_tokens, self.prefill_tokens, self._forward, self.agreement
        return Drafts(self.draft, *made)

    def _read(self, cache: KeyValueCache, parts: list[Reading], started: float) -> None:
        """Read parts of prompts, and choose the first token of those that are read."""
        tokens = [token for s, start, length in parts for token in s.prompt[start : start + length]]
        places, rows, scored = wanted_logits(parts)
        slots, starts, lengths = zip(*((s.slot, start, length) for s, start, length in parts), strict=True)
        positions = cache.read(slots, starts, lengths, places or [len(tokens) - 1])
        logits = self._forward(self.executor, cache, positions, tokens)
        for sequence, start, length in parts:
            sequence.cached = start + length
        for sequence in (part.sequence for part in parts if part.ends):
            sequence.end_of_prompt()
        top = _most_curious([*(one for _, one in rows), *(one for _, one, _ in scored)])
        choices, known = [(at, one.row()) for at, one in rows], [(at, token) for at, _, token in scored]
        told = self.agreement.told(logits, choices, known, top)
        for (_, sequence), found in zip(rows, told, strict=False):
            self._add(sequence, found)
        for (_, sequence, _), found in zip(scored, told[len(rows) :], strict=True):
            sequence.add_of_prompt(found)
        self.statistics.prefill_tokens += len(tokens)
        self.statistics.prefill_s += time.perf_counter() - started

    def _decode(self, cache: KeyValueCache, active: list[Growing], drafts: Drafts | None, started: float) -> None:
        """One more token for every sequence, or several of those that were proposed."""
        ahead = drafts.propose(active) if drafts else [[] for _ in active]
        tokens = [token for sequence, more in zip(active, ahead, strict=True) for token in (sequence.last, *more)]
        starts = [sequence.cached for sequence in active]
        if any(ahead):
            lengths = [1 + len(more) for more in ahead]
            positions = cache.read([s.slot for s in active], starts, lengths, range(len(tokens)))
        else:
            positions = cache.decode(starts)
        logits = self._forward(self.executor, cache, positions, tokens)
        rows = [s.row(more[:n]) for s, more in zip(active, ahead, strict=True) for n in range(len(more) + 1)]
        told = iter(self.agreement.told(logits, list(enumerate(rows)), [], _most_curious(active)))
        for sequence, more in zip(active, ahead, strict=True):
            self._accept(sequence, more, [next(told) for _ in range(len(more) + 1)])
        self.statistics.decode_s += time.perf_counter() - started

    def _accept(self, sequence: Growing, more: list[int], told: list[Told]) -> None:
        """Take the model's own tokens as long as they are what was proposed, and the one after."""
        statistics, before = self.statistics, len(sequence.token_ids)
        for guess, found in zip([*more, None], told, strict=True):
            sequence.cached += 1
            self._add(sequence, found)
            if sequence.finish_reason or found.token != guess:
                break
        added = len(sequence.token_ids) - before
        sequence.drafted = min(sequence.drafted, sequence.length - 1)
        statistics.decode_tokens += added
        statistics.proposed_tokens += len(more)
        statistics.accepted_tokens += added - 1

    @torch.no_grad()  # not inference_mode: megatron-core keeps its rotary angles, and training could not use them
    def _forward(
        self, executor: Executor, cache: KeyValueCache, positions: Tensor, tokens: Sequence[int]
    ) -> Tensor | None:
        """Logits [r, v] of the tokens that ``cache`` was told of; None where the last layers are elsewhere."""
        ids = torch.zeros(positions.shape, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        logits = executor.forward(ids.to(self.device), positions, cache)
        return None if logits is None else logits[:, : self.vocab_size]

    def _add(self, sequence: Growing, found: Told) -> None:
        sequence.add(found)
        if self.on_piece:
            self.on_piece(sequence.piece())


def complete(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    prompts: Iterable[Sequence[int]],
    sampling: Sampling = Sampling(),
    **settings: Any,
) -> list[list[Completion]]:
    """The ``sampling.n`` completions of each prompt; ``settings`` are those of ``Engine``.

    A prompt's random numbers are named by its place among the prompts.
    """
    requests = [Request(prompt, sampling, key=str(i)) for i, prompt in enumerate(prompts)]
    found: list[list[Completion]] = [[] for _ in requests]
    for completion in Engine(model, **settings).generate(requests):
        found[completion.number].append(completion)
    return found


def _most_curious(sequences: Iterable[Growing]) -> int:
    """How many alternatives are to be told at most."""
    return max((sequence.request.sampling.top_logprobs for sequence in sequences), default=0)
