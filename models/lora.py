"""Low-rank adapters (LoRA) on paper: which weights get one, their shapes, names and first values. Imports no torch.

To a Hugging Face projection W [out, in] is added B [out, r] A [r, in] times a scale. A fused weight has the adapters of
its parts as one pair: lora_A [parts*r, in], those of the parts one below the other, and lora_B [out, r], its rows in
the order of the weight's. So a row of lora_B belongs to the part that the row of the weight comes from, tensor
parallelism cuts it as it cuts the weight, and nothing is lost between this form and that of peft.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megapatch.models import commit, core_files, hf_files
from megapatch.models.cli import UserError
from megapatch.models.rules import CORE, Placed
from megapatch.models.shapes import Layout

if TYPE_CHECKING:
    from torch import Tensor

A, B = "lora_A", "lora_B"  # what follows a core module's name
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT = "base_model.model.{module}.{kind}.weight"
_PLAIN = {  # settings of peft that are not supported -> the values that mean without
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
    "target_parameters": ([],),
    "exclude_modules": ([],),
    "trainable_token_indices": ([],),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    **dict.fromkeys(("loftq_config", "corda_config", "lora_ga_config", "arrow_config", "kasa_config"), ({},)),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the weights of the base too
}
GROUPS = {"attention": ("self_attention.",), "mlp": ("mlp.",), "all": ("self_attention.", "mlp.")}  # in core's names


@dataclass(frozen=True)
class Lora:
    """How adapters are made."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)  # ends of Hugging Face names, such as q_proj, or keys of GROUPS
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (sqrt(self.rank) if self.rank_stabilized else self.rank)

    def described(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Lora":
        """What ``described`` gave."""
        return cls(**{**said, "targets": tuple(said["targets"])})


@dataclass(frozen=True)
class Target:
    """A core weight with adapters for some of its ``parts`` (their places among the Hugging Face names)."""

    placed: Placed
    parts: tuple[int, ...]

    @property
    def module(self) -> str:
        """The core module, as in a layer."""
        return self.placed.rule.core.removeprefix(CORE).removesuffix(".weight")

    def names(self) -> Iterator[str]:
        """The Hugging Face module of each part that has an adapter."""
        return (self.placed.hf[part].removesuffix(".weight") for part in self.parts)

    def key(self, stacked: bool, kind: str) -> str:
        """The name of lora_A or lora_B in a torch_dist checkpoint."""
        return self.placed.key(stacked).removesuffix("weight") + kind


def last(name: str, words: int = 1) -> str:
    """The last words of a dotted name."""
    return ".".join(name.split(".")[-words:])


def candidates(layout: Layout) -> list[Placed]:
    """Every linear layer of the decoder."""
    return [p for p in layout.placed if p.rule.core.startswith(CORE) and p.rule.core.endswith(".weight") and _linear(p)]


def _linear(placed: Placed) -> bool:
    return last(placed.rule.core, 2).startswith("linear_")


def targets(layout: Layout, lora: Lora) -> list[Target]:
    """The weights that get adapters (UserError: a name that the model has not, or that experts have)."""
    found, unseen = [], set(lora.targets)
    for placed in candidates(layout):
        groups = {group for group, inside in GROUPS.items() if placed.rule.core.removeprefix(CORE).startswith(inside)}
        meant = [{*groups, *_ends(name.removesuffix(".weight"))} & set(lora.targets) for name in placed.hf]
        parts = tuple(n for n, names in enumerate(meant) if names)
        unseen -= set().union(*meant)
        if parts and placed.expert is not None:
            raise UserError(
                f"--lora-targets {' '.join(lora.targets)}: would give adapters to experts ({placed.hf[parts[0]]}), "
                "which is not supported; name attention, or projections that experts do not have"
            )
        if parts:
            found.append(Target(placed, parts))
    if unseen:
        there = sorted({last(n.removesuffix(".weight")) for placed in candidates(layout) for n in placed.hf})
        raise UserError(f"--lora-targets {min(unseen)}: the model has {', '.join(there)}; groups: {', '.join(GROUPS)}")
    return found


def _ends(name: str) -> set[str]:
    """a.b.c -> c, b.c, a.b.c"""
    return {last(name, words) for words in range(1, name.count(".") + 2)}


def num_parameters(layout: Layout, lora: Lora) -> int:
    """Numbers in the adapters of the whole model."""
    shapes = [layout.parts(target.placed)[part] for target in targets(layout, lora) for part in target.parts]
    return sum(lora.rank * (rows + columns) for rows, columns in shapes)


def part_of_rows(layout: Layout, placed: Placed) -> list[int]:
    """For each row of a core weight, the number of the Hugging Face part that it comes from."""
    return [block.part for block in layout.packed(placed)[1] for _ in range(block.rows)]


def first_a(name: str, rank: int, columns: int, seed: int) -> "Tensor":
    """The A [rank, columns] fp32 with which a module begins: uniform, as peft's; the same on any layout."""
    import torch

    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1)
    bound = 1 / sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def peft_name(module: str, kind: str) -> str:
    """The tensor in a file of peft's with lora_A or lora_B of a Hugging Face module."""
    return _PEFT.format(module=module, kind=kind)


