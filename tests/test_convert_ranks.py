"""mp-convert: files of ranks and chunks of layouts, against megatron-core's own models at those layouts."""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from model_folders import contents, make, weights
from safetensors.torch import save_file
from slow_cases import marked, wanted
from trainer_runs import ENVIRONMENT, ROOT, TORCHRUN

from megapatch.models import core_files, hf_files
from megapatch.tools.convert.convert import main


class Case(NamedTuple):
    """A model at a layout (options of mp-convert), and the layout of the chunks of its torch_dist checkpoint."""

    family: str
    layout: str
    chunk: str
    changes: dict
    own: bool = True  # whether megatron-core's own specification has the model


OTHER_CHUNKS = "PP2 VPP2, chunks of TP2"
PREDICTING = "latent attention, a layer for multi-token prediction, TP2 PP2 EP2"
CASES = {
    "tied embeddings, uneven vocabulary, TP2 PP2": Case("llama", "--tp 2 --pp 2", "tp=2", {"vocab_size": 97}),
    "biases, own output layer, TP4": Case("qwen2", "--tp 4", "tp=4,pp=2", {"vocab_size": 97}),
    OTHER_CHUNKS: Case("qwen3", "--pp 2 --vpp 2", "tp=2,pp=2,vpp=2", {}),
    "PP2": Case("qwen2", "--pp 2", "pp=4", {}),
    "PP2, 1 and 3 layers": Case(
        "qwen3", "--pp 2 --decoder-first-pipeline-num-layers 1", "pp=2,decoder_last_pipeline_num_layers=1", {}
    ),
    "dense and mixture layers, TP2 EP2": Case("qwen3_moe", "--tp 2 --ep 2", "tp=2,ep=2", {"vocab_size": 97}),
    "mixtures, TP2 PP2 EP2, experts whole": Case("mixtral", "--tp 2 --pp 2 --ep 2 --etp 1", "tp=2,etp=1,ep=2", {}),
    "mixtures, EP4": Case("mixtral", "--ep 4", "ep=4", {}),
    "shared experts, TP2 EP2": Case("qwen2_moe", "--tp 2 --ep 2", "tp=2,ep=2", {}),
    "latent attention, TP2 EP2": Case("deepseek_v3", "--tp 2 --ep 2", "tp=2,ep=2", {}, own=False),
    PREDICTING: Case(
        "deepseek_v3", "--tp 2 --pp 2 --ep 2 --etp 1", "tp=2,ep=2,etp=1", {"num_nextn_predict_layers": 1}, own=False
    ),
    "latent attention, TP4": Case("deepseek_v2", "--tp 4", "tp=4", {}, own=False),
    "LayerNorm, biases, learned positions, transposed, TP2 PP2": Case("gpt2", "--tp 2 --pp 2", "tp=2,pp=2", {}),
    "ALiBi, norm of the embedding, TP2 PP2": Case("bloom", "--tp 2 --pp 2", "tp=2", {}, own=False),
    "parallel attention, TP2": Case("falcon", "--tp 2", "tp=2", {}, own=False),
}
MORE = {  # slow
    "biases, own output layer, TP4",
    "PP2",
    "mixtures, TP2 PP2 EP2, experts whole",
    "mixtures, EP4",
    "latent attention, TP2 EP2",
    "latent attention, TP4",
    "parallel attention, TP2",
}
QUICK = CASES.keys() - MORE


def convert(source: Path, target: Path, *more: str) -> Path:
    """Run mp-convert, which must succeed; the checkpoint's folder."""
    assert main(["--source", str(source), "--target", str(target), *more]) == 0
    return target


