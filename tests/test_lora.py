"""LoRA: equal to peft, in every layout; the base stays as it is; runs resume to the bit; exports that peft loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import by_peft, session_of
from model_folders import weights
from peft import PeftModel
from slow_cases import marked, wanted
from trainer_runs import arguments, corpus, error, events, launch, model, steps
from transformers import AutoModelForCausalLM

from megapatch.tools.convert.convert import main as convert
from megapatch.tools.convert.inspect_checkpoint import main as inspect
from megapatch.trainer.pretrain import main

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = "--lora-rank 4 --lora-alpha 8 --train-iters 5"
SOME = "--lora-rank 3 --lora-targets v_proj up_proj --lora-rslora --train-iters 5"
PEFT: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {  # name: model, options, what peft is told
    "all": ("dense", LORA, ALL, {"r": 4, "lora_alpha": 8}),
    "some, rsLoRA": ("dense", SOME, ["v_proj", "up_proj"], {"r": 3, "lora_alpha": 6, "use_rslora": True}),
    "biases": ("biased", LORA, ALL, {"r": 4, "lora_alpha": 8}),
    "transposed": ("gpt", LORA, ["c_attn", "c_proj", "c_fc"], {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
    "experts": (
        "mixture",
        f"{LORA} --lora-targets attention",
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        {"r": 4, "lora_alpha": 8},
    ),
    "latent": (
        "latent",
        f"{LORA} --lora-targets attention",
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        {"r": 4, "lora_alpha": 8},
    ),
}
MODELS = {"dense": "qwen3", "biased": "qwen2", "gpt": "gpt2", "mixture": "qwen3_moe", "latent": "deepseek_v3"}
DISTRIBUTED = "--use-distributed-optimizer"
LAYOUTS = {  # two processes: as one
    "TP2": ("dense", f"{LORA} --tp 2"),
    "TP2 SP": ("dense", f"{LORA} --tp 2 --sequence-parallel"),
    "PP2, full recomputation": ("dense", f"{LORA} --pp 2 --recompute full"),
    "CP2": ("dense", f"{LORA} --cp 2"),
    "DP2 distributed": ("dense", f"{LORA} {DISTRIBUTED}"),
    "latent, TP2 SP": ("latent", f"{LORA} --lora-targets attention --tp 2 --sequence-parallel"),
    "EP2 distributed": ("mixture", f"{LORA} --lora-targets attention --ep 2 {DISTRIBUTED}"),
}
SAME = {  # processes: {name: options of a run that is interrupted after step 2}
    1: {"alone": LORA, "bf16, dropout": f"{LORA} --precision bf16 --lora-dropout 0.2"},
    2: {"TP2 SP": f"{LORA} --tp 2 --sequence-parallel --lora-dropout 0.2", "DP2": f"{LORA} {DISTRIBUTED}"},
}
MORE = {"biases", "TP2", "DP2 distributed", "alone", "bf16, dropout"}  # of all three, slow
SAMES = {name: (processes, words) for processes, cases in SAME.items() for name, words in cases.items()}
PARTS = {name: set(cases) - MORE for name, cases in {"peft": PEFT, "layouts": LAYOUTS, "same": SAMES}.items()}
FROM = ("all", "transposed")  # of PEFT
STILL = "--train-iters 1 --lr 1e-30 --weight-decay 0 --tp 2"  # changes nothing
SIGNAL = {"step": 2, "number": 10, "rank": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lora")
    corpus(made)
    for name, family in MODELS.items():
        model(made, name, family)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Each case of PEFT trained in this process: losses, rates, samples, logits of the end, frozen weights."""
    found = {}
    for name, (kind, options, *_) in wanted(request, PEFT, PARTS["peft"]).items():
        with session_of(folder, kind, f"runs/{name}", options) as (trainer, samples, before):
            (whole,), optimizer = trainer.session.models, trainer.session.optimizer
            after = {name: p for name, p in whole.named_parameters() if not p.requires_grad}
            trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
            moments = [
                state["exp_avg"] for part in optimizer.chained_optimizers for state in part.optimizer.state.values()
            ]
            tokens = samples[0]["tokens"]
            places = torch.arange(tokens.shape[1]).expand_as(tokens)
            with torch.no_grad():
                logits = whole.eval()(tokens, places, None)
            found[name] = {
                "samples": samples,
                "logits": logits,
                "trained": sorted(trained),
                "changed": [name for name, p in before.items() if not torch.equal(p, after[name])],
                "with gradients": [name for name, p in after.items() if p.grad is not None or hasattr(p, "main_grad")],
                "numbers": {
                    "adapters": sum(p.numel() for p in trained.values()),
                    "gradients": sum(b.grad_data.numel() for chunk in trainer.session.chunks for b in chunk.buffers),
                    "moments": sum(moment.numel() for moment in moments),
                },
                "log": [json.loads(line) for line in (folder / f"runs/{name}/log.jsonl").read_text().splitlines()],
            }
    return found


