"""What is told of a run while it goes: lines and a bar on a terminal, the page, profiles, TensorBoard, W&B."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import Page as Html
from trainer_runs import ENVIRONMENT, ROOT, arguments, corpus, data, events, launch, log_of, model, steps, train

from megapatch.models import device

device.start()  # before megatron-core is imported

from megapatch.trainer.pretrain import main  # noqa: E402
from megapatch.trainer.watching import progress  # noqa: E402
from megapatch.trainer.watching.metrics import Log  # noqa: E402

PEAK = 0.25  # TFLOP/s, stated
RANKS = "--profile-steps 2:3 --profile-ranks 0 1 --save-interval 2 --tensorboard DIR/board2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("progress")
    corpus(made)
    data(made, "other", [str(ROOT / "LICENSE"), str(ROOT / "CONTRIBUTING.md")] * 2)
    model(made, "dense")
    model(made, "mixture", "qwen3_moe")
    return made


def terminal(words: list[str]) -> str:
    """What a process writes to a terminal; its exit status is 0."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 200))  # rows, columns
    child = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert child.wait() == 0, said.decode()
    return said.decode()


@pytest.fixture(scope="module")
def shown(folder: Path) -> str:
    """A run on a terminal, with all that can be watched, as it was shown."""
    blend = f"--data-path 0.6 {folder}/data 0.4 {folder}/other --split 80,20 --eval-interval 3 --eval-iters 1"
    watched = f"--peak-tflops {PEAK} --profile-steps 2:3 --tensorboard {folder}/board --report-interval 0.1"
    words = arguments(folder, "mixture", "shown", f"{blend} {watched} --train-iters 6 --save-interval 3")
    return terminal([sys.executable, "-m", "megapatch.trainer.pretrain", *words])


LINE = (
    r"step (\d)/6  loss (\d\.\d{4})  lr (\S+)  norm (\d+\.\d{3})  ([\d,]+) tokens/s  (\S+) TFLOP/s  MFU ([\d.]+)%  "
    r"memory (\S+) peak (\S+) GiB  left (\d+):(\d\d):(\d\d)"
)


def test_a_terminal_shows_a_line_a_step_and_a_bar(folder: Path, shown: str) -> None:
    lines = re.findall(LINE, shown)
    records = events(log_of(folder / "shown"), "train")
    assert [int(found[0]) for found in lines] == [1, 2, 3, 4, 5, 6]
    for found, record in zip(lines, records, strict=True):
        loss, lr, norm, tokens, tflops, mfu, now, peak = (float(word.replace(",", "")) for word in found[1:9])
        assert (loss, norm) == (round(record["loss"], 4), round(record["grad_norm"], 3))
        assert lr == float(f"{record['lr']:.3g}") and tokens == round(record["tokens_per_s"])
        assert tflops == float(f"{record['tflops']:.3g}") and mfu == round(100 * record["mfu"], 1)
        assert now == round(record["memory_bytes"] / 2**30, 2) and peak == round(record["peak_memory_bytes"] / 2**30, 2)
    assert lines[-1][9:] == ("0", "00", "00")
    bars = re.findall(r"\r *(\d+)%\|[^\r]*?(\d)/6 \[[^\r]*loss (\d\.\d{4})\]", shown)
    assert bars[-1] == ("100", "6", f"{records[-1]['loss']:.4f}")


def test_utilisation_is_model_flops_by_the_stated_peak(folder: Path, shown: str, capfd: pytest.CaptureFixture) -> None:
    assert main(arguments(folder, "mixture", "planned", "--dry-run")) == 0
    per_token = json.loads(capfd.readouterr().out)["flops_per_token"]  # tests/test_metrics.py counts them
    for record in events(log_of(folder / "shown"), "train"):
        flops = per_token * 8 * 32 / record["step_s"]
        assert record["tflops"] == pytest.approx(flops / 1e12, rel=1e-12)
        assert record["mfu"] == pytest.approx(flops / (PEAK * 1e12), rel=1e-12)


