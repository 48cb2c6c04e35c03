"""The sweep of mp-offload-bench: points, what goes on after a stop or a failure, who is dominated; and a real one."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import trainer_runs
from torch.distributed.run import parse_args as torchrun_args

from megapatch.models.cli import UserError
from megapatch.tools.offload_bench import pareto, sweep, tell
from megapatch.tools.offload_bench.offload_bench import main
from megapatch.tools.offload_bench.sweep import Point, Sweep, points

GIVEN = ("--model", "m")
MIB = 2**20


def steps(loss: float, seconds: float, **more: Any) -> list[dict]:
    """A log of four steps, of which the first two are slow."""
    fields = {"event": "train", "loss": loss, "grad_norm": 1.0, "peak_memory_bytes": 100 * MIB, **more}
    times = [9.0, 9.0, 2 * seconds, seconds]
    return [{**fields, "step": n, "step_s": t, "tokens_per_s": 100 / t} for n, t in enumerate(times, 1)]


class Trainer:
    """Stands in for the trainer's process: writes the log that each point is to have, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, logs: dict[str, list[dict] | str]) -> None:
        self.logs, self.ran = logs, []
        monkeypatch.setattr(sweep, "run_to_end", self.run)

    def run(self, words: list[str], _: float) -> tuple[int, str]:
        value = {flag: words[words.index(flag) + 1] for flag in words if flag.startswith("--")}
        self.ran.append(" ".join(words[words.index("--offload-optimizer") : words.index("--save")]))
        found = self.logs[Path(value["--save"]).name]
        if found == "interrupt":
            raise KeyboardInterrupt
        if isinstance(found, str):
            return 1, found
        Path(value["--save"]).mkdir(parents=True)
        lines = [{"event": "start"}, *found, {"event": "end"}]
        (Path(value["--save"]) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0, ""


def test_points_are_the_ways_to_save_memory() -> None:
    base = ("--offload-optimizer", "0")
    assert points(["0", "0.5", "0.0", "0.5", "auto"], ["full"], ["2"], ["--device-memory-gib", "4"]) == [
        Point("optimizer", "0", base),
        Point("optimizer", "0.5", ("--offload-optimizer", "0.5")),
        Point("optimizer", "auto", ("--offload-optimizer", "auto", "--device-memory-gib", "4")),
        Point("recompute", "full", (*base, "--recompute", "full")),
        Point("activations", "2", (*base, "--offload-activations", "2")),
    ]


def test_a_command_is_the_trainer_with_the_points_options_last(tmp_path: Path) -> None:
    point = Point("optimizer", "1", ("--offload-optimizer", "1"))
    one, two = (Sweep(tmp_path, GIVEN, 4, ranks, 9.0).command(point, tmp_path / "s") for ranks in (1, 2))
    assert one[2] == "megapatch.trainer.pretrain" and two[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    end = [
        "--offload-optimizer",
        "1",
        "--save",
        f"{tmp_path}/s",
        "--no-save",
        "--train-iters",
        "4",
        "--log-file",
        f"{tmp_path}/s/log.jsonl",
    ]
    assert one[-9:] == two[-9:] == end
    started = torchrun_args(two[3:])
    assert (started.nproc_per_node, started.module, started.training_script) == ("2", True, one[2])
    assert started.training_script_args == one[3:]


def test_a_sweep_goes_on_where_it_stopped_and_failures_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(
        monkeypatch,
        {
            "optimizer-0": steps(3.0, 1.0),
            "optimizer-0.5": "mp-pretrain: step 1\nmp-pretrain: error: it does not fit\n",
            "optimizer-1": "interrupt",
        },
    )
    made = Sweep(tmp_path, GIVEN, 4, 1, 9.0)
    wanted = points(["0.5", "1"], [], [])
    with pytest.raises(KeyboardInterrupt):
        list(made.rows(wanted))
    trainer.logs["optimizer-0.5"] = steps(3.0, 2.0, device_memory_bytes=90 * MIB, offload_fraction=0.5)
    trainer.logs["optimizer-1"] = "Traceback\nRuntimeError: boom\n"
    rows = list(made.rows(wanted))
    assert trainer.ran.count("--offload-optimizer 0") == 1  # it was done
    assert [row["point"] for row in rows] == ["optimizer 0", "optimizer 0.5", "optimizer 1"]
    assert "error" not in rows[1] and rows[1]["device_bytes"] == 90 * MIB  # on a CPU the peak counts both memories
    assert rows[2]["error"] == "exit status 1: RuntimeError: boom" and rows[2]["same_loss"] is None
    kept = [json.loads(line)["point"] for line in made.results.read_text().splitlines()]
    assert sorted(kept) == ["optimizer 0", "optimizer 0.5", "optimizer 1"]
    assert len(list(tmp_path.glob("*/log.jsonl"))) == 2


PARENT = """
import pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def end(*_):
    child.kill()
    sys.exit(child.wait())
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("x" * 200_000, file=sys.stderr)
time.sleep(600)
"""


@pytest.mark.parametrize("stop", [subprocess.TimeoutExpired("x", 1), KeyboardInterrupt()])
def test_a_point_that_is_stopped_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    """As torchrun's, which are in sessions of their own; here one that says more than a pipe holds."""
    named, real, calls = tmp_path / "child", subprocess.Popen.communicate, []

    def communicate(self: Any, *args: Any, **words: Any) -> Any:
        calls.append(words)
        if len(calls) > 1:
            return real(self, *args, **words)
        while not named.exists() or not named.read_text():
            time.sleep(0.01)
        raise stop

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(type(stop)):
        sweep.run_to_end([sys.executable, "-c", PARENT, str(named)], 5.0)
    assert calls == [{"timeout": 5.0}, {"timeout": sweep.GRACE_S}]
    with pytest.raises(ProcessLookupError):
        os.kill(int(named.read_text()), 0)


@pytest.mark.parametrize(
    ("program", "timeout_s", "told"),
    [
        ("import sys; sys.exit('mp-pretrain: error: no')", 60, "exit status 1: mp-pretrain: error: no"),
        ("import sys; sys.exit(3)", 60, "exit status 3: no message"),
        ("import time; time.sleep(600)", 0.5, "took more than 0.5 s (--timeout-s)"),
        ("print('planned')", 60, "it ended without a step; is --dry-run among its options?"),
        ("import os; os.kill(os.getpid(), 9)", 60, "exit status -9: no message"),
    ],
)
def test_a_point_without_figures_has_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, timeout_s: float, told: str
) -> None:
    monkeypatch.setattr(Sweep, "command", lambda *_: [sys.executable, "-c", program])
    (row,) = Sweep(tmp_path, GIVEN, 4, 1, timeout_s).rows(points([], [], []))
    assert row["error"] == told and row["same_loss"] is None


def test_wrong_options_of_the_trainer_end_the_sweep_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "import sys; print('mp-pretrain: error: unrecognized arguments: --tain', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(Sweep, "command", lambda *_: [sys.executable, "-c", said])
    with pytest.raises(UserError, match="the options after --: mp-pretrain: error: unrecognized arguments: --tain"):
        list(Sweep(tmp_path / "s", ("--tain", "1"), 4, 1, 60.0).rows(points(["1"], [], [])))
    assert not (tmp_path / "s" / "sweep.json").exists()  # so that the folder takes the mended options


def test_a_sweep_of_other_options_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(monkeypatch, {"optimizer-0": steps(3.0, 1.0)})
    words = ["--measure", "sweep", "--output", str(tmp_path / "s"), "--fractions", "--recompute"]
    assert main([*words, "--", "--lr", "1"]) == 0
    assert main([*words, "--", "--lr", "2"]) == 1
    assert "has results of other options or steps; name another folder" in capsys.readouterr().err
    assert main(words) == 1
    assert "--measure sweep needs mp-pretrain's options after --" in capsys.readouterr().err


def test_other_losses_are_a_failure_and_dominated_points_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = {
        "optimizer-0": steps(3.0, 1.0),
        "optimizer-0.5": steps(3.0, 2.0, device_memory_bytes=80 * MIB, optimizer_s=0.5, offload_exposed_s=0.25),
        "optimizer-1": steps(3.0, 4.0, device_memory_bytes=60 * MIB),
        "recompute-full": steps(3.0, 3.0, peak_memory_bytes=50 * MIB),
        "activations-2": steps(3.5, 3.0, device_memory_bytes=95 * MIB, activations_wait_s=0.5),
    }
    Trainer(monkeypatch, logs)
    words = ["--measure", "sweep", "--output", str(tmp_path / "s"), "--fractions", "0.5", "1", "--activations", "2"]
    assert main([*words, "--", *GIVEN]) == 1  # activations 2 has another loss
    out, err = capsys.readouterr()
    rows = {row["point"]: row for row in map(json.loads, out.splitlines()) if row["part"] == "sweep"}
    assert {name: row["dominated"] for name, row in rows.items()} == {
        "optimizer 0": None,
        "optimizer 0.5": None,
        "optimizer 1": "recompute full",
        "recompute full": None,
        "activations 2": "optimizer 0.5",
    }
    assert [row["same_loss"] for row in rows.values()] == [True, True, True, True, False]
    half = rows["optimizer 0.5"]
    assert (half["step_s"], half["forward_backward_s"], half["exposed_s"]) == (2.0, 1.5, 0.25)
    assert "activations 2: its losses are not those of optimizer 0." in err
    assert "--offload-optimizer 0.5: saves 20MiB of the device, 50% fewer tokens/s." in err
    assert "worse than recompute full" in err and "other losses!" in err
    drawn = ElementTree.fromstring((tmp_path / "s" / "sweep.svg").read_text())
    said = "".join(drawn.itertext())
    assert "optimizer in host memory, share: 1, 0.5, 0 (left to right)" in said and "recomputation: full" in said
    circles = [e.get("class") for e in drawn.iter() if e.tag.endswith("circle")]
    assert circles.count("hollow c5") == 2 + 1 and len(circles) == 5 + 2 + 1  # one is in the legend


def test_a_table_has_a_line_for_a_point_that_failed() -> None:
    failed = {"part": "sweep", "point": "optimizer 1", "kind": "optimizer", "setting": "1", "error": "it does not fit"}
    assert pareto.cells(failed)[:2] == ("optimizer 1", "failed")
    assert "it does not fit" in tell.tables(pareto.judged([failed]))
    assert pareto.plot([failed], "t").startswith("<svg")


@pytest.mark.timeout(600)
def test_a_real_sweep_has_one_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_runs.corpus(tmp_path)
    trainer_runs.model(tmp_path, "dense")
    given = trainer_runs.arguments(tmp_path, "dense", "unused", "--offload-engine cpu")
    words = ["--measure", "sweep", "--output", str(tmp_path / "sweep"), "--steps", "3", "--fractions", "1"]
    capsys.readouterr()
    assert main([*words, "--recompute", "full", "--link-gb-per-s", "1", "--", *given]) == 0
    rows = [row for row in map(json.loads, capsys.readouterr().out.splitlines()) if row["part"] == "sweep"]
    assert [row["point"] for row in rows] == ["optimizer 0", "optimizer 1", "recompute full"]
    assert len({row["loss_hash"] for row in rows}) == 1 and all(row["same_loss"] for row in rows)
    assert rows[1]["fraction"] == 1.0 and rows[1]["host_bytes"] > 0 and rows[1]["d2h_bytes"] > 0
