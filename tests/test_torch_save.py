"""torch.save files: written around data that comes later, read for where the data lies, damage told."""

import io
import zipfile
from math import prod

import pytest
import torch

from megapatch.models import torch_save, torch_write
from megapatch.models.cli import UserError

FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (1, 1, 4, 5), (0, 3)])
def test_a_blob_filled_with_data_is_what_torch_saved(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    blob = torch_write.tensor_blob(FLOATS[dtype], shape)
    made = bytearray(blob.size)
    for at, data in (*blob.parts, (blob.data_offset, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())):
        made[at : at + len(data)] = data
    found = torch.load(io.BytesIO(made), weights_only=True)
    assert found.dtype == dtype and found.shape == shape and torch.equal(found, tensor)
    assert zipfile.ZipFile(io.BytesIO(made)).read("archive/byteorder") == b"little"
    assert blob.data_offset % 64 == 0


def test_blobs_of_more_than_4_gib_load(tmp_path):
    shape = (1100, 1000, 1000)
    blob = torch_write.tensor_blob("float32", shape)
    with (tmp_path / "big").open("wb") as file:
        for at, data in blob.parts:
            file.seek(at)
            file.write(data)
        file.seek(blob.data_offset + 4 * (1100 * 10**6 - 1))
        file.write(torch.tensor([7.0]).numpy().tobytes())
        assert file.seek(0, 2) == blob.size
    found = torch.load(tmp_path / "big", mmap=True, weights_only=True)
    assert found.shape == shape and found[-1, -1, -1] == 7 and found[0, 0, 0] == 0
    with (tmp_path / "big").open("rb") as file:
        region = torch_save.Archive(file, 0, blob.size, "big").tensor()
    assert region == ("float32", shape, blob.data_offset)


def test_several_tensors_beyond_4_gib_load(tmp_path):
    tensors = torch_write.Tensors()
    value = {
        name: tensors.add("bfloat16", shape) for name, shape in (("a", (3,)), ("b", (1100, 1000, 2000)), ("c", (2,)))
    }
    blob = tensors.blob(value | {"n": 5})
    with (tmp_path / "big").open("wb") as file:
        for at, data in (
            *blob.parts,
            *((hole, torch.ones(1).bfloat16().view(torch.uint8).numpy()) for hole in blob.holes),
        ):
            file.seek(at)
            file.write(data)
    found = torch.load(tmp_path / "big", mmap=True)
    assert blob.holes[2] > 1 << 32 and found["n"] == 5
    assert (
        found["a"].tolist() == [1, 0, 0] and found["c"].tolist() == [1, 0] and found["b"][0, 0, :2].tolist() == [1, 0]
    )


def test_more_tensors_than_a_plain_zip_may_have_load():
    tensors, count = torch_write.Tensors(), 66_000
    blob = tensors.blob([tensors.add("float32", (1,)) for _ in range(count)])
    made = bytearray(blob.size)
    for at, data in blob.parts:
        made[at : at + len(data)] = data
    made[blob.holes[-1] : blob.holes[-1] + 4] = torch.tensor([7.0]).numpy().tobytes()
    found = torch.load(io.BytesIO(made))
    assert len(found) == count and found[-1] == 7 and found[-2] == 0


def saved(value: object, before: bytes = b"") -> io.BytesIO:
    file = io.BytesIO(before)
    file.seek(len(before))
    torch.save(value, file)
    return file


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4),
        torch.arange(24.0).reshape(4, 6)[1:3],
        torch.arange(6.0)[5:],
        torch.nn.Parameter(torch.ones(3, 2)),
        torch.tensor(5.0),
        torch.ones(1, 4)[:, :1].t(),
    ],
)
def test_the_place_of_what_torch_saved_is_found(tensor):
    file = saved(tensor, b"other data")
    region = torch_save.Archive(file, 10, len(file.getvalue()) - 10, "x").tensor()
    assert region.shape == tensor.shape and region.dtype == "float32"
    data = file.getvalue()[region.offset : region.offset + 4 * tensor.numel()]
    assert data == tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    "value, said",
    [
        (torch.ones(4, 6)[:, :3], "strides (6, 1); only contiguous tensors"),
        (torch.ones(4, 6).t(), "strides (1, 6); only contiguous tensors"),
        (torch.ones(2, dtype=torch.complex64), "names torch.ComplexFloatStorage"),
        ([torch.ones(2)], "holds no tensor"),
        ({"a": 1}, "holds no tensor"),
    ],
)
def test_what_cannot_be_copied_is_refused(value, said):
    file = saved(value)
    with pytest.raises(UserError, match=r"^x: ") as error:
        torch_save.Archive(file, 0, len(file.getvalue()), "x").tensor()
    assert said in str(error.value)


def test_big_endian_is_refused():
    file = saved(torch.ones(2))
    data = file.getvalue().replace(b"little", b"big   ")
    with pytest.raises(UserError, match="big-endian"):
        torch_save.Archive(io.BytesIO(data), 0, len(data), "x").tensor()


def test_damage_of_a_blob_is_told_or_names_bytes_inside_it():
    data = saved(torch.arange(100.0)).getvalue()
    told = 0
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        try:
            region = torch_save.Archive(io.BytesIO(damaged), 0, len(damaged), "x").tensor()
        except UserError:
            told += 1
            continue
        assert region.offset >= 0
        assert region.offset + prod(region.shape) * torch_save.ITEM_BYTES[region.dtype] <= len(data)
    assert told > 100


@pytest.mark.parametrize("length", [0, 1, 21, 22, 500, 1500])
def test_a_blob_cut_short_is_told(length):
    data = saved(torch.ones(1000)).getvalue()[:length]
    with pytest.raises(UserError, match=r"^x: "):
        torch_save.Archive(io.BytesIO(data), 0, len(data), "x").tensor()


def test_plain_values_are_written_as_torch_reads_them():
    value = {"a": [1, 2.5, None, True, "ü", (1, (2,)), {}], "b": {"c": -(1 << 40)}}
    data = torch_write.object_blob(value)
    assert torch.load(io.BytesIO(data), weights_only=True) == value
    assert torch_save.Archive(io.BytesIO(data), 0, len(data), "x").value() == value
