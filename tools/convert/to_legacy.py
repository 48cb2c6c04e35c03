"""Plan: a checkpoint of one file for each rank, which Megatron-LM loads with --ckpt-format torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import NamedTuple

from megapatch.models import core_names, legacy_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER
from megapatch.models.core_names import RankName
from megapatch.models.legacy_files import Rank
from megapatch.models.rules import Placed
from megapatch.models.safe_pickle import Call
from megapatch.models.stages import OUTPUT, Place
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.models.torch_write import Tensors
from megapatch.tools.convert.legacy_args import arguments
from megapatch.tools.convert.matrix import Matrix
from megapatch.tools.convert.plan import Entry, Literal, Plan
from megapatch.tools.convert.ranks import Member, Ranks
from megapatch.tools.convert.source import Source, add_side_files, choose_dtype

_ZEROS = bytes(1 << 20)
_FINAL_NORM = "decoder.final_layernorm.weight"


class Names(NamedTuple):
    """How the model that loads is built: ``spec`` te or local, ``experts`` grouped or sequential."""

    spec: str
    experts: str


@dataclass
class _Tensor:
    """A tensor of a rank's state_dict: matrices, one after the other, then bytes of padding (zeros)."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[Matrix] = field(default_factory=list)

    def entries(self, name: str, file: str, offset: int) -> Iterator[Entry]:
        """Its bytes from ``offset`` of ``file``."""
        end = offset + prod(self.shape) * ITEM_BYTES[self.dtype]
        for part in self.parts:
            for copy in part.copies(name, file, offset, self.dtype):
                yield copy
                offset += copy.size
        for at in range(offset, end, len(_ZEROS)):
            yield Literal(file, at, _ZEROS[: end - at])


Held = list[tuple[Placed, Place]]  # what a chunk of a stage holds


def plan(source: Source, dtype: str, ranks: Ranks, names: Names) -> Plan:
    """The copy list that makes the checkpoint folder."""
    if ranks.tp % ranks.etp:
        raise UserError(f"--etp {ranks.etp}: must divide --tp {ranks.tp}, or ranks with different experts share a file")
    made, layout, stages = Plan(notes=list(source.notes)), source.model.layout, ranks.stages
    weights = {placed: _Weight(placed, source, dtype) for placed in layout.placed}
    args = arguments(source.model.config, ranks, names.spec, names.experts)
    held: dict[tuple[int, int], Held] = {at: [] for at in product(range(stages.pp), range(stages.vpp))}
    for placed in layout.placed:
        for place in stages.of(placed):
            held[place.stage, place.chunk].append((placed, place))
    for stage, member in product(range(stages.pp), ranks.members()):
        chunks = [_chunk(held[stage, n], weights, ranks, member, names) for n in range(stages.vpp)]
        file = legacy_files.file_name(Rank(member.tensor, stage, member.expert), stages.pp, ranks.ep)
        made.entries += _file(file, chunks, args, names.spec)
    add_side_files(source.model, made, f"{HF_SUBFOLDER}/")
    if source.model.index:  # so that the way back gives the same files
        made.add_file(source.model.index, f"{HF_SUBFOLDER}/{source.model.index.name}")
    return made.finish()


class _Weight:
    """A core weight, the type it gets, and its number of axes."""

    def __init__(self, placed: Placed, source: Source, dtype: str) -> None:
        self.matrix = source.weight(placed)
        self.dtype = choose_dtype(dtype, self.matrix, self.matrix.origin, placed.rule.core)
        self.axes = len(source.model.layout.packed(placed)[0])


def _chunk(
    held: Held, weights: Mapping[Placed, _Weight], ranks: Ranks, member: Member, names: Names
) -> dict[str, _Tensor]:
    """The state_dict of a chunk at a rank."""
    made: dict[str, _Tensor] = {}
    experts = ranks.experts(member)
    for placed, place in held:
        if placed.expert is None or placed.expert in experts:
            expert = None if placed.expert is None else placed.expert - experts.start
            canonical = place.core.format(l=place.layer, e=expert)
            name = core_names.of_rank(canonical, names.spec, names.experts)
            _add(made, name, weights[placed], ranks, member, place.core)
    return made


def _add(made: dict[str, _Tensor], name: RankName, weight: _Weight, ranks: Ranks, member: Member, core: str) -> None:
    matrix = weight.matrix
    regions = ranks.regions(core, matrix.rows, matrix.columns, member)
    rows, columns = sum(region.rows for region in regions), regions[0].columns
    inside = [r._replace(rows=min(r.rows, matrix.rows - r.row)) for r in regions if r.row < matrix.rows]
    part = matrix.take(inside) if inside else Matrix(matrix.origin, 0, columns, ())
    if name.expert is None:
        shape = (rows, columns) if weight.axes > 1 else (rows,)
        made[name.name] = _Tensor(weight.dtype, shape, [part])
        return
    whole = made.setdefault(name.name, _Tensor(weight.dtype, (0, rows) if name.axis == 0 else (columns, 0)))
    turned = part.transposed()  # GroupedMLP multiplies from the left
    grown = [turned.rows, turned.columns]
    grown[name.axis] += whole.shape[name.axis]
    whole.shape = tuple(grown)
    whole.parts.append(turned)


def _file(file: str, chunks: list[dict[str, _Tensor]], args: Call, spec: str) -> Iterator[Entry]:
    """A rank's file."""
    tensors, models = Tensors(), {}
    for n, chunk in enumerate(chunks):
        model = {name: tensors.add(tensor.dtype, tensor.shape) for name, tensor in chunk.items()}
        modules = [*chunk, OUTPUT] if _FINAL_NORM in chunk else [*chunk]
        states = dict.fromkeys(core_names.extra_states(modules, spec))
        models["model" if len(chunks) == 1 else f"model{n}"] = model | states
    blob = tensors.blob({"args": args, "checkpoint_version": 3.0, "iteration": 0, **models})
    yield from (Literal(file, at, data) for at, data in blob.parts)
    laid = [item for chunk in chunks for item in chunk.items()]
    for (name, tensor), hole in zip(laid, blob.holes, strict=True):
        yield from tensor.entries(name, file, hole)
