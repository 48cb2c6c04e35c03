"""The two folders of a comparison: checked to be the same kind of model, and what runs each."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapatch.models import core_files, hf_files
from megapatch.models.cli import UserError
from megapatch.models.device import Device
from megapatch.models.family import find
from megapatch.models.load import hf_folder
from megapatch.models.shapes import sizes
from megapatch.tools.verify import by_core, by_transformers
from megapatch.tools.verify.stream import Engine

log = logging.getLogger(__name__)
SIZES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_moe_experts".split()
)


class Sides:
    """Source and target, and which of them is the reference: the one that transformers runs, else the source."""

    def __init__(self, source: Path, target: Path, engine: str, device: Device) -> None:
        self.folders, self.device = (source, target), device
        self.configs = [hf_files.config(hf_folder(folder)) for folder in self.folders]
        self.on_core = [engine == "core" or core_files.is_core(folder) for folder in self.folders]
        self.reference = 1 if self.on_core == [True, False] else 0
        self._check()

    def _check(self) -> None:
        """Models of different kinds or sizes are a UserError; settings that differ are told."""
        source, target = self.folders
        first, second = ({"vocab_size": sizes(hf)["v"], **find(hf).transformer_config(hf)} for hf in self.configs)
        first["model_type"], second["model_type"] = (find(hf).model_type for hf in self.configs)
        for key in ("vocab_size", "model_type", *SIZES):
            if first.get(key) != second.get(key):
                said = f"{first.get(key)} and {second.get(key)}"
                raise UserError(f"{target}: {key} differs from {source} ({said}); not the same model")
        for key in sorted(first.keys() | second.keys()):
            if first.get(key) != second.get(key):
                log.warning("config.json: %s differs: %s and %s", key, first.get(key), second.get(key))

    def tokens(self, count: int, seed: int) -> Tensor:
        """At least ``count`` random token ids [b, s], in rows as long as the model allows."""
        letters = sizes(self.configs[0])
        length = min(count, letters["p"] or count)
        shape = -(-count // length), length
        ids = torch.randint(letters["v"], shape, generator=torch.Generator().manual_seed(seed))
        return ids.to(self.device.torch)

    def engine(
        self, side: int, ids: Tensor, precision: str, *, rounded: bool = False, own_spec: bool = False
    ) -> Engine:
        """A side's model without storage; ``own_spec``: megatron-core's layers without Transformer Engine."""
        device = replace(self.device, transformer_engine=False) if own_spec else self.device
        make = by_core.engine if self.on_core[side] else by_transformers.engine
        return make(self.folders[side], self.configs[side], ids, device, precision, rounded)

    def tell(self) -> None:
        """Log what runs on what."""
        for folder, core in zip(self.folders, self.on_core, strict=True):
            log.info("%s: running on %s", folder, "megatron-core" if core else "transformers")

    @torch.no_grad()
    def whole_logits(self, side: int, ids: Tensor) -> Tensor:
        """fp32 logits [b, s, v] of a model that is in memory as a whole."""
        whole: Any = by_core.whole if self.on_core[side] else by_transformers.whole
        return whole(self.folders[side], self.configs[side], ids, self.device)