@pytest.fixture(scope="module")
def runs(folder: Path, alone: dict[str, dict], request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """The records of runs in one and in two processes, by name; some begin with adapters that peft has saved."""
    for name in FROM:
        ours, base = folder / f"{name} as exported", folder / PEFT[name][0]
        assert convert(["--source", str(folder / "runs" / name), "--target", str(ours), "--to", "peft"]) == 0
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(whole, str(ours)).save_pretrained(folder / name)

    def cases(processes: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, (size, options) in wanted(request, SAMES, PARTS["same"]).items():
            if size != processes:
                continue
            words = arguments(folder, "dense", f"runs/{name} parted", options)
            made[f"{name} whole"] = {
                "arguments": arguments(folder, "dense", f"runs/{name} whole", options),
                "digests": True,
                "save": True,
            }
            made[f"{name} first"] = {"arguments": words, "signal": SIGNAL}
            made[f"{name} rest"] = {"arguments": words, "digests": True}
        return made

    asked = wanted(request, LAYOUTS, PARTS["layouts"])
    layouts = {name: arguments(folder, kind, f"runs/{name}", words) for name, (kind, words) in asked.items()}
    more = {
        f"from {name}": {
            "arguments": arguments(folder, PEFT[name][0], f"runs/from {name}", f"{STILL} --lora-from {folder / name}"),
            "save": True,
        }
        for name in FROM
    }
    one = cases(1)
    return (launch(1, one, folder) if one else {}) | launch(2, layouts | cases(2) | more, folder)


@pytest.mark.parametrize("name", marked(PEFT, PARTS["peft"]))
def test_training_equals_that_of_peft_within_1e_5(folder: Path, alone: dict[str, dict], name: str) -> None:
    kind, _, targets, said = PEFT[name]
    records = alone[name]["log"]
    rates = [lr for *_, lr in steps(records)]
    expected = by_peft(folder / kind, alone[name]["samples"], rates, targets, **said)
    assert [loss for _, loss, *_ in steps(records)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", marked(LAYOUTS, PARTS["layouts"]))
def test_every_layout_trains_as_one_process_does(
    alone: dict[str, dict], runs: dict[str, list[dict]], name: str
) -> None:
    expected = alone[{"dense": "all", "mixture": "experts", "latent": "latent"}[LAYOUTS[name][0]]]["log"]
    for a, b in zip(steps(runs[name]), steps(expected), strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-5)
        assert a[2] == pytest.approx(b[2], rel=1e-4)


@pytest.mark.parametrize("name", marked(PEFT, PARTS["peft"]))
def test_only_adapters_are_trained_and_only_they_take_memory(alone: dict[str, dict], name: str) -> None:
    found = alone[name]
    assert {name.rpartition(".")[2] for name in found["trained"]} == {"lora_A", "lora_B"}
    assert found["changed"] == found["with gradients"] == []
    assert len(set(found["numbers"].values())) == 1, found["numbers"]


@pytest.mark.parametrize("name", marked(SAMES, PARTS["same"]))
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(runs: dict[str, list[dict]], name: str) -> None:
    whole, first, rest = (runs[f"{name} {part}"] for part in ("whole", "first", "rest"))
    assert len(steps(first)) == 2
    assert steps(first, rest) == steps(whole)
    assert [r["digest"] for r in events(rest, "state")] == [r["digest"] for r in events(whole, "state")][2:]


@pytest.mark.parametrize("name", marked(PEFT, PARTS["peft"]))
def test_peft_loads_the_exported_adapter_and_gives_our_logits(
    folder: Path, alone: dict[str, dict], name: str, tmp_path: Path
) -> None:
    base = folder / PEFT[name][0]
    assert convert(["--source", str(folder / "runs" / name), "--target", str(tmp_path / "peft"), "--to", "peft"]) == 0
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(whole, str(tmp_path / "peft")).eval()
    tokens = alone[name]["samples"][0]["tokens"]
    with torch.no_grad():
        theirs = adapted(tokens).logits
    ours = alone[name]["logits"].reshape(*theirs.shape[:2], -1)[..., : theirs.shape[-1]]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    merged = ["--source", str(folder / "runs" / name), "--target", str(tmp_path / "hf"), "--merge-lora"]
    assert convert(merged) == 0
    assert convert([*merged, "--verify"]) == 0
    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    expected = weights(tmp_path / "theirs")
    for key, value in weights(tmp_path / "hf").items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0, msg=key)
    assert set(weights(tmp_path / "hf")) == set(weights(base))

    merged[merged.index("--target") + 1] = str(tmp_path / "bf16")
    assert convert([*merged, "--dtype", "bf16"]) == 0
    rounded = weights(tmp_path / "bf16")
    assert torch.bfloat16 in {value.dtype for value in rounded.values()}
    for key, value in weights(tmp_path / "hf").items():  # a router's bias stays in fp32
        assert torch.equal(rounded[key], value.to(rounded[key].dtype)), key


@pytest.mark.parametrize("name", ["TP2 SP whole", "DP2 whole"])
def test_adapters_saved_in_a_layout_are_merged_as_those_of_one_process(
    folder: Path, runs: dict[str, list[dict]], name: str, tmp_path: Path
) -> None:
    assert not error(runs[name])
    for kind in ("hf", "core"):
        words = ["--source", str(folder / "runs" / name), "--target", str(tmp_path / kind), "--merge-lora", "--to"]
        assert convert([*words, kind]) == 0
    back = ["--source", str(tmp_path / "core"), "--target", str(tmp_path / "back")]
    assert convert(back) == 0
    found, again, base = weights(tmp_path / "hf"), weights(tmp_path / "back"), weights(folder / "dense")
    assert all(torch.equal(found[key], again[key]) for key in base)
    changed = {key for key in base if not torch.equal(base[key], found[key])}
    assert changed == {key for key in base if any(f".{module}." in key for module in ALL)}


@pytest.mark.parametrize("name", FROM)
def test_training_starts_from_an_adapter_of_peft(
    folder: Path, runs: dict[str, list[dict]], name: str, tmp_path: Path
) -> None:
    assert not error(runs[f"from {name}"])
    words = ["--source", str(folder / "runs" / f"from {name}"), "--target", str(tmp_path / "peft"), "--to", "peft"]
    assert convert(words) == 0
    before, after = weights(folder / name), weights(tmp_path / "peft")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-20) for key in before)
    assert any(value.abs().max() > 1e-4 for key, value in after.items() if "lora_B" in key)


