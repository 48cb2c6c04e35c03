"""Hugging Face folders: headers as the library writes them, damage told by name, nothing read outside the folder."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from megapatch.models import hf_files
from megapatch.models.cli import UserError

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4).bfloat16(), "empty": torch.ones(0, 3)}
TENSORS |= {"scalar": torch.tensor(1.5).half(), "wide": torch.ones(2, dtype=torch.float64)}


def file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_the_library_s_files_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    found = hf_files.tensors(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].shape, f"torch.{found[name].dtype}") == (tensor.shape, str(tensor.dtype))
        at, size = found[name].offset, found[name].size
        assert data[at : at + size] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(st.lists(st.tuples(st.sampled_from("abcdeé"), st.sampled_from(["float32", "bfloat16", "float16", "float64"]))))
def test_headers_are_the_library_s_byte_for_byte(drawn):
    described = {name: (name, dtype, (2, 3)) for name, dtype in drawn}
    order = hf_files.saved_order(list(described.values()))
    header, offsets, size = hf_files.header(order)
    tensors = {name: torch.zeros(2, 3, dtype=getattr(torch, dtype)) for name, dtype, _ in described.values()}
    expected = save(tensors, {"format": "pt"})
    assert expected[: len(header)] == header and len(expected) == size
    assert offsets == sorted(offsets) and all(at >= len(header) for at in offsets)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, too short for a header"),
    "short": (lambda p: p.write_bytes(b"\0" * 7), "7 bytes, too short for a header"),
    "header of nothing": (lambda p: file(p, b""), "header said to be 0"),
    "header beyond the end": (lambda p: file(p, {}, length=3), "header said to be 3"),
    "huge header": (lambda p: file(p, {}, length=1 << 62), f"header said to be {1 << 62}"),
    "not JSON": (lambda p: file(p, b"{not json}"), "header is not readable"),
    "not UTF-8": (lambda p: file(p, b'{"\xff": 1}'), "header is not readable"),
    "a list": (lambda p: file(p, []), "header is not readable"),
    "no offsets": (lambda p: file(p, {"a": {"dtype": "F32", "shape": [2]}}), "header is not readable"),
    "unknown dtype": (lambda p: file(p, {"a": entry(0, 8, dtype="F31")}, b"x" * 8), "a: unknown dtype 'F31'"),
    "negative shape": (lambda p: file(p, {"a": entry(0, 8, (-1, -2))}, b"x" * 8), "header is not readable (a number -"),
    "shape of text": (
        lambda p: file(p, {"a": entry(0, 8) | {"shape": ["2"]}}, b"x" * 8),
        "a: shape ['2'], offsets 0, 8",
    ),
    "twice": (
        lambda p: file(p, b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), b"x" * 8),
        "a is in the header twice",
    ),
    "wrong size": (lambda p: file(p, {"a": entry(0, 12)}, b"x" * 12), "a: 12 bytes for float32 [2]; expected 8"),
    "gap": (lambda p: file(p, {"a": entry(4, 12)}, b"x" * 12), "a starts at byte"),
    "overlap": (lambda p: file(p, {"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "b starts at byte"),
    "cut short": (lambda p: file(p, {"a": entry(0, 8)}, b"x" * 7), "the header says"),
    "longer": (lambda p: file(p, {"a": entry(0, 8)}, b"x" * 9), "the header says"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told(case, tmp_path):
    damage, said = DAMAGED[case]
    damage(tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        hf_files.tensors(tmp_path)
    told = str(error.value)
    assert said in told and told.startswith(f"{tmp_path / 'model.safetensors'}: ") and "\n" not in told


@given(st.binary(max_size=60), st.integers(0, 400))
def test_random_damage_never_ends_in_another_error(tmp_path_factory, junk, at):
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    data = bytearray(save(TENSORS, {"format": "pt"}))
    data[at : at + len(junk)] = junk
    path.write_bytes(data)
    try:
        found = hf_files.read_header(path)
    except UserError:
        return
    assert sum(tensor.size for tensor in found) < len(data)


def sharded(folder: Path, **weight_map: object) -> Path:
    """Two files, and an index that says what is given."""
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "one.safetensors")
    save_file({"c": torch.ones(2)}, folder / "two.safetensors")
    (folder / hf_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


WHERE = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def test_sharded_folders_are_read(tmp_path):
    found = hf_files.tensors(sharded(tmp_path, **WHERE))
    assert {name: tensor.file.name for name, tensor in found.items()} == WHERE


@pytest.mark.parametrize(
    "weight_map, said",
    [
        (WHERE | {"d": "two.safetensors"}, "names d in two.safetensors, but that file does not hold it"),
        (WHERE | {"d": "three.safetensors"}, "three.safetensors: missing, but model.safetensors.index.json names it"),
        ({"a": "one.safetensors"}, "one.safetensors: holds b, but model.safetensors.index.json gives no file"),
        (WHERE | {"c": "one.safetensors"}, "names c in one.safetensors, but that file does not hold it"),
        (WHERE | {"d": "../two.safetensors"}, "d is said to be in '../two.safetensors'; expected"),
        (WHERE | {"d": "/etc/two.safetensors"}, "d is said to be in '/etc/two.safetensors'"),
        (WHERE | {"d": "pytorch_model.bin"}, "d is said to be in 'pytorch_model.bin'"),
        (WHERE | {"d": 5}, "d is said to be in 5"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_told(weight_map, said, tmp_path):
    sharded(tmp_path, **weight_map)
    with pytest.raises(UserError) as error:
        hf_files.tensors(tmp_path)
    assert said in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_an_index_that_is_no_object_is_told(tmp_path):
    (tmp_path / hf_files.INDEX).write_text("[]")
    with pytest.raises(UserError, match="no weight_map"):
        hf_files.index(tmp_path)


def test_folders_without_index(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors file; expected model\.safetensors"):
        hf_files.tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert hf_files.tensors(tmp_path).keys() == {"a"}
    save_file({"b": torch.ones(1)}, tmp_path / "another.safetensors")
    with pytest.raises(UserError, match=r"several \.safetensors files and no model\.safetensors\.index\.json"):
        hf_files.tensors(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")  # some folders hold it twice, in two formats
    assert hf_files.tensors(tmp_path).keys() == {"c"}


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_shards_hold_each_tensor_once_in_order_within_the_limit(sizes, limit):
    named = {f"t{n}": size for n, size in enumerate(sizes)}
    files = hf_files.shards(named, limit)
    assert [name for names in files.values() for name in names] == list(named)
    assert all(len(names) == 1 or sum(named[name] for name in names) <= limit for names in files.values() if sizes)
    count = len(files)
    expected = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert list(files) == (expected if count > 1 else ["model.safetensors"])


def test_side_files_are_all_but_weights(tmp_path):
    source = tmp_path / "hf"
    kept = ["config.json", "merges.txt", "tokenizer.model", "qwen.tiktoken", "LICENSE", "chat_template.jinja", "x.py"]
    kept += ["additional_chat_templates/rag.jinja"]
    left = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "consolidated.00.pth", "m.gguf"]
    left += ["pytorch_model.bin.index.json", "manifest.json", ".gitattributes", "original/params.json"]
    for name in kept + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    hf_files.copy_side_files(source, tmp_path / "copy")
    copied = [path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert sorted(map(str, copied)) == sorted(kept)
    assert all((tmp_path / "copy" / name).read_text() == name for name in kept)


def test_links_are_followed_inside_the_folder_and_into_the_hub_s_cache_only(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "123").write_text("{}")
    os.symlink("../../blobs/123", snapshot / "config.json")
    os.symlink("config.json", snapshot / "other.json")
    assert list(hf_files.side_files(snapshot)) == ["config.json", "other.json"]
    save_file({"a": torch.ones(1)}, snapshot.parent.parent / "blobs" / "456")
    os.symlink("../../blobs/456", snapshot / "model.safetensors")
    assert hf_files.tensors(snapshot).keys() == {"a"} and hf_files.config(snapshot) == {}
    (snapshot / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    os.symlink("../../../outside.safetensors", snapshot / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: a link to .*, outside the folder"):
        hf_files.tensors(snapshot)
    (tmp_path / "secret").write_text("x")
    os.symlink("../../../secret", snapshot / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: a link to \.\./\.\./\.\./secret, outside the folder"):
        hf_files.side_files(snapshot)


def test_config_is_an_object(tmp_path):
    for text, said in (("[]", "a JSON list; expected an object"), ("{", "not JSON"), (None, "missing")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        else:
            (tmp_path / "config.json").unlink()
        with pytest.raises(UserError, match=rf"config\.json: {said}"):
            hf_files.config(tmp_path)
