"""Hugging Face folders of tiny models, written by transformers, for tests of conversion."""

import json
from pathlib import Path
from typing import Any

import references  # noqa: F401  makes AutoModelForCausalLM know the models that transformers lacks
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megapatch.models import family, hf_files, rules, shapes

FAMILIES = tuple(sorted(family.known()))


def make(folder: Path, name: str, shards: str = "5GB", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A model folder with weights that are all different, a tokenizer and an oddly formatted config.json."""
    config = AutoConfig.for_model(name, **dict(family.known()[name].tiny) | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if name in model.state_dict())):
            tensor.normal_()
    model.save_pretrained(folder, max_shard_size=shards)
    text = json.dumps(json.loads((folder / "config.json").read_text()), indent=7)
    (folder / "config.json").write_text(text + "\n\n")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return folder


def soften(folder: Path) -> Path:
    """Weights of a folder at a scale whose logits and gradients are of order one: norms near 1, the rest near 0.2."""
    scales = {name for name, value in weights(folder).items() if value.dim() == 1 and "bias" not in name}
    parts = {name: value * 0.2 + (name in scales) for name, value in weights(folder).items()}
    save_file(parts, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, as the safetensors library reads it."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def core_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the rules make of a Hugging Face folder: each core tensor whole, layers and experts stacked."""
    hf, parts = hf_files.config(folder), weights(folder)
    config, stacked = family.find(hf).transformer_config(hf), family.stacked_layers(hf)
    found: dict[str, torch.Tensor] = {}
    for placed in family.placed_rules(hf):
        packed = rules.pack(placed.rule, [parts[name] for name in placed.hf], shapes.sizes(hf))
        axes = [(placed.layer, config["num_layers"])] if stacked and placed.layer is not None else []
        axes += [(placed.expert, config["num_moe_experts"])] if placed.expert is not None else []
        whole = found.setdefault(placed.key(stacked), packed.new_empty([*(n for _, n in axes), *packed.shape]))
        whole[tuple(place for place, _ in axes)] = packed
    return found
