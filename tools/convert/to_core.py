"""Plan: Hugging Face folder -> core checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megapatch.models import family, hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER
from megapatch.models.core_write import CoreWriter
from megapatch.models.rules import CORE, Placed
from megapatch.models.shapes import Layout
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.plan import DTYPES, Copy, Literal, Part, Plan

_FLOATS = tuple(DTYPES.values())
_BUFFERS = ".rotary_emb.inv_freq"  # early Llama files hold it; it follows from config.json
_FILE_BYTES = 1 << 28


def plan(source: Path, dtype: str) -> Plan:
    """The copy list that makes the checkpoint folder; ``dtype``: keep, bf16, fp16 or fp32."""
    hf = hf_files.config(source)
    layout = Layout(hf)
    found = hf_files.tensors(source)
    made = Plan()
    _account(hf, layout, found, made)
    total = sum(t.size for t in found.values())
    writer = CoreWriter(max(1, min(8, total // _FILE_BYTES), total // (_FILE_BYTES << 4)))
    for placed in layout.placed:
        made.entries += _tensor(placed, layout, [found[name] for name in placed.hf], writer, dtype)
    for key in extra_states(layout):
        writer.object(key)
    content = {"singleton_local_shards": False, "non_homogeneous_layers": not layout.stacked}
    common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
    made.entries += [Literal(*part) for part in writer.rest(common)]
    for name, path in hf_files.side_files(source).items():
        made.add_file(path, f"{HF_SUBFOLDER}/{name}")
    if (source / hf_files.INDEX).is_file():  # so that the way back gives the same files
        made.add_file(source / hf_files.INDEX, f"{HF_SUBFOLDER}/{hf_files.INDEX}")
    return made.finish()


def _account(hf: family.HfConfig, layout: Layout, found: dict[str, hf_files.Tensor], made: Plan) -> None:
    """Refuse a missing tensor, and one that has no place in the model."""
    wanted = {name for placed in layout.placed for name in placed.hf}
    for name in sorted(wanted - found.keys()):
        raise UserError(f"{name}: missing in the source; config.json ({layout.model_type}) asks for it")
    twins = tied(hf)
    for name in sorted(found.keys() - wanted):
        twin = twins.get(name)
        if name.endswith(_BUFFERS):
            made.notes.append(f"{name}: left out; it is computed from config.json")
        elif twin and same_bytes(found[name], found[twin]):
            made.notes.append(f"{name}: left out; it is equal to {twin}, and config.json ties them")
        elif twin:
            raise UserError(
                f"{name}: differs from {twin}, but config.json ties them; set tie_word_embeddings to false to keep it"
            )
        else:
            raise UserError(f"{name}: has no place in a {layout.model_type} model; is this the right config.json?")


def tied(hf: family.HfConfig) -> dict[str, str]:
    """Hugging Face weights that config.json ties, and what to: {} or {output layer: embedding}."""
    rules = {rule.core: rule.hf[0] for rule in family.find(hf).rules(hf)}
    if not family.tied_embeddings(hf):
        return {}
    return {rules["output_layer.weight"]: rules["embedding.word_embeddings.weight"]}


def same_bytes(a: hf_files.Tensor, b: hf_files.Tensor) -> bool:
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


def _tensor(
    placed: Placed, layout: Layout, parts: Sequence[hf_files.Tensor], writer: CoreWriter, dtype: str
) -> Iterator[Copy]:
    for part, shape in zip(parts, layout.parts(placed), strict=True):
        _check(part, shape)
    key, target = placed.key(layout.stacked), DTYPES.get(dtype, parts[0].dtype)
    for other in {target, writer.dtype(key) or target, *(part.dtype for part in parts)} - {target}:
        if dtype == "keep":
            raise UserError(f"{parts[0].name}: {target}, but core stores it with weights of {other}; choose --dtype")
    rows, rest = [part.shape[0] for part in parts], parts[0].shape[1:]
    shape, axes = (sum(rows), *rest), layout.axes(placed, layout.stacked)
    lead, at = tuple(size for _, size in axes), tuple(place for place, _ in axes)
    file, offset = writer.tensor(key, target, (*lead, *shape), (*at, *[0] * len(shape)), (*[1] * len(lead), *shape))
    width = rest[0] if rest else 1
    for block in placed.rule.blocks(rows, layout.sizes):
        part = parts[block.part]
        start = part.offset + block.start * width * ITEM_BYTES[part.dtype]
        origin = Part(part.file, start, block.rows * width)
        copy = Copy(part.name, file, offset, (origin,), read=part.dtype, write=target)
        yield copy
        offset += copy.size


def _check(part: hf_files.Tensor, shape: tuple[int, ...]) -> None:
    if part.shape != shape:
        raise UserError(
            f"{part.name}: shape {list(part.shape)} in {part.file.name}, {list(shape)} in config.json; "
            "is this the right config.json?"
        )
    if part.dtype not in _FLOATS:
        raise UserError(f"{part.name}: dtype {part.dtype} is not supported; supported: {', '.join(_FLOATS)}")


def extra_states(layout: Layout) -> Iterator[str]:
    """Keys of the empty objects that any layer specification may ask for; core tolerates more than it asks for."""
    seen = set()
    for placed in layout.placed:
        module, _, kind = placed.key(layout.stacked).rpartition(".")
        modules = [module] if (kind == "weight" and "linear_" in module) or "layernorm" in module else []
        if placed.rule.core == CORE + "self_attention.linear_proj.weight":
            modules.append(module.replace("linear_proj", "core_attention"))
        axes = layout.axes(placed, layout.stacked) or [(0, 1)]
        place, size = (".".join(str(axis[n]) for axis in axes) for n in (0, 1))
        keys = [f"{name}._extra_state/shard_{place}_{size}" for name in modules]
        yield from (key for key in keys if key not in seen)
        seen.update(keys)
