"""mp-inspect-checkpoint: names, shapes, layout, sizes and verdicts of every kind of folder, without torch."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
from hostile import Made, Named

from megapatch.models import core_files, hf_files
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.convert.folded import fold, spans_of, table
from megapatch.tools.convert.found import Item
from megapatch.tools.convert.inspect_checkpoint import main

GOOD = {"complete": True, "verified": None, "safe": True}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Two models in every form."""
    root = tmp_path_factory.mktemp("good")
    for name in ("mixtral", "qwen3"):
        hostile.small_folder(root / name, name)
        for kind, *options in (
            ("core",),
            ("sharded", "--to", "hf", "--max-shard-size", "30KB"),
            ("legacy", "--to", "legacy", "--tp", "2", "--pp", "2"),
        ):
            source, target = str(root / name), str(root / f"{name}-{kind}")
            assert convert(["--source", source, "--target", target, *options]) == 0
    return root


def said(folder: Path, capsys, *more: str, status: int = 0) -> dict:
    """The JSON object that the command prints."""
    capsys.readouterr()
    assert main([str(folder), "--json", *more]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["", "-sharded"])
def test_every_tensor_of_a_hugging_face_folder_is_there(kind, good, capsys):
    found = said(good / f"qwen3{kind}", capsys, "--all")
    expected = hf_files.tensors(good / "qwen3")
    names = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert {name: tensor["file"] for name, tensor in names.items()} == {
        name: tensor.file.name for name, tensor in hf_files.tensors(good / f"qwen3{kind}").items()
    }
    assert {n: (t["dtype"], tuple(t["shape"]), t["bytes"]) for n, t in names.items()} == {
        name: (tensor.dtype, tensor.shape, tensor.size) for name, tensor in expected.items()
    }
    assert (found["kind"], found["model"]["model_type"], found["model"]["layers"]) == ("hf", "qwen3", 4)
    assert found["verdict"] == GOOD | {"verified": True if kind else None}
    sums = found["dtypes"]["bfloat16"]
    assert sums == {
        "tensors": len(expected),
        "parameters": sum(math.prod(t.shape) for t in expected.values()),
        "bytes": sum(t.size for t in expected.values()),
    }


@pytest.mark.parametrize("path", ["qwen3-core", "qwen3-core/release"])
def test_every_tensor_of_a_checkpoint_is_there(path, good, capsys):
    found = said(good / path, capsys)
    with core_files.Checkpoint(good / "qwen3-core" / "release") as checkpoint:
        expected = {t.key: (t.dtype, list(t.shape), len(t.chunks)) for t in checkpoint.tensors.values()}
        objects = len(checkpoint.objects)
    assert {t["name"]: (t["dtype"], t["shape"], t["parts"]) for t in found["tensors"]} == expected
    assert found["verdict"] == {"complete": True, "verified": True, "safe": True}
    layout = found["layout"]
    assert (layout["iteration"], layout["layers_are"], layout["written_by_ranks"]) == (0, "an axis", 1)
    assert layout["suggests_tensor_model_parallel_size"] == 1
    assert found["state"] == {"tensors": 0, "bytes": 0, "objects": objects} and found["kind"] == "core"


def test_ranks_are_counted_and_their_layout_is_told(good, capsys):
    found = said(good / "mixtral-legacy", capsys)
    assert found["kind"] == "legacy" and found["verdict"]["complete"] is True
    layout = found["layout"]
    sizes = [layout[f"{name}_model_parallel_size"] for name in ("tensor", "pipeline")]
    assert (layout["ranks"], sizes, layout["optimizer_state"]) == (4, [2, 2], False)
    norms = next(t for t in found["tensors"] if t["name"] == "decoder.final_layernorm.weight")
    assert (norms["count"], norms["shape"]) == (2, [32])  # two ranks of the last stage
    qkv = next(t for t in found["tensors"] if t["name"].endswith("linear_qkv.weight"))
    assert qkv["name"] == "decoder.layers.{0-1}.self_attention.linear_qkv.weight" and qkv["count"] == 8


def test_torch_is_not_imported_and_help_is_quick(good):
    code = (
        "import sys; from megapatch.tools.convert.inspect_checkpoint import main; status = main(sys.argv[1:]); "
        "sys.exit(status or ('torch' in sys.modules) or ('numpy' in sys.modules))"
    )
    for kind in ("mixtral", "mixtral-core", "mixtral-legacy"):
        subprocess.run([sys.executable, "-c", code, str(good / kind)], check=True, stdout=subprocess.DEVNULL)


