"""The trainer itself, a few steps for each way to save memory; the losses must be those of the first, to the bit."""

import json
import logging
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megapatch.models import commit
from megapatch.models.cli import USAGE, UserError

log = logging.getLogger(__name__)
PACKAGE = __package__.rpartition(".tools.")[0]
BASE = ("--offload-optimizer", "0")  # of the first point, and of those on other axes
WARM_UP = 2  # steps whose time does not count
GRACE_S = 60.0  # for a run to end; torchrun kills its processes after 30
TAIL = 300  # characters of a failed run's last words


@dataclass(frozen=True)
class Point:
    """A way to save memory: the trainer's options for it."""

    kind: str  # the curve that it is on
    setting: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """For the table, and for its folder."""
        return f"{self.kind} {self.setting}"


def points(
    fractions: Sequence[str], recompute: Sequence[str], activations: Sequence[str], fit: Sequence[str] = ()
) -> list[Point]:
    """Optimizer in host memory by fraction, then recomputation, then activations in host memory; the first is 0.

    ``fit``: further options of the automatic fraction.
    """
    found = [Point("optimizer", "0", BASE)]
    for fraction in dict.fromkeys(fractions):
        if fraction == "auto" or float(fraction):
            more = fit if fraction == "auto" else ()
            found.append(Point("optimizer", fraction, ("--offload-optimizer", fraction, *more)))
    found += [Point("recompute", kind, (*BASE, "--recompute", kind)) for kind in recompute]
    return found + [Point("activations", n, (*BASE, "--offload-activations", n)) for n in activations]


@dataclass(frozen=True)
class Sweep:
    """Runs of the trainer with the same options but for the points'; results are added to OUTPUT/points.jsonl."""

    output: Path
    given: tuple[str, ...]  # options of mp-pretrain
    steps: int
    ranks: int
    timeout_s: float

    @property
    def results(self) -> Path:
        """One line for each point that was run."""
        return self.output / "points.jsonl"

    @property
    def about(self) -> Path:
        """What the results are of."""
        return self.output / "sweep.json"

    @property
    def _asked(self) -> dict[str, Any]:
        return {"given": list(self.given), "steps": self.steps, "ranks": self.ranks}

    def rows(self, wanted: Sequence[Point]) -> Iterator[dict[str, Any]]:
        """Each point's row: from an earlier call, or run now; one that fails has an 'error' and is run again."""
        done = {row["point"]: row for row in self._done()}
        base: str | None = None
        for number, point in enumerate(wanted, 1):
            found = done.get(point.name)
            if found is None or "error" in found:
                log.info("%d/%d: %s", number, len(wanted), " ".join(point.flags))
                found = self._run(point)
                self._keep(found)
            if "error" in found:
                log.warning("%s: %s", point.name, found["error"])
            base = base or found.get("loss_hash")
            yield found | {"same_loss": found.get("loss_hash") == base if "loss_hash" in found else None}

    def _done(self) -> list[dict[str, Any]]:
        if self.about.exists() and json.loads(self.about.read_text()) != self._asked:
            raise UserError(f"--output {self.output}: has results of other options or steps; name another folder")
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def _keep(self, row: dict[str, Any]) -> None:
        others = [old for old in self._done() if old["point"] != row["point"]]
        if not self.about.exists():
            with commit.staged_file(self.about) as path:
                path.write_text(json.dumps(self._asked))
        with commit.staged_file(self.results) as path:
            path.write_text("".join(json.dumps(each) + "\n" for each in [*others, row]))

    def command(self, point: Point, save: Path) -> list[str]:
        """The words that start a point's run."""
        start = [sys.executable, "-m"]
        if self.ranks > 1:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m", "--"]
        own = ["--save", str(save), "--no-save", "--train-iters", str(self.steps)]
        own += ["--log-file", str(save / "log.jsonl")]
        cache = ["--data-cache-path", str(self.output / "data-cache")]
        return [*start, f"{PACKAGE}.trainer.pretrain", *cache, *self.given, *point.flags, *own]

    def _run(self, point: Point) -> dict[str, Any]:
        save = self.output / point.name.replace(" ", "-")
        shutil.rmtree(save, ignore_errors=True)  # of a run that was killed
        row: dict[str, Any] = {"part": "sweep", "point": point.name, "kind": point.kind, "setting": point.setting}
        row["flags"] = list(point.flags)
        try:
            status, said = run_to_end(self.command(point, save), self.timeout_s)
            if status == USAGE and point.flags == BASE:
                raise UserError(f"the options after --: {last_words(said)}")  # of which each point would tell
            if status:
                return row | {"error": f"exit status {status}: {last_words(said)}"}
            told = save / "log.jsonl"
            records = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
            steps = [record for record in records if record["event"] == "train"]
            return row | (
                measured(steps) if steps else {"error": "it ended without a step; is --dry-run among its options?"}
            )
        except subprocess.TimeoutExpired:
            return row | {"error": f"took more than {self.timeout_s:g} s (--timeout-s)"}


def run_to_end(words: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Exit status of a program, and its stderr. Where time is up, or Ctrl-C is pressed, it is ended first.

    It is asked to, as torchrun then ends the processes that it started; killed, it would leave them behind.
    """
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = running.communicate(timeout=timeout_s)
    except BaseException:
        running.terminate()
        try:
            running.communicate(timeout=GRACE_S)
        finally:
            running.kill()
        raise
    return running.returncode, said


def last_words(said: str) -> str:
    """The line of a program's stderr that says what was wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line or "Error: " in line]
    return (errors or lines or ["no message"])[-1][-TAIL:]


def measured(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run's log says: of the fastest step after warm-up; peaks; a hash of all losses and gradient norms."""
    last, best = steps[-1], min(steps[WARM_UP:] or steps, key=lambda step: step["step_s"])

    def of(name: str) -> float:
        return float(best.get(name, 0.0))

    host = int(last.get("offload_host_bytes", 0)) + int(last.get("activations_pool_bytes", 0))
    peak = max(last.get("peak_memory_bytes_by_rank", [last["peak_memory_bytes"]]))
    numbers = [value for step in steps for value in (step["loss"], step["grad_norm"] or float("nan"))]
    return {
        "steps": len(steps),
        "device_bytes": last.get("device_memory_bytes", peak),  # on a CPU, whose peak counts both memories
        "peak_memory_bytes": peak,
        "host_bytes": host,
        "fraction": last.get("offload_fraction", 0.0),
        "tokens_per_s": of("tokens_per_s"),
        "step_s": of("step_s"),
        "forward_backward_s": of("step_s") - of("optimizer_s") - of("activations_wait_s"),
        "d2h_wait_s": of("offload_d2h_wait_s"),
        "adam_s": of("offload_adam_s"),
        "h2d_wait_s": of("offload_h2d_wait_s"),
        "exposed_s": of("offload_exposed_s") + of("activations_wait_s"),
        "d2h_bytes": int(of("offload_d2h_bytes") + of("activations_out_bytes")),
        "h2d_bytes": int(of("offload_h2d_bytes") + of("activations_back_bytes")),
        "loss_hash": xxhash.xxh3_64(struct.pack(f"{len(numbers)}d", *numbers)).hexdigest(),
    }
