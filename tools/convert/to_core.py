"""Plan: Hugging Face folder -> core checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megapatch.models import family, hf_files
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER
from megapatch.models.core_write import CoreWriter
from megapatch.models.rules import CORE, Placed
from megapatch.models.shapes import part_shapes, sizes
from megapatch.models.torch_save import ITEM_BYTES
from megapatch.tools.convert.plan import DTYPES, Copy, Literal, Part, Plan

_FLOATS = tuple(DTYPES.values())
_BUFFERS = ".rotary_emb.inv_freq"  # early Llama files hold it; it follows from config.json
_FILE_BYTES = 1 << 28


def plan(source: Path, dtype: str) -> Plan:
    """The copy list that makes the checkpoint folder; ``dtype``: keep, bf16, fp16 or fp32."""
    hf = hf_files.config(source)
    found = hf_files.tensors(source)
    family.rope(hf)  # refuses kinds of RoPE that no layer here computes
    placed = family.placed_rules(hf)
    made = Plan()
    _account(hf, placed, found, made)
    total = sum(t.size for t in found.values())
    writer = CoreWriter(max(1, min(8, total // _FILE_BYTES), total // (_FILE_BYTES << 4)))
    for rule in placed:
        made.entries += _tensor(rule, hf, found, writer, dtype)
    for key in extra_states(placed, family.stacked_layers(hf), hf):
        writer.object(key)
    made.entries += [Literal(*part) for part in writer.rest(_common(hf))]
    for name, path in hf_files.side_files(source).items():
        made.add_file(path, f"{HF_SUBFOLDER}/{name}")
    if (source / hf_files.INDEX).is_file():  # so that the way back gives the same files
        made.add_file(source / hf_files.INDEX, f"{HF_SUBFOLDER}/{hf_files.INDEX}")
    return made.finish()


def _account(hf: family.HfConfig, placed: Sequence[Placed], found: dict[str, hf_files.Tensor], made: Plan) -> None:
    """Refuse a missing tensor, and one that has no place in the model."""
    wanted = {name for rule in placed for name in rule.hf}
    for name in wanted - found.keys():
        raise UserError(f"{name}: missing in the source; config.json ({hf['model_type']}) asks for it")
    for name in sorted(found.keys() - wanted):
        twin = tied(hf).get(name)
        if name.endswith(_BUFFERS):
            made.notes.append(f"{name}: left out; it is computed from config.json")
        elif twin in found and same_bytes(found[name], found[twin]):
            made.notes.append(f"{name}: left out; it is equal to {twin}, and config.json ties them")
        elif twin:
            raise UserError(
                f"{name}: differs from {twin}, but config.json ties them; set tie_word_embeddings to false to keep it"
            )
        else:
            raise UserError(f"{name}: has no place in a {hf['model_type']} model; is this the right config.json?")


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
    rule: Placed, hf: family.HfConfig, found: dict[str, hf_files.Tensor], writer: CoreWriter, dtype: str
) -> Iterator[Copy]:
    core, letters = family.find(hf).transformer_config(hf), sizes(hf)
    stacked = family.stacked_layers(hf)
    parts = [found[name] for name in rule.hf]
    for part, shape in zip(parts, part_shapes(rule.rule, letters), strict=True):
        _check(part, shape, parts[0].dtype)
    target = DTYPES.get(dtype, parts[0].dtype)
    rows, rest = [part.shape[0] for part in parts], parts[0].shape[1:]
    shape = (sum(rows), *rest)
    axes = leading_axes(rule, stacked, core)
    lead, at = tuple(size for _, size in axes), tuple(place for place, _ in axes)
    file, offset = writer.tensor(
        rule.key(stacked), target, (*lead, *shape), (*at, *[0] * len(shape)), (*[1] * len(lead), *shape)
    )
    width = rest[0] if rest else 1
    for block in rule.rule.blocks(rows, core["num_query_groups"]):
        part = parts[block.part]
        start = part.offset + block.start * width * ITEM_BYTES[part.dtype]
        origin = Part(part.file, start, block.rows * width)
        copy = Copy(part.name, file, offset, (origin,), read=part.dtype, write=target)
        yield copy
        offset += copy.size


def _check(part: hf_files.Tensor, shape: tuple[int, ...], dtype: str) -> None:
    if part.shape != shape:
        raise UserError(
            f"{part.name}: shape {list(part.shape)} in {part.file.name}, {list(shape)} in config.json; "
            "is this the right config.json?"
        )
    if part.dtype not in _FLOATS:
        raise UserError(f"{part.name}: dtype {part.dtype} is not supported; supported: {', '.join(_FLOATS)}")
    if part.dtype != dtype:
        raise UserError(f"{part.name}: {part.dtype}, but it is fused with a tensor of {dtype}; choose one with --dtype")


def leading_axes(rule: Placed, stacked: bool, core: dict[str, Any]) -> list[tuple[int, int]]:
    """(index, size) of the axes before those of the weight: layers where they are stacked, experts."""
    axes = [(rule.layer, core["num_layers"])] if stacked and rule.layer is not None else []
    return axes + ([(rule.expert, core["num_moe_experts"])] if rule.expert is not None else [])


def extra_states(placed: Sequence[Placed], stacked: bool, hf: family.HfConfig) -> Iterator[str]:
    """Keys of the empty objects that any layer specification may ask for; core tolerates more than it asks for."""
    core, seen = family.find(hf).transformer_config(hf), set()
    for rule in placed:
        module, _, kind = rule.key(stacked).rpartition(".")
        modules = [module] if (kind == "weight" and "linear_" in module) or "layernorm" in module else []
        if rule.rule.core == CORE + "self_attention.linear_proj.weight":
            modules.append(module.replace("linear_proj", "core_attention"))
        axes = leading_axes(rule, stacked, core) or [(0, 1)]
        place, size = (".".join(str(axis[n]) for axis in axes) for n in (0, 1))
        keys = [f"{name}._extra_state/shard_{place}_{size}" for name in modules]
        yield from (key for key in keys if key not in seen)
        seen.update(keys)


def _common(hf: family.HfConfig) -> dict[str, Any]:
    layers = {"singleton_local_shards": False, "non_homogeneous_layers": not family.stacked_layers(hf)}
    return {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": layers}
