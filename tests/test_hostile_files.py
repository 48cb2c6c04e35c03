"""Damaged folders, through the commands: cut short, bits flipped, files missing, paths and links that lead out."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest

from megapatch.models import core_files, hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_write import CoreWriter
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.convert.inspect_checkpoint import main as inspect

INDEX = hf_files.INDEX


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """One model as a Hugging Face folder in several files, as a torch_dist checkpoint, and as files of ranks."""
    root = tmp_path_factory.mktemp("good")
    hostile.small_folder(root / "one")
    for name, source, *options in (
        ("hf", "one", "--to", "hf", "--max-shard-size", "20KB"),
        ("core", "one"),
        ("legacy", "one", "--to", "legacy", "--tp", "2", "--pp", "2"),
    ):
        assert convert(["--source", str(root / source), "--target", str(root / name), *options]) == 0
    return root


def told(source: Path, capsys) -> list[str]:
    """Both commands refuse the folder; the problems that the first names, and what the other says."""
    capsys.readouterr()
    target = source.parent / "target"
    assert inspect([str(source), "--json"]) == 1
    said = capsys.readouterr()
    if said.out:
        found = [problem for _, problem in json.loads(said.out)["problems"]]
        assert found and said.err == ""
    else:
        found = said.err.splitlines()
        assert len(found) == 1 and found[0].startswith("mp-inspect-checkpoint: error: ")
    assert all("\n" not in line for line in found)
    assert convert(["--source", str(source), "--target", str(target)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and not target.exists()
    return [*found, errors[0].partition("error: ")[2]]


def test_every_length_of_a_small_safetensors_file_is_refused(tmp_path, capsys):
    folder = hostile.small_folder(tmp_path / "hf")
    path = hostile.write_safetensors(folder / hf_files.SINGLE, {"a": ("bfloat16", (4,)), "b": ("float32", (2, 2))})
    whole = path.read_bytes()
    assert len(whole) < 250
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for line in told(folder, capsys):
            assert f"{path}: {length} bytes" in line, length
    path.write_bytes(whole + b"\0")
    assert all("get it again" in line for line in told(folder, capsys))


def checkpoint(folder: Path) -> Path:
    """A torch_dist folder with one small tensor and one object, without a manifest."""
    folder.mkdir(parents=True)
    writer = CoreWriter(1)
    file, offset = writer.tensor("a", "float32", (2, 3), (0, 0), (2, 3))
    writer.object("a._extra_state/shard_0_1")
    for name, at, data in ((file, offset, bytes(24)), *writer.rest({})):
        with (folder / name).open("r+b" if (folder / name).exists() else "wb") as made:
            made.seek(at)
            made.write(data)
    return folder


def test_every_length_of_a_distcp_file_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "c")
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    core_files.load_metadata_safely(folder)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with core_files.Checkpoint(folder) as found, pytest.raises(UserError, match="the file is cut short"):
            found.check_objects()
            found.locate(found.tensors["a"], found.tensors["a"].chunks[0])


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_every_length_of_the_description_is_refused(name, tmp_path):
    folder = checkpoint(tmp_path / "c")
    whole = (folder / name).read_bytes()
    for length in range(len(whole)):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            core_files.load_metadata_safely(folder)
        assert str(error.value).startswith(str(folder / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_bit_anywhere_in_a_checkpoint_ends_in_one_line_or_an_equal_description(name, tmp_path):
    folder = checkpoint(tmp_path / "c")
    whole = (folder / name).read_bytes()
    refused = 0
    for at in range(0, len(whole)):
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            core_files.load_metadata_safely(folder)
            with core_files.Checkpoint(folder) as found:
                for tensor in found.tensors.values():
                    for chunk in tensor.chunks:
                        assert 0 <= found.locate(tensor, chunk) <= len(whole)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(whole) // 5


def copied(good: Path, kind: str, tmp_path: Path) -> Path:
    """A copy of one of the folders that may be damaged, without manifests."""
    folder = shutil.copytree(good / kind, tmp_path / "copy" / kind)
    for path in folder.rglob("manifest.json"):
        path.unlink()
    return folder


def cut(folder: Path, pattern: str) -> None:
    path = max(folder.rglob(pattern), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def gone(folder: Path, pattern: str) -> None:
    min(folder.rglob(pattern)).unlink()


def index(folder: Path, **changed: object) -> None:
    said = json.loads((folder / INDEX).read_text())
    said["weight_map"] |= changed
    (folder / INDEX).write_text(json.dumps(said))


def configured(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def in_header(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the header of the first file."""
    path = min(folder.glob("*.safetensors"))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header: dict) -> dict:
    return header[min(name for name in header if name != "__metadata__")]


