"""Conversations for mp-sft: checked, laid in rows, and put in an order that depends on the seed alone."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import USER_ERRNOS, UserError
from megapatch.models.data_formats import format_of
from megapatch.models.indexed_data import manifest_path, read_index, read_manifest
from megapatch.models.packed_rows import PackedRows, Row, one_by_one
from megapatch.models.packing import Plan, document_lengths, pack, plan_path, read_plan, refuse_long, write_plan
from megapatch.models.tokenizer import Tokenizer
from megapatch.trainer.data.made_data import Maker, idle_words
from megapatch.trainer.data.named_data import agreed, checkable, named, refuse_missing_files
from megapatch.trainer.ranks import first, together, warn
from megapatch.trainer.tuning.sft_options import READING, SftOptions

log = logging.getLogger(__name__)
PARTS = ("training", "validation")


def check_data(options: SftOptions, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse conversations that this model cannot train on; the first process makes what --data names."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size};"
            " use the model's own tokenizer, or a model with a larger vocab_size"
        )
    parts = [named(options, part) for part in PARTS]
    refuse_missing_files(parts)
    for part in parts:
        for prefix in checkable(options, part, _maker(options), tokenizer):
            _check(prefix, tokenizer, options)


def _maker(options: SftOptions) -> Maker:
    """mp-preprocess-chat, as --data is read."""
    words = ["--max-length", str(options.seq_length)]
    for name in READING:
        value: Any = getattr(options, name)
        if value not in (None, False, "") and name != "workers":
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [f"{flag}={value}"]
    files = [Path(options.template)] if options.template and Path(options.template).is_file() else []
    module = "megapatch.tools.preprocess.preprocess_chat"
    return Maker("mp-preprocess-chat", module, "chats", tuple(words), idle_words(options), tuple(files))


def _check(prefix: str, tokenizer: Tokenizer, options: SftOptions) -> None:
    manifest = read_manifest(prefix)
    if (form := format_of(prefix, manifest)) != "chat":
        raise UserError(
            f"{manifest_path(prefix)}: format {form}; mp-sft trains on conversations, made by mp-preprocess-chat"
        )
    assert manifest is not None
    if (manifest.get("tokenizer") or {}).get("digest") != tokenizer.digest:
        raise UserError(
            f"{prefix}: made with another tokenizer than {tokenizer.folder}; run mp-preprocess-chat again with it"
        )
    counts = manifest.get("counts") or {}
    if not counts.get("trained_tokens", 1):
        raise UserError(f"{prefix}: no token of its {counts.get('documents'):,} conversations is trained; see the mask")
    lengths = document_lengths(read_index(prefix))
    if not lengths.size or not int(lengths.max()):
        raise UserError(f"{prefix}: holds no conversations; bring some, or a longer --seq-length or --max-length")
    refuse_long(prefix, lengths, options.seq_length, f"--seq-length {options.seq_length}")


@dataclass(frozen=True)
class Blend:
    """Rows of several sets by sample number: ``blend[i]`` depends on the seed and i, on nothing else."""

    names: list[str]
    sets: list[PackedRows]
    seed: int | None  # None: in the order of the sets' plans
    which: np.ndarray  # uint16 [samples], the set of a sample
    nth: np.ndarray  # int64 [samples], its number among the samples of that set, over all epochs
    orders: dict[tuple[int, int], np.ndarray]  # set and epoch -> order of rows, filled as needed

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, sample: int) -> tuple[int, Row]:
        which = int(self.which[sample])
        rows = self.sets[which]
        epoch, place = divmod(int(self.nth[sample]), len(rows))
        return which, rows[int(self._order(which, epoch)[place])]

    def _order(self, which: int, epoch: int) -> np.ndarray:
        if (which, epoch) not in self.orders:
            for old in [key for key in self.orders if key[0] == which]:
                del self.orders[old]
            rows = np.arange(len(self.sets[which]))
            shuffled = self.seed is not None
            self.orders[which, epoch] = (
                np.random.default_rng([self.seed or 0, which, epoch]).permutation(rows) if shuffled else rows
            )
        return self.orders[which, epoch]

    @property
    def about(self) -> list[dict[str, Any]]:
        """Counts of each set, for the log."""
        return [_described(name, rows) for name, rows in zip(self.names, self.sets, strict=True)]

    @property
    def context(self) -> int:
        """Tokens of the conversation that a token is in, on average."""
        lengths = np.concatenate([rows.data.lengths for rows in self.sets]).astype(np.float64)
        return round(float((lengths**2).sum() / lengths.sum()))


def _described(name: str, rows: PackedRows) -> dict[str, Any]:
    said = read_manifest(name) or {}
    counts, cut = said.get("counts") or {}, said.get("truncation") or {}
    tokens, room = int(rows.data.lengths.sum()), len(rows) * rows.plan.seq_length
    return {
        "prefix": name,
        "conversations": len(rows.plan.order),
        "rows": len(rows),
        "tokens": tokens,
        "trained_tokens": counts.get("trained_tokens"),
        "fill_percent": round(100 * tokens / room, 3),
        "truncated": cut.get("records", 0),
        "lost_tokens": cut.get("lost_tokens", 0),
    }


def build(options: SftOptions, tokenizer: Tokenizer, samples: int) -> tuple[Blend, Blend | None]:
    """So many training samples, and those to validate with (None without --eval-interval); every rank must call."""
    held = options.eval_iters * options.global_batch_size
    train = _blend(options, tokenizer, "training", samples)
    return train, _blend(options, tokenizer, "validation", held) if options.eval_interval else None


def _blend(options: SftOptions, tokenizer: Tokenizer, part: str, samples: int) -> Blend:
    what = named(options, part)
    prefixes = agreed(options, what, _maker(options), tokenizer)
    with together():
        sets = [_rows(prefix, options, tokenizer) for prefix in prefixes]
    which, nth = interleaved(what.weights or [float(len(rows)) for rows in sets], samples)
    return Blend(prefixes, sets, options.seed if part == "training" else None, which, nth, {})


def _rows(prefix: str, options: SftOptions, tokenizer: Tokenizer) -> PackedRows:
    pad = tokenizer.eod_id if tokenizer.eod_id is not None else 0
    return PackedRows(prefix, _plan(prefix, options), pad_id=pad)


def _plan(prefix: str, options: SftOptions) -> Plan:
    """The plan beside the data; one that is made now is the same in every process, and the first stores it."""
    if options.no_packing:
        return one_by_one(document_lengths(read_index(prefix)), options.seq_length)
    path = plan_path(prefix, options.seq_length, options.multiple)
    if path.exists():
        return read_plan(prefix, options.seq_length, options.multiple)
    plan = pack(prefix, options.seq_length, multiple=options.multiple)  # mp-pack-data makes the same
    if first():
        _store(prefix, plan, path)
    return plan


def _store(prefix: str, plan: Plan, path: Path) -> None:
    try:
        log.info("%s: packed %d conversations into %d rows", write_plan(prefix, plan), len(plan.order), plan.num_rows)
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        warn(log, "%s: not stored (%s); each run makes it again", path, error.strerror)


def interleaved(weights: list[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The set of each sample, and its number in that set, so that every beginning has sets by their weights.

    Sample k of a set with share w is due at (k + 1/2) / w; a longer list begins as a shorter one does.
    """
    shares = [weight / sum(weights) for weight in weights]
    numbers = [np.arange(min(samples, math.ceil(samples * share) + 2)) for share in shares]
    due = np.concatenate([(some + 0.5) / share for some, share in zip(numbers, shares, strict=True)])
    which = np.repeat(np.arange(len(weights), dtype=np.uint16), [len(some) for some in numbers])
    order = np.argsort(due, kind="stable")[:samples]
    return which[order], np.concatenate(numbers)[order]