def test_a_profile_is_a_trace_and_a_table(folder: Path, shown: str) -> None:
    profile = folder / "shown" / "profile"
    assert sorted(path.name for path in profile.iterdir()) == ["rank0.json", "rank0.txt"]
    trace = json.loads((profile / "rank0.json").read_text())["traceEvents"]
    operators = {event["name"] for event in trace if event.get("cat") == "cpu_op"}
    assert {"aten::mm", "aten::_fused_adamw_"} <= operators or {"aten::mm", "aten::add_"} <= operators
    table = (profile / "rank0.txt").read_text()
    rows = [line.split() for line in table.splitlines() if line.strip().startswith("aten::")]
    assert 10 <= len(rows) <= 25
    shares = [float(row[1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)  # by the time of their own
    counted = {row[0]: int(row[-1]) for row in rows}
    name = max(counted, key=counted.__getitem__)
    assert counted[name] == sum(event["name"] == name for event in trace if event.get("cat") == "cpu_op")


def test_the_page_of_a_run_that_ended_is_whole(folder: Path, shown: str) -> None:
    html = (folder / "shown" / "report.html").read_text()
    made, last = Html(html), events(log_of(folder / "shown"), "train")[-1]
    assert 'http-equiv="refresh"' not in html and made.text.split()[0] == "shown"
    assert made.row("shown")[2] == f"{last['loss']:,.7g}"
    titles = {"Loss", "Loss by source", "Throughput", "MFU", "Busiest expert, by the average", "Peak memory, rank 0"}
    assert titles <= set(re.findall("<h3>([^<]*)</h3>", html))


def test_tensorboard_has_every_number_of_the_log(folder: Path, shown: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    sources = [str(folder / "data"), str(folder / "other")]
    for kind in ("train", "eval"):
        assert {f"{kind}/loss_of/{name}" for name in sources} <= tags
    assert {f"train/{name}" for name in ("tflops", "mfu", "memory_bytes", "expert_tokens_max")} <= tags
    records = log_of(folder / "shown")
    for name in sources:
        for kind in ("train", "eval"):
            expected = [(r["step"], pytest.approx(r["loss_of"][name], rel=1e-6)) for r in events(records, kind)]
            assert [(e.step, e.value) for e in board.Scalars(f"{kind}/loss_of/{name}")] == expected


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict]:
    """Two processes."""
    words = arguments(folder, "dense", "pair", RANKS.replace("DIR", str(folder)))
    return launch(2, {"pair": words}, folder)["pair"]


def test_communication_that_nothing_hides_is_told(folder: Path, pair: list[dict]) -> None:
    assert len(steps(pair)) == 4
    for rank in (0, 1):
        head, *rows = (folder / "pair" / "profile" / f"rank{rank}.txt").read_text().split("\n\n")[0].splitlines()
        assert head.split() == ["Communication", "calls", "total", "ms", "exposed", "ms", "exposed"]
        found = {
            name: (int(calls), float(total), float(exposed)) for name, calls, total, exposed, _ in map(str.split, rows)
        }
        calls, total, exposed = found["all_reduce"]
        assert calls >= 2 and 0 <= exposed <= total
        json.loads((folder / "pair" / "profile" / f"rank{rank}.json").read_text())


def test_memory_of_every_rank_is_told(folder: Path, pair: list[dict]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = events(pair, "train")
    for record in found:
        assert len(record["peak_memory_bytes_by_rank"]) == 2
        assert record["peak_memory_bytes_by_rank"][0] == record["peak_memory_bytes"]
    board = EventAccumulator(str(folder / "board2"))
    board.Reload()
    values = [e.value for e in board.Scalars("train/peak_memory_bytes_by_rank/1")]
    assert values == [pytest.approx(r["peak_memory_bytes_by_rank"][1]) for r in found]


def test_the_page_is_renewed_as_the_run_goes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 waits for the page of the steps before."""
    seen: list[str] = []
    page, write = tmp_path / "run" / "report.html", Log.write

    def patient(self: Log, event: str, **fields: Any) -> None:
        write(self, event, **fields)
        if event == "train" and fields["step"] == 3:
            until = time.monotonic() + 100
            while not page.exists() and time.monotonic() < until:
                time.sleep(0.05)
            seen.append(page.read_text())

    monkeypatch.setattr(Log, "write", patient)
    train(folder, str(tmp_path / "run"), "--report-interval 0.001")
    assert '<meta http-equiv="refresh" content="1">' in seen[0]
    assert "1\xa0to\xa04" in page.read_text() and 'http-equiv="refresh"' not in page.read_text()


def test_a_run_that_fails_leaves_its_page(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    extra = "--report-interval 999 --lr 1e30 --min-lr 1e30 --lr-schedule constant --max-nan 0 --clip-grad 0"
    assert main(arguments(folder, "dense", str(tmp_path / "run"), f"{extra} --train-iters 9")) == 1
    page, until = tmp_path / "run" / "report.html", time.monotonic() + 100
    while not page.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert "steps skipped, for numbers that are not finite" in page.read_text()


def test_weights_and_biases_gets_what_the_log_gets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with wandb's documented calls: init(project, config), Run.log(scalars, step), Run.finish()."""
    logged: list[tuple[dict[str, float], int]] = []
    ended: list[bool] = []
    made: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda scalars, step: logged.append((scalars, step)), finish=lambda: ended.append(True))

    def init(**words: Any) -> Any:
        made.append(words)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None)))
    blend = f"--data-path 0.6 {folder}/data 0.4 {folder}/other --split 80,20 --eval-interval 2 --eval-iters 1"
    records = train(folder, str(tmp_path / "run"), f"--wandb trials {blend}")
    assert [words["project"] for words in made] == ["trials"] and made[0]["config"]["seq_length"] == 32
    assert ended == [True]
    assert [step for _, step in logged] == sorted(step for _, step in logged)  # wandb drops what goes back
    told = {name: value for scalars, step in logged if step == 4 for name, value in scalars.items()}
    for record in (r for r in records if r["event"] in ("train", "eval") and r["step"] == 4):
        assert told[f"{record['event']}/loss"] == record["loss"]
        for name, loss in record["loss_of"].items():
            assert told[f"{record['event']}/loss_of/{name}"] == loss


