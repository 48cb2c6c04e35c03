"""Tiny models of every family with weights of order one, and their logits of packed rows and of conversations alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import references  # noqa: F401  makes AutoConfig know the models that transformers lacks
import torch
from chat_pairs import write_set
from torch import Tensor

from megapatch.models import device, family, packing, parallel
from megapatch.models.packed_rows import PackedRows, Row, one_by_one, share_of_rank

LENGTHS = (17, 1, 40, 9, 2, 25, 31, 5)
ROW, VOCABULARY = 64, 90
CHANGES: dict[str, dict[str, Any]] = {  # of the tiny configurations, so that all that matters is there
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"sliding_window": 7},
    "bloom": {},
}


def conversations(prefix: Path) -> None:
    """Random tokens, some of them trained, weighted too."""
    chance = np.random.default_rng(0)
    data = [(chance.integers(VOCABULARY, size=n), chance.integers(2, size=n)) for n in LENGTHS]
    write_set(prefix, data, [chance.random(n) for n in LENGTHS])


def rows(prefix: Path, multiple: int = 1) -> list[Row]:
    """The packed rows."""
    found = PackedRows(prefix, packing.pack(prefix, ROW, multiple=multiple, seed=1), pad_id=3)
    return [found[i] for i in range(len(found))]


def singles(prefix: Path) -> list[Row]:
    """Each conversation as a row of its own, unpadded, by its number."""
    found = PackedRows(prefix, one_by_one(np.array(LENGTHS), ROW), full=False)
    return [found[i] for i in range(len(found))]


def model(name: str, options: parallel.Parallel) -> torch.nn.Module:
    """A family's tiny model in fp32 in one process; the process groups must be there."""
    from transformers import AutoConfig

    from megapatch.models.build import ModelOptions, build

    hf = AutoConfig.for_model(name, **dict(family.known()[name].tiny) | CHANGES.get(name, {})).to_dict()
    device.seed_everything(0, 0)
    [made] = build(hf, ModelOptions(options, device.start()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + (parameter.dim() == 1 and "bias" not in key))
    return made.eval()


def loaded(folder: Path, options: parallel.Parallel) -> torch.nn.Module:
    """This process's part of the model of a Hugging Face folder, in fp32; the process groups must be there."""
    from megapatch.models.build import ModelOptions, build
    from megapatch.models.load import load_weights

    hf = json.loads((folder / "config.json").read_text())
    device.seed_everything(0, 0)
    chunks = build(hf, ModelOptions(options, device.start()))
    load_weights(chunks, folder, hf)
    return chunks[0].eval()


def tensors(row: Row, places: Any = slice(None)) -> dict[str, Tensor]:
    """What a model reads of a row, [1, s], at some of its places."""
    words = ("tokens", "position_ids", "labels", "loss_mask")
    return {word: torch.from_numpy(getattr(row, word)[places])[None] for word in words}


def packed(row: Row) -> Any:
    """The boundaries of a row as megatron-core takes them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.from_numpy(row.cu_seqlens)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=row.max_seqlen, max_seqlen_kv=row.max_seqlen)


def forward(made: torch.nn.Module, row: Row, *, thd: bool, losses: bool = False, places: Any = slice(None)) -> Tensor:
    """Logits [s, v] of a row or, with ``losses``, those of its tokens [s]; ``thd``: within its segments."""
    batch = tensors(row, places)
    words: dict[str, Any] = {"labels": batch["labels"]} if losses else {}
    words |= {"packed_seq_params": packed(row)} if thd else {}
    return made(batch["tokens"], batch["position_ids"], None, **words)[0]


def cut(row: Row, values: Tensor) -> dict[int, Tensor]:
    """Conversation -> what of the values of a row [s, ...] is of it, without its padding."""
    starts = row.cu_seqlens.tolist()
    return {
        number: values[start : start + LENGTHS[number]]
        for start, number in zip(starts, row.conversations.tolist(), strict=False)
    }


def share(row: Row, options: parallel.Parallel) -> Any:
    """The places of a row that this process holds."""
    from megatron.core import parallel_state

    if options.cp == 1:
        return slice(None)
    return share_of_rank(row.cu_seqlens, parallel_state.get_context_parallel_rank(), options.cp)
