"""Layers for multi-token prediction (DeepSeek-V3): converted bit for bit, as transformers computes them, trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_runs
from model_folders import contents, make, soften, weights
from safetensors.torch import save_file
from slow_cases import marked, wanted

from megapatch.models import cli, device, family, hf_files, parallel
from megapatch.models.shapes import Layout
from megapatch.tools.convert.convert import main as convert

COPIES = {
    "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.4.shared_head.head.weight": "lm_head.weight",
}
NORM = "model.layers.4.enorm.weight"
STEPS = 5
WEIGHT = "--mtp-loss-weight 0.3"
LAYOUTS = {  # (processes, arguments)
    "TP2": (2, "--tp 2 --sequence-parallel"),
    "EP2": (2, "--ep 2"),
    "PP2": (2, "--pp 2"),
    "PP2 VPP2": (2, "--pp 2 --vpp 2"),
    "CP2": (2, "--cp 2"),
    "recompute": (2, "--recompute full"),
    "distributed optimizer": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}
QUICK = ("EP2", "PP2 VPP2", "CP2")  # tests/test_layouts_latent.py has others


def published(folder: Path, shards: str = "5GB", **changes: Any) -> Path:
    """A folder as DeepSeek publishes it: a layer more than transformers writes, with copies of two weights."""
    soften(make(folder, "deepseek_v3", dtype=torch.float32, num_nextn_predict_layers=1, **changes))
    hf, parts = hf_files.config(folder), weights(folder)
    layout, generator = Layout(hf), torch.Generator().manual_seed(1)
    for placed in layout.placed:
        for name, shape in zip(placed.hf, layout.parts(placed), strict=True):
            noise = torch.randn(shape, generator=generator) * 0.2
            parts.setdefault(name, noise + ("norm" in name))
    parts |= {copy: parts[twin].clone() for copy, twin in COPIES.items()}
    return write(folder, parts, 4 if shards != "5GB" else 1)


def write(folder: Path, parts: dict[str, torch.Tensor], files: int = 1) -> Path:
    """The weights in one file, or dealt to several, with index.json."""
    if files == 1:
        save_file(parts, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{n % files + 1:05}-of-{files:05}.safetensors" for n, name in enumerate(parts)}
    for file in set(names.values()):
        held = {name: parts[name] for name in parts if names[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in parts.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / hf_files.INDEX).write_text(json.dumps(index))
    return folder


def loaded(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a folder."""
    return {name: tensor.numpy().tobytes() for name, tensor in weights(folder).items()}


@pytest.mark.parametrize("shards", ["5GB", "several"])
def test_published_files_come_back_with_their_copies(shards: str, tmp_path: Path) -> None:
    source, core, back = published(tmp_path / "hf", shards), tmp_path / "core", tmp_path / "back"
    assert convert(["--source", str(source), "--target", str(core)]) == 0
    assert convert(["--source", str(core), "--target", str(back)]) == 0
    assert loaded(back) == loaded(source)
    assert {path.name for path in back.glob("*.safetensors")} == {path.name for path in source.glob("*.safetensors")}
    assert contents(back)["config.json"] == contents(source)["config.json"]


def test_files_of_ranks_hold_the_layer_too(tmp_path: Path) -> None:
    source, ranks, back = published(tmp_path / "hf"), tmp_path / "ranks", tmp_path / "back"
    layout = ["--to", "legacy", "--tp", "2", "--pp", "2", "--ep", "2", "--etp", "1"]
    assert convert(["--source", str(source), "--target", str(ranks), *layout]) == 0
    assert convert(["--source", str(ranks), "--target", str(back)]) == 0
    assert loaded(back) == loaded(source)


def test_files_without_copies_stay_without_them(tmp_path: Path) -> None:
    source, core, back = published(tmp_path / "hf"), tmp_path / "core", tmp_path / "back"
    write(source, {name: tensor for name, tensor in weights(source).items() if name not in COPIES}, 3)
    assert convert(["--source", str(source), "--target", str(core)]) == 0
    assert convert(["--source", str(core), "--target", str(back)]) == 0
    assert loaded(back) == loaded(source)


