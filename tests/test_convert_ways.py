"""mp-convert: every direction between Hugging Face, core and legacy; options that cannot take effect; bad sources."""

import argparse
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_folders import FAMILIES, contents, make, weights
from safetensors.torch import save_file

from megapatch.models import core_files, family
from megapatch.models.cli import UserError
from megapatch.tools.convert.convert import main

LAYOUT = ("--tp", "2", "--pp", "2")


def convert(source: Path, target: Path, *more: str) -> Path:
    """Run mp-convert, which must succeed."""
    assert main(["--source", str(source), "--target", str(target), *more]) == 0
    return target


def fails(source: Path, target: Path, capsys: pytest.CaptureFixture[str], said: str, *more: str) -> None:
    """mp-convert gives one line that says ``said``, exit status 1, and writes nothing."""
    capsys.readouterr()
    assert main(["--source", str(source), "--target", str(target), *more]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "no manifest.json" not in line]
    assert len(told) == 1 and said in told[0], told
    assert not target.exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_through_files_of_ranks_and_chunks(name, tmp_path):
    source = make(tmp_path / "hf", name)
    hf = json.loads((source / "config.json").read_text())
    experts = family.find(hf).transformer_config(hf).get("num_moe_experts")
    more, chunk = (("--ep", "2"), ",ep=2") if experts else ((), "")
    for spec in ("te", "local"):
        ranks = convert(source, tmp_path / spec, "--to", "legacy", *LAYOUT, *more, "--spec", spec)
        assert contents(convert(ranks, tmp_path / spec / "back")) == contents(source)
    chunked = convert(source, tmp_path / "chunked", "--chunk", "tp=2,pp=2" + chunk)
    assert contents(convert(chunked, tmp_path / "again")) == contents(source)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Path]:
    """One model in every form."""
    root = tmp_path_factory.mktemp("kinds")
    made = {"hf": make(root / "hf", "qwen2", "20KB")}
    made["core"] = convert(made["hf"], root / "core")
    made["legacy"] = convert(made["hf"], root / "legacy", "--to", "legacy", *LAYOUT)
    return made


@pytest.mark.parametrize("way", itertools.product(("hf", "core", "legacy"), repeat=2), ids="-".join)
def test_every_way_there_ends_at_the_same_files(way, kinds, tmp_path):
    start, end = way
    more = LAYOUT if end == "legacy" else ()
    made = convert(kinds[start], tmp_path / "made", "--to", end, *more)
    assert contents(made) == contents(kinds[end])


def test_the_manifest_says_the_layout(kinds):
    said = json.loads((kinds["legacy"] / "release" / "manifest.json").read_text())
    assert {"to": "legacy", "tp": 2, "pp": 2}.items() <= said.items() and "chunk" not in said


def test_the_automatic_target_is_core_for_hugging_face_and_hugging_face_for_the_rest(kinds, tmp_path):
    for kind, expected in (("hf", "core"), ("core", "hf"), ("legacy", "hf")):
        assert contents(convert(kinds[kind], tmp_path / kind)) == contents(kinds[expected])


def test_a_hugging_face_folder_is_cut_anew_and_cast(kinds, tmp_path):
    one = convert(kinds["hf"], tmp_path / "one", "--to", "hf", "--max-shard-size", "1GB")
    assert [path.name for path in one.glob("*.safetensors*")] == ["model.safetensors"]
    wide = convert(kinds["hf"], tmp_path / "wide", "--to", "hf", "--dtype", "fp32")
    assert len(list(wide.glob("*.safetensors"))) == len(list(kinds["hf"].glob("*.safetensors")))
    for name, tensor in weights(kinds["hf"]).items():
        assert torch.equal(weights(one)[name], tensor) and torch.equal(weights(wide)[name], tensor.float())


def test_the_bias_by_which_experts_are_chosen_stays_as_exact_as_it_is(tmp_path):
    source = make(tmp_path / "hf", "deepseek_v3", dtype=torch.float32)
    for to in ("core", "legacy"):
        back = weights(convert(convert(source, tmp_path / to, "--to", to, "--dtype", "bf16"), tmp_path / f"from-{to}"))
        kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in back.items()}
        assert kinds == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}


