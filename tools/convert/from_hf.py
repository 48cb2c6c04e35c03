"""A Hugging Face folder as a source of core weights."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from megapatch.models import family, held, hf_files
from megapatch.models.cli import UserError
from megapatch.models.cuts import Region
from megapatch.models.hf_files import Tensor
from megapatch.models.rules import Placed
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.matrix import Matrix, Rectangle, stack
from megapatch.tools.convert.plan import Scale
from megapatch.tools.convert.source import FP8, check_dtype, model_of, named

_SCALE = "_scale_inv"  # of a quantised weight, in the same files
_QUANTISED = "quantization_config"


class HfSource:
    """The weights of a folder, all of them accounted for (UserError)."""

    def __init__(self, folder: Path) -> None:
        config = hf_files.config(folder)
        self.notes: list[str] = []
        self.block = _block_sizes(config)
        stored = hf_files.tensors(folder)
        model = model_of(folder, {key: value for key, value in config.items() if key != _QUANTISED}, stored)
        self.model = replace(model, index=None if self.block else model.index)
        self.notes += held.lacking(model.written, model.config)
        wanted = {name for placed in self.model.layout.placed for name in placed.hf}
        names = held.full_names(config, stored, wanted)
        self.tensors = {name: stored[there] for there, name in names.items()}
        self.notes += [f"{n}: left out; it is computed from config.json" for n in sorted(stored.keys() - names.keys())]
        self.scales = {name: self.tensors.pop(name + _SCALE) for name in wanted if name + _SCALE in self.tensors}
        self._account(wanted)

    def weight(self, placed: Placed) -> Matrix:
        """A core weight, made of blocks of the folder's tensors."""
        parts = []
        for name, shape in zip(placed.hf, self.model.layout.parts(placed), strict=True):
            tensor = self.tensors[name]
            _check(tensor, shape)
            parts.append(self._matrix(tensor).transposed() if placed.rule.transposed else self._matrix(tensor))
        (_, *rest), blocks = self.model.layout.packed(placed)
        taken = [parts[b.part].take([Region(b.start, 0, b.rows, prod(rest))]) for b in blocks]
        return stack(placed.hf[0], taken)

    def _matrix(self, tensor: Tensor) -> Matrix:
        rows, columns = tensor.shape[0], prod(tensor.shape[1:])
        pitch, scale = columns * ITEM_BYTES[tensor.dtype], None
        if tensor.dtype == FP8:
            scale = self._scale(tensor)
        else:
            check_dtype(tensor.name, tensor.dtype)
        whole = Rectangle(0, 0, rows, columns, tensor.dtype, tensor.file, tensor.offset, pitch, scale=scale)
        return Matrix(tensor.name, rows, columns, (whole,))

    def _scale(self, tensor: Tensor) -> Scale:
        found = self.scales.get(tensor.name)
        if found is None or self.block is None:
            lacks = f"no {tensor.name}{_SCALE}" if found is None else f"no {_QUANTISED} in config.json"
            raise UserError(f"{tensor.name}: {tensor.dtype}, but {lacks}; it says what the values stand for")
        rows, columns = self.block
        grid = (-(-tensor.shape[0] // rows), -(-prod(tensor.shape[1:]) // columns))
        if (found.shape, found.dtype) != (grid, "float32"):
            raise UserError(
                f"{found.name}: {found.dtype} {list(found.shape)} in {found.file.name}; expected float32 {list(grid)}: "
                f"one for each block of {rows} x {columns}"
            )
        return Scale(found.file, found.offset, found.dtype, grid[1], 0, 0, rows, columns)

    def _account(self, wanted: set[str]) -> None:
        """Refuse a missing tensor, and one that has no place in the model."""
        found, layout = self.tensors, self.model.layout
        if missing := wanted - found.keys():
            raise UserError(f"{named(missing)}: missing in the source; config.json ({layout.model_type}) asks for it")
        for name, scale in self.scales.items():
            if found[name].dtype != FP8:
                raise UserError(f"{scale.name}: scales of {name}, which is {found[name].dtype}; expected {FP8}")
        twins = held.copies(self.model.config)
        for name in sorted(found.keys() - wanted):
            twin = twins.get(name)
            if twin and same_bytes(found[name], found[twin]):
                self.notes.append(f"{name}: left out; it is equal to {twin}, and config.json ties them")
            elif twin:
                untie = (
                    "; set tie_word_embeddings to false to keep it" if family.tied_embeddings(self.model.config) else ""
                )
                raise UserError(f"{name}: differs from {twin}, but config.json ties them{untie}")
        if unknown := found.keys() - wanted - twins.keys():
            raise UserError(
                f"{named(unknown)}: has no place in a {layout.model_type} model; is this the right config.json?"
            )


def _block_sizes(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks of an FP8 model; None: not quantised. Other kinds are a UserError."""
    said = config.get(_QUANTISED)
    if said is None:
        return None
    block = said.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if said.get("quant_method") != "fp8" or not sizes or said.get("fmt", "e4m3") != "e4m3":
        raise UserError(
            f"config.json: {_QUANTISED} {said.get('quant_method')!r} with weight_block_size {block}; "
            "supported: fp8 (e4m3) in blocks, as DeepSeek-V3 has it; get the model in bf16"
        )
    return block[0], block[1]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """True when two tensors are equal in dtype, shape and every byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        for start in range(0, a.size, 1 << 20):
            count = min(1 << 20, a.size - start)
            if left.read(count) != right.read(count):
                return False
    return True


def _check(part: Tensor, shape: tuple[int, ...]) -> None:
    if part.shape != shape:
        raise UserError(
            f"{part.name}: shape {list(part.shape)} in {part.file.name}, {list(shape)} in config.json; "
            "is this the right config.json?"
        )
