"""Checkpoints of adapters (LoRA) as sources: merged with the weights they belong to, or as a folder that peft loads."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megapatch.models import commit, core_files, hf_files, lora
from megapatch.models.cli import UserError
from megapatch.models.core_files import HF_SUBFOLDER, Checkpoint
from megapatch.models.cuts import Region
from megapatch.models.held import plain
from megapatch.models.lora import Lora, Target
from megapatch.models.rules import Placed
from megapatch.models.shapes import Layout
from megapatch.tools.convert.from_core import matrix_of
from megapatch.tools.convert.matrix import Matrix, Rectangle
from megapatch.tools.convert.plan import Delta, Literal, LowRank, Plan
from megapatch.tools.convert.source import Source, choose_dtype, kind_of
from megapatch.tools.convert.to_hf import Weight, file_of

_KINDS = (lora.A, lora.B)


def said_of(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a checkpoint of adapters says of them and of their base; None of another folder."""
    manifest = commit.read_manifest(folder)
    return manifest if manifest is not None and "lora" in manifest and "base" in manifest else None


class Adapters:
    """The adapters in a checkpoint, all of them accounted for (UserError)."""

    def __init__(self, checkpoint: Checkpoint, said: Mapping[str, Any]) -> None:
        self.checkpoint, self.lora, self.base = checkpoint, Lora.of(said["lora"]), said["base"]
        self.layout = Layout(plain(core_files.hf_config(checkpoint.folder)))
        self.targets = lora.targets(self.layout, self.lora)
        wanted = {target.key(self.layout.stacked, kind) for target in self.targets for kind in _KINDS}
        found = {key for key in checkpoint.tensors if key.endswith(_KINDS) and not key.startswith("optimizer.")}
        if wrong := wanted ^ found:
            what = "missing" if wanted - found else "has no place in the model of its config.json"
            raise UserError(f"{checkpoint.folder / core_files.METADATA}: {min(wrong)} {what}")

    def factors(self, target: Target) -> tuple[Matrix, Matrix]:
        """lora_A [parts*r, in] and lora_B [out, r] of a core weight."""
        (rows, columns), _ = self.layout.packed(target.placed)
        axes = self.layout.axes(target.placed, self.layout.stacked)
        rank = self.lora.rank
        made = []
        for kind, shape in zip(_KINDS, ((len(target.parts) * rank, columns), (rows, rank)), strict=True):
            tensor = self.checkpoint.tensors[target.key(self.layout.stacked, kind)]
            expected = (*(size for _, size in axes), *shape)
            if tensor.shape != expected:
                raise UserError(
                    f"{tensor.key}: shape {list(tensor.shape)} in the checkpoint, expected {list(expected)}"
                )
            made.append(matrix_of(self.checkpoint, tensor, tuple(place for place, _ in axes)))
        return made[0], made[1]

    def low_rank(self, target: Target) -> LowRank:
        """What the adapters of a core weight add to it."""
        a, b = (tuple(m.copies(m.origin, "", 0, "float32")) for m in self.factors(target))
        places = {part: n for n, part in enumerate(target.parts)}
        runs = tuple((places.get(block.part, -1), block.rows) for block in self.layout.packed(target.placed)[1])
        return LowRank(target.key(False, "lora"), a, b, self.lora.rank, self.lora.scale, runs)


class MergedSource:
    """The weights of the base with what the adapters add, in float32 before the cast."""

    def __init__(self, base: Source, adapters: Adapters) -> None:
        files = hf_files.side_files(adapters.checkpoint.folder / HF_SUBFOLDER)  # the tokenizer of the training
        self.model, self.notes, self._base = replace(base.model, files=files), list(base.notes), base
        self._added = {_place(target.placed): adapters.low_rank(target) for target in adapters.targets}
        self.notes.append(f"merged: adapters of rank {adapters.lora.rank} into {len(self._added)} weights")

    def weight(self, placed: Placed) -> Matrix:
        """A core weight of the base, and what is added to it while it is copied."""
        matrix, low = self._base.weight(placed), self._added.get(_place(placed))
        if low is None:
            return matrix
        return replace(matrix, rectangles=tuple(_with_delta(r, low) for r in matrix.rectangles))


def _place(placed: Placed) -> tuple[str, int | None]:
    return placed.rule.core, placed.layer


def _with_delta(rectangle: Rectangle, low: LowRank) -> Rectangle:
    place = (rectangle.row, rectangle.column)
    row, column = place[::-1] if rectangle.turned else place
    return rectangle._replace(delta=Delta(low, row, column, rectangle.turned))


@contextlib.contextmanager
def merged(
    adapters: Adapters,
    base: Path | None,
    opened: Callable[[str, Path, Path | None], AbstractContextManager[Source]],
    *,
    digests: bool,
) -> Iterator[Source]:
    """Base and adapters as one source; ``base``: where the base is, if not where it was (UserError: another one)."""
    folder = base or Path(adapters.base["path"])
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; the adapters are for its weights: name its folder with --base")
    if digests and lora.base_digest(folder) != adapters.base["xxh3_128"]:
        raise UserError(
            f"{folder}: not the weights that the adapters in {adapters.checkpoint.folder} were trained beside; "
            "name those with --base"
        )
    kind, resolved = kind_of(folder)
    with opened(kind, resolved, None) as source:
        yield MergedSource(source, adapters)


def plan(adapters: Adapters, dtype: str) -> Plan:
    """The copy list that makes a folder for peft."""
    made = Plan(notes=[f"adapters of rank {adapters.lora.rank} for {adapters.base['path']}"])
    weights = {w.name: w for target in adapters.targets for w in _weights(adapters, target, dtype)}
    made.entries += file_of(lora.PEFT_WEIGHTS, weights, list(weights))
    text = json.dumps(_config(adapters), indent=2) + "\n"
    made.entries.append(Literal(lora.PEFT_CONFIG, 0, text.encode()))
    return made.finish()


def _weights(adapters: Adapters, target: Target, dtype: str) -> Iterator[Weight]:
    """A and B of each Hugging Face module, B's rows in Hugging Face's order."""
    rank, (a, b) = adapters.lora.rank, adapters.factors(target)
    taken: list[list[tuple[int, Region]]] = [[] for _ in target.placed.hf]
    row = 0
    for part, start, rows in adapters.layout.packed(target.placed)[1]:
        taken[part].append((start, Region(row, 0, rows, rank)))
        row += rows
    for n, (part, name) in enumerate(zip(target.parts, target.names(), strict=True)):
        parts = {
            lora.A: a.take([Region(n * rank, 0, rank, a.columns)]),
            lora.B: b.take([region for _, region in sorted(taken[part])]),
        }
        for kind, matrix in parts.items():
            full = lora.peft_name(name, kind)
            yield Weight(full, choose_dtype(dtype, matrix, full), (matrix.rows, matrix.columns), matrix)


def _config(adapters: Adapters) -> dict[str, Any]:
    """adapter_config.json."""
    made = adapters.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters.base["path"],
        "r": made.rank,
        "lora_alpha": made.alpha,
        "lora_dropout": made.dropout,
        "use_rslora": made.rank_stabilized,
        "target_modules": lora.target_modules(adapters.layout, made),
        "fan_in_fan_out": any(target.placed.rule.transposed for target in adapters.targets),
        "bias": "none",
        "inference_mode": True,
    }