@pytest.mark.parametrize(
    "kind, flags, said",
    [
        ("hf", "--tp 2", "--tp: only for --to legacy; this is --to core"),
        ("hf", "--to hf --pp 2", "--pp: only for --to legacy; this is --to hf"),
        ("core", "--chunk tp=2", "--chunk: only for --to core; this is --to hf"),
        ("core", "--spec te", "--spec: only for --to legacy or core; this is --to hf"),
        ("hf", "--spec te", "--spec: needs --chunk"),
        ("hf", "--to legacy --max-shard-size 1GB", "--max-shard-size: only for --to hf; this is --to legacy"),
        ("hf", "--make-vocab-size-divisible-by 8", "--make-vocab-size-divisible-by: needs --chunk"),
        ("hf", "--config CONFIG", "--config: only for a checkpoint"),
        ("hf", "--to legacy --tp 3", "--tp 3 does not divide the 4 attention heads"),
        ("hf", "--to legacy --ep 2", "--ep 2: the model of config.json has no experts"),
        ("hf", "--to legacy --pp 8", "--pp = 8 does not divide the 4 layers"),
        ("hf", "--to legacy --etp 2", "--etp 2: must divide --tp 1"),
    ],
)
def test_options_that_cannot_take_effect_are_told(kind, flags, said, kinds, tmp_path, capsys):
    fails(kinds[kind], tmp_path / "x", capsys, said, *flags.replace("CONFIG", str(tmp_path)).split())


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--chunk tp", "--chunk tp: expected sizes of tp, pp, vpp, ep, etp"),
        ("--chunk cp=2", "--chunk cp=2: expected sizes"),
        ("--chunk tp=2,tp=4", "expected sizes"),
        ("--chunk vpp=2", "--vpp 2: needs --pp above 1"),
        ("--to legacy --tp 0", "--tp 0: must be at least 1"),
        ("--to legacy --make-vocab-size-divisible-by 0", "must be 1 or more"),
        ("--to gguf", "invalid choice: 'gguf'"),
    ],
)
def test_wrong_usage_is_told(flags, said, kinds, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--source", str(kinds["hf"]), "--target", str(tmp_path / "x"), *flags.split()])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_checkpoint_of_a_run_is_not_replaced_in_its_tracker(kinds, tmp_path, capsys):
    run = shutil.copytree(kinds["core"], tmp_path / "run")
    for to in ("core", "legacy"):
        assert main(["--source", str(run), "--target", str(run), "--to", to, "--force"]) == 1
        assert "is the source" in capsys.readouterr().err
    (run / "release").rename(run / "iter_0000007")
    core_files.write_tracker(run, 7)
    assert main(["--source", str(run), "--target", str(run), "--to", "core", "--force"]) == 1
    assert core_files.read_tracker(run) == 7


def test_all_that_is_missing_or_has_no_place_is_counted(kinds, tmp_path, capsys):
    source = make(tmp_path / "hf", "llama")
    whole, norms = weights(source), [f"model.layers.{n}.input_layernorm.weight" for n in range(4)]
    save_file({n: t for n, t in whole.items() if n not in norms}, source / "model.safetensors")
    fails(source, tmp_path / "x", capsys, f"{norms[0]} (and 3 more): missing in the source")
    save_file(whole | {f"extra.{n}": torch.ones(1) for n in range(3)}, source / "model.safetensors")
    fails(source, tmp_path / "x", capsys, "extra.0 (and 2 more): has no place in a llama model")
    core = shutil.copytree(kinds["core"], tmp_path / "core")
    (core / "release" / "manifest.json").unlink()
    json_changed(core / "release" / "hf" / "config.json", model_type="llama")
    fails(core, tmp_path / "x", capsys, "linear_qkv.bias: in the checkpoint, but has no place in a llama model")


def rank(folder: Path, number: str = "00_000") -> Path:
    return folder / "release" / f"mp_rank_{number}" / "model_optim_rng.pt"


def resaved(path: Path, change: Callable[[dict], object]) -> None:
    """The file of a rank with its state changed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path)
    change(state)
    torch.save(state, path)


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
BAD_RANKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank missing": (lambda f: rank(f, "01_000").unlink(), "leave a part of it out"),
    "a stage missing": (
        lambda f: [rank(f, "00_001").unlink(), rank(f, "01_001").unlink()],
        "2 layers in the files, 4 in config.json; are files of a stage missing",
    ),
    "two layouts": (lambda f: shutil.copytree(rank(f).parent, f / "release" / "mp_rank_00"), "of different layouts"),
    "no model": (lambda f: resaved(rank(f), lambda s: s.pop("model")), "holds no model; expected what Megatron-LM"),
    "an old one": (lambda f: resaved(rank(f), lambda s: s.update(checkpoint_version=1.0)), "checkpoint_version 1.0"),
    "from before core": (
        lambda f: resaved(rank(f), lambda s: s.update(model={"language_model": {}})),
        "of a model from before megatron-core (language_model)",
    ),
    "a weight missing": (lambda f: resaved(rank(f), lambda s: s["model"].pop(FC1)), f"no {FC1}; config.json asks"),
    "a weight of nothing": (
        lambda f: resaved(rank(f), lambda s: s["model"].update({"decoder.x.weight": torch.ones(2)})),
        "decoder.x.weight: has no place in a qwen2 model",
    ),
    "another shape": (
        lambda f: resaved(rank(f), lambda s: s["model"].update({FC1: torch.ones(32, 32).bfloat16()})),
        f"{FC1}: shape [32, 32] in the file, [64, 32] by config.json at tensor parallelism 2",
    ),
    "fewer layers": (
        lambda f: json_changed(f / "release" / "hf" / "config.json", num_hidden_layers=8),
        "4 layers in the files, 8 in config.json",
    ),
    "no config.json": (
        lambda f: (f / "release" / "hf" / "config.json").unlink(),
        "config.json: missing; name the model's Hugging Face folder with --config",
    ),
    "cut short": (lambda f: rank(f).write_bytes(rank(f).read_bytes()[:3000]), "not a torch.save file"),
}


def json_changed(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", BAD_RANKS)
def test_bad_files_of_ranks_are_told_in_one_line(case, kinds, tmp_path, capsys):
    damage, said = BAD_RANKS[case]
    root = shutil.copytree(kinds["legacy"], tmp_path / "legacy")
    (root / "release" / "manifest.json").unlink()
    damage(root)
    fails(root, tmp_path / "out", capsys, said)


def test_a_file_of_a_rank_that_does_not_fit_its_manifest_is_refused(kinds, tmp_path, capsys):
    root = shutil.copytree(kinds["legacy"], tmp_path / "legacy")
    data = bytearray(rank(root).read_bytes())
    data[-1000] ^= 1
    rank(root).write_bytes(data)
    fails(root, tmp_path / "out", capsys, "content differs from manifest.json")


def test_tools_that_read_core_checkpoints_say_how_to_convert_files_of_ranks(kinds):
    with pytest.raises(UserError, match=r"it has mp_rank_\*: convert it with mp-convert --to core"):
        core_files.resolve(kinds["legacy"])


def test_files_of_ranks_carry_the_options_that_megatron_compares(kinds):
    with torch.serialization.safe_globals([argparse.Namespace]):
        args = torch.load(rank(kinds["legacy"]), mmap=True)["args"]
    expected = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 64,
        "add_position_embedding": False,
        "position_embedding_type": "rope",
        "add_qkv_bias": True,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 256,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "ckpt_format": "torch",
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_bare_model_s_files_get_their_prefix(tmp_path, monkeypatch):
    source = make(tmp_path / "hf", "llama")
    whole = weights(source)
    bare = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    save_file(bare, source / "model.safetensors")
    monkeypatch.setitem(family.known(), "llama", replace(family.known()["llama"], prefix="model."))
    back = weights(convert(convert(source, tmp_path / "core"), tmp_path / "back"))
    assert back.keys() == whole.keys() and all(torch.equal(back[name], whole[name]) for name in whole)
