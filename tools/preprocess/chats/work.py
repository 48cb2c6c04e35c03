"""What a worker does with conversations: render, encode, mask and cut; and what it tells the parent."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from megapatch.models.chat import Sample
from megapatch.models.chat_literal import LiteralEncoder
from megapatch.models.chat_mask import Masker
from megapatch.tools.preprocess.chats.cuts import Truncate, cuts
from megapatch.tools.preprocess.chats.texts import Item, Texts
from megapatch.tools.preprocess.encoding.encoder import Encoder
from megapatch.tools.preprocess.encoding.watch import Report as EngineReport
from megapatch.tools.preprocess.reading.inputs import Chunk
from megapatch.tools.preprocess.reading.records import Tally, read_records

TOO_LONG = "longer than --max-length"
NOTHING_LEFT = "nothing to train on within --max-length"


@dataclass(frozen=True)
class Side:
    """One output of ids: ``ids`` [tokens], ``weights`` float32 [tokens] (None without a mask), ``lengths`` int32
    [sequences], and ``record`` [sequences], the number of the record that each sequence is of."""

    ids: np.ndarray
    weights: np.ndarray | None
    lengths: np.ndarray
    record: np.ndarray

    def of(self, records: np.ndarray) -> "Side":
        """The sequences of some records, bool [records]."""
        keep = records[self.record]
        if keep.all():
            return self
        tokens = np.repeat(keep, self.lengths)
        weights = None if self.weights is None else self.weights[tokens]
        return Side(self.ids[tokens], weights, self.lengths[keep], self.record[keep])


@dataclass(frozen=True)
class Cut:
    """A record that is too long: tokens before and after, the input, and what it begins with."""

    record: int
    path: str
    begins: str
    tokens: int
    kept: int


@dataclass
class Report:
    """What the parent must know of a chunk. ``fate``: why each record is left out, or ''; ``hashes`` uint64
    [records, 2] or [0, 2]; ``lengths``, ``record`` and ``trained`` (tokens): of each side's sequences, int;
    ``answers``: bytes of each record's answer, int32; ``spelled``: special tokens in messages; ``empty``: numbers of
    records and which of their parts say nothing; ``unshown``: of records with fields that the template leaves out the
    number, what it begins with, and these fields."""

    tallies: list[Tally]
    engine: EngineReport
    paths: list[str]
    fate: list[str]
    hashes: np.ndarray
    answers: np.ndarray
    spelled: list[str]
    lengths: list[np.ndarray] = field(default_factory=list)
    record: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    weighted: bool = False
    by_offsets: int = 0
    empty: list[tuple[int, str]] = field(default_factory=list)
    unshown: list[tuple[int, str, list[str]]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """What stays in the worker until it is known which records are kept."""

    sides: list[Side]
    answers: list[bytes]


@dataclass(frozen=True)
class Worker:
    """Turns chunks into sequences; ``masker`` None where nothing is masked, ``literal`` where all may be spelled."""

    texts: Texts
    encoder: Encoder
    masker: Masker | None
    literal: LiteralEncoder | None
    sides: int
    max_length: int | None
    truncate: Truncate
    deduplicate: bool
    keep_raw: bool

    def begin(self, chunk: Chunk) -> tuple[Report, State]:
        """Read and encode a chunk."""
        items: list[Item] = []
        tallies, paths = [], []
        for piece in chunk:
            take = self.texts.of_row if piece.kind in ("parquet", "arrow") else self.texts
            records = read_records(piece, take, keep_raw=self.keep_raw)
            items += records.taken
            tallies.append(records.tally)
            paths += [piece.path] * len(records.taken)
        answers = [item.answer or b"" for item in items]
        report = Report(
            tallies,
            EngineReport(self.encoder.fast is not None),
            paths,
            [""] * len(items),
            _hashes(items) if self.deduplicate else np.zeros((0, 2), np.uint64),
            np.array([len(answer) for answer in answers], np.int32),
            [token for item in items for token in item.spelled],
            empty=[(number, name) for number, item in enumerate(items) for name in item.empty],
            unshown=[(number, item.begins, item.unshown) for number, item in enumerate(items) if item.unshown],
        )
        sides = [self._side(number, items, report, chunk.number == 0) for number in range(self.sides)]
        return report, State(sides, answers)

    def _side(self, number: int, items: Sequence[Item], report: Report, first: bool) -> Side:
        samples = [sample for item in items for sample in item.sides[number]]
        record = np.repeat(np.arange(len(items)), [len(item.sides[number]) for item in items])
        ids, lengths = self._encode(samples, report, first)
        weights = None
        if self.masker is not None:
            weights, exact = self.masker.masks(samples, ids, lengths)
            report.by_offsets += int((~exact).sum())
            report.weighted |= any(weight != 1 for sample in samples for weight in sample.weights)
        side = self._cut(Side(ids, weights, lengths.astype(np.int32), record), items, report)
        report.lengths.append(side.lengths)
        report.record.append(side.record)
        report.trained.append(0 * side.lengths if side.weights is None else _trained(side.weights, side.lengths))
        return side

    def _encode(self, samples: Sequence[Sample], report: Report, first: bool) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.encoder([sample.text for sample in samples], first=first)
        report.engine.add(encoded.report)
        if self.literal is None:
            return encoded.ids, encoded.lengths
        return self.literal.replaced(samples, encoded.ids, encoded.lengths)

    def _cut(self, side: Side, items: Sequence[Item], report: Report) -> Side:
        """Apply --max-length; a record of which nothing is left gets its fate."""
        if self.max_length is None or not (side.lengths > self.max_length).any():
            return side
        keep = np.ones(len(side.ids), bool)
        parts: list[tuple[int, int]] = []  # record and length of each sequence
        end = 0
        for size, owner in zip(side.lengths.tolist(), side.record.tolist(), strict=True):
            start, end = end, end + size
            if size <= self.max_length:
                parts.append((owner, size))
                continue
            weights = np.ones(size, np.float32) if side.weights is None else side.weights[start:end]
            found = cuts(weights, self.max_length, self.truncate)
            keep[start:end] = False
            for a, b in found:
                keep[start + a : start + b] = True
                parts.append((owner, b - a))
            report.cuts.append(Cut(owner, report.paths[owner], items[owner].begins, size, int(keep[start:end].sum())))
        owners, lengths = np.array(parts, np.int64).reshape(-1, 2).T
        for owner in np.setdiff1d(side.record, owners).tolist():
            report.fate[owner] = TOO_LONG if self.truncate == "drop" else NOTHING_LEFT
        kept_weights = None if side.weights is None else side.weights[keep]
        return Side(side.ids[keep], kept_weights, lengths.astype(np.int32), owners)


def _hashes(items: Sequence[Item]) -> np.ndarray:
    """xxh3-128 of each record's texts and answer, uint64 [records, 2]."""
    digest = xxhash.xxh3_128_digest
    parts = ([*(sample.text.encode() for side in item.sides for sample in side), item.answer or b""] for item in items)
    return np.frombuffer(b"".join(digest(b"\0".join(part)) for part in parts), "<u8").reshape(-1, 2)


def _trained(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many tokens of each sequence have a weight, int64 [sequences]."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(weights > 0)])
    ends = np.cumsum(lengths, dtype=np.int64)
    return before[ends] - before[ends - lengths]