def of_peft(folder: Path) -> Lora:
    """How the adapters in a folder of peft's are made (UserError: not as here)."""
    said, path = hf_files.config(folder, PEFT_CONFIG), folder / PEFT_CONFIG
    for key, plain in _PLAIN.items():
        if (value := said.get(key)) is not None and value not in plain:
            raise UserError(f"{path}: {key} is {value!r}, which is not supported; expected {plain[0]!r}")
    modules = said.get("target_modules")
    if not isinstance(modules, list) or not modules:
        raise UserError(f"{path}: target_modules is {modules!r}; expected a list of names, such as q_proj")
    try:
        rank, alpha, dropout = int(said["r"]), float(said["lora_alpha"]), float(said.get("lora_dropout") or 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: r, lora_alpha and lora_dropout must be numbers ({error})") from error
    return Lora(rank, alpha, dropout, tuple(sorted(modules)), bool(said.get("use_rslora")))


class Start:
    """The first values of adapters: A by the seed and B zero, or those in a folder of peft's (UserError: no fit)."""

    def __init__(self, layout: Layout, lora: Lora, seed: int, folder: Path | None = None) -> None:
        self.lora, self.seed, self.folder = lora, seed, folder
        self._stored = {t.name: t for t in hf_files.read_header(folder / PEFT_WEIGHTS)} if folder else {}
        modules = {module for target in targets(layout, lora) for module in target.names()}
        wanted = {peft_name(module, kind) for module in modules for kind in (A, B)}
        if folder and (wrong := wanted ^ self._stored.keys()):
            what = "is missing" if min(wrong) in wanted else "has no place in the model"
            raise UserError(f"{folder / PEFT_WEIGHTS}: {min(wrong)} {what}; is it an adapter for --model?")

    def a(self, module: str, columns: int) -> "Tensor":
        """A [rank, columns] of a Hugging Face module."""
        shape = (self.lora.rank, columns)
        return self._read(module, A, shape) if self.folder else first_a(module, *shape, self.seed)

    def b(self, module: str, rows: int) -> "Tensor":
        """B [rows, rank], in Hugging Face's order of rows."""
        import torch

        shape = (rows, self.lora.rank)
        return self._read(module, B, shape) if self.folder else torch.zeros(shape)

    def _read(self, module: str, kind: str, shape: tuple[int, int]) -> "Tensor":
        from safetensors import safe_open

        assert self.folder is not None
        name = peft_name(module, kind)
        if self._stored[name].shape != shape:
            there = list(self._stored[name].shape)
            raise UserError(f"{self.folder / PEFT_WEIGHTS}: {name}: shape {there}, the model needs {list(shape)}")
        with safe_open(self.folder / PEFT_WEIGHTS, framework="pt") as file:
            return file.get_tensor(name).float()


def target_modules(layout: Layout, lora: Lora) -> list[str]:
    """The shortest ends of names by which peft finds exactly the modules that have adapters."""
    chosen = {name for target in targets(layout, lora) for name in target.names()}
    others = {name.removesuffix(".weight") for placed in layout.placed for name in placed.hf} - chosen
    for words in (1, 2):
        ends = {last(name, words) for name in chosen}
        if not ends & {last(name, words) for name in others}:
            return sorted(ends)
    return sorted(chosen)


def base_digest(folder: Path) -> str:
    """xxh3-128 of the weights in a Hugging Face folder or core checkpoint, from its manifest where it has one."""
    if core_files.is_core(folder):
        folder = core_files.resolve(folder)
        files: Sequence[Path] = sorted([*folder.glob("*.distcp"), folder / core_files.METADATA])
    else:
        files = sorted({tensor.file for tensor in hf_files.tensors(folder).values()})
    said = (commit.read_manifest(folder) or {}).get("files", {})
    state = xxhash.xxh3_128()
    for path in files:
        known = said.get(path.name, {}).get("xxh3_128") or commit.digest(path)
        state.update(f"{path.name} {known}\n".encode())
    return state.hexdigest()