def add_predicting_layer(folder: Path) -> None:
    """The tensors of a layer after the last, as published files have them; transformers writes none."""
    found = weights(folder)
    last, new = "model.layers.3.", "model.layers.4."
    found |= {new + name.removeprefix(last): -tensor for name, tensor in found.items() if name.startswith(last)}
    norm = found["model.norm.weight"]
    found |= {f"{new}{name}.weight": norm + n for n, name in enumerate(("enorm", "hnorm", "shared_head.norm"))}
    found[new + "eh_proj.weight"] = torch.randn(norm.numel(), 2 * norm.numel())
    found[new + "embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
    found[new + "shared_head.head.weight"] = found["lm_head.weight"].clone()
    save_file(found, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory, request) -> dict[str, Path]:
    """For each case a folder with hf, core, chunked, legacy, and what megatron-core saved: saved, apart."""
    root, cases, folders = tmp_path_factory.mktemp("ranks"), [], {}
    for name, case in wanted(request, CASES, QUICK).items():
        n = list(CASES).index(name)
        folder = folders[name] = root / str(n)
        make(folder / "hf", case.family, dtype=torch.float32, **case.changes)
        if name == PREDICTING:
            add_predicting_layer(folder / "hf")
        convert(folder / "hf", folder / "core")
        one = ("--make-vocab-size-divisible-by", "1")
        convert(folder / "core", folder / "chunked", "--to", "core", "--chunk", case.chunk, "--spec", "local", *one)
        local = ("--spec", "local", "--experts", "sequential")
        convert(folder / "core", folder / "legacy", "--to", "legacy", *case.layout.split(), *one, *local)
        words = case.layout.replace("--", "").replace("-", "_").split()
        layout = {flag: int(size) for flag, size in zip(words[::2], words[1::2], strict=True)}
        layout |= {"sequence_parallel": True} if layout.get("tp", 1) > 1 else {}
        paths = {kind: str(folder / kind / "release") for kind in ("core", "chunked", "legacy")}
        paths |= {"hf": str(folder / "hf"), "saved": str(folder / "saved"), "apart": str(folder / "apart")}
        cases.append({"layout": layout, "args": n % 2 == 0, "exact": name != OTHER_CHUNKS, "own": case.own} | paths)
    (root / "cases.json").write_text(json.dumps(cases))
    command = [*TORCHRUN, "--nproc-per-node", "4", str(ROOT / "tests" / "rank_worker.py"), str(root / "cases.json")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return folders


def same(found: Path, expected: Path) -> bool:
    """Do two Hugging Face folders hold the same weights?"""
    one, other = weights(found), weights(expected)
    return one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("name", marked(CASES, QUICK))
def test_files_of_ranks_and_chunks_are_what_core_holds_at_the_layout(name, made):
    back = made[name] / "back"
    convert(made[name] / "chunked", back)
    assert contents(back) == contents(made[name] / "hf")


def test_the_chunks_of_a_stage_have_files_of_their_own(made):
    with core_files.Checkpoint(made[OTHER_CHUNKS] / "chunked" / "release") as checkpoint:
        layers = checkpoint.tensors["decoder.layers.self_attention.linear_proj.weight"]
    assert {(chunk.offsets[0], chunk.file) for chunk in layers.chunks} == {
        (0, "__0_0.distcp"),  # layers 0 and 2 are the chunks of stage 0
        (1, "__1_0.distcp"),
        (2, "__0_0.distcp"),
        (3, "__1_0.distcp"),
    }
    assert len(layers.chunks) == 8


@pytest.mark.parametrize("name", marked(CASES, QUICK))
def test_what_core_saved_for_each_rank_converts_to_the_same_model(name, made, tmp_path, capsys):
    saved, config = made[name] / "saved", ("--config", str(made[name] / "hf"))
    assert same(convert(saved, tmp_path / "hf", *config), made[name] / "hf")
    told = capsys.readouterr().err
    assert ("left out: training state (optimizer)" in told) == (list(CASES).index(name) % 2 == 0)
    convert(saved, tmp_path / "core", "--to", "core", *config)
    assert same(convert(tmp_path / "core", tmp_path / "again"), made[name] / "hf")


@pytest.mark.parametrize("name", marked(CASES, QUICK))
def test_legacy_files_of_any_naming_convert_back(name, made, tmp_path):
    for spec in ("te", "local"):
        for experts in ("grouped", "sequential"):
            target = tmp_path / spec / experts
            names = ("--spec", spec, "--experts", experts)
            convert(made[name] / "hf", target, "--to", "legacy", *CASES[name].layout.split(), *names)
            assert contents(convert(target, target / "back")) == contents(made[name] / "hf")


@pytest.mark.parametrize("name", marked(CASES, QUICK))
def test_what_core_saved_in_any_form_of_torch_dist_converts_to_the_same_model(name, made, tmp_path, capsys):
    apart = made[name] / "apart"
    assert main(["--source", str(apart), "--target", str(tmp_path / "x")]) == 1
    assert "name the model's Hugging Face folder with --config" in capsys.readouterr().err
    assert same(convert(apart, tmp_path / "hf", "--config", str(made[name] / "hf")), made[name] / "hf")
    assert (tmp_path / "hf" / hf_files.CONFIG).is_file()
