"""The training loop: step, log, evaluate, save; notices signals and numbers that are not finite."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from megapatch.models.cli import UserError
from megapatch.trainer import final_test, signals
from megapatch.trainer.data.sample_places import Samples, shown
from megapatch.trainer.data.sources import BySource
from megapatch.trainer.offload.auto import Fitting
from megapatch.trainer.ranks import first, together, warn
from megapatch.trainer.saving import checkpoint
from megapatch.trainer.saving.writing import Saving
from megapatch.trainer.session import Session
from megapatch.trainer.step import Batches, StepResult, evaluate
from megapatch.trainer.watching.metrics import Log
from megapatch.trainer.watching.progress import Progress
from megapatch.trainer.watching.watchdog import note

log = logging.getLogger(__name__)


class Trainer:
    """Runs a session to its last step."""

    samples: Samples | None = None  # what ``train`` reads, where it can say where that comes from
    trained: BySource | None = None  # is told of losses in training
    validated: BySource | None = None  # and in validation
    test: Callable[[int], Batches] | None = None  # as ``valid``, for the evaluation after the last step
    tested: BySource | None = None  # is told of losses in that one
    saving: Saving | None = None  # the checkpoint that is written beside the training

    def __init__(
        self,
        session: Session,
        *,
        records: Log,
        source: checkpoint.Source,
        num_micro_batches: int,
        flops_per_token: float,
        train: Callable[[int], Batches],
        valid: Callable[[int], Batches],
        eval_steps: int,
    ) -> None:
        """``train`` and ``valid`` give the micro-batches of the global batch that starts at a sample, or a number."""
        self.session, self.records, self.source = session, records, source
        self.count, self.flops_per_token = num_micro_batches, flops_per_token
        self.train, self.valid, self.eval_steps = train, valid, eval_steps
        self.bad_steps = 0
        self.saved_step = session.step
        self.fitting = Fitting(session, records, num_micro_batches)
        self.progress = Progress(session.options, session.device, session.step)

    def run(self) -> None:
        """Train until --train-iters, or until a signal asks to stop; the state is saved at the end."""
        options, session = self.session.options, self.session
        try:
            reason = self._steps()
            self.save()
            if reason == "done":
                reason = self._test()
        except BaseException:
            self.progress.close(failed=True)
            raise
        self.records.write("end", step=session.step, reason=reason, consumed_samples=session.consumed_samples)
        unfinished = session.step < options.train_iters or (self.test and reason != "done")
        if options.requeue_file and unfinished and first():
            options.requeue_file.touch()
        self.progress.close()

    def _steps(self) -> str:
        """Every step that is left, with what is due between them; why it ended."""
        options, session = self.session.options, self.session
        if session.step == 0 and options.eval_interval:
            self.evaluate()
        while session.step < options.train_iters:
            self._one_step()
            if signal := self._look_around():
                what = "leaving at step %d, nothing is saved" if options.no_save else "saving at step %d and leaving"
                warn(log, f"signal %d: {what}", signal, session.step)
                return f"signal {signal}"
            if options.eval_interval and session.step % options.eval_interval == 0:
                self.evaluate()
            if options.save_interval and session.step % options.save_interval == 0:
                self.save(beside=options.async_save and session.step < options.train_iters)
        return "done"

    def _one_step(self) -> None:
        session = self.session
        note(f"in step {session.step + 1}")
        start = time.perf_counter()
        lr = session.optimizer.param_groups[0]["lr"]
        with self.progress.profiler.around(session.step + 1):
            result = self.fitting.train_step(self._batches)
        session.device.synchronize()
        seconds = time.perf_counter() - start
        session.step += 1
        session.consumed_samples += session.options.global_batch_size
        self._record(result, seconds, lr)
        if self.samples and session.options.log_sample_ids:
            read = self.samples.read_by_all()
            self.records.write("samples", step=session.step, samples=[self.samples.place(i) for i in read])
        if result.grad_norm is None:
            self._bad_step(result)
        else:
            self.bad_steps = 0

    def _batches(self) -> Batches:
        """The step's micro-batches, from the first; where it is done again, losses that were told of are forgotten."""
        if self.trained:
            self.trained.clear()
        return self.train(self.session.consumed_samples)

    def _bad_step(self, result: StepResult) -> None:
        self.bad_steps += 1
        what = "gradient" if math.isfinite(result.loss) else "loss"
        last = self.session.consumed_samples
        batch = range(last - self.session.options.global_batch_size, last)
        places = [self.samples.place(i) for i in batch] if self.samples else []
        self.records.write("bad_step", step=self.session.step, what=what, samples=places or list(batch))
        where = f"samples {batch[0]} to {batch[-1]}" + (f": {shown(places)}" if places else "")
        message = f"step {self.session.step}: the {what} is not finite ({where})"
        over = self.bad_steps > self.session.options.max_nan
        if over and self.saving:
            self._saved(self.saving)  # of a step before the bad ones, or of one that they left unchanged
        with together():
            if over:
                raise UserError(
                    f"{message}; {self.bad_steps} such steps in a row, giving up; {self._last_good()}; "
                    "lower --lr, or look at the data"
                )
        warn(log, "%s: step skipped", message)

    def _last_good(self) -> str:
        return f"the last checkpoint is step {self.saved_step}" if self.saved_step else "nothing was saved"

    def _record(self, result: StepResult, seconds: float, lr: float) -> None:
        session = self.session
        tokens_per_s = result.tokens / seconds
        tflops = tokens_per_s * self.flops_per_token / 1e12
        fields: dict[str, Any] = {
            "step": session.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "step_s": seconds,
            "tokens_per_s": tokens_per_s,
            "tflops": tflops,
            "consumed_samples": session.consumed_samples,
            **self.progress.measures(session.step, tflops),
            **result.extra,
            **(self.trained.said if self.trained else {}),
        }
        self.records.write("train", **fields)
        self.progress.tell(fields)

    def evaluate(self) -> None:
        """Log the mean loss of the first global batches of the validation split; not if a signal cuts it short."""
        if self.eval_steps:
            self._evaluate("eval", "valid", self.valid, self.validated)

    def _test(self) -> str:
        """Log and keep the mean loss on data to test with; "done", or the signal that cut it short."""
        if self.test is None:
            return "done"
        loss = self._evaluate("test", "test", self.test, self.tested)
        with together():
            if loss is not None and first():
                final_test.write(self.session.options, self.session.step, loss)
        return f"signal {self._look_around()}" if loss is None else "done"

    def _evaluate(
        self, event: str, split: str, given: Callable[[int], Batches], losses: BySource | None
    ) -> float | None:
        """Log the mean loss of the first global batches of a split, and give it; None if a signal cuts that short."""
        session = self.session

        def batches(step: int) -> Batches | None:
            note(f"in evaluation {step + 1} at step {session.step}")
            return None if self._look_around() else given(step)

        if losses:
            losses.clear()
        loss = evaluate(session, batches, session.options.eval_iters, self.count)
        if loss is not None:
            self.records.write(event, step=session.step, loss=loss, split=split, **(losses.said if losses else {}))
            log.info(f"step {session.step}  {'test' if event == 'test' else 'validation'} loss {loss:.4f}")
        return loss

    def save(self, *, beside: bool = False) -> None:
        """Save, unless this step is saved already; ``beside`` the training, or wait until all is durable."""
        if self.session.options.no_save:
            return
        note("saving")
        step = self.session.step
        if self.saving and (self.saving.step != step or not beside):
            self._saved(self.saving)
        if self.saved_step != step and not self.saving:
            self.saving = Saving(self.session, self.source, beside=beside)
            if not beside:
                self._saved(self.saving)

    def _saved(self, saving: Saving) -> None:
        """Wait for a checkpoint that is on its way, and tell of it."""
        folder = saving.wait()
        self.saving, self.saved_step = None, saving.step
        self.source = checkpoint.source_in(folder)  # --keep may remove the checkpoint that this run came from
        seconds = {"seconds": saving.seconds(), "held_s": saving.held_s}
        self.records.write("save", step=saving.step, **seconds, folder=str(folder))
        log.info("saved %s", folder)

    def _look_around(self) -> int:
        """The signal that any rank has received, agreed by all, 0 for none; a checkpoint on its way goes on."""
        busy = self.saving is not None and self.saving.busy()
        asked = torch.tensor([signals.asked(), busy], device=self.session.device.torch)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        signal, anywhere = asked.tolist()
        if self.saving and not anywhere and self.saving.advance():
            self._saved(self.saving)
        return int(signal)
