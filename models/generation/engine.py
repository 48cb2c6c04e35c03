"""From prompts to completions with log-probabilities, on the modules and weights that train.

One engine, in process. Prompts are read, in parts where they are long; then every sequence grows by one token a step,
and a slot is refilled as soon as its sequence ends. All processes of a group make the same calls with the same
requests; the tokens are chosen by one of them and sent to the others, so that no rounding can lead two apart.

    for completion in Engine(chunks, vocab_size=size, max_length=4096).run([Request([1, 2, 3])]):
        print(completion.token_ids, completion.logprobs)
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.generation.executors import Executor, ModuleExecutor
from megapatch.models.generation.lean import LeanExecutor
from megapatch.models.generation.sequences import Completion, Growing, OnPiece, Told
from megapatch.models.generation.slots import Reading, Slots
from megapatch.models.layers.kv_cache import KeyValueCache
from megapatch.models.load import unwrapped
from megapatch.models.request import Request, Sampling
from megapatch.models.sampling import Choice, choose, known
from megapatch.models.tokenizer import Tokenizer

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
        executor: Literal["auto", "lean", "module"] = "auto",
        packed: bool = True,
        tokenizer: Tokenizer | None = None,
        group: dist.ProcessGroup | None = None,
        on_step: Callable[[Statistics], None] | None = None,
        on_piece: OnPiece | None = None,
    ) -> None:
        """``model``: this process's chunk or chunks of it; ``max_length``: tokens of the longest prompt with its
        completion; ``batch_size``: sequences that grow at once, fewer where their keys and values would be more than
        ``cache_bytes`` (of this process); ``prefill_tokens``: of prompts, read in one pass.

        ``executor``: lean where the layout lets it, module for megatron-core's own forward pass; ``packed``: the lean
        one may keep a copy of the weights that CPU kernels read faster.
        ``group``: the processes that make the same calls; by default those that share a model and its experts.
        ``on_step`` is called after every forward pass, ``on_piece`` with every token.
        """
        chunks = list(model) if isinstance(model, Sequence) else [model]
        self.chunks: list[Any] = [unwrapped(chunk) for chunk in chunks]
        config = self.chunks[0].config
        if config.context_parallel_size > 1:
            raise UserError(
                f"--cp {config.context_parallel_size}: generation runs with --cp 1; use --tp or --pp to cut the model"
            )
        self.vocab_size, self.max_length, self.prefill_tokens = vocab_size, max_length, prefill_tokens
        self.tokenizer, self.on_step, self.on_piece = tokenizer, on_step, on_piece
        self.device = next(self.chunks[0].parameters()).device
        self.group = group or _default_group(config)
        last = self.chunks[-1].post_process
        self.chooser = _least(self.group, self.group.rank() if last else self.group.size(), self.device)
        self.multiple: int = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.executor = _executor(self.chunks, executor, packed)
        self.batch_size = _least(self.group, self._fitting(batch_size, cache_bytes), self.device)
        self.statistics = Statistics()

    def _fitting(self, batch_size: int, cache_bytes: int | None) -> int:
        """How many sequences of the longest length fit into a budget (UserError: not one)."""
        if cache_bytes is None:
            return batch_size
        numbers = sum(kept.numbers * kept.positions(self.max_length) for kept in self.executor.kept)
        each = numbers * self.chunks[0].config.params_dtype.itemsize
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
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            self.executor.refresh()
            yield from self._run(self._growing(requests))
        finally:
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def _growing(self, requests: Iterable[Request]) -> Iterator[Growing]:
        """A sequence for each sample of each request."""
        for number, request in enumerate(requests):
            if reason := request.problem(self.vocab_size, self.max_length):
                raise UserError(f"request {number}: {reason}")
            for one in request.samples():
                yield Growing(number, one, self.max_length, self.tokenizer)

    def _run(self, waiting: Iterator[Growing]) -> Iterator[Completion]:
        cache = KeyValueCache(self.batch_size, self.max_length, self.device, self.multiple)
        slots, shared_before = Slots(cache, waiting), self.statistics.shared_tokens
        while True:
            started = time.perf_counter()
            slots.admit()
            if parts := slots.readings(self.prefill_tokens, max(1, _LOGITS // self.vocab_size)):
                self._read(cache, parts, started)
                slots.share()
            elif active := slots.sequences():
                self._decode(cache, active, started)
            else:
                return
            self.statistics.passes += 1
            self.statistics.shared_tokens = shared_before + slots.shared_tokens
            if self.on_step:
                self.on_step(self.statistics)
            yield from [sequence.completion() for sequence in slots.retire()]

    def _read(self, cache: KeyValueCache, parts: list[Reading], started: float) -> None:
        """Read parts of prompts, and choose the first token of those that are read."""
        tokens = [token for s, start, length in parts for token in s.prompt[start : start + length]]
        places, rows, told = _wanted(parts)
        slots, starts, lengths = zip(*((s.slot, start, length) for s, start, length in parts), strict=True)
        positions = cache.read(slots, starts, lengths, places or [len(tokens) - 1])
        logits = self._forward(cache, positions, tokens)
        for sequence, start, length in parts:
            sequence.cached = start + length
        for sequence in (part.sequence for part in parts if part.ends):
            sequence.end_of_prompt()
        self._tell(logits, rows, told)
        self.statistics.prefill_tokens += len(tokens)
        self.statistics.prefill_s += time.perf_counter() - started

    def _decode(self, cache: KeyValueCache, active: list[Growing], started: float) -> None:
        """One more token for every sequence."""
        positions = cache.decode([sequence.cached for sequence in active])
        logits = self._forward(cache, positions, [sequence.token_ids[-1] for sequence in active])
        for sequence in active:
            sequence.cached += 1
        self._tell(logits, list(enumerate(active)), [])
        self.statistics.decode_tokens += len(active)
        self.statistics.decode_s += time.perf_counter() - started

    @torch.no_grad()  # not inference_mode: megatron-core keeps its rotary angles, and training could not use them
    def _forward(self, cache: KeyValueCache, positions: Tensor, tokens: Sequence[int]) -> Tensor | None:
        """Logits [r, v] of the tokens that ``cache`` was told of; None where the last layers are elsewhere."""
        ids = torch.zeros(positions.shape, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        logits = self.executor.forward(ids.to(self.device), positions, cache)
        return None if logits is None else logits[:, : self.vocab_size]

    def _tell(
        self, logits: Tensor | None, rows: list[tuple[int, Growing]], scored: list[tuple[int, Growing, int]]
    ) -> None:
        """Choose a token of each of ``rows`` of the logits; of the ``scored``, the token is known."""
        sequences = [sequence for _, sequence in rows] + [sequence for _, sequence, _ in scored]
        top = max((sequence.request.sampling.top_logprobs for sequence in sequences), default=0)
        table = torch.empty(len(sequences), 3 + 2 * top, dtype=torch.float64, device=self.device)  # holds ids exactly
        if self.group.rank() == self.chooser and sequences:
            assert logits is not None
            chosen = choose(logits[[row for row, _ in rows]], [sequence.row() for _, sequence in rows], top)
            given = known(logits[[row for row, *_ in scored]], [token for *_, token in scored], top)
            table = torch.cat([_table(chosen), _table(given)])
        if self.group.size() > 1:
            dist.broadcast(table, dist.get_global_rank(self.group, self.chooser), self.group)
        for number, (sequence, found) in enumerate(zip(sequences, _told(table, top), strict=True)):
            if number >= len(rows):
                sequence.told_of_prompt.append(found)
                continue
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


def _wanted(
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


def _table(choice: Choice) -> Tensor:
    """[r, 3+2k] in fp64: token, log-probability, that of sampling, best tokens, their log-probabilities."""
    first = choice.tokens, choice.logprobs, choice.sampling_logprobs
    return torch.cat([torch.stack([x.double() for x in first], -1), choice.top_tokens, choice.top_logprobs], -1)


def _told(table: Tensor, top: int) -> Iterator[Told]:
    for token, logprob, sampling_logprob, *best in table.tolist():
        tokens = map(int, best[:top])
        yield Told(int(token), logprob, sampling_logprob, dict(zip(tokens, best[top:], strict=True)))


def _executor(chunks: list[Any], kind: str, packed: bool) -> Executor:
    """The executor of a model that is asked for, or the fastest one that can run it."""
    fits = LeanExecutor.fits(chunks)
    if kind == "lean" and not fits:
        raise UserError("the lean executor runs whole models, without --pp and --sequence-parallel; use the module one")
    return LeanExecutor(chunks[0], packed) if fits and kind != "module" else ModuleExecutor(chunks)


def _default_group(config: Any) -> dist.ProcessGroup:
    """The processes that share a model: its tensor, pipeline and expert parallelism."""
    if config.expert_model_parallel_size > 1:
        return parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    return parallel_state.get_model_parallel_group()


def _least(group: dist.ProcessGroup, number: int, device: torch.device) -> int:
    """The smallest of the processes' numbers."""
    if group.size() == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    return int(found)
