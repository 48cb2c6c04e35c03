"""Batches from megatron-core's GPTDataset. The order depends on the seed and the step alone, never on the layout."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import read_index
from megapatch.models.tokenizer import Tokenizer
from megapatch.trainer.options import PretrainOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataTokenizer:
    """The little that GPTDataset asks of a tokenizer. No ``pad``: real tokens are never taken for padding."""

    vocab_size: int
    eod: int
    digest: str

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What the names of cached indices depend on."""
        return {"vocab_size": self.vocab_size, "eod": self.eod, "digest": self.digest}


def parse_blend(words: list[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and their weights, from 'PREFIX ...' or 'WEIGHT PREFIX WEIGHT PREFIX ...'."""

    def weight(word: str) -> float | None:
        try:
            return float(word)
        except ValueError:
            return None

    weights = [weight(word) for word in words[::2]]
    if len(words) < 2 or any(w is None for w in weights):
        return list(words), None
    if len(words) % 2:
        raise UserError(f"--data-path: {len(words)} words; a blend needs WEIGHT PREFIX pairs")
    return words[1::2], [w for w in weights if w is not None]


def check_data(prefixes: list[str], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse data that this model cannot train on: damaged pairs, another tokenizer, ids beyond the vocabulary."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size};"
            " use the model's own tokenizer, or a model with a larger vocab_size"
        )
    for prefix in prefixes:
        read_index(prefix)
        manifest = Path(f"{prefix}.manifest.json")
        if not manifest.exists():
            log.warning("%s: no manifest; cannot check that the data fit the tokenizer", prefix)
            continue
        made_with = json.loads(manifest.read_text()).get("tokenizer", {})
        if made_with.get("digest", tokenizer.digest) != tokenizer.digest:
            raise UserError(
                f"{prefix}: made with another tokenizer than {tokenizer.folder}; run mp-preprocess again with it"
            )


def build_datasets(options: PretrainOptions, tokenizer: Tokenizer) -> tuple[Any, Any]:
    """Training and validation datasets (None where the split is empty); every rank must call."""
    prefixes, weights = parse_blend(options.data_path)
    batch = options.global_batch_size
    sizes = (options.train_iters * batch, options.eval_iters * batch if options.eval_interval else 0, 0)
    config = GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.seq_length,
        blend=(prefixes, weights),
        split=options.split,
        path_to_cache=str(options.data_cache_path or options.save / "data-cache"),
        tokenizer=DataTokenizer(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.digest),
        reset_position_ids=options.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=options.eod_mask_loss,
        create_attention_mask=False,
    )
    build = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    try:
        train, valid, _ = build.build()
    except (IndexError, AssertionError, ValueError) as error:
        raise UserError(
            f"--data-path {' '.join(prefixes)}: too little data for --seq-length and --split ({error})"
        ) from error
    if train is None:
        raise UserError(f"--split {options.split}: leaves nothing to train on")
    return train, valid


def micro_batches(
    dataset: Any, options: PretrainOptions, first: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of the global batch that starts at sample ``first`` of the dataset.

    Each batch: tokens, labels, position_ids (int64) and loss_mask (fp32), [b, s/cp].
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    width = options.micro_batch_size
    for start in range(first + rank * width, first + options.global_batch_size, size * width):
        samples = [dataset[i] for i in range(start, start + width)]
        batch = {key: torch.stack([s[key] for s in samples]).to(device, non_blocking=True) for key in samples[0]}
        yield get_batch_on_this_cp_rank(batch)


def num_micro_batches(options: PretrainOptions, data_parallel_size: int) -> int:
    """Forward passes per step of each data-parallel rank (UserError when they do not divide)."""
    per_pass = options.micro_batch_size * data_parallel_size
    if options.global_batch_size % per_pass:
        raise UserError(
            f"--global-batch-size {options.global_batch_size} is not divisible by --micro-batch-size x data-parallel "
            f"size = {options.micro_batch_size} x {data_parallel_size}"
        )
    count = options.global_batch_size // per_pass
    if options.vpp and count % options.pp:
        raise UserError(f"--vpp: the {count} micro-batches per step are not divisible by --pp {options.pp}")
    return count


def eval_steps(dataset: Any, options: PretrainOptions) -> int:
    """Global batches of the validation set that one evaluation reads."""
    return min(options.eval_iters, math.floor(len(dataset) / options.global_batch_size))