def test_the_table_fits_a_terminal_and_folds_layers_and_experts(good, capsys):
    for kind in ("mixtral", "mixtral-core", "mixtral-legacy", "mixtral-sharded"):
        assert main([str(good / kind)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 120 and len(lines) < 40
        assert [line.split()[:2] for line in lines[-3:] if line.startswith(("complete", "safe"))] == [
            ["complete", "yes"],
            ["safe", "yes"],
        ]
    assert main([str(good / "mixtral")]) == 0
    folded = capsys.readouterr().out
    assert "model.layers.{0-3}.block_sparse_moe.experts.{0-3}.w1.weight     16  bfloat16" in folded
    assert main([str(good / "mixtral"), "--all"]) == 0
    everything = capsys.readouterr().out
    assert "model.layers.3.block_sparse_moe.experts.2.w1.weight" in everything and "  model.safetensors" in everything
    assert everything.count("experts.") == 48


@pytest.mark.parametrize(
    "numbers, text",
    [
        ({3}, "3"),
        ({0, 1, 2}, "{0-2}"),
        ({0, 2, 4}, "{0,2,4}"),
        ({0, 1, 3, 7, 8}, "{0-1,3,7-8}"),
        (set(range(0, 40, 2)), "{0,2,4,...,38}"),
    ],
)
def test_spans(numbers, text):
    assert spans_of(numbers) == text


def test_kinds_differ_by_shape_and_type_and_long_names_are_cut():
    items = [Item(f"a.{n}.w", "float32", (2, n // 2 + 1), "f") for n in range(4)]
    assert [(kind.name, kind.count, kind.shape) for kind in fold(items)] == [
        ("a.{0-1}.w", 2, (2, 1)),
        ("a.{2-3}.w", 2, (2, 2)),
    ]
    assert max(map(len, table(fold([Item("x" * 500, "float32", (1,), "f")])))) <= 120


def test_digests_are_compared_unless_skipped(good, tmp_path, capsys):
    folder = shutil.copytree(good / "qwen3-core", tmp_path / "c")
    path = folder / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    found = said(folder, capsys, status=1)
    assert found["verdict"] == {"complete": True, "verified": False, "safe": True}
    assert found["problems"] == [["verified", f"{path}: content differs from manifest.json; it is damaged"]]
    assert said(folder, capsys, "--skip-digests")["verdict"]["verified"] is None
    path.unlink()
    assert said(folder, capsys, "--skip-digests", status=1)["verdict"]["verified"] is False


def test_what_cannot_be_known_is_not_judged(good, tmp_path, capsys):
    folder = shutil.copytree(good / "qwen3", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    found = said(folder, capsys)
    assert found["verdict"] == GOOD | {"complete": None} and "'mamba9' is not known" in found["notes"][0]
    core = shutil.copytree(good / "qwen3-core" / "release", tmp_path / "iter_0000042")
    shutil.rmtree(core / "hf")
    (core / "manifest.json").unlink()
    found = said(core, capsys)
    assert found["verdict"] == GOOD | {"complete": None} and "--config" in found["notes"][0]
    assert said(core, capsys, "--config", str(good / "qwen3"))["verdict"] == GOOD
    assert said(core, capsys, "--config", str(good / "mixtral"), status=1)["verdict"]["complete"] is False


def trained(folder: Path) -> Path:
    """The description of a checkpoint in the chunks of TP2 on two stages, by four ranks, with an optimizer beside."""
    of, torch_size = "torch.distributed.checkpoint.", Named("torch", "Size")
    described, places = {}, []

    def chunk(key: str, rank: int, *offsets_and_sizes: tuple[int, ...]) -> Made:
        offsets, sizes = (Made(torch_size, numbers) for numbers in offsets_and_sizes)
        stored = Made(Named(of + "filesystem", "_StorageInfo"), f"__{rank}_0.distcp", 0, 1)
        places.append((Made(Named(of + "metadata", "MetadataIndex"), key, offsets), stored))
        return Made(Named(of + "metadata", "ChunkStorageMetadata"), offsets, sizes)

    def tensor(shape: tuple[int, ...], chunks: list[Made]) -> Made:
        kind = Made(Named(of + "metadata", "TensorProperties"), Named("torch", "float32"))
        return Made(Named(of + "metadata", "TensorStorageMetadata"), kind, Made(torch_size, shape), chunks)

    qkv, layers = "decoder.layers.self_attention.linear_qkv.weight", [(n, r) for n in range(4) for r in range(2)]
    chunks = [chunk(qkv, n // 2 * 2 + r, (n, 4 * r, 0), (1, 4, 4)) for n, r in layers]
    described[qkv] = tensor((4, 8, 4), chunks)
    for rank in range(4):
        key = f"optimizer.state.exp_avg.shard_{rank}"
        described[key] = tensor((32,), [chunk(key, rank, (0,), (32,))])
    folder.mkdir()
    metadata = Made(Named(of + "metadata", "Metadata"), described, None, dict(places))
    (folder / ".metadata").write_bytes(hostile.pickled(metadata))
    (folder / "common.pt").write_bytes(hostile.saved(hostile.pickled({"iteration": 5})))
    (folder / "metadata.json").write_text("{}")
    return folder


def test_chunks_suggest_the_layout_that_saved_and_training_state_is_counted_apart(tmp_path, capsys):
    found = said(trained(tmp_path / "c"), capsys)
    layout = found["layout"]
    assert layout["suggests_tensor_model_parallel_size"] == layout["suggests_pipeline_model_parallel_size"] == 2
    assert (layout["written_by_ranks"], layout["iteration"], layout["files"]) == (4, 5, 4)
    assert found["state"]["tensors"] == 4 and found["state"]["bytes"] == 4 * 128
    assert [tensor["parts"] for tensor in found["tensors"]] == [8]


def rank(folder: Path, name: str, *names: str, **more: object) -> None:
    hostile.rank_file(folder / name / "model_optim_rng.pt", dict.fromkeys(names, (2,)), **more)


FINAL = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    "ranks, expected",
    [
        ({"mp_rank_00": (FINAL,), "mp_rank_01": (FINAL,)}, {"tensor": 2}),
        ({"mp_rank_00_000": ("a",), "mp_rank_00_001": (FINAL,)}, {"tensor": 1, "pipeline": 2}),
        ({"mp_rank_00_000": (FINAL,), "mp_rank_00_001": (FINAL,)}, {"tensor": 1, "expert": 2}),
        ({f"mp_rank_00_00{n}_00{e}": () for n in (0, 1) for e in (0, 1)}, {"tensor": 1, "pipeline": 2, "expert": 2}),
    ],
)
def test_folder_names_and_final_norms_tell_the_layout_of_ranks(ranks, expected, tmp_path, capsys):
    for name, weights in ranks.items():
        rank(tmp_path / "c", name, *weights)
    layout = said(tmp_path / "c", capsys)["layout"]
    found = {name: size for name, size in layout.items() if name.endswith("_model_parallel_size")}
    assert found == {f"{name}_model_parallel_size": size for name, size in expected.items()}


def test_what_ranks_say_of_themselves_is_told(tmp_path, capsys):
    sizes = {"tensor_model_parallel_size": 1, "transformer_impl": "local", "num_experts": None, "secret": "x"}
    args = Made(Named("argparse", "Namespace"), state=sizes)
    rank(tmp_path / "c", "mp_rank_00", "a.weight", args=args, optimizer={"x": 1})
    layout = said(tmp_path / "c", capsys)["layout"]
    assert layout == {
        "ranks": 1,
        "tensor_model_parallel_size": 1,
        "checkpoint_version": 3.0,
        "iteration": 7,
        "optimizer_state": True,
        "chunks_of_the_pipeline": 1,
        "transformer_impl": "local",
    }


def test_a_missing_rank_is_named(tmp_path, capsys):
    for name in ("mp_rank_00_000", "mp_rank_01_001", "mp_rank_00_001"):
        rank(tmp_path / "c", name, "a")
    found = said(tmp_path / "c", capsys, status=1)
    assert found["problems"] == [["complete", f"{tmp_path / 'c'}: no mp_rank_01_000, though ranks above it are there"]]
    (tmp_path / "c" / "mp_rank_00_000" / "model_optim_rng.pt").unlink()
    problems = said(tmp_path / "c", capsys, status=1)["problems"]
    assert any("mp_rank_00_000: no model_optim_rng.pt" in what for _, what in problems)


def test_weights_in_pickles_are_listed_and_judged(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    weights = {"model.a.weight": hostile.Tensor("0", (2, 3)), "model.b.weight": hostile.Tensor("0", (6,))}
    (tmp_path / "pytorch_model.bin").write_bytes(hostile.saved(hostile.pickled(weights), **{"data/0": bytes(12)}))
    found = said(tmp_path, capsys)
    assert [(t["name"], t["shape"]) for t in found["tensors"]] == [("model.a.weight", [2, 3]), ("model.b.weight", [6])]
    assert found["verdict"] == {"complete": None, "verified": None, "safe": True}
    evil = Made(Named("posix", "mkdir"), str(tmp_path / "trap"))
    (tmp_path / "pytorch_model.bin").write_bytes(hostile.saved(hostile.pickled(weights | {"x": evil})))
    assert said(tmp_path, capsys, status=1)["verdict"]["safe"] is False
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda p: None, "does not exist; expected a folder of weights"),
        (lambda p: p.write_text("x"), "is a file; expected a folder of weights"),
        (lambda p: p.mkdir(), "not a core checkpoint: no latest_checkpointed_iteration.txt"),
        (lambda p: (p / "iter_0000003").mkdir(parents=True) or core_files.write_tracker(p, 3), "iter_0000003"),
    ],
)
def test_a_folder_without_weights_is_told_in_one_line(make, what, tmp_path, capsys):
    make(tmp_path / "x")
    assert main([str(tmp_path / "x")]) == 1
    told = capsys.readouterr()
    assert what in told.err and told.err.count("\n") == 1 and told.out == ""


def test_names_of_others_do_not_reach_the_terminal_raw(tmp_path, capsys):
    name = "a\x1b[31m\nb"
    hostile.write_safetensors(tmp_path / "model.safetensors", {name: ("float32", (1,))})
    (tmp_path / "config.json").write_text('{"model_type": "x\\u001b[31m"}')
    main([str(tmp_path)])
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "a\\x1b[31m\\nb" in told.out
