"""Batches from megatron-core's GPTDataset. The order depends on the seed and the step alone, never on the layout."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from megapatch.models.cli import UserError
from megapatch.models.data_formats import described
from megapatch.models.indexed_data import blocks, manifest_path, read_index
from megapatch.models.tokenizer import Tokenizer
from megapatch.trainer.data.data_cache import building, key
from megapatch.trainer.data.made_data import Maker, idle_words
from megapatch.trainer.data.named_data import Named, agreed, checkable, named, refuse_missing_files
from megapatch.trainer.data.options import PARTS, SPLIT, Shares
from megapatch.trainer.data.sources import BySource
from megapatch.trainer.options import PretrainOptions, TrainOptions
from megapatch.trainer.ranks import warn

log = logging.getLogger(__name__)
Blend = tuple[list[str], list[float] | None]
FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


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


def check_data(options: PretrainOptions, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse data that this model cannot train on: damaged pairs, another tokenizer, a share without documents."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size};"
            " use the model's own tokenizer, or a model with a larger vocab_size"
        )
    parts = _parts(options)
    refuse_missing_files(part.named for part in parts)
    for part in parts:
        for prefix in checkable(options, part.named, _maker(options), tokenizer):
            known = described(prefix)
            if known.form != "corpus":
                what = f"format {known.form}{known.part}"
                raise UserError(f"{known.path}: {what}; mp-pretrain trains on corpora, made by mp-preprocess")
            _check_shares(prefix, part.shares, options)
            _check_tokenizer(prefix, known.manifest, tokenizer, options)


@dataclass(frozen=True)
class Part:
    """Data that one flag names, and the shares that are taken of each pair."""

    named: Named
    shares: Shares


def _parts(options: PretrainOptions) -> list[Part]:
    """What is trained on, and what is named apart from it."""
    shares = options.shares()
    if options.eval_interval and not (shares[1] or options.validates_apart):
        raise UserError(f"--split {options.split or SPLIT}: leaves nothing to validate with; leave out --eval-interval")
    used = [True, options.eval_interval > 0, options.tests]
    found = [Part(named(options, PARTS[0]), [share if use else None for share, use in zip(shares, used, strict=True)])]
    for number, apart in ((1, options.validates_apart), (2, options.tests_apart)):
        if apart:
            whole: Shares = [(0.0, 1.0) if i == number else None for i in range(len(PARTS))]
            found.append(Part(named(options, PARTS[number]), whole))
    return found


def _maker(options: PretrainOptions) -> Maker:
    """mp-preprocess, as --data is read."""
    return Maker("mp-preprocess", "megapatch.tools.preprocess.preprocess", "text", (), idle_words(options))


def _check_tokenizer(
    prefix: str, manifest: dict[str, Any] | None, tokenizer: Tokenizer, options: PretrainOptions
) -> None:
    """Refuse data that another tokenizer made, or whose documents end otherwise than is needed."""
    said = (manifest or {}).get("tokenizer") or {}
    made_with = said.get("digest")
    if made_with is None:
        found = "no such file, so the data name no tokenizer" if manifest is None else "names no tokenizer"
        warn(log, "%s: %s; cannot check that the data fit this one", manifest_path(prefix), found)
    elif made_with != tokenizer.digest:
        raise UserError(
            f"{prefix}: made with another tokenizer than {tokenizer.folder}; run mp-preprocess again with it"
        )
    flags = [name for name in ("eod_mask_loss", "reset_position_ids") if getattr(options, name)]
    if flags and "eod_id" in said and said["eod_id"] != tokenizer.eod_id:
        raise UserError(
            f"{manifest_path(prefix)}: documents end with token {said['eod_id']}, but --{flags[0].replace('_', '-')} "
            f"looks for {tokenizer.eod_id}, the eos token of {tokenizer.folder}; run mp-preprocess again with --eod yes"
        )


def _check_shares(prefix: str, shares: Shares, options: PretrainOptions) -> None:
    """megatron-core would count the epochs of a share without tokens for ever."""
    index = read_index(prefix)
    documents = len(index.lengths)
    for name, share in zip(PARTS, shares, strict=True):
        if share is None:
            continue
        begin, end = (round(place * documents) for place in share)
        tokens = sum(int(block.sum(dtype="int64")) for block in blocks(index.lengths[begin:end]))
        if tokens < 2:
            whole = share == (0.0, 1.0)
            by = "" if whole else f" (--split {options.split or SPLIT})"
            mend = "bring" if whole else "change --split, or bring"
            raise UserError(
                f"{prefix}: {end - begin} of its {documents} documents are for {name}{by}, with {tokens} tokens; "
                f"{mend} more documents"
            )


def build_datasets(options: PretrainOptions, tokenizer: Tokenizer, samples: int | None = None) -> list[Any]:
    """Datasets to train (``samples``, if not those of all steps), validate and test with, None where there is no such
    evaluation; every rank must call."""
    parts = [part for part in _parts(options) if part.shares[1] is None or options.eval_interval]
    blends = [_blend(part.named, agreed(options, part.named, _maker(options), tokenizer)) for part in parts]
    batch = options.global_batch_size
    sizes = [samples or options.train_iters * batch, options.eval_iters * batch, options.eval_iters * batch]
    made_of = [options.seed, options.seq_length, [part.shares for part in parts], tokenizer.digest]
    prefixes = [prefix for names, _ in blends for prefix in names]
    found: list[Any] = [None] * len(PARTS)
    with building(options.data_cache, key(prefixes, [[weights for _, weights in blends], sizes, *made_of])) as folder:
        for part, blend in zip(parts, blends, strict=True):
            config = _config(options, tokenizer, folder, blend)
            config.split_matrix = part.shares
            made = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
            found = [old if new is None else new for old, new in zip(found, made, strict=True)]
    for name, dataset, size in zip(PARTS, found, sizes, strict=True):
        if dataset is not None:
            assert len(dataset) >= size, f"megatron-core built {len(dataset)} {name} samples instead of {size}"
    return found


def _config(options: PretrainOptions, tokenizer: Tokenizer, folder: Path, blend: Blend) -> GPTDatasetConfig:
    """For the data of one part; what is taken of them is to be filled in, as ``split_matrix``."""
    return GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.seq_length,
        path_to_cache=str(folder),
        tokenizer=DataTokenizer(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.digest),
        reset_position_ids=options.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=options.eod_mask_loss,
        create_attention_mask=False,
        blend=blend,
        split="1,0,0",
    )


def _blend(what: Named, prefixes: list[str]) -> Blend:
    """Prefixes and their weights: without given ones, by tokens."""
    weights = what.weights
    if weights is None and len(prefixes) > 1:
        weights = [float(read_index(prefix).num_tokens) for prefix in prefixes]
    return prefixes, weights


def micro_batches(
    dataset: Any,
    options: PretrainOptions,
    vocab_size: int,
    first: int,
    device: torch.device,
    losses: BySource | None = None,
) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of the global batch that starts at sample ``first`` of the dataset.

    Each batch: tokens, labels, position_ids (int64) and loss_mask (fp32), [b, s/cp]. ``losses`` are told of the passes.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    width = options.micro_batch_size
    for start in range(first + rank * width, first + options.global_batch_size, size * width):
        samples = [dataset[i] for i in range(start, start + width)]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in FIELDS}
        largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
        if largest >= vocab_size:
            raise UserError(
                f"--data-path: token {largest} in samples {start} to {start + width - 1}, the model's vocabulary ends "
                f"at {vocab_size - 1}; run mp-preprocess with the model's tokenizer"
            )
        share = get_batch_on_this_cp_rank({k: v.to(device, non_blocking=True) for k, v in batch.items()})
        if losses and len(losses.names) > 1:
            rows = torch.from_numpy(dataset.dataset_index[start : start + width].astype("int64"))[:, None].to(device)
            share["weighing"] = {"watch": losses.watching(rows)}
        yield share


def num_micro_batches(options: TrainOptions, data_parallel_size: int) -> int:
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