def test_adapters_are_inspected_as_complete(folder: Path, alone: dict[str, dict], capfd: pytest.CaptureFixture) -> None:
    assert inspect(["--json", str(folder / "runs" / "all")]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["verdict"] == {"complete": True, "verified": True, "safe": True}
    assert f"adapters of rank 4 for {folder / 'dense'}" in said["notes"]


REFUSED = {  # what: (arguments of mp-pretrain, exit status, part of the message)
    "alpha without rank": ("--lora-alpha 4", 2, "--lora-alpha needs --lora-rank"),
    "adapter and rank": ("--lora-from DIR/peft --lora-rank 4", 2, "--lora-rank: not with --lora-from"),
    "adapter that is not there": ("--lora-from DIR/peft", 1, "adapter_config.json"),
    "kind of adapter": ("--lora-from DIR/dora", 1, "adapter_config.json: use_dora is True, which is not supported"),
    "adapter beside changed weights": (
        "--lora-from DIR/pissa",
        1,
        "adapter_config.json: init_lora_weights is 'pissa', which",
    ),
    "rank of none": ("--lora-rank 0", 2, "--lora-rank 0: must be at least 1"),
    "unknown layer": ("--lora-rank 2 --lora-targets w1", 1, "--lora-targets w1: the model has down_proj, gate_proj"),
    "another rank": (LORA.replace("rank 4", "rank 2") + " --train-iters 6", 1, "--lora-rank was 4, now 2"),
    "no adapters": ("--train-iters 6", 1, "--lora-rank was 4 and is not given now: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    folder: Path, alone: dict[str, dict], case: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    words, status, message = REFUSED[case]
    for name, what in {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **what}))
    words = words.replace("DIR", str(tmp_path))
    save = "runs/all" if "train-iters" in words else str(tmp_path / "run")
    try:
        found = main(arguments(folder, "dense", save, words))
    except SystemExit as end:
        found = end.code
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert found == status
    assert len(lines) == 1 and message in lines[0]


def test_experts_get_no_adapters(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(arguments(folder, "mixture", str(tmp_path / "run"), "--lora-rank 2")) == 1
    assert "would give adapters to experts (model.layers.0.mlp.experts.0.gate_proj.weight)" in capfd.readouterr().err


def test_adapters_are_not_taken_for_weights_nor_merged_into_others(
    folder: Path, alone: dict[str, dict], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    words = ["--source", str(folder / "runs" / "all"), "--target", str(tmp_path / "out")]
    assert convert(words) == 1
    assert "holds adapters, not weights; give --merge-lora" in capfd.readouterr().err
    assert convert([*words, "--merge-lora", "--base", str(folder / "biased")]) == 1
    assert "not the weights that the adapters" in capfd.readouterr().err
    assert convert(["--source", str(folder / "dense"), *words[2:], "--merge-lora"]) == 1
    assert "holds no adapters" in capfd.readouterr().err
    other = arguments(folder, "dense", str(tmp_path / "run"))
    other[other.index("--model") + 1] = str(folder / "runs" / "all")
    assert main(other) == 1
    assert "holds adapters only; merge them with mp-convert --merge-lora first" in capfd.readouterr().err
