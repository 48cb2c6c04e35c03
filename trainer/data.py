"""Batches from megatron-core's GPTDataset. The order depends on the seed and the step alone, never on the layout."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
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
from megapatch.trainer.data_cache import building, key
from megapatch.trainer.options import SPLIT, PretrainOptions, TrainOptions
from megapatch.trainer.ranks import warn
from megapatch.trainer.sources import BySource

log = logging.getLogger(__name__)
SPLITS = ("training", "validation", "test")
Shares = list[tuple[float, float] | None]  # of documents, in parts of 1: first and last place for each of SPLITS
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


def parse_blend(words: list[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """Prefixes and their weights, None where none are given, from 'PREFIX ...' or 'WEIGHT PREFIX WEIGHT PREFIX ...'."""

    def weight(word: str) -> float | None:
        try:
            return float(word)
        except ValueError:
            return None

    weights = [weight(word) for word in words[::2]]
    if len(words) < 2 or any(w is None for w in weights):
        return list(words), None
    if len(words) % 2:
        raise UserError(f"{flag}: {len(words)} words; a blend needs WEIGHT PREFIX pairs")
    numbers = [w for w in weights if w is not None]
    for number, prefix in zip(numbers, words[1::2], strict=True):
        if not 0 < number < float("inf"):
            raise UserError(f"{flag}: weight {number} of {prefix}; a weight is a number above 0")
    return words[1::2], numbers


def check_data(options: PretrainOptions, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse data that this model cannot train on: damaged pairs, another tokenizer, a share without documents."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size};"
            " use the model's own tokenizer, or a model with a larger vocab_size"
        )
    for words, flag, shares in _parts(options):
        for prefix in parse_blend(words, flag)[0]:
            known = described(prefix)
            if known.form != "corpus":
                what = f"format {known.form}{known.part}"
                raise UserError(f"{known.path}: {what}; mp-pretrain trains on corpora, made by mp-preprocess")
            _check_shares(prefix, shares, options)
            _check_tokenizer(prefix, known.manifest, tokenizer, options)


def _parts(options: PretrainOptions) -> list[tuple[list[str], str, Shares]]:
    """Words that name data, the flag they follow, and the shares that are taken of each pair."""
    if not options.valid_data_path:
        return [(options.data_path, "--data-path", _shares(options))]
    train, valid = (options.data_path, "--data-path"), (options.valid_data_path, "--valid-data-path")
    return [(*train, [(0.0, 1.0), None, None]), (*valid, [None, (0.0, 1.0), None])]


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


def _shares(options: PretrainOptions) -> Shares:
    """The shares that --split makes of the documents to train on, to validate with, and to leave alone."""
    split = options.split or SPLIT
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= len(SPLITS) or min(parts) < 0 or not 0 < sum(parts) < float("inf"):
        raise UserError(f"--split {split}: expected up to three shares with commas between, like 98,2,0")
    if not parts[0]:
        raise UserError(f"--split {split}: leaves nothing to train on")
    if options.eval_interval and (len(parts) < 2 or not parts[1]):
        raise UserError(f"--split {split}: leaves nothing to validate with; leave out --eval-interval")
    ends = [sum(parts[: i + 1]) / sum(parts) for i in range(len(parts))]
    return [(0.0, ends[0]), (ends[0], ends[1]) if options.eval_interval else None, None]


def _check_shares(prefix: str, shares: Shares, options: PretrainOptions) -> None:
    """megatron-core would count the epochs of a share without tokens for ever."""
    index = read_index(prefix)
    documents = len(index.lengths)
    for name, share in zip(SPLITS, shares, strict=True):
        if share is None:
            continue
        begin, end = (round(place * documents) for place in share)
        tokens = sum(int(block.sum(dtype="int64")) for block in blocks(index.lengths[begin:end]))
        if tokens < 2:
            by = "" if options.valid_data_path else f" (--split {options.split or SPLIT})"
            mend = "bring" if options.valid_data_path else "change --split, or bring"
            raise UserError(
                f"{prefix}: {end - begin} of its {documents} documents are for {name}{by}, with {tokens} tokens; "
                f"{mend} more documents"
            )


def build_datasets(options: PretrainOptions, tokenizer: Tokenizer) -> tuple[Any, Any]:
    """Training and validation datasets (None without --eval-interval); every rank must call."""
    blends = [_blend(words, flag) for words, flag, _ in _parts(options)]
    batch = options.global_batch_size
    sizes = (options.train_iters * batch, options.eval_iters * batch, 0)
    evaluated = bool(options.eval_interval)
    made_of = [options.seed, options.seq_length, options.split or SPLIT, evaluated, tokenizer.digest]
    root = options.data_cache_path or options.save / "data-cache"
    prefixes = [prefix for names, _ in blends for prefix in names]
    with building(root, key(prefixes, [[weights for _, weights in blends], sizes, *made_of])) as folder:
        config = GPTDatasetConfig(
            random_seed=options.seed,
            sequence_length=options.seq_length,
            path_to_cache=str(folder),
            tokenizer=DataTokenizer(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.digest),
            reset_position_ids=options.reset_position_ids,
            reset_attention_mask=False,
            eod_mask_loss=options.eod_mask_loss,
            create_attention_mask=False,
            **(_of_one(blends[0]) if len(blends) == 1 else _of_two(blends, evaluated)),
        )
        if len(blends) == 1:
            config.split_matrix = _shares(options)
        train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    for name, dataset, size in (("training", train, sizes[0]), ("validation", valid, sizes[1])):
        if dataset is not None:
            assert len(dataset) >= size, f"megatron-core built {len(dataset)} {name} samples instead of {size}"
    return train, valid


def _blend(words: list[str], flag: str) -> Blend:
    """Prefixes and their weights: without given ones, by tokens."""
    prefixes, weights = parse_blend(words, flag)
    if weights is None and len(prefixes) > 1:
        weights = [float(read_index(prefix).num_tokens) for prefix in prefixes]
    return prefixes, weights


def _of_one(blend: Blend) -> dict[str, Any]:
    return {"blend": blend, "split": "1,0,0"}  # the split is replaced by --split's


def _of_two(blends: list[Blend], evaluated: bool) -> dict[str, Any]:
    return {"blend_per_split": [blends[0], blends[1] if evaluated else None, None]}


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
