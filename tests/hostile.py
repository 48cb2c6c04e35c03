"""Tiny folders without torch, and pickles that would make a folder if anything in them ran."""

import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

from megapatch.models import family, hf_files, shapes
from megapatch.models.torch_save import ITEM_BYTES


def small_folder(folder: Path, name: str = "qwen3", **changes: object) -> Path:
    """A Hugging Face folder of a family's smallest model, with random bytes as weights."""
    hf = {"model_type": name, "rms_norm_eps": 1e-6, **family.known()[name].tiny, **changes}
    letters = shapes.sizes(hf)
    named = {
        n: s for p in family.placed_rules(hf) for n, s in zip(p.hf, shapes.part_shapes(p.rule, letters), strict=True)
    }
    write_safetensors(folder / hf_files.SINGLE, {n: ("bfloat16", s) for n, s in named.items()})
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_safetensors(path: Path, described: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A safetensors file of random bytes: name -> dtype and shape."""
    header, _, size = hf_files.header(hf_files.saved_order([(n, d, s) for n, (d, s) in described.items()]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + random.Random(0).randbytes(size - len(header)))
    return path


def saved(data_pkl: bytes, **records: bytes) -> bytes:
    """A torch.save file with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in {"data.pkl": data_pkl, "byteorder": b"little", "version": b"3\n", **records}.items():
            made.writestr(f"archive/{name}", data)
    return file.getvalue()


class Tensor:
    """Pickled as torch pickles a tensor: ``Tensor("0", shape)`` in record data/0."""

    def __init__(self, key: str, shape: tuple[int, ...], storage: str = "BFloat16Storage") -> None:
        self.key, self.shape, self.storage = key, shape, storage


class Named:
    """Pickled as a name, imported by nobody."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Made:
    """Pickled as the call of a name."""

    def __init__(self, name: Named, *args: object, state: object = None) -> None:
        self.name, self.args, self.state = name, args, state


class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes the classes above."""

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, Named):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Made):
            self.save(value.name)
            self.save(value.args)
            self.write(b"R")
            if value.state is not None:
                self.save(value.state)
                self.write(b"b")
        elif isinstance(value, Tensor):
            self.tensor(value)
        else:
            super().save(value, save_persistent_id)

    def tensor(self, value: Tensor) -> None:
        self.save(Named("torch._utils", "_rebuild_tensor_v2"))
        self.write(b"(")
        self.save(("storage", Named("torch", value.storage), value.key, "cpu", items(value.shape)))
        self.write(b"Q")
        strides = tuple(items(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        for part in (0, value.shape, strides, False, Made(Named("collections", "OrderedDict"))):
            self.save(part)
        self.write(b"tR")


def items(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor has."""
    count = 1
    for length in shape:
        count *= length
    return count


def pickled(value: object) -> bytes:
    """The pickle of plain values and the classes above."""
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def rank_file(path: Path, model: dict[str, tuple[int, ...]], **more: object) -> Path:
    """What Megatron-LM saves for a rank: a model of bfloat16 tensors of these shapes, and what else is given."""
    tensors = {name: Tensor(str(n), shape) for n, (name, shape) in enumerate(model.items())}
    data = {f"data/{n}": bytes(items(shape) * ITEM_BYTES["bfloat16"]) for n, shape in enumerate(model.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved(pickled({"model": tensors, "checkpoint_version": 3.0, "iteration": 7, **more}), **data))
    return path


class Evil:
    """Pickled as the call of a function with arguments."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