def test_files_without_the_layer_are_told_and_stay_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers writes no such layer, whatever config.json says."""
    source = make(tmp_path / "hf", "deepseek_v3", num_nextn_predict_layers=1)
    core, back = tmp_path / "core", tmp_path / "back"
    for start, end in ((source, core), (core, back)):
        assert convert(["--source", str(start), "--target", str(end)]) == 0
        assert (
            "config.json says num_nextn_predict_layers 1, but the source has no such layer" in capsys.readouterr().err
        )
    assert contents(back) == contents(source)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_differs_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "hf")
    write(source, weights(source) | {name: weights(source)[name] + 1})
    assert convert(["--source", str(source), "--target", str(tmp_path / "core")]) == 1
    assert f"{name}: differs from {COPIES[name]}" in capsys.readouterr().err


def test_half_of_the_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "hf")
    write(source, {name: tensor for name, tensor in weights(source).items() if name != NORM})
    assert convert(["--source", str(source), "--target", str(tmp_path / "core")]) == 1
    assert f"{NORM}: missing" in capsys.readouterr().err


def test_the_layer_computes_what_transformers_does(tmp_path: Path) -> None:
    found = device.start()
    parallel.start(parallel.Parallel(), found)
    try:
        ours, theirs = hidden_states(published(tmp_path / "hf"), found)
    finally:
        parallel.stop()
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() <= 1e-5


def hidden_states(folder: Path, found: device.Device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer hands to the output layer, here and in transformers [b, s, h]."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    from megapatch.models.build import ModelOptions, build
    from megapatch.models.load import load_hf

    device.seed_everything(1, 0)
    hf, seen = hf_files.config(folder), []
    model: Any = build(hf, ModelOptions(parallel.Parallel(), found, overrides={"mtp_num_layers": 1}))[0]
    load_hf([model], folder, hf)
    model.mtp.register_forward_hook(lambda module, given, output: seen.append(output.chunk(2)[1].transpose(0, 1)))
    ids = torch.randint(90, (2, 32), generator=torch.Generator().manual_seed(1))
    places = torch.arange(32).expand(2, 32)
    with torch.no_grad():
        model.eval()(ids, places, None, labels=ids)
        main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]  # there it is 61, as in the published model
        theirs = MtpModel.from_pretrained(main).eval()
        hidden = main(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        shifted = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
        return seen[0], theirs.forward_layer(0, hidden, places, None, input_ids=shifted)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, list[dict]]]:
    """The log records of training at each layout, in one process ('alone'), and without the layer ('without')."""
    folder = tmp_path_factory.mktemp("prediction")
    trainer_runs.corpus(folder)
    made = published(folder / "v3", vocab_size=trainer_runs.VOCABULARY)
    (made / "tokenizer.json").unlink()
    (made / "chat_template.jinja").unlink()
    asked = f"--train-iters {STEPS} --micro-batch-size 2 --lr 1e-2"
    by_size: dict[int, dict[str, Any]] = {1: {}, 2: {}}
    for name, (size, layout) in {"alone": (1, ""), **wanted(request, LAYOUTS, QUICK)}.items():
        by_size[size][name] = trainer_runs.arguments(folder, "v3", "none", f"{asked} {WEIGHT} {layout}")
    for name, words in {"saved": f"{WEIGHT}", "without": ""}.items():
        case = trainer_runs.arguments(folder, "v3", name, f"{asked} --save-interval {STEPS} {words}")
        by_size[1][name] = {"arguments": case}
    again = trainer_runs.arguments(folder, "v3", "without", f"--train-iters 9 --lr 1e-2 {WEIGHT}")
    by_size[1]["other weight"] = again
    return folder, {
        n: log for size, cases in by_size.items() for n, log in trainer_runs.launch(size, cases, folder).items()
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", marked(LAYOUTS, QUICK))
def test_a_layout_trains_as_one_process(runs: tuple[Path, dict[str, list[dict]]], layout: str) -> None:
    _, records = runs
    expected, found = trainer_runs.steps(records["alone"]), trainer_runs.steps(records[layout])
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    theirs, ours = ([r["mtp_1_loss"] for r in trainer_runs.events(records[n], "train")] for n in ("alone", layout))
    further = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"{layout:22} loss off by {loss:.1e}  norm off by {norm:.1e}  mtp loss off by {further:.1e}")
    assert loss <= 2e-5 and norm <= 2e-4
    assert further <= (0.02 if "CP" in layout else 2e-5)  # a mean of each rank's share, not of all tokens


def test_both_losses_fall(runs: tuple[Path, dict[str, list[dict]]]) -> None:
    first, *_, last = trainer_runs.events(runs[1]["alone"], "train")
    assert last["loss"] < first["loss"] and last["mtp_1_loss"] < first["mtp_1_loss"]


def test_what_was_trained_is_exported(runs: tuple[Path, dict[str, list[dict]]]) -> None:
    folder, _ = runs
    assert convert(["--source", str(folder / "saved"), "--target", str(folder / "exported")]) == 0
    before, after = weights(folder / "v3"), weights(folder / "exported")
    assert before.keys() == after.keys()
    assert not torch.equal(before[NORM], after[NORM])
    bias = "model.layers.4.mlp.gate.e_score_correction_bias"
    assert 0 < (after[bias] - before[bias]).abs().max() <= STEPS * 1.001e-3  # moved a step at a time, by the load
    assert all(torch.equal(after[copy], after[twin]) for copy, twin in COPIES.items())


def test_a_run_without_the_layer_says_so_and_exports_without_it(
    runs: tuple[Path, dict[str, list[dict]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = runs
    assert convert(["--source", str(folder / "without"), "--target", str(folder / "plain")]) == 0
    assert "the source has no such layer" in capsys.readouterr().err
    assert weights(folder / "plain").keys() == {n for n in weights(folder / "v3") if ".layers.4." not in n}


def test_a_run_goes_on_with_the_layers_that_it_began_with(runs: tuple[Path, dict[str, list[dict]]]) -> None:
    assert "began without layers for multi-token prediction" in trainer_runs.error(runs[1]["other weight"])


@pytest.mark.parametrize("source", ["plain", "without"])
def test_training_what_is_not_there_is_refused(
    runs: tuple[Path, dict[str, list[dict]]], source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from megapatch.trainer.pretrain import main

    folder, _ = runs
    if source == "plain" and not (folder / "plain").exists():
        assert convert(["--source", str(folder / "without"), "--target", str(folder / "plain")]) == 0
    assert main(trainer_runs.arguments(folder, source, "new", WEIGHT)) == 1
    assert "has no layers for multi-token prediction; leave out --mtp-loss-weight" in capsys.readouterr().err


def test_a_model_that_has_none_is_refused(tmp_path: Path) -> None:
    from megapatch.models.device import Device
    from megapatch.trainer.options import PretrainOptions
    from megapatch.trainer.session import _overrides

    hf = {"model_type": "llama", "rms_norm_eps": 1e-6, **family.known()["llama"].tiny}
    words = trainer_runs.arguments(tmp_path, "x", "y", WEIGHT)
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(words)
    with pytest.raises(cli.UserError, match="no layers for multi-token prediction"):
        _overrides(options, Device("cpu", False, False, "a test"), hf)