def move(header: dict, by: int) -> None:
    said = max((said for name, said in header.items() if name != "__metadata__"), key=lambda s: s["data_offsets"])
    said["data_offsets"] = [at + by for at in said["data_offsets"]]


def linked(folder: Path, name: str) -> None:
    """The file is outside, a link to it inside."""
    outside = folder.parent.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


def described(folder: Path, change: Callable[[object], object]) -> None:
    """Change what .metadata says."""
    import torch.distributed.checkpoint as dcp

    release = folder / "release"
    metadata = dcp.FileSystemReader(release).read_metadata()
    change(metadata)
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


def place(metadata: object, **changed: object) -> None:
    """Change where the first tensor is said to lie."""
    saved = next(info for index, info in metadata.storage_data.items() if index.offset is not None)
    vars(saved).update(changed)


def tensor(metadata: object) -> object:
    return metadata.state_dict_metadata["embedding.word_embeddings.weight"]


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a shard is missing": ("hf", lambda f: gone(f, "*.safetensors"), "missing, but model.safetensors.index.json names"),
    "a shard is cut": ("hf", lambda f: cut(f, "*.safetensors"), "cut short"),
    "a ghost in the index": ("hf", lambda f: index(f, ghost=min(f.glob("*.safetensors")).name), "names ghost in"),
    "a ghost file": ("hf", lambda f: index(f, ghost="ghost.safetensors"), "ghost.safetensors: missing"),
    "a path in the index": (
        "hf",
        lambda f: index(f, x="../one/model.safetensors"),
        "'../one/model.safetensors'; expected",
    ),
    "an absolute path": ("hf", lambda f: index(f, x="/etc/model.safetensors"), "'/etc/model.safetensors'; expected"),
    "an index that is none": ("hf", lambda f: (f / INDEX).write_text("[" * 100_000), "not JSON"),
    "an index of numbers": ("hf", lambda f: (f / INDEX).write_text('{"weight_map": 1}'), "no weight_map"),
    "overlapping tensors": ("hf", lambda f: in_header(f, lambda h: move(h, -2)), "overlap or leave gaps"),
    "a gap": ("hf", lambda f: in_header(f, lambda h: move(h, 2)), "overlap or leave gaps"),
    "another shape": ("hf", lambda f: in_header(f, lambda h: first(h)["shape"].insert(0, 2)), "; expected"),
    "another dtype": ("hf", lambda f: in_header(f, lambda h: first(h).update(dtype="F8_E9")), "unknown dtype 'F8_E9'"),
    "turned sizes": (
        "hf",
        lambda f: in_header(f, lambda h: h["model.embed_tokens.weight"]["shape"].reverse()),
        "[32, 96]",
    ),
    "a tensor twice": ("one", lambda f: twice(f), "is in the header twice"),
    "several files, no index": ("hf", lambda f: (f / INDEX).unlink(), "several .safetensors files and no"),
    "weights outside": ("hf", lambda f: linked(f, min(f.glob("*.safetensors")).name), "outside the folder"),
    "one file outside": ("one", lambda f: linked(f, "model.safetensors"), "outside the folder"),
    "a tokenizer outside": ("one", lambda f: linked(f, "tokenizer.json"), "outside the folder"),
    "config.json outside": ("one", lambda f: linked(f, "config.json"), "outside the folder"),
    "config.json of text": ("one", lambda f: configured(f / "config.json", hidden_size="32"), "hidden_size is '32'"),
    "a billion layers": (
        "one",
        lambda f: configured(f / "config.json", num_hidden_layers=10**9),
        "num_hidden_layers is",
    ),
    "less than no heads": ("one", lambda f: configured(f / "config.json", num_attention_heads=-4), "_heads is '-4'"),
    "another width": ("one", lambda f: configured(f / "config.json", intermediate_size=48), "in config.json"),
    "chunks are missing": ("core", lambda f: gone(f / "release", "*.distcp"), "missing, but .metadata names it"),
    "chunks are cut": ("core", lambda f: cut(f, "*.distcp"), "the file is cut short"),
    ".metadata is cut": ("core", lambda f: cut(f, ".metadata"), "damaged"),
    "a path in .metadata": (
        "core",
        lambda f: described(f, lambda m: place(m, relative_path="../../one/model.safetensors")),
        "is said to be in ../../one/model.safetensors; expected a file of this folder",
    ),
    "a negative place": ("core", lambda f: described(f, lambda m: place(m, offset=-8)), "no place in"),
    "a place of text": ("core", lambda f: described(f, lambda m: place(m, offset="8")), "no place in"),
    "another chunk's place": ("core", lambda f: described(f, lambda m: place(m, offset=0, length=9)), "damaged"),
    "a chunk beyond its tensor": (
        "core",
        lambda f: described(f, lambda m: vars(tensor(m)).update(size=(4, 32))),
        "the file is damaged",
    ),
    "a tensor with a hole": (
        "core",
        lambda f: described(f, lambda m: vars(tensor(m)).update(chunks=[])),
        "embedding.word_embeddings.weight",
    ),
    "a tensor left out": (
        "core",
        lambda f: described(f, lambda m: m.state_dict_metadata.pop("decoder.final_layernorm.weight")),
        "decoder.final_layernorm.weight",
    ),
    "chunks outside": ("core", lambda f: linked(f / "release", "__0_0.distcp"), "outside the folder"),
    "a tracker that leads out": (
        "core",
        lambda f: (f / core_files.TRACKER).write_text("../one"),
        "says '../one'; expected",
    ),
    "a rank is missing": ("legacy", lambda f: gone(f / "release" / "mp_rank_01_001", "*.pt"), "release"),
    "a rank's folder is missing": ("legacy", lambda f: shutil.rmtree(f / "release" / "mp_rank_00_001"), "release"),
    "a rank is cut": ("legacy", lambda f: cut(f, "*.pt"), "model_optim_rng.pt"),
}


