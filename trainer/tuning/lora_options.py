"""Options of LoRA: train low-rank adapters beside weights that stay as they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megapatch.models.cli import opt
from megapatch.models.lora import Lora, of_peft
from megapatch.models.parallel import Parallel

_NEED_RANK: dict[str, Any] = {
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_targets": [],
    "lora_rslora": False,
}  # and their defaults


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Parallel):
    """Adapters of rank R add B A x to the output of linear layers; only they are trained, and only they are saved."""

    lora_rank: Optional[int] = opt(
        "train adapters of this rank (LoRA) and leave the weights of --model as they are; mp-convert merges them into "
        "the weights, or writes them for peft",
        None,
    )
    lora_alpha: Optional[float] = opt(
        "for --lora-rank: what an adapter says is multiplied by this / rank (default: 2 x --lora-rank)", None
    )
    lora_dropout: float = opt("for --lora-rank: share of an adapter's inputs that training leaves out", 0.0)
    lora_targets: list[str] = opt(
        "for --lora-rank: layers that get adapters, as Hugging Face names them (q_proj k_proj v_proj o_proj gate_proj "
        "up_proj down_proj), or groups of them: attention, mlp, all (default: all)",
        [],
        nargs="+",
        metavar="NAME",
    )
    lora_from: Optional[Path] = opt(
        "train on from the adapter in this folder, as peft and mp-convert --to peft write it; rank and all else are "
        "those of its adapter_config.json",
        None,
    )
    lora_rslora: bool = opt("for --lora-rank: divide --lora-alpha by the root of the rank (rsLoRA)", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name, default in _NEED_RANK.items() if getattr(self, name) != default]
        if self.lora_from is not None and (given or self.lora_rank is not None):
            name = (["lora_rank"] if self.lora_rank is not None else given)[0].replace("_", "-")
            raise ValueError(f"--{name}: not with --lora-from, whose adapter_config.json says it")
        if self.lora_rank is None and given:
            raise ValueError(f"--{given[0].replace('_', '-')} needs --lora-rank")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora-rank {self.lora_rank}: must be at least 1")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora-alpha {self.lora_alpha}: must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout {self.lora_dropout}: must be 0 or more, and below 1")

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained."""
        return self.lora_rank is not None or self.lora_from is not None

    @property
    def lora(self) -> Lora | None:
        """The adapters that are asked for."""
        if self.lora_from is not None:
            return of_peft(self.lora_from)
        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        named = tuple(self.lora_targets) or ("all",)
        return Lora(self.lora_rank, alpha, self.lora_dropout, named, self.lora_rslora)
