"""Plan: a core checkpoint in torch_dist format, whole or in the chunks of a parallel layout."""

from collections.abc import Iterator

from megapatch.models import hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER
from megapatch.models.core_write import CoreWriter
from megapatch.models.cuts import Region
from megapatch.models.rules import Placed
from megapatch.models.shapes import Layout
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.matrix import Matrix
from megapatch.tools.convert.plan import Copy, Literal, Plan
from megapatch.tools.convert.ranks import Ranks
from megapatch.tools.convert.source import Source, add_side_files, choose_dtype

_FILE_BYTES = 1 << 28


def plan(source: Source, dtype: str, ranks: Ranks | None) -> Plan:
    """The copy list that makes the checkpoint folder; chunks as ``ranks`` load them, None: each weight whole."""
    made, layout = Plan(notes=list(source.notes)), source.model.layout
    weights = [(placed, source.weight(placed)) for placed in layout.placed]
    total = sum(m.rows * m.columns * ITEM_BYTES[m.dtypes[0]] for _, m in weights)
    stages = ranks.stages.pp if ranks else 1
    share = total // stages
    writer = CoreWriter(max(1, min(8, share // _FILE_BYTES), share // (_FILE_BYTES << 4)), stages)
    for placed, matrix in weights:
        made.entries += _tensor(placed, layout, matrix, writer, dtype, ranks)
    for key in extra_states(layout):
        writer.object(key)
    content = {"singleton_local_shards": False, "non_homogeneous_layers": not layout.stacked}
    common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
    made.entries += [Literal(*part) for part in writer.rest(common)]
    add_side_files(source.model, made, f"{HF_SUBFOLDER}/")
    if source.model.index:  # so that the way back gives the same files
        made.add_file(source.model.index, f"{HF_SUBFOLDER}/{hf_files.INDEX}")
    return made.finish()


def _tensor(
    placed: Placed, layout: Layout, matrix: Matrix, writer: CoreWriter, dtype: str, ranks: Ranks | None
) -> Iterator[Copy]:
    key, target = placed.key(layout.stacked), choose_dtype(dtype, matrix, matrix.origin, placed.rule.core)
    if (other := writer.dtype(key) or target) != target:
        raise UserError(f"{matrix.origin}: {target}, but core stores it with weights of {other}; choose --dtype")
    shape, axes = layout.packed(placed)[0], layout.axes(placed, layout.stacked)
    lead, whole = [place for place, _ in axes], [size for _, size in axes]
    stage = next(ranks.stages.of(placed)).stage if ranks else 0
    for region in ranks.chunks(placed, matrix.rows, matrix.columns) if ranks else [_whole(matrix)]:
        across = [(region.column, region.columns)] if len(shape) == 2 else [(0, size) for size in shape[1:]]
        places = [*((place, 1) for place in lead), (region.row, region.rows), *across]
        offsets, sizes = zip(*places, strict=True)
        file, offset = writer.tensor(key, target, [*whole, *shape], offsets, sizes, stage)
        yield from matrix.take([region]).copies(key, file, offset, target)


def _whole(matrix: Matrix) -> Region:
    return Region(0, 0, matrix.rows, matrix.columns)


def extra_states(layout: Layout) -> Iterator[str]:
    """Keys of the empty objects that any layer specification may ask for; core tolerates more than it asks for."""
    seen = set()
    for placed in layout.placed:
        module, _, kind = placed.key(layout.stacked).rpartition(".")
        linear = kind == "weight" and ("linear_" in module or module.endswith("eh_proj"))
        modules = [module] if linear or module.endswith("norm") else []
        if placed.rule.core.endswith("self_attention.linear_proj.weight"):
            modules.append(module.replace("linear_proj", "core_attention"))
        axes = layout.axes(placed, layout.stacked) or [(0, 1)]
        place, size = (".".join(str(axis[n]) for axis in axes) for n in (0, 1))
        keys = [f"{name}._extra_state/shard_{place}_{size}" for name in modules]
        yield from (key for key in keys if key not in seen)
        seen.update(keys)
