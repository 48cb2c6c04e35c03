"""--offload-optimizer auto: as little in host memory as lets the run fit, followed step by step.

It begins with all of the state in host memory, or as much as fits there. After each step the peak of the device's
memory, the largest of a pipeline stage's ranks, is held against the budget: chunks come back while there is room, and
leave where there is none. Between the two lies a band in which nothing moves. Where a step finds no memory, half of
what is on the device leaves, and the step is done once more.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megapatch.models.cuts import padded_vocabulary
from megapatch.models.family import vocab_size
from megapatch.models.space import DoesNotFit, short
from megapatch.trainer.layout import experts
from megapatch.trainer.offload.adam import ChunkedAdam, device_bytes
from megapatch.trainer.offload.chunks import needed_bytes
from megapatch.trainer.offload.options import AUTO
from megapatch.trainer.ranks import first, together, warn
from megapatch.trainer.session import Session
from megapatch.trainer.sizes.flops import sizes_of
from megapatch.trainer.sizes.memory import MARGIN, Activations
from megapatch.trainer.step import Batches, StepResult, train_step
from megapatch.trainer.watching.metrics import Log

log = logging.getLogger(__name__)
GIB = 2**30
SHORT = "out of memory"
BAND = 0.02  # of the budget, in which nothing moves


@dataclass(frozen=True)
class Move:
    """What a review came to on a rank."""

    stage: int
    rank: int
    reason: str
    before: float  # fraction on the host
    after: float
    moved_bytes: int
    peak_bytes: int
    budget_bytes: int


class Fitting:
    """Does a session's steps; with --offload-optimizer auto it keeps them within the device's memory."""

    def __init__(self, session: Session, records: Log, count: int) -> None:
        """``count`` micro-batches a step."""
        self.session, self.records, self.count = session, records, count
        self.away = session.away
        self.follows = session.options.offload_optimizer == AUTO
        self.full = False  # it once found no memory: nothing comes back
        self.made: list[Move] = []  # by this rank alone, not yet in the log
        if self.away is None:
            return
        self.records.write("offload", step=session.step, reason="start", **self.away.described())
        if first():
            log.info("optimizer: %.4g of its state in host memory, engine %s", self.away.fraction, self.away.engine)
        if self.follows:
            with together():
                self.budget_bytes = budget_bytes(session)
            self._watch_reductions(session.config)

    def _watch_reductions(self, config: Any) -> None:
        """Note when gradients of a step are reduced, which all ranks must do as often."""
        reduce, self.reduced = config.finalize_model_grads_func, False

        def noted(*args: Any, **words: Any) -> None:
            self.reduced = True
            reduce(*args, **words)

        config.finalize_model_grads_func = noted

    def train_step(self, batches: Callable[[], Batches]) -> StepResult:
        """One optimizer step on fresh batches; every rank must call."""
        if self.away is None or not self.follows:
            try:
                return train_step(self.session, batches(), self.count)
            except torch.OutOfMemoryError as error:
                raise self._does_not_fit(_line(error)) from error
        device = self.session.device
        device.forget_peak()
        self.reduced = False
        generators, updates = device.generator_state(), self._updates()
        result: StepResult | None = None
        try:
            result = train_step(self.session, batches(), self.count)
        except torch.OutOfMemoryError as error:
            self._refuse_again(error, updates)
        if result is None:  # what the failed step held is free by now
            self._make_room()
            device.forget_peak()
            device.set_generator_state(generators)
            forget_step(self.session)
            try:
                result = train_step(self.session, batches(), self.count)
            except torch.OutOfMemoryError as error:
                raise self._does_not_fit(f"and a second time: {_line(error)}") from error
        self._review()
        return result

    def _updates(self) -> list[int]:
        assert self.away is not None
        return [adam.updates for adam in self.away.adams]

    def _refuse_again(self, error: torch.OutOfMemoryError, updates: list[int]) -> None:
        """DoesNotFit where the step cannot be done again: others wait in the middle of it, or it is half done."""
        options = self.session.options
        apart = options.tp == options.pp == options.cp == options.ep == 1
        if not apart or options.overlap_grad_reduce:
            why = "ranks speak within a step (--tp, --pp, --cp, --ep, --overlap-grad-reduce): it is not done again"
            raise self._does_not_fit(f"{why}; {_line(error)}") from error
        assert self.away is not None
        if updates != self._updates() or (self.reduced and torch.distributed.get_world_size() > 1):
            raise self._does_not_fit(f"in the middle of the update; {_line(error)}") from error
        if not device_bytes(self.away.adams):
            raise self._does_not_fit(f"and no optimizer state is left there; {_line(error)}") from error

    def _does_not_fit(self, why: str) -> DoesNotFit:
        session, asked = self.session, self.session.options.offload_optimizer
        peak = peak_bytes(session, self.count) if self.away else session.device.peak_memory_bytes()
        return DoesNotFit(
            (f"--offload-optimizer {asked}: " if asked else "")
            + f"step {session.step + 1} found no memory on the device (peak {short(peak)}B), {why}; use "
            + ("" if self.follows else "--offload-optimizer auto, ")
            + "more processes, --recompute full, or less --micro-batch-size or --seq-length"
        )

    def _make_room(self) -> None:
        """After a step that found no memory: half of what this rank has on the device leaves."""
        assert self.away is not None
        before, self.full = self.away.fraction, True
        peak, half = peak_bytes(self.session, self.count), -(-device_bytes(self.away.adams) // 2)
        moved = leave(self.away.adams, half, self.away.host_room())
        if not moved:
            raise self._does_not_fit(f"and the {short(half)}B of state that were to leave it find none on the host")
        self.session.device.free_cached()
        self.made = [self._move(SHORT, before, moved, peak)]  # for the log, which others write: after the step
        log.warning("rank %d: step %d: %s", self.made[0].rank, self.session.step + 1, _sentence(self.made[0]))

    def _move(self, reason: str, before: float, moved: int, peak: int) -> Move:
        assert self.away is not None
        stage, rank = parallel_state.get_pipeline_model_parallel_rank(), torch.distributed.get_rank()
        return Move(stage, rank, reason, before, self.away.fraction, moved, peak, self.budget_bytes)

    def _review(self) -> None:
        """Hold the step's peak against the budget, and move what is to move (every rank must call)."""
        assert self.away is not None
        session, before = self.session, self.away.fraction
        peak = torch.tensor([peak_bytes(session, self.count), self.full], device=session.device.torch)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)  # of one stage
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
        most, full = peak.tolist()
        room, moved, reason = self.budget_bytes - most, 0, "room"
        if room < 0:
            moved, reason = leave(self.away.adams, -room, self.away.host_room()), "over budget"
        elif not full and room > (band := round(BAND * self.budget_bytes)):
            moved = come_back(self.away.adams, room - band)
        mine = [*self.made, *([self._move(reason, before, moved, most)] if moved else [])]
        self.made = []
        told = torch.tensor(len(mine), device=session.device.torch)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if not told:
            return
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        seen: set[tuple[int, str]] = set()
        for move in (move for moves in found for move in moves):
            alone = move.reason == SHORT  # of this rank; others are of all ranks of a stage
            if alone or (move.stage, move.reason) not in seen:
                self._tell(move)
            seen.add((move.stage, move.reason))

    def _tell(self, move: Move) -> None:
        about = {
            name: getattr(move, name)
            for name in ("stage", "rank", "reason", "moved_bytes", "peak_bytes", "budget_bytes")
        }
        fractions = {"fraction_before": move.before, "fraction": move.after}
        self.records.write("offload", step=self.session.step + 1, **about, **fractions)
        if move.reason != SHORT:  # of which its rank told at once
            warn(log, "step %d: %s", self.session.step + 1, _sentence(move))


