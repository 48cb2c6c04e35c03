"""Runs training cases one after the other in the same processes; started by tests under torchrun.

    torchrun --nproc-per-node 4 tests/train_worker.py cases.json results.json

cases.json: {name: case}; results.json: {name: [log records]}, written by rank 0. One start for many cases, because
starting processes and importing megatron-core takes longer than training a tiny model. A case is a list of mp-pretrain
arguments, or an object that holds them as "arguments" and, when wanted, with steps counted from 1:

    "signal": {"step": 3, "rank": 1, "number": 10}   this rank receives the signal while it logs step 3
    "bad": {"3": ["loss", 1], "4": ["gradient", 0]}  the loss of step 3 on rank 1 and a gradient of step 4 on rank 0 are
                                                     not finite
    "fail": 1                                        loading the weights fails on this rank, with a UserError
    "behind": 1                                      this rank has found the checkpoint of step 1 to resume from
    "done": [1, true]                                this rank finds all steps done (or false: some left to do)
    "full": 1                                        writing its share of a checkpoint fails on this rank: no space left
    "kill": {"step": 4} or {"save": 4}               the process is killed (-9) after step 4, or while it saves step 4;
                                                     for one process only, before the first case without
    "digests": true                                  adds {"event": "state", "step", "digest"}: xxh3 of all parameters
                                                     and optimizer states of rank 0, after the step
    "kept": true                                     adds {"event": "kept", "bytes"}: the most that rank 0 kept for the
                                                     backward pass of a micro-batch; "total_bytes" of all of them

A case that fails has one record: {"event": "error", "text": traceback}.
"""

import errno
import gc
import json
import os
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import xxhash
from kept import Kept

from megapatch.models import cli, commit, device
from megapatch.trainer import signals
from megapatch.trainer.options import PretrainOptions

device.start()  # before megatron-core is imported

from megapatch.trainer import session, step  # noqa: E402
from megapatch.trainer.pretrain import make_plan, prepare  # noqa: E402
from megapatch.trainer.session import Session  # noqa: E402


class Memory:
    """A sink that keeps the records."""

    def __init__(self, case: dict, run: Session) -> None:
        self.records: list[dict] = []
        self.case, self.session = case, run

    def write(self, record: dict) -> None:
        self.records.append(dict(record))
        if record["event"] != "train":
            return
        if self.case.get("digests"):
            found = {"event": "state", "step": record["step"], "digest": state_digest(self.session)}
            self.records.append(found)
        signal = self.case.get("signal", {})
        if signal.get("step") == record["step"] and signal.get("rank", 0) == dist.get_rank():
            os.kill(os.getpid(), signal["number"])
        if self.case.get("kill", {}).get("step") == record["step"]:
            os.kill(os.getpid(), 9)

    def close(self) -> None:
        pass


def state_digest(run: Session) -> str:
    """One digest of this rank's parameters, masters and optimizer states."""
    state = xxhash.xxh3_128()
    for model in run.models:
        for parameter in model.parameters():
            state.update(_bytes(parameter))
    for optimizer in run.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                state.update(_bytes(parameter))
                for value in optimizer.optimizer.state.get(parameter, {}).values():
                    state.update(_bytes(torch.as_tensor(value)))
    return state.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def spoil(parameter: torch.nn.Parameter) -> None:
    """Make the sum of a parameter's gradients one that is not finite."""
    parameter.main_grad.fill_(float("nan"))  # type: ignore[attr-defined]


class Faults:
    """Makes losses and gradients that are not finite, at given steps on given ranks."""

    def __init__(self, bad: dict[str, tuple[str, int]], kept: Kept | None = None) -> None:
        self.bad, self.step, self.kept = bad, 0, kept
        self.loss, self.run_batches = step._loss, step.run_batches

    def what(self) -> str:
        kind, rank = self.bad.get(str(self.step), ("", -1))
        return kind if rank == dist.get_rank() else ""

    def spoil_loss(self, mask: torch.Tensor, output: torch.Tensor, **words: Any) -> Any:
        if self.kept:
            self.kept.measure()
        return self.loss(mask, output * float("inf") if self.what() == "loss" else output, **words)

    def spoil_gradient(self, run: Session, *args: Any, train: bool) -> Any:
        self.step = run.step + 1 if train else -1
        hook = None
        if self.what() == "gradient":  # before it is reduced over the ranks, as a number too large would be
            parameter = next(p for p in run.models[0].parameters() if p.dim() > 1)
            hook = parameter.register_hook(lambda _: spoil(parameter))  # gradients of weights may never reach a hook
        with self.kept.watching() if self.kept else nullcontext():
            found = self.run_batches(run, *args, train=train)
        if hook:
            hook.remove()
        return found


