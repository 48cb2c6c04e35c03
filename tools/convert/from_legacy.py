"""Megatron-LM's checkpoints of one file for each rank, as a source of core weights.

The layout follows from the names of the folders, the names of the weights and their shapes; options need not be there.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

from megapatch.models import core_names, legacy_files
from megapatch.models.cli import UserError
from megapatch.models.core_names import RankName
from megapatch.models.cuts import VOCABULARY, Region, cut_of, regions
from megapatch.models.family import find
from megapatch.models.held import lacking
from megapatch.models.legacy_files import Rank, RankFile
from megapatch.models.rules import Placed
from megapatch.models.stages import Place, Stages
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.models.torch_save import Region as Stored
from megapatch.tools.convert.from_core import described_by
from megapatch.tools.convert.matrix import Matrix, Rectangle
from megapatch.tools.convert.source import check_dtype, model_of

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_FINAL_NORM = "decoder.final_layernorm.weight"
_ABOUT = {"args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far"}


class LegacySource:
    """The weights of a checkpoint, with the config.json in it or in the Hugging Face folder ``config``."""

    def __init__(self, folder: Path, config: Path | None) -> None:
        self.folder = folder
        self.files = _by_rank(folder)
        names = {name for file in self.files.values() for chunk in file.chunks for name in chunk}
        self.model = model_of(*described_by(folder, config), names)
        self.tp, self.pp, self.ep = (max(rank[axis] for rank in self.files) + 1 for axis in range(3))
        fields = find(self.model.config).transformer_config(self.model.config)
        self._gated, self._experts = fields["gated_linear_unit"], (fields.get("num_moe_experts") or 0) // self.ep
        self._stages = self._stages_of()
        self._found = {placed: list(self._shards(placed)) for placed in self.model.layout.placed}
        self.notes = lacking(self.model.written, self.model.config)
        self._account()

    def weight(self, placed: Placed) -> Matrix:
        """A core weight, made of what the ranks hold of it."""
        (rows, *rest), _ = self.model.layout.packed(placed)
        found: dict[tuple[int, ...], Rectangle] = {}  # one of several ranks that hold the same
        for place, name, rank in self._found[placed]:
            for part in self._rectangles(placed, place, name, rank):
                found.setdefault(part[:4], part)
        origin = f"{self.folder}: the ranks' parts of {core_names.full(placed)}"
        stored = max(part.row + part.rows for part in found.values())  # with what pads the vocabulary
        return Matrix(origin, stored, prod(rest), tuple(found.values())).take([Region(0, 0, rows, prod(rest))])

    def _stages_of(self) -> Stages:
        """How many layers each chunk of each stage has."""
        counts: dict[tuple[int, int], int] = {}
        for rank, file in self.files.items():
            for chunk, names in enumerate(file.chunks):
                counts[chunk, rank.stage] = len({found[1] for name in names if (found := _LAYER.match(name))})
        chunks = max(chunk for chunk, _ in counts) + 1
        missing = [(c, s) for c in range(chunks) for s in range(self.pp) if (c, s) not in counts]
        if missing:
            raise UserError(f"{self.folder}: no file of stage {missing[0][1]}; the checkpoint is incomplete")
        layers = [[counts[chunk, stage] for stage in range(self.pp)] for chunk in range(chunks)]
        wanted = find(self.model.config).transformer_config(self.model.config)["num_layers"]
        if (total := sum(map(sum, layers))) != wanted:
            raise UserError(
                f"{self.folder}: {total} layers in the files, {wanted} in config.json; are files of a stage "
                "missing, or is it the config.json of another model?"
            )
        return Stages(layers)

    def _shards(self, placed: Placed) -> Iterator[tuple[Place, RankName, Rank]]:
        """Where the ranks hold a weight, and by which name."""
        (place,) = self._stages.of(placed)
        owner = None if placed.expert is None else placed.expert // max(1, self._experts)
        expert = None if placed.expert is None else placed.expert % max(1, self._experts)
        canonical = place.core.format(l=place.layer, e=expert)
        names, found = list(core_names.any_of_rank(canonical)), False
        for rank, file in self.files.items():
            if rank.stage == place.stage and owner in (None, rank.expert):
                held = file.chunks[place.chunk]
                name = next((name for name in names if name.name in held), None)
                if name is None:
                    raise UserError(
                        f"{file.path}: no {names[0].name}; config.json asks for it: is it the right config.json?"
                    )
                found = True
                yield place, name, rank
        if not found:
            raise UserError(f"{self.folder}: no file of a rank with {canonical}; the checkpoint is incomplete")

    def _rectangles(self, placed: Placed, place: Place, name: RankName, rank: Rank) -> Iterator[Rectangle]:
        """What a rank holds of a weight, at its place there."""
        file = self.files[rank]
        stored = file.chunks[place.chunk][name.name]
        check_dtype(name.name, stored.dtype)
        (rows, *rest), _ = self.model.layout.packed(placed)
        columns, count = prod(rest), prod(stored.shape) // (1 if name.expert is None else self._experts)
        held = self._held(place.core, (rows, columns), count, rank)
        local = sum(region.rows for region in held), held[0].columns
        if local[0] * local[1] != count or (name.expert is None and stored.shape[0] != local[0]):
            raise UserError(
                f"{file.path}: {name.name}: shape {list(stored.shape)} in the file, {list(local)} by config.json "
                f"at tensor parallelism {self.tp}; is this the right config.json?"
            )
        whole, at = _rectangle(local, stored, file.path, name), 0
        for region in held:
            part = whole.within(Region(at, 0, region.rows, region.columns))
            assert part is not None, f"{name.name}: an empty part"
            yield part._replace(row=region.row, column=region.column)
            at += region.rows

    def _held(self, core: str, shape: tuple[int, int], count: int, rank: Rank) -> list[Region]:
        """The regions of a weight of ``shape`` that make the ``count`` items that a rank holds."""
        rows, columns = shape
        size = self.tp if "{e}" not in core else max(1, rows * columns // max(1, count))
        padded = core in core_names.PADDED
        if count == rows * columns and not padded:
            return [Region(0, 0, rows, columns)]
        cut = cut_of(core, self._gated, size)
        rows = count // columns * size if cut == VOCABULARY else rows
        return regions(cut, rows, columns, rank.tensor % size, size)

    def _account(self) -> None:
        """Refuse weights that have no place in the model; name the training state that is left out."""
        used = {(rank, place.chunk, name.name) for found in self._found.values() for place, name, rank in found}
        copies = {"embedding.word_embeddings.weight", "output_layer.weight"}  # that the last stage holds
        for rank, file in self.files.items():
            for n, chunk in enumerate(file.chunks):
                for name in chunk:
                    copied = name in copies and rank.stage == self.pp - 1 > 0
                    if (rank, n, name) not in used and not copied:
                        kind = self.model.layout.model_type
                        raise UserError(f"{file.path}: {name}: has no place in a {kind} model")
        state = {key for file in self.files.values() for key in file.others} - _ABOUT
        if state:
            self.notes.append(f"left out: training state ({', '.join(sorted(state))})")


def _rectangle(shape: tuple[int, int], stored: Stored, path: Path, name: RankName) -> Rectangle:
    """A rank's part of a weight, where it is stored."""
    (rows, columns), item = shape, ITEM_BYTES[stored.dtype]
    turned = name.expert is not None
    offset = stored.offset + (name.expert or 0) * rows * columns * item
    return Rectangle(0, 0, rows, columns, stored.dtype, path, offset, (rows if turned else columns) * item, turned)


def _by_rank(folder: Path) -> dict[Rank, RankFile]:
    """The files by the places of their ranks: of two numbers, the second is a stage or a place among experts."""
    files = {numbers: legacy_files.read(path) for numbers, path in legacy_files.ranks(folder).items()}
    first = files[min(files)]
    staged = _FINAL_NORM not in first.chunks[-1]
    found = {}
    for numbers, file in files.items():
        tensor, *rest = numbers
        stage, expert = rest if len(rest) == 2 else ([*rest, 0] if staged else [0, *rest, 0][:2])
        found[Rank(tensor, stage, expert)] = file
    return found