def _sentence(move: Move) -> str:
    return (
        f"{move.reason}: {short(move.moved_bytes)}B of optimizer state moved, {move.before:.4g} -> {move.after:.4g} in "
        f"host memory (stage {move.stage}, peak {short(move.peak_bytes)}B of {short(move.budget_bytes)}B)"
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def leave(adams: list[ChunkedAdam], wanted_bytes: int, most_bytes: int) -> int:
    """Move at least so many bytes of state off the device, or all there are; how many moved.

    At most ``most_bytes`` of host memory are taken for those that have no place there yet.
    """
    moved = 0
    for adam in adams:
        count = adam.count
        while count < len(adam.chunks) and moved < wanted_bytes:
            chunk = adam.chunks[count]
            taken = 0 if chunk.slot is not None else needed_bytes([chunk], mastered=adam.engine.mastered)
            if taken > most_bytes:
                break
            most_bytes -= taken
            moved += chunk.memory.nbytes
            count += 1
        adam.place(count)
    return moved


def come_back(adams: list[ChunkedAdam], most_bytes: int) -> int:
    """Move chunks of at most so many bytes in all to the device; how many bytes moved."""
    moved = 0
    for adam in adams:
        count = adam.count
        while count:
            chunk = adam.chunks[count - 1]
            size = needed_bytes([chunk], mastered=False)
            if moved + size > most_bytes:
                break
            moved, count = moved + size, count - 1
        adam.place(count)
    return moved


def budget_bytes(session: Session) -> int:
    """Bytes of the device's memory that a run may fill."""
    given, has = session.options.device_memory_gib, session.device.memory_bytes()
    return round(MARGIN * min(size for size in (has, given and given * GIB) if size))


def peak_bytes(session: Session, count: int) -> int:
    """The device's peak in this step: measured on a GPU; counted on a CPU, with the estimate of activations."""
    if session.device.memory_bytes() is not None:
        return session.device.peak_memory_bytes()
    assert session.away is not None
    weights = sum(tensor.nbytes for model in session.models for tensor in (*model.parameters(), *model.buffers()))
    buffers = [buffer for chunk in session.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    sizes = sizes_of(session.hf, bool(session.options.mtp_loss_weight))
    stage, vocabulary = parallel_state.get_pipeline_model_parallel_rank(), vocab_size(session.hf)
    padded = padded_vocabulary(vocabulary, 1, session.options.tp)
    activations = Activations(session.options, sizes).of_stage(stage, count, padded)
    streamed = max((adam.engine.device_bytes for adam in session.away.adams), default=0)  # one for all
    return weights + gradients + device_bytes(session.away.adams) + streamed + activations


def forget_step(session: Session) -> None:
    """Drop what modules counted in a step that did not end."""
    for router in experts.routers(session.models):
        router.take_load()
    if session.config.num_moe_experts:
        clear_aux_losses_tracker()
    MTPLossLoggingHelper.tracker.pop("values", None)