def run_killed(case: dict) -> list[dict]:
    """Run a case in a fork of this process, which kills itself."""
    assert not dist.is_initialized(), "cases that are killed come first: threads of the process group do not fork"
    child = os.fork()
    if child == 0:
        try:
            run_case(case)
        except Exception:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return [{"event": "error", "text": f"killed by signal {os.waitstatus_to_exitcode(status) * -1}"}]


def killing(where: dict) -> Any:
    """Patch the end of a save so that the process dies there, if so asked."""

    def seal(folder: Path, *args: Any, **kwargs: Any) -> None:
        if str(where.get("save")) == folder.name.removeprefix("iter_").removesuffix(".tmp").lstrip("0"):
            os.kill(os.getpid(), 9)
        real(folder, *args, **kwargs)

    real = commit.seal
    return mock.patch.object(commit, "seal", seal)


def failing(rank: int) -> Any:
    """Patch the loading of weights so that it fails on this rank."""

    def load(*args: Any) -> None:
        if rank == dist.get_rank():
            raise cli.UserError("no such weights")
        real(*args)

    real = session.load_weights
    return mock.patch.object(session, "load_weights", load)


def filling(rank: int) -> Any:
    """Patch the writing of checkpoints so that the disk is full on this rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*args: Any, **words: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = full if rank == dist.get_rank() else filesystem_async._write_item
    return mock.patch.object(filesystem_async, "_write_item", found)


def run_case(case: Any) -> list[dict]:
    from megatron.core import parallel_state

    case = case if isinstance(case, dict) else {"arguments": case}
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(case["arguments"])
    signals.forget()
    try:
        plan = make_plan(options)
        rank, done = case.get("done", (None, plan.done))
        if str(rank) == os.environ.get("RANK"):
            plan = replace(plan, done=done)
        if str(case.get("behind")) == os.environ.get("RANK"):
            plan = replace(plan, resumed=options.save / "iter_0000001")
        with failing(case.get("fail", -1)):
            prepared = prepare(options, device.start(options.device), plan)
        if prepared is None:
            return []
        trainer, records = prepared
        memory = Memory(case, trainer.session)
        records.sinks.append(memory)
        if not options.save_interval and "signal" not in case and "save" not in case:
            trainer.saved_step = options.train_iters  # nothing to save: these cases look at the losses only
        kept = Kept(p for m in trainer.session.models for p in m.parameters()) if case.get("kept") else None
        if kept and trainer.session.aside:
            kept.watch_offload(trainer.session.aside)
        faults = Faults(case.get("bad", {}), kept)
        with (
            mock.patch.object(step, "_loss", faults.spoil_loss),
            mock.patch.object(step, "run_batches", faults.spoil_gradient),
            killing(case.get("kill", {})),
            filling(case.get("full", -1)),
        ):
            trainer.run()
        if kept:
            memory.records.append({"event": "kept", "bytes": kept.most, "total_bytes": kept.total})
        records.close()
        return memory.records
    finally:
        parallel_state.destroy_model_parallel()


def main(cases: Path, results: Path) -> None:
    signals.listen()
    gc.collect()
    gc.freeze()  # what imports made is not looked through again: Kept asks for it in every pass
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        try:
            killed = isinstance(case, dict) and "kill" in case
            found[name] = run_killed(case) if killed else run_case(case)
        except (Exception, SystemExit):  # the latter on the ranks that rank 0 speaks for
            found[name] = [{"event": "error", "text": traceback.format_exc()}]
            print(name, found[name][0]["text"], file=sys.stderr, flush=True)
    if int(os.environ.get("RANK", "0")) == 0:
        results.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
