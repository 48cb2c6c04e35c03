"""Reads the JSON-lines files a report is made from: training logs, checks, pipeline steps."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError

EVENTS = ("start", "data", "train", "samples", "bad_step", "eval", "test", "save", "resume", "end", "offload")
MEASURED = ("train", "eval", "test")  # have a loss at a step
NAN = float("nan")


@dataclass
class Run:
    """What one training log says, in the order of its lines."""

    label: str
    path: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)  # what mp-sft says of its sets
    resumed_at: list[int] = field(default_factory=list)  # steps, each once
    saved_at: list[int] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)  # step: what was not finite
    moves: list[dict[str, Any]] = field(default_factory=list)  # of optimizer state, from and to host memory
    times: list[float] = field(default_factory=list)  # unix times of all lines that have one
    unknown: int = 0  # lines with an event this tool does not know

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one field of the train lines, or of DERIVED; NaN where a line does not have it."""
        value = DERIVED.get(key, lambda line: as_float(line.get(key)))
        return [line["step"] for line in self.train], [value(line) for line in self.train]

    def reruns(self) -> tuple[int, float]:
        """How many steps were run more than once, and the largest difference between their losses."""
        seen: dict[int, float] = {}
        again: dict[int, float] = {}
        for step, loss in zip(*self.series("loss"), strict=True):
            if step in seen:
                same = seen[step] == loss or (math.isnan(seen[step]) and math.isnan(loss))
                again[step] = max(again.get(step, 0.0), 0.0 if same else abs(seen[step] - loss))
            seen[step] = loss
        return len(again), max(again.values(), default=0.0)


def read_run(label: str, path: Path) -> Run:
    """The training log at ``path``; a line that is not what the trainer writes is a UserError."""
    run = Run(label, str(path))
    for where, line in json_lines(path):
        event = need(line, "event", str, where)
        if event not in EVENTS:
            run.unknown += 1
            continue
        if event in MEASURED:
            need(line, "step", int, where)
            for key in line.keys() & NUMBERS:
                _need_number(line[key], key, where)
            need(line, "loss", (int, float, type(None)), where)
            line.setdefault("loss_of", {})
            for source, loss in need(line, "loss_of", dict, where).items():
                _need_number(loss, f"loss_of {source}", where)
        _add(run, event, line)
    return run


def _need_number(value: Any, name: str, where: str) -> None:
    if as_float(value, default=None) is None:
        raise UserError(f"{where}: {name!r} is {value!r}; expected a number or null")


def _balance(line: dict[str, Any]) -> float:
    """Tokens of the busiest expert by those of the average one."""
    mean = as_float(line.get("expert_tokens_mean"))
    return as_float(line.get("expert_tokens_max")) / mean if mean else NAN


def _largest_rank(line: dict[str, Any]) -> float:
    ranks = line.get("peak_memory_bytes_by_rank")
    return max(map(as_float, ranks)) if isinstance(ranks, list) and ranks else NAN


DERIVED: dict[str, Callable[[dict[str, Any]], float]] = {
    "expert_balance": _balance,
    "largest_peak_memory_bytes": _largest_rank,
}
NUMBERS = {
    "loss",
    "lr",
    "grad_norm",
    "step_s",
    "tokens_per_s",
    "tflops",
    "consumed_samples",
    "peak_memory_bytes",
    "memory_bytes",
    "mfu",
    "offload_fraction",
    "offload_exposed_s",
    "expert_tokens_max",
    "expert_tokens_mean",
    "ts",
}


def _add(run: Run, event: str, line: dict[str, Any]) -> None:
    lists = {"start": run.starts, "train": run.train, "eval": run.evals, "test": run.evals, "data": run.data}
    if event in lists:
        lists[event].append(line)
    step = line.get("resumed_from" if event == "start" else "step")
    marked = {"start": run.resumed_at, "resume": run.resumed_at, "save": run.saved_at}.get(event)
    if marked is not None and isinstance(step, int) and step not in marked:
        marked.append(step)
    if event == "bad_step" and isinstance(step, int):
        run.skipped[step] = str(line.get("what", "a number is"))
    if event == "offload" and line.get("reason") != "start":
        run.moves.append(line)
    if not math.isnan(time := as_float(line.get("ts"))):
        run.times.append(time)


def read_checks(path: Path) -> list[dict[str, Any]]:
    """Lines {"check": text, "ok": bool, ...}; a file without any is a UserError, for nothing was checked."""
    found = []
    for where, line in json_lines(path):
        need(line, "check", str, where)
        need(line, "ok", bool, where)
        found.append(line)
    if not found:
        raise UserError(f'{path}: no checks in it; expected lines such as {{"check": "...", "ok": true}}')
    return found


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Lines {"step": text, "seconds": number, "command": text}."""
    found = []
    for where, line in json_lines(path):
        need(line, "step", str, where)
        need(line, "seconds", (int, float), where)
        if not 0 <= as_float(line["seconds"]) < math.inf:
            raise UserError(f"{where}: 'seconds' is {line['seconds']!r}; expected a number of seconds, 0 or more")
        found.append(line)
    return found


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ('FILE:LINE', object) for each line that is not blank; anything but an object is a UserError."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            where = f"{path}:{number}"
            if not text.strip():
                continue
            try:
                line = json.loads(text.strip())
            except (ValueError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{where}: not JSON ({reason}); remove the line if a killed run left it torn"
                ) from error
            if not isinstance(line, dict):
                raise UserError(f"{where}: {type(line).__name__} found; expected one JSON object a line")
            yield where, line


def need(line: dict[str, Any], key: str, kind: Any, where: str) -> Any:
    """``line[key]``, which must be there and of type ``kind`` (a bool is no number)."""
    if key not in line:
        raise UserError(f"{where}: no {key!r}; found {', '.join(map(repr, line)) or 'an empty object'}")
    value = line[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{where}: {key!r} is {value!r}; expected {names}")
    return value


def as_float(value: Any, default: Any = NAN) -> Any:
    """A JSON number as float, null and absent as NaN; anything else gives ``default``."""
    if value is None:
        return NAN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    try:
        return float(value)
    except OverflowError:
        return math.inf
