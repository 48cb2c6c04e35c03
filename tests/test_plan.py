"""mp-plan: what it prints and writes, in which order, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import ENVIRONMENT, ROOT, corpus

from megapatch.models.held import plain
from megapatch.models.shapes import num_parameters
from megapatch.tools.plan import machines, plan
from megapatch.tools.plan.plan import main
from megapatch.trainer.pretrain import main as pretrain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this process uses a GPU, which mp-plan hides")
MODELS = ROOT / "scripts" / "configs" / "models"
BATCH = ["--seq-length", "1024", "--global-batch-size", "4"]
GIB = 2**30
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def gpus_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """mp-plan hides GPUs from its own process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def plans(capfd: pytest.CaptureFixture, *words: Any) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, stdout's lines and stderr."""
    capfd.readouterr()
    status = main([*map(str, words), "--workers", "1"])
    said = capfd.readouterr()
    return status, [json.loads(line) for line in said.out.splitlines()], said.err


def small(capfd: pytest.CaptureFixture, model: Path, *words: Any) -> list[dict[str, Any]]:
    """Plans of the small model on two GPUs of 24 GiB."""
    given = ["--model", model, "--gpu", "RTX-4090", "--gpus", 2, *BATCH]
    status, rows, said = plans(capfd, *given, *words)
    assert status == 0, said
    return rows