def test_a_checkpoint_tells_how_to_repeat_its_run(folder: Path, tmp_path: Path) -> None:
    """Its options.args is in its manifest and gives the same run again; with the same --save nothing is left to do."""
    first = train(folder, str(tmp_path / "run"), "--weight-decay 0.02 --save-interval 2 --precision bf16")
    again = train(folder, str(tmp_path / "run"), "--weight-decay 0.03 --train-iters 5 --precision bf16")
    written = {path.name: path / "options.args" for path in sorted((tmp_path / "run").glob("iter_*"))}
    assert [re.findall("--weight-decay (.*)", path.read_text()) for path in written.values()] == [["0.02"]] * 2 + [
        ["0.03"]
    ]
    for path in written.values():
        assert "options.args" in json.loads((path.parent / "manifest.json").read_text())["files"]
    assert (tmp_path / "run" / "options.args").read_text() == written["iter_0000005"].read_text()
    assert main([f"@{written['iter_0000002']}", "--save", str(tmp_path / "again")]) == 0
    assert steps(log_of(tmp_path / "again")) == steps(first)
    assert len(events(again, "end")) == 2
    assert main([f"@{written['iter_0000005']}"]) == 0
    assert log_of(tmp_path / "run") == again


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([], 0.0), ([9.0], 0.0), ([9.0, 0.5], 0.5), ([9.0, 0.5, 1.5], 1.0), ([9.0, 7.0, 1.0, 2.0, 3.0], 2.0)],
)
def test_the_pace_is_of_the_latest_steps(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], expected: float
) -> None:
    """The first step, which also warms up, does not count; nor do those before the latest three."""
    now, pace = 100.0, progress.Pace(steps=3)
    for passed in seconds:
        now += passed
        monkeypatch.setattr(progress.time, "monotonic", lambda now=now: now)
        pace.step()
    assert pace.step_s == expected


@pytest.mark.parametrize(
    ("left", "shown"), [(0.4, "0:00:00"), (59.9, "0:00:59"), (3725, "1:02:05"), (4e5, "111:06:40")]
)
def test_time_left_is_in_hours(left: float, shown: str) -> None:
    fields = {"step": 3, "loss": float("nan"), "lr": 1e-4, "grad_norm": None, "tokens_per_s": 1234.5, "tflops": 0.0123}
    fields |= {"memory_bytes": 2**30, "peak_memory_bytes": 3 * 2**29, "memory_bytes_by_rank": [2**30, 2**31]}
    assert progress.line(fields, 10, left) == (
        "step 3/10  loss nan  lr 0.0001  norm -  1,234 tokens/s  0.0123 TFLOP/s  memory 2.00 peak 1.50 GiB  "
        f"left {shown}"
    )
