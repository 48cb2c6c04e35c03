"""Where the numbers of a run go: JSON lines always, TensorBoard and W&B when asked. Imports no torch."""

import json
import math
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megapatch.models import commit
from megapatch.models.cli import UserError

NEEDS = {  # option: package, its name, extra of ours that brings it
    "tensorboard": ("tensorboard", "TensorBoard", "tb"),
    "wandb": ("wandb", "Weights & Biases", "wandb"),
}


def refuse_missing(options: Any) -> None:
    """UserError where an option needs a package that is not installed."""
    for option, (package, name, extra) in NEEDS.items():
        if getattr(options, option) and find_spec(package) is None:
            raise UserError(f"--{option} needs {name}: pip install 'megapatch[{extra}]'")


class Sink(Protocol):
    """Somewhere that log records go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """No more records."""


class JsonLines:
    """Appends one JSON object per record, whole lines only; NaN is written as null."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self.path, self.file = path, path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        with commit.naming_full_disks(self.path):
            self.file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.close()


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed run left of its last line."""
    if path.exists():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with path.open("r+b") as file:
                file.truncate(end)


class TensorBoard:
    """Scalars for TensorBoard, by step; a run that goes on hides what was written of steps that it does again."""

    def __init__(self, folder: Path, step: int) -> None:
        """``step``: those until then are done."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def write(self, record: Mapping[str, Any]) -> None:
        if scalars := _scalars(record):
            for name, value in scalars.items():
                self.writer.add_scalar(f"{record['event']}/{name}", value, record["step"])  # type: ignore[no-untyped-call]
            self.writer.flush()  # type: ignore[no-untyped-call] # a run that is killed leaves no gap

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


class WeightsAndBiases:
    """Scalars for Weights & Biases, by step."""

    def __init__(self, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project=project, config=dict(config))

    def write(self, record: Mapping[str, Any]) -> None:
        scalars = {f"{record['event']}/{name}": value for name, value in _scalars(record).items()}
        if scalars:
            self.run.log(scalars, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Its numbers, by name; those by source or by rank as NAME/SOURCE; of other events than these nothing."""
    if record.get("event") not in ("train", "eval", "test"):
        return {}
    found: dict[str, float] = {}
    for name, value in record.items():
        many = dict(enumerate(value)) if isinstance(value, list) else value
        parts = {f"{name}/{key}": each for key, each in many.items()} if isinstance(many, Mapping) else {name: many}
        found |= {key: each for key, each in parts.items() if isinstance(each, int | float)}
    return {name: value for name, value in found.items() if name not in ("step", "ts")}


class Log:
    """Sends records to every sink, with the time added; on ranks that do not log there are no sinks."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def write(self, event: str, **fields: Any) -> None:
        """Record one event: start, train, eval, save, resume or end."""
        for sink in self.sinks:
            sink.write({"event": event, "ts": time.time(), **fields})

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()
