"""mp-convert: bit-exact both ways, whatever the layout that saved; every byte planned; failures leave nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from model_folders import FAMILIES, contents, core_tensors, make, weights
from safetensors.torch import save_file

from megapatch.models import commit, core_files, hf_files
from megapatch.tools.convert.convert import main, shard_bytes


def convert(source: Path, target: Path, *more: str) -> Path:
    """Run mp-convert, which must succeed."""
    assert main(["--source", str(source), "--target", str(target), *more]) == 0
    return target


@pytest.fixture(scope="session")
def hf(tmp_path_factory) -> dict[str, Path]:
    """A sharded Hugging Face folder of each family."""
    root = tmp_path_factory.mktemp("hf")
    return {name: make(root / name, name, "20KB") for name in FAMILIES}


@pytest.fixture(scope="session")
def core(hf, tmp_path_factory) -> dict[str, Path]:
    """The core checkpoint that mp-convert makes of each."""
    root = tmp_path_factory.mktemp("core")
    return {name: convert(folder, root / name) for name, folder in hf.items()}


@pytest.fixture(scope="session")
def cut(hf, core, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the same weights that megatron-core saved in the chunks of another layout."""
    root = tmp_path_factory.mktemp("cut")
    cases = [
        {"hf": str(hf[name]), "core": str(core[name] / "release"), "cut": str(root / name / "iter_0000007")}
        for name in FAMILIES
    ]
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(Path(__file__).with_name("core_worker.py")), str(root / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in FAMILIES:
        core_files.write_tracker(root / name, 7)
        hf_files.copy_side_files(hf[name], root / name / "iter_0000007" / "hf")
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_gives_the_same_files_byte_for_byte(name, hf, core, tmp_path):
    back = convert(core[name], tmp_path / "back")
    assert contents(back) == contents(hf[name])
    assert commit.verify(back) and commit.verify(core[name] / "release")


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_reads_what_the_rules_say(name, hf, core):
    expected = core_tensors(hf[name])
    reader = dcp.FileSystemReader(core[name] / "release")
    described = reader.read_metadata().state_dict_metadata
    tensors = {key: said for key, said in described.items() if isinstance(said, dcp.TensorStorageMetadata)}
    found = {key: torch.empty(said.size, dtype=said.properties.dtype) for key, said in tensors.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_of_another_layout_give_the_same_weights(name, hf, cut, tmp_path, capsys):
    back = convert(cut[name], tmp_path / "back", "--max-shard-size", "20KB")
    found, expected = weights(back), weights(hf[name])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    told = capsys.readouterr().err
    assert "left out: 2 tensors and objects of training state" in told and "no manifest.json" in told


def test_a_checkpoint_saved_by_core_passes_the_allow_list(cut):
    for folder in cut.values():
        core_files.load_metadata_safely(core_files.resolve(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_names_every_byte_once_and_where_it_comes_from(name, hf, core, cut, tmp_path, capsys):
    cases = (
        (hf[name], core[name] / "release"),
        (core[name], hf[name]),
        (cut[name], convert(cut[name], tmp_path / "b")),
    )
    for source, made in cases:
        capsys.readouterr()
        convert(source, tmp_path / "absent", "--dry-run")
        assert not (tmp_path / "absent").exists()
        planned: dict[str, bytes] = {}
        for line in map(json.loads, capsys.readouterr().out.splitlines()):
            before = planned.get(line["file"], b"")
            assert line["offset"] == len(before)
            planned[line["file"]] = before + described(line, made)
        assert planned == contents(made)


def described(line: dict, made: Path) -> bytes:
    """The bytes that a line of the plan describes."""
    if line["from"] == "header":
        whole = (made / line["file"]).read_bytes()
        return whole[line["offset"] : line["offset"] + line["bytes"]]
    if "rows" not in line:
        whole = Path(line["from"]["file"]).read_bytes()
        return whole[line["from"]["offset"] : line["from"]["offset"] + line["bytes"]]
    made_of = []
    for part in line["from"] if isinstance(line["from"], list) else [line["from"]]:
        data, size = Path(part["file"]).read_bytes()[part["offset"] :], part["row_bytes"]
        starts = [row * part.get("pitch", size) for row in range(line["rows"])]
        made_of.append(np.array([np.frombuffer(data, np.uint16, size // 2, start) for start in starts]))
    return (np.vstack(made_of).T if line.get("transposed") else np.hstack(made_of)).tobytes()


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_cast_gives_what_torch_gives(dtype, kind, tmp_path):
    source = make(tmp_path / "hf", "qwen2", dtype=torch.float32)
    replaced(source, model__layers__1__self_attn__k_proj__weight=torch.randn(16, 32).half())  # dtypes may differ
    convert(source, tmp_path / "core", "--dtype", dtype)
    back = weights(convert(tmp_path / "core", tmp_path / "back"))
    for name, tensor in weights(source).items():
        assert back[name].dtype == kind and torch.equal(back[name], tensor.to(kind))
    again = weights(convert(tmp_path / "core", tmp_path / "again", "--dtype", "fp32"))
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in back.items())


def test_neither_direction_imports_torch(hf, core, tmp_path):
    code = (
        "import sys; from megapatch.tools.convert.convert import main; status = main(sys.argv[1:]); "
        "sys.exit(status or ('torch' in sys.modules) or ('numpy' in sys.modules))"
    )
    for source in (hf["qwen3"], core["qwen3"]):
        command = [sys.executable, "-c", code, "--source", str(source), "--target", str(tmp_path / source.parent.name)]
        subprocess.run(command, check=True)


def test_an_equal_copy_of_a_tied_weight_is_dropped_and_another_refused(tmp_path, capsys):
    source = make(tmp_path / "hf", "llama")
    tied = weights(source)
    save_file(tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    back = convert(convert(source, tmp_path / "core"), tmp_path / "back")
    assert weights(back).keys() == tied.keys()
    assert "lm_head.weight: left out; it is equal to model.embed_tokens.weight" in capsys.readouterr().err
    save_file(tied | {"lm_head.weight": tied["model.embed_tokens.weight"] + 1}, source / "model.safetensors")
    fails(source, tmp_path / "other", capsys, "lm_head.weight: differs from model.embed_tokens.weight, but config.json")


def test_buffers_of_early_llama_files_are_left_out(tmp_path, capsys):
    source = make(tmp_path / "hf", "llama")
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(4)}
    save_file(weights(source) | buffers, source / "model.safetensors")
    back = convert(convert(source, tmp_path / "core"), tmp_path / "back")
    assert weights(back).keys() == weights(source).keys() - buffers.keys()
    assert capsys.readouterr().err.count("inv_freq: left out") == 4


def test_existing_targets_need_force(hf, core, tmp_path, capsys):
    for source in (hf["qwen3"], core["qwen3"]):
        target = tmp_path / source.parent.name
        target.mkdir()
        (target / "precious").write_text("x")
        fails(source, target, capsys, f"{target}: exists already", left={"precious": b"x"})
        convert(source, target, "--force")
    assert (tmp_path / core["qwen3"].parent.name / "config.json").exists()
    fails(core["qwen3"], core["qwen3"], capsys, "is the source", left=contents(core["qwen3"]))


def test_the_source_is_never_overwritten_also_with_force(core, hf, tmp_path, capsys):
    root = shutil.copytree(core["qwen3"], tmp_path / "root" / "core")
    folder = shutil.copytree(hf["qwen3"], tmp_path / "root" / "hf")
    (tmp_path / "link").symlink_to(root)
    shutil.copytree(folder, tmp_path / "models" / "release")
    for source, target, said in (
        (root, root / "release", "is the source"),
        (root, tmp_path / "root", "holds it"),
        (root / "release", root, "holds it"),
        (root, tmp_path / "link" / "release", "is the source"),
        (root, root / "release" / "hf", "lies inside the checkpoint"),
        (folder, folder, "is the source"),
        (tmp_path / "models" / "release", tmp_path / "models", "is the source"),
    ):
        fails(source, target, capsys, said, "--force", left=contents(target))
    convert(root, root / "exported")  # a new folder beside the checkpoints is welcome


def test_the_files_are_as_large_as_asked(core, tmp_path):
    one = convert(core["mixtral"], tmp_path / "one", "--max-shard-size", "1GB")
    assert [path.name for path in one.glob("*.safetensors*")] == ["model.safetensors"]
    many = convert(core["mixtral"], tmp_path / "many", "--max-shard-size", "30KB")
    sizes = [path.stat().st_size for path in many.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 33_000
    assert all(torch.equal(tensor, weights(one)[name]) for name, tensor in weights(many).items())
    assert [shard_bytes(text) for text in ("5GB", "1.5 MiB", "7B", "2kb")] == [5 * 10**9, 3 << 19, 7, 2000]


def fails(source: Path, target: Path, capsys, said: str, *more: str, left: dict[str, bytes] | None = None) -> None:
    """mp-convert gives one line that says ``said``, exit status 1, and leaves what was there."""
    capsys.readouterr()
    assert main(["--source", str(source), "--target", str(target), *more]) == 1
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and told.out == ""
    assert (contents(target) if target.exists() else {}) == (left or {})
    assert not list(target.parent.glob("*.tmp-*"))


def without(folder: Path, name: str) -> None:
    save_file({key: tensor for key, tensor in weights(folder).items() if key != name}, folder / "model.safetensors")


def replaced(folder: Path, **changed: torch.Tensor) -> None:
    renamed = {key.replace("__", "."): tensor for key, tensor in changed.items()}
    save_file(weights(folder) | renamed, folder / "model.safetensors")


def configured(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda f: without(f, "model.norm.weight"), "model.norm.weight: missing in the source"),
    "extra tensor": (lambda f: replaced(f, model__extra=torch.ones(2)), "model.extra: has no place in a qwen3 model"),
    "wrong shape": (
        lambda f: replaced(f, model__norm__weight=torch.ones(33).bfloat16()),
        "model.norm.weight: shape [33] in model.safetensors, [32] in config.json",
    ),
    "integers": (lambda f: replaced(f, model__norm__weight=torch.ones(32).int()), "dtype int32 is not supported"),
    "mixed dtypes": (
        lambda f: replaced(f, model__layers__0__self_attn__k_proj__weight=torch.ones(32, 32)),
        "q_proj.weight: bfloat16, but core stores it with weights of float32; choose --dtype",
    ),
    "mixed layers": (
        lambda f: replaced(f, model__layers__2__input_layernorm__weight=torch.ones(32)),
        "model.layers.2.input_layernorm.weight: float32, but core stores it with weights of bfloat16; choose --dtype",
    ),
    "cut short": (lambda f: truncated(f / "model.safetensors"), "model.safetensors: "),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config without sizes": (lambda f: (f / "config.json").write_text('{"model_type": "qwen3"}'), "config.json: no "),
    "unknown model": (lambda f: configured(f, model_type="gpt9"), "model_type 'gpt9' is not supported; supported: "),
    "unsupported setting": (lambda f: configured(f, attention_bias=True), "attention_bias is True; qwen3 supports"),
    "unsupported rope": (
        lambda f: configured(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope type 'yarn' is not supported",
    ),
    "uneven heads": (lambda f: configured(f, num_key_value_heads=3), "4 attention heads do not divide into 3 groups"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_told_in_one_line_and_nothing_is_left(case, tmp_path, capsys):
    damage, said = BAD[case]
    source = make(tmp_path / "hf", "qwen3")
    damage(source)
    fails(source, tmp_path / "out" / "core", capsys, said)
    assert not (tmp_path / "out").exists()


def renamed(release: Path, **changed: object) -> None:
    configured(release / "hf", **changed)


BAD_CORE: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
    "file cut short": (lambda f: truncated(f / "__0_0.distcp"), "the file is cut short"),
    "no config": (lambda f: (f / "hf" / "config.json").unlink(), "config.json: missing"),
    "larger model": (lambda f: renamed(f, num_hidden_layers=5), "shape [4, 32] in the checkpoint, [5, 32] in config"),
    "smaller model": (lambda f: renamed(f, num_hidden_layers=3), "shape [4, 32] in the checkpoint, [3, 32] in config"),
    "larger vocabulary": (lambda f: renamed(f, vocab_size=97), "shape [96, 32] in the checkpoint, [97, 32] in config"),
    "weight without place": (lambda f: renamed(f, model_type="llama"), "has no place in a llama model"),
    "weight not there": (lambda f: renamed(f, tie_word_embeddings=False), "no output_layer.weight"),
    "tracker": (lambda f: (f.parent / core_files.TRACKER).write_text("9"), "names iter_0000009, but"),
    "tracker not a number": (lambda f: (f.parent / core_files.TRACKER).write_text("-1"), "says '-1'; expected"),
}


@pytest.mark.parametrize("case", BAD_CORE)
def test_a_bad_checkpoint_is_told_in_one_line_and_nothing_is_left(case, core, tmp_path, capsys):
    damage, said = BAD_CORE[case]
    root = shutil.copytree(core["qwen3"], tmp_path / "core")
    (root / "release" / "manifest.json").unlink()
    damage(root / "release")
    capsys.readouterr()
    assert main(["--source", str(root), "--target", str(tmp_path / "out")]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "no manifest.json" not in line]
    assert len(told) == 1 and said in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core"]


def test_a_manifest_that_does_not_fit_is_refused(core, tmp_path, capsys):
    root = shutil.copytree(core["qwen3"], tmp_path / "core")
    truncated(root / "release" / "__0_0.distcp")
    fails(root, tmp_path / "out", capsys, "manifest.json says")


def test_wrong_usage_is_told(hf, core, tmp_path, capsys):
    for flags in (["--jobs", "0"], ["--max-shard-size", "5 bananas"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--source", str(core["qwen3"]), "--target", str(tmp_path / "x"), *flags])
        assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err
    fails(hf["qwen3"], tmp_path / "x", capsys, "--max-shard-size: only for", "--max-shard-size", "5GB")
    fails(tmp_path / "absent", tmp_path / "x", capsys, "absent")