def test_the_best_plan_comes_first_and_all_fit(capfd: pytest.CaptureFixture, model: Path) -> None:
    rows = small(capfd, model, "--top", 50)
    assert [row["plan"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) == 3
    assert [row["step_s"] for row in rows] == sorted(row["step_s"] for row in rows)
    for row in rows:
        assert row["total_bytes"] <= row["budget_bytes"] < 24564 << 20
        assert row["tp"] * row["pp"] * row["cp"] * row["data_parallel_size"] == 2
        assert row["micro_batches"] * row["micro_batch_size"] * row["data_parallel_size"] == 4
        assert sum(row["seconds"].values()) == pytest.approx(row["step_s"])
        most = max(range(row["pp"]), key=lambda n: row["stages"][n]["total_bytes"])
        assert row["binding"]["rank"] == most * 2 // row["pp"]
    weights = sum(stage["weights_bytes"] for stage in next(r for r in rows if r["pp"] == 2 and r["tp"] == 1)["stages"])
    assert weights == 2 * num_parameters(plain(SMALL))


def test_less_memory_is_never_faster_and_ends_in_a_refusal(capfd: pytest.CaptureFixture, model: Path) -> None:
    """What does not fit is computed again or goes to the host; in the end the least that is needed is told."""
    step, gib, done = 0.0, 23.0, set()
    given = ["--model", model, "--gpu", "RTX-4090", "--gpus", 2, *BATCH, "--reserve-gib", 0, "--top", 1]
    for _ in range(6):
        status, rows, said = plans(capfd, *given, "--memory-gib", gib)
        if status:
            break
        assert rows[0]["step_s"] >= step
        step, gib = rows[0]["step_s"], rows[0]["total_bytes"] / GIB * 0.75
        done |= {rows[0]["recompute"], "offload" if rows[0]["offload_optimizer"] else "on the GPU"}
    assert status == 3 and "offload" in done
    least = float(said.partition("the least is ")[2].split()[0])
    assert gib < least <= gib / 0.74 and "use more GPUs" in said
    assert plans(capfd, *given, "--memory-gib", least + 0.1)[0] == 0
    status, _, said = plans(capfd, *given, "--memory-gib", least + 0.1, "--no-offload")
    assert status == 3, said


def test_a_fast_link_lets_activations_wait_in_host_memory(
    capfd: pytest.CaptureFixture, model: Path, tmp_path: Path
) -> None:
    """Of as few layers as fit: less memory takes more of them; mp-pretrain takes the file."""
    link = {"part": "link", "operation": "h2d", "pinned": True, "bytes": 1 << 30, "bytes_per_s": 200e9}
    (tmp_path / "bench.jsonl").write_text(json.dumps(link))
    given = ["--model", model, "--gpu", "RTX-4090", "--gpus", 1, "--seq-length", 8192, "--global-batch-size", 8]
    given += ["--reserve-gib", 0, "--memory-gib", 6, "--bench", tmp_path / "bench.jsonl"]
    status, (row,), said = plans(capfd, *given, "--output", tmp_path / "best.args")
    count = row["offload_activations"]
    assert status == 0 and 0 < count < 7 and f"--offload-activations {count}" in row["arguments"], said
    assert f"offload activations {count}" in said
    assert row["stages"][0]["host_bytes"] == pytest.approx(row["offload_activations_bytes"] * 9 / 8, abs=1)
    less = plans(capfd, *given, "--memory-gib", row["total_bytes"] / GIB - 0.1)[1][0]
    assert (less["offload_activations"], less["step_s"]) > (count, 0.99 * row["step_s"])
    kept = plans(capfd, *given, "--no-offload")[1][0]
    assert kept["offload_activations"] == kept["stages"][0]["host_bytes"] == 0 and kept["step_s"] > row["step_s"]
    none = plans(capfd, *given, "--host-memory-gib", 1)[1][0]
    assert none["stages"][0]["host_bytes"] <= GIB and none["step_s"] > row["step_s"]
    corpus(tmp_path)
    paths = ["--tokenizer", tmp_path / "tokenizer", "--data-path", tmp_path / "data", "--save", tmp_path / "run"]
    assert pretrain([f"@{tmp_path / 'best.args'}", *map(str, paths), "--train-iters", "10", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--gpu", "H1000"], 1, "--gpu H1000: not known; known: A100-40GB, "),
        (["--memory-gib", "80"], 1, "--memory-gib 80: RTX-4090 has 24.0 GiB"),
        (["--reserve-gib", "24"], 1, "--reserve-gib 24: nothing is left of 24 GiB"),
        (["--seq-length", "16384"], 1, "longer than max_position_embeddings of config.json, 8192"),
        (["--global-batch-size", "0"], 2, "--global-batch-size 0: must be at least 1"),
        (["--expert-load", "0.5"], 2, "--expert-load 0.5: must be at least 1"),
        (["--bench", "config.json"], 1, "--bench config.json: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_planned_is_one_line(
    capfd: pytest.CaptureFixture, model: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, told: str
) -> None:
    monkeypatch.chdir(model)
    given = ["--model", ".", "--gpu", "RTX-4090", "--gpus", "1", *BATCH]
    if status == 2:
        with pytest.raises(SystemExit) as ended:
            main([*given, *words])
        found, said = ended.value.code, capfd.readouterr().err
    else:
        found, rows, said = plans(capfd, *given, *words)
        assert rows == []
    assert found == status and told in said, said
    assert len([line for line in said.splitlines() if "error" in line]) == 1


def test_an_unknown_model_names_those_that_are_known(capfd: pytest.CaptureFixture) -> None:
    status, rows, said = plans(capfd, "--model", "llama-4", "--gpus", 8)
    assert (status, rows) == (1, []) and "no name of: deepseek-v3, llama-3.1-70b" in said


@pytest.mark.parametrize(("name", "told"), [("config.json/x.args", "is a file"), ("x" * 300, "File name too long")])
def test_where_the_plan_cannot_be_written_nothing_is_searched(
    capfd: pytest.CaptureFixture, model: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    monkeypatch.setattr(plan, "progressing", lambda *_: pytest.fail("searched"))
    status, rows, said = plans(capfd, "--model", model, "--gpus", 2, *BATCH, "--output", model / name)
    assert (status, rows) == (1, []) and told in said and str(model / name) in said
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_a_plan_for_a_folder_with_weights_begins_with_them(
    capfd: pytest.CaptureFixture, model: Path, tmp_path: Path
) -> None:
    small(capfd, model, "--output", tmp_path / "fresh.args")
    assert f"\n--init-from {model / 'config.json'}\n" in (tmp_path / "fresh.args").read_text()
    core = tmp_path / "core"
    (core / "release" / "hf").mkdir(parents=True)
    (core / "release" / ".metadata").touch()
    (core / "latest_checkpointed_iteration.txt").write_text("release")
    (core / "release" / "hf" / "config.json").write_bytes((model / "config.json").read_bytes())
    small(capfd, core, "--output", tmp_path / "core.args")
    (core / "release" / "hf" / "model.safetensors").touch()
    small(capfd, core / "release" / "hf", "--output", tmp_path / "hf.args")
    for name, weights in (("core.args", core), ("hf.args", core / "release" / "hf")):
        written = (tmp_path / name).read_text()
        assert f"\n--model {weights}\n" in written and "--init-from" not in written


def test_the_file_it_writes_is_one_of_mp_pretrain(capfd: pytest.CaptureFixture, model: Path, tmp_path: Path) -> None:
    row = small(capfd, model, "--output", tmp_path / "best.args")[0]
    corpus(tmp_path)
    paths = ["--tokenizer", tmp_path / "tokenizer", "--data-path", tmp_path / "data", "--save", tmp_path / "run"]
    capfd.readouterr()
    assert pretrain([f"@{tmp_path / 'best.args'}", *map(str, paths), "--train-iters", "10", "--dry-run"]) == 0
    found = json.loads(capfd.readouterr().out)
    layout = {name: row[name] for name in ("tp", "pp", "cp", "ep", "data_parallel_size")}
    assert layout.items() <= found["layout"].items() and found["layout"]["world_size"] == 2
    assert found["micro_batches_per_step"] == row["micro_batches"]
    assert found["memory"][0]["weights_bytes"] == row["stages"][0]["weights_bytes"]
    assert found["memory"][0]["gradients_bytes"] == row["stages"][0]["gradients_bytes"]


def test_measured_rates_take_the_place_of_the_data_sheets(tmp_path: Path) -> None:
    bench = tmp_path / "bench.jsonl"
    link = {"part": "link", "operation": "h2d", "pinned": True, "bytes": 1 << 30, "bytes_per_s": 50e9}
    rows = [link, link | {"operation": "d2h", "bytes_per_s": 40e9}, link | {"bytes": 1 << 20, "bytes_per_s": 1e9}]
    rows += [link | {"pinned": False, "bytes_per_s": 5e9}, link | {"operation": "both", "bytes_per_s": 80e9}]
    rows += [{"part": "adam", "kernel": "fused", "bytes_per_s": 200e9}]
    bench.write_text("\n".join(map(json.dumps, rows)))
    known = machines.find("h200")
    found = machines.measured(known, bench, 8)
    assert (found.host_link, found.host_memory, found.source) == (40e9, 25e9, "data sheet, bench.jsonl")
    assert replace(found, host_link=known.host_link, host_memory=known.host_memory, source=known.source) == known


@pytest.mark.slow
@pytest.mark.timeout(3600)  # processor time is minutes; on a machine that others use it takes longer than a test may
@pytest.mark.parametrize(("name", "gpus"), [("llama-3.1-8b", 8), ("qwen3-30b-a3b", 64), ("deepseek-v3", 1024)])
def test_published_models_are_planned(name: str, gpus: int) -> None:
    """In processes of its own, one for each CPU."""
    given = ["--gpu", "H100", "--gpus", gpus, "--seq-length", 4096, "--global-batch-size", gpus * 8]
    start = [sys.executable, "-m", "megapatch.tools.plan.plan", "--model", MODELS / f"{name}.json", *given]
    ran = subprocess.run([*map(str, start)], env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(ran.stdout.splitlines()[0])
    assert row["total_bytes"] <= row["budget_bytes"]