def twice(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    name = b'"model.norm.weight":'
    entry = data[8 : 8 + length].partition(name)[2].partition(b"}")[0] + b"}"
    text = data[8 : 8 + length].rstrip()[:-1] + b"," + name + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_both_commands(fault, good, tmp_path, capsys):
    kind, damage, said = FAULTS[fault]
    folder = copied(good, kind, tmp_path)
    assert inspect([str(folder)]) == 0
    damage(folder)
    lines = told(folder, capsys)
    assert said in lines[-1], lines
    assert any(said in line for line in lines[:-1]), lines


@pytest.mark.parametrize("kind", ["hf", "core", "legacy"])
def test_a_bit_flipped_anywhere_is_found_by_the_manifest(kind, good, tmp_path, capsys):
    folder = shutil.copytree(good / kind, tmp_path / kind)
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != core_files.TRACKER]
    assert len(files) > 3
    for number, path in enumerate(files):
        whole = path.read_bytes()
        at = len(whole) * (number + 1) // (len(files) + 2)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << number % 8]) + whole[at + 1 :])
        capsys.readouterr()
        assert inspect([str(folder), "--json"]) == 1, path
        told = capsys.readouterr()
        assert path.name in told.out + told.err
        assert convert(["--source", str(folder), "--target", str(tmp_path / "out")]) == 1
        assert path.name in capsys.readouterr().err and not (tmp_path / "out").exists()
        path.write_bytes(whole)
    assert inspect([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == {"complete": True, "verified": True, "safe": True}


@pytest.mark.parametrize("kind", ["hf", "core", "legacy"])
def test_random_damage_of_any_file_never_ends_in_another_error(kind, good, tmp_path, capsys):
    import random

    chance = random.Random(3)
    folder = copied(good, kind, tmp_path)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    outcomes = set()
    for _ in range(150):
        path = chance.choice(files)
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + chance.randbytes(chance.randrange(40)) + whole[at + chance.randrange(40) :])
        capsys.readouterr()
        outcomes.add(inspect([str(folder), "--json"]))
        assert capsys.readouterr().err.count("\n") <= 1
        status = convert(["--source", str(folder), "--target", str(tmp_path / "out"), "--dry-run"])
        assert status in (0, 1) and capsys.readouterr().err.count("error:") == status
        path.write_bytes(whole)
    assert outcomes == {0, 1}
