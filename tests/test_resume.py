"""A run that was interrupted goes on as if it had not been: to the bit in the same layout, within 1e-6 in another.

Three starts serve all cases: one process, then two, then one that continues what the two left.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from slow_cases import marked, wanted
from trainer_runs import ROOT, arguments, corpus, data, error, launch, log_of, model, steps

DISTRIBUTED = "--use-distributed-optimizer"
OVERLAP = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
SAME: dict[int, dict[str, tuple[str, str]]] = {  # processes: {name: (model, options)}
    1: {
        "alone": ("dense", "--log-sample-ids"),
        "bf16": ("dense", "--precision bf16"),
        "attention dropout": ("dropout", ""),
        "distributed optimizer of one": ("dense", f"--precision bf16 {DISTRIBUTED}"),
        "mixture": ("mixture", ""),
        "many epochs, evaluations": ("dense", "--data-path SMALL --eval-interval 2 --split 60,40"),
    },
    2: {
        "TP2 SP, dropout": ("dropout", "--tp 2 --sequence-parallel"),
        "PP2 VPP2, dropout": ("dropout", "--pp 2 --vpp 2"),
        "CP2, dropout": ("dropout", "--cp 2"),
        "DP2": ("dense", ""),
        "DP2 distributed, overlap, bf16": ("dense", f"{OVERLAP} --precision bf16"),
        "EP2 distributed, dropout": ("mixture dropout", f"--ep 2 {DISTRIBUTED}"),
    },
}
ACROSS: dict[int, dict[str, tuple[str, str, str]]] = {  # processes after: {name: (model, options before, after)}
    2: {
        "1 to TP2 distributed": ("dense", "", f"--tp 2 {DISTRIBUTED}"),
        "1 to PP2 VPP2": ("dense", "", "--pp 2 --vpp 2"),
        "1 to DP2 distributed": ("dense", "--log-sample-ids", f"{OVERLAP} --log-sample-ids --async-save"),
        "1 to EP2 distributed": ("mixture", "", f"--ep 2 {DISTRIBUTED}"),
        "bf16, 1 to DP2 distributed": ("dense", "--precision bf16", f"--precision bf16 {DISTRIBUTED}"),
    },
    1: {
        "TP2 distributed to 1": ("dense", f"--tp 2 {DISTRIBUTED}", ""),
        "PP2 to 1": ("dense", "--pp 2", ""),
        "DP2 distributed to 1": ("dense", f"{OVERLAP} --log-sample-ids --async-save", "--log-sample-ids"),
        "TP2 SP EP2 ETP1 to 1": ("mixture", "--tp 2 --sequence-parallel --ep 2 --etp 1", ""),
    },
}
MORE = {  # of both, slow
    "attention dropout",
    "distributed optimizer of one",
    "CP2, dropout",
    "DP2",
    "1 to TP2 distributed",
    "TP2 distributed to 1",
}
SAMES = {name: (processes, *case) for processes, cases in SAME.items() for name, case in cases.items()}
ACROSSES = {name: (processes, *case) for processes, cases in ACROSS.items() for name, case in cases.items()}
KILLED = {"step": (3, [1, 2, 3, 3, 4]), "save": (4, [1, 2, 3, 4, 3, 4])}  # after or while saving which step; the log
SIGNAL = {"step": 2, "number": 10}  # SIGUSR1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    corpus(made)
    data(made, "small", [str(ROOT / "models" / f"{name}.py") for name in ("__init__", "open_files", "request")])
    model(made, "dense")
    model(made, "dropout", attention_dropout=0.2)
    model(made, "mixture", "qwen3_moe")
    model(made, "mixture dropout", "qwen3_moe", attention_dropout=0.2)
    return made


@pytest.fixture(scope="module")
def runs(folder: Path, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """The records of every run, by name."""
    asked, across = (wanted(request, cases, cases.keys() - MORE) for cases in (SAMES, ACROSSES))

    def run(model: str, options: str, save: str) -> list[str]:
        return arguments(folder, model, f"runs/{save}", options.replace("SMALL", str(folder / "small")))

    def interrupted(model: str, options: str, save: str, rank: int) -> dict[str, Any]:
        return {"arguments": run(model, options, save), "signal": SIGNAL | {"rank": rank}}

    def same(processes: int) -> dict[str, Any]:
        cases: dict[str, Any] = {}
        for name, (size, kind, options) in asked.items():
            if size != processes:
                continue
            cases[name] = run(kind, options, f"{name} whole")
            cases[f"{name}, first"] = interrupted(kind, options, name, processes - 1)
            cases[f"{name}, rest"] = run(kind, options, name)
        return cases

    def before(processes: int) -> dict[str, Any]:
        return {f"{k}, before": interrupted(m, o, k, 0) for k, (n, m, o, _) in across.items() if n != processes}

    def after(processes: int) -> dict[str, Any]:
        return {k: run(m, o, k) for k, (n, m, _, o) in across.items() if n == processes}

    killed = {
        f"killed in a {where}": {
            "arguments": run("dense", "--save-interval 2", f"killed in a {where}"),
            "kill": {where: step},
        }
        for where, (step, _) in KILLED.items()
    }
    killed |= {f"{name}, rest": case["arguments"] for name, case in killed.items()}
    done = {"done": run("dense", "", "killed in a step"), "precision": run("dense", "--precision bf16", "alone")}
    done["other batch"] = run("dense", "--global-batch-size 4 --train-iters 6 --lr-schedule linear", "batches")
    begun = {"batch": interrupted("dense", "--lr-schedule linear --train-iters 4 --lr-decay-iters 6", "batches", 0)}
    first = launch(1, killed | same(1) | before(1) | begun | done, folder)
    second = launch(2, same(2) | after(2) | before(2), folder)
    return first | second | launch(1, after(1), folder)


@pytest.mark.parametrize("name", marked(SAMES, SAMES.keys() - MORE))
def test_a_run_resumed_after_a_signal_equals_the_uninterrupted_one_to_the_bit(
    runs: dict[str, list[dict]], name: str
) -> None:
    first, rest = runs[f"{name}, first"], runs[f"{name}, rest"]
    assert first[-1] | {"ts": 0} == {"event": "end", "ts": 0, "step": 2, "reason": "signal 10", "consumed_samples": 16}
    assert len(steps(first)) == len(steps(rest)) == 2
    assert steps(first, rest) == steps(runs[name])


@pytest.mark.parametrize("name", marked(ACROSSES, ACROSSES.keys() - MORE))
def test_a_run_resumed_in_another_layout_goes_on_within_1e_6(runs: dict[str, list[dict]], name: str) -> None:
    _, kind, _, after = ACROSSES[name]
    whole = "bf16" if "bf16" in after else {"dense": "alone", "mixture": "mixture"}[kind]
    expected, found = steps(runs[whole]), steps(runs[f"{name}, before"], runs[name])
    assert [step for step, *_ in found] == [1, 2, 3, 4]
    assert [lr for *_, lr in found] == [lr for *_, lr in expected]
    for a, b in zip(found, expected, strict=True):
        assert a[1] == pytest.approx(b[1], rel=2e-6 if "bf16" in after else 1e-6)
        assert a[2] == pytest.approx(b[2], rel=1e-5)


@pytest.mark.parametrize("name", ["1 to DP2 distributed", "DP2 distributed to 1"])
def test_every_sample_is_read_once_whatever_the_number_of_ranks(runs: dict[str, list[dict]], name: str) -> None:
    def samples(*parts: list[dict]) -> list[list[dict]]:
        return [record["samples"] for part in parts for record in part if record["event"] == "samples"]

    expected = samples(runs["alone"])
    assert samples(runs[f"{name}, before"], runs[name]) == expected
    assert [place["sample"] for places in expected for place in places] == list(range(32))
    assert len({(place["documents"][0], place["first_token"]) for places in expected for place in places}) == 32


@pytest.mark.parametrize("where", KILLED)
def test_a_killed_run_goes_on_from_its_last_complete_checkpoint_to_the_bit(
    runs: dict[str, list[dict]], folder: Path, where: str
) -> None:
    name = f"killed in a {where}"
    assert error(runs[name]) == "killed by signal 9"
    logged = [r["step"] for r in log_of(folder / "runs" / name) if r["event"] == "train"]
    assert logged == KILLED[where][1]
    assert steps(runs[f"{name}, rest"]) == steps(runs["alone"])[2:]
    assert [p.name for p in sorted((folder / "runs" / name).glob("iter_*"))] == [f"iter_{n:07d}" for n in (2, 4)]


def test_a_finished_run_started_again_trains_nothing(runs: dict[str, list[dict]]) -> None:
    assert runs["done"] == []


def test_the_learning_rate_goes_on_where_it_was_with_another_global_batch_size(runs: dict[str, list[dict]]) -> None:
    assert not error(runs["other batch"])
    found = steps(runs["batch"], runs["other batch"])
    assert [lr for *_, lr in found] == pytest.approx([1e-3 * (1 - n / 6) for n in range(6)])


def test_a_run_is_not_resumed_at_another_precision(runs: dict[str, list[dict]]) -> None:
    assert "--precision was fp32, now bf16: such a run cannot be continued" in error(runs["precision"])


def test_a_checkpoint_names_its_layout_step_and_tool(folder: Path, runs: dict[str, list[dict]]) -> None:
    manifest = json.loads((folder / "runs" / "TP2 SP, dropout" / "iter_0000002" / "manifest.json").read_text())
    assert (manifest["tool"], manifest["step"], manifest["layout"]["tp"]) == ("mp-pretrain", 2, 2)
    assert manifest["layout"]["world_size"] == 2
