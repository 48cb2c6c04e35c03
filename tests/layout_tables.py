"""Tables of parallel layouts, each of which is to train as the single process does.

All layouts of one number of processes run in one set of them (tests/train_worker.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainer_runs
from trainer_runs import launch

STEPS = 5
LOSS, NORM = 1e-5, 1e-4
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
SP = "--tp 2 --sequence-parallel"
Layouts = dict[str, tuple[int, str]]  # name: (processes, arguments)
Steps = list[tuple[int, float, float, float]]


class Table:
    """A tiny model of a family, the arguments of all its runs, and its layouts; ``make`` writes FOLDER/NAME."""

    def __init__(
        self, family: str, layouts: Layouts, extra: str = "", make: Callable[..., Any] = trainer_runs.model
    ) -> None:
        self.family, self.layouts, self.extra, self.make = family, layouts, extra, make


def cases(tables: dict[str, Table]) -> list[tuple[str, str]]:
    """Model and layout of each case."""
    return [(model, name) for model, table in tables.items() for name in table.layouts]


def each(tables: dict[str, Table]) -> pytest.MarkDecorator:
    """Runs a test of ``model`` and ``layout`` for each case."""
    found = cases(tables)
    return pytest.mark.parametrize(("model", "layout"), found, ids=[f"{m}-{n}".replace(" ", "_") for m, n in found])


def fixture(tables: dict[str, Table]) -> Any:
    """A fixture that runs all cases, for ``check``."""

    @pytest.fixture(scope="module")
    def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
        return run(tmp_path_factory.mktemp("layouts"), tables)

    return runs


def run(folder: Path, tables: dict[str, Table]) -> dict[str, Steps]:
    """Step, loss, gradient norm and learning rate of each step of each case; the single process is 'MODEL alone'."""
    trainer_runs.corpus(folder)
    started: dict[tuple[int, str], dict[str, list[str]]] = {}  # together: cases of a size, of a model where it is large
    for model, table in tables.items():
        table.make(folder, model, table.family)
        for name, (size, layout) in {"alone": (1, ""), **table.layouts}.items():
            words = f"--train-iters {STEPS} --micro-batch-size 1 --seq-length 64 {table.extra} {layout}"
            found = started.setdefault((size, model if size > 4 else ""), {})
            found[f"{model} {name}"] = trainer_runs.arguments(folder, model, "run", words)
    records = {n: log for (size, _), found in started.items() for n, log in launch(size, found, folder).items()}
    return {name: trainer_runs.steps(log) for name, log in records.items()}


def check(runs: dict[str, Steps], model: str, layout: str) -> None:
    """The layout trains as the single process does."""
    expected, found = runs[f"{model} alone"], runs[f"{model} {layout}"]
    assert len(expected) == len(found) == STEPS
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    last = f"loss {found[-1][1]:.7f} off by {loss:.1e}  norm {found[-1][2]:.6f} off by {norm:.1e}"
    print(f"{model:14} {layout:45} {last}")
    assert loss <= LOSS
    assert norm <= NORM
    assert expected[-1][1] != expected[0][1]  # it trained
