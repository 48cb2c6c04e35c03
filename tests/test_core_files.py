"""Core checkpoints on disk: folders and trackers, metadata as torch writes it, pickles that run nothing."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_torch_save import FLOATS, saved
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megapatch.models import core_files, safe_pickle, torch_save
from megapatch.models.cli import UserError
from megapatch.models.core_write import CoreWriter


class Evil:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write(folder: Path, tensors: dict[str, torch.Tensor], objects: tuple[str, ...] = ()) -> Path:
    """A checkpoint folder made with CoreWriter, one chunk a tensor."""
    folder.mkdir(parents=True)
    writer, data = CoreWriter(2), []
    for key, tensor in tensors.items():
        place = writer.tensor(key, FLOATS[tensor.dtype], tensor.shape, [0] * tensor.dim(), tensor.shape)
        data.append((*place, tensor.contiguous().view(torch.uint8).numpy().tobytes()))
    for key in objects:
        writer.object(key)
    for name, offset, content in (*data, *writer.rest({"iteration": 3})):
        with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
            file.seek(offset)
            file.write(content)
    return folder


def test_torch_finds_the_metadata_equal_to_its_own(tmp_path):
    folder = write(tmp_path / "c", {"a.weight": torch.ones(3, 4), "b": torch.ones(5).bfloat16()}, ("x/shard_0_1",))
    found = dcp.FileSystemReader(folder).read_metadata()
    places = {index: (info.relative_path, info.offset, info.length) for index, info in found.storage_data.items()}

    def described(dtype: torch.dtype, *size: int) -> TensorStorageMetadata:
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
        return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [chunk])

    expected = {"a.weight": described(torch.float32, 3, 4), "b": described(torch.bfloat16, 5)}
    expected["x/shard_0_1"] = BytesStorageMetadata()
    assert found == Metadata(expected, None, found.storage_data, found.storage_meta)
    assert pickle.dumps(found.state_dict_metadata) == pickle.dumps(expected)  # types too, torch.Size for one
    keys = [MetadataIndex("a.weight", (0, 0)), MetadataIndex("b", (0,)), MetadataIndex("x/shard_0_1")]
    assert list(places) == keys and all((folder / name).stat().st_size >= at + n for name, at, n in places.values())


def evil_metadata(folder: Path, trap: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(trap)))


def evil_inside_metadata(folder: Path, trap: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.planner_data = {"x": Evil(trap)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_common(folder: Path, trap: Path) -> None:
    torch.save({"args": Evil(trap)}, folder / "common.pt")


def evil_object(folder: Path, trap: Path, value: object = None) -> None:
    file = saved([Evil(trap) if value is None else value])
    metadata = dcp.FileSystemReader(folder).read_metadata()
    (folder / "evil.distcp").write_bytes(file.getvalue())
    info = next(info for index, info in metadata.storage_data.items() if "_extra_state" in index.fqn)
    info.relative_path, info.offset, info.length = "evil.distcp", 0, len(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_state_of_fp8(folder: Path, trap: Path) -> None:
    state = torch.frombuffer(bytearray(pickle.dumps(Evil(trap))), dtype=torch.uint8)
    evil_object(folder, trap, state)


EVILS = (evil_metadata, evil_inside_metadata, evil_common, evil_object, evil_state_of_fp8)


@pytest.mark.parametrize("spoil", EVILS)
def test_no_pickle_of_a_checkpoint_runs_anything(spoil, tmp_path):
    folder = write(tmp_path / "c", {"a": torch.ones(3)}, ("a._extra_state/shard_0_1",))
    core_files.load_metadata_safely(folder)
    spoil(folder, tmp_path / "trap")
    with pytest.raises(UserError, match=r"c/.*: the pickle names posix.mkdir, which no checkpoint needs"):
        core_files.load_metadata_safely(folder)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'x'\ntR.",
        b"cbuiltins\neval\n.",
        b"c__builtin__\ngetattr\n(c__builtin__\nset\nS'union'\ntR.",
        b"cbuiltins\ngetattr\n(csignal\nSignals\nS'__init__'\ntR.",
        b"cbuiltins\ngetattr\n(csignal\nSignals\n(S'SIGTERM'\ntRS'name'\ntR.",
        b"ctorch\nSize.__class__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x0cstorage.load\x93.",
        b"ctorch\nload\n.",
        b"carchive\nx\n.",
        b"\x80\x02\x82\x01.",
        b"P1\n.",
        b"garbage",
        b"",
    ],
)
def test_the_unpickler_refuses(data):
    with pytest.raises(UserError, match=r"^x: "):
        safe_pickle.load(data, "x")


def test_an_enumeration_passes_as_python_3_11_2_pickles_it():
    name = "torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING"
    member = b"\x8c\x17TORCH_CONTIGUOUS_FORMAT"
    found = safe_pickle.load(f"cbuiltins\ngetattr\n(c{name}\n".encode() + member + b"tR.", "x")
    assert found.args == ("TORCH_CONTIGUOUS_FORMAT",)


def test_what_checkpoints_hold_passes(tmp_path):
    import argparse

    import numpy as np

    state = [
        {
            "np_rng_state": np.random.get_state(),
            "random_rng_state": random.getstate(),
            "torch_rng_state": torch.get_rng_state(),
            "size": torch.Size([2]),
            "dtype": torch.bfloat16,
            "args": argparse.Namespace(path=tmp_path, sizes={1, 2}),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        }
    ]
    file = saved(state)
    found = torch_save.Archive(file, 0, len(file.getvalue()), "x").value()
    assert found[0]["random_rng_state"] == random.getstate()
    assert found[0]["dtype"] == "bfloat16" and found[0]["size"] == (2,)


def test_a_path_means_a_checkpoint(tmp_path):
    for step in ("release", 100, 123456789):
        write(core_files.iteration_folder(tmp_path / "run", step), {"a": torch.ones(1)})
    assert sorted(os.listdir(tmp_path / "run")) == ["iter_0000100", "iter_123456789", "release"]
    with pytest.raises(UserError, match=r"it holds iter_0000100, iter_123456789, release: name one of them"):
        core_files.resolve(tmp_path / "run")
    for step in ("release", 100, 123456789):
        core_files.write_tracker(tmp_path / "run", step)
        assert core_files.read_tracker(tmp_path / "run") == step
        assert core_files.resolve(tmp_path / "run") == core_files.iteration_folder(tmp_path / "run", step)
        assert core_files.resolve(tmp_path / "run" / "iter_0000100") == tmp_path / "run" / "iter_0000100"
    assert (tmp_path / "run" / core_files.TRACKER).read_text() == "123456789"
    (tmp_path / "run" / core_files.TRACKER).write_text(" 100\n")
    assert core_files.read_tracker(tmp_path / "run") == 100


def test_other_paths_are_told_apart(tmp_path):
    assert core_files.read_tracker(tmp_path) is None
    with pytest.raises(UserError, match=r"nowhere: not a core checkpoint: .* does not exist"):
        core_files.resolve(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="it is a Hugging Face folder: convert it first with mp-convert"):
        core_files.resolve(tmp_path)
    core_files.write_tracker(tmp_path, 5)
    with pytest.raises(UserError, match=r"names iter_0000005, but .* does not exist; bring the folder back"):
        core_files.resolve(tmp_path)
    for step in (3, 4):
        core_files.iteration_folder(tmp_path, step).mkdir()
        (core_files.iteration_folder(tmp_path, step) / core_files.METADATA).touch()
    with pytest.raises(UserError, match="to use iter_0000004, write 4 into latest_checkpointed_iteration"):
        core_files.resolve(tmp_path)
    for text in ("", "latest", "1.5", "٣", "-3"):
        (tmp_path / core_files.TRACKER).write_text(text)
        with pytest.raises(UserError, match="expected 'release' or the number"):
            core_files.read_tracker(tmp_path)


def test_files_outside_the_folder_are_not_read(tmp_path):
    folder = write(tmp_path / "c", {"a": torch.ones(3)})
    (tmp_path / "c" / "__0_0.distcp").rename(tmp_path / "outside.distcp")
    metadata = dcp.FileSystemReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../outside.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"a is said to be in \.\./outside\.distcp; expected a file of this folder"):
        core_files.Checkpoint(folder)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder = write(tmp_path / "c", {"a": torch.ones(3)})
    (folder / "__0_0.distcp").rename(tmp_path / "outside.distcp")
    (folder / "__0_0.distcp").symlink_to("../outside.distcp")
    with (
        core_files.Checkpoint(folder) as checkpoint,
        pytest.raises(UserError, match=r"a link to \.\./outside\.distcp, outside the folder"),
    ):
        tensor = checkpoint.tensors["a"]
        checkpoint.locate(tensor, tensor.chunks[0])


def test_compressed_chunks_are_refused(tmp_path):
    folder = write(tmp_path / "c", {"a": torch.ones(3)})
    metadata = dcp.FileSystemReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).transform_descriptors = ("zstd",)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"a is stored compressed \(\('zstd',\)\)"):
        core_files.Checkpoint(folder)
