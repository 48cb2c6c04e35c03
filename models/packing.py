"""Which conversations lie together in a row of a batch: a plan of indices, made again in a moment for another length.

The plan lies beside the data as PREFIX.pack-<seq_length>[-m<multiple>].npz. Data are neither copied nor cut.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError, versions
from megapatch.models.commit import digest, staged_file
from megapatch.models.indexed_data import Index, idx_path, read_index

FORMAT = 1
_DIGIT = 16  # bits that numpy sorts in linear time


@dataclass(frozen=True)
class Plan:
    """Row i holds the conversations ``order[bounds[i] : bounds[i + 1]]``; bounds int64 [rows + 1], order int32."""

    seq_length: int  # tokens of a row
    multiple: int  # each conversation is padded to a multiple of so many tokens
    seed: int
    bounds: np.ndarray
    order: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the plan."""
        return len(self.bounds) - 1

    def row(self, number: int) -> np.ndarray:
        """The conversations of a row, in their order [n]."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]


def check_shape(seq_length: int, multiple: int) -> None:
    """Refuse a row length that ``multiple`` does not divide (ValueError)."""
    if multiple < 1:
        raise ValueError(f"--multiple {multiple}: must be at least 1")
    if seq_length < 1 or seq_length % multiple:
        raise ValueError(f"--seq-length {seq_length}: must be a multiple of --multiple {multiple}, and at least 1")


def make_plan(lengths: np.ndarray, seq_length: int, *, multiple: int = 1, seed: int = 0) -> Plan:
    """Fill rows best-fit-decreasing with conversations of ``lengths`` tokens [n]; those without tokens are left out.

    Conversations of one row, and the rows, are shuffled by ``seed``. All must fit a row (``refuse_long`` says it well).
    """
    check_shape(seq_length, multiple)
    assert not lengths.size or int(lengths.max()) <= seq_length, "a conversation is longer than a row"
    chance = np.random.default_rng(seed)
    units = lengths.astype(np.int32) if multiple == 1 else -(-lengths.astype(np.int32) // multiple)  # ceil
    mixed = chance.permutation(np.flatnonzero(units).astype(np.int32))
    falling = mixed[_sorted(seq_length // multiple - units[mixed])]  # longest first, by chance where equal
    row_of, num_rows = _fill(np.bincount(units[falling], minlength=1), seq_length // multiple)
    row_of = chance.permutation(np.arange(num_rows, dtype=np.int32))[row_of]
    mixed = chance.permutation(np.arange(len(row_of), dtype=np.int32))
    order = falling[mixed[_sorted(row_of[mixed])]]
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Plan(seq_length, multiple, seed, bounds, order)


def _sorted(keys: np.ndarray) -> np.ndarray:
    """The stable order of integer keys [n] from 0, in linear time."""
    order = np.argsort((keys & (1 << _DIGIT) - 1).astype(np.uint16), kind="stable")
    top = int(keys.max()) if keys.size else 0
    for shift in range(_DIGIT, top.bit_length(), _DIGIT):
        digits = (keys >> shift & (1 << _DIGIT) - 1).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def _fill(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """How often each length occurs -> the row of every conversation, longest first [n], and the number of rows.

    Best fit decreasing over whole groups of equal rows: a conversation of length l goes into the row with the least
    room that takes it. That row then has the least room again, as long as another of length l fits.
    """
    rooms = _Rooms(capacity)
    placed = [np.zeros(0, np.int32)]
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room, rows = rooms.take(length, left)
            each = room // length
            full = min(len(rows), left // each)
            placed.append(np.repeat(rows[:full], each) if each > 1 else rows[:full])
            rooms.put(room - each * length, rows[:full])
            left -= full * each
            if full < len(rows):  # the last row, where fewer are left than fit
                placed.append(np.repeat(rows[full], left))
                rooms.put(room - left * length, rows[full:])
                left = 0
    return np.concatenate(placed), rooms.opened


class _Rooms:
    """Rows by how much room they have; rows are numbered as they are opened."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.opened = capacity, 0
        self._rows: dict[int, list[np.ndarray]] = {}
        self._there = bytearray(capacity + 1)  # 1 where there are rows with so much room

    def take(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """The least room of at least ``length``, and no more rows with it than ``count`` conversations need."""
        room = self._there.find(1, length)
        if room < 0:
            room = self.capacity
            new = -(-count // (room // length))
            self.opened += new
            return room, np.arange(self.opened - new, self.opened, dtype=np.int32)
        stack, needed = self._rows[room], -(-count // (room // length))
        rows = stack.pop()
        if len(rows) > needed:
            stack.append(rows[needed:])
            rows = rows[:needed]
        if not stack:
            self._there[room] = 0
        return room, rows

    def put(self, room: int, rows: np.ndarray) -> None:
        """Remember rows that have ``room`` left; full ones are done with."""
        if room and len(rows):
            self._rows.setdefault(room, []).append(rows)
            self._there[room] = 1


def document_lengths(index: Index) -> np.ndarray:
    """Tokens of each document, int64 [n]."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(index.lengths, dtype=np.int64)])
    return np.diff(ends[index.documents])


def refuse_long(prefix: str | Path, lengths: np.ndarray, longest: int, reason: str) -> None:
    """UserError where conversations are longer than ``longest`` tokens; they are never cut here."""
    if wrong := np.flatnonzero(lengths > longest).tolist():
        raise UserError(
            f"{prefix}: {len(wrong):,} of {len(lengths):,} conversations are longer than {reason} (first: number "
            f"{wrong[0]:,}, {int(lengths[wrong[0]]):,} tokens; longest: {int(lengths.max()):,}); choose a longer "
            "--seq-length, or make the data again with mp-preprocess-chat, which can cut or drop them"
        )


def plan_path(prefix: str | Path, seq_length: int, multiple: int = 1) -> Path:
    """Where the plan of a prefix lies."""
    return Path(f"{prefix}.pack-{seq_length}" + (f"-m{multiple}" if multiple > 1 else "") + ".npz")


def pack(prefix: str | Path, seq_length: int, *, multiple: int = 1, seed: int = 0) -> Plan:
    """A plan for the conversations of PREFIX.bin/.idx; UserError when one does not fit."""
    lengths = document_lengths(read_index(prefix))
    refuse_long(prefix, lengths, seq_length, f"--seq-length {seq_length}")
    return make_plan(lengths, seq_length, multiple=multiple, seed=seed)


def write_plan(prefix: str | Path, plan: Plan) -> Path:
    """Store a plan beside its data, whole or not at all; the path."""
    about = {
        "format": FORMAT,
        "seq_length": plan.seq_length,
        "multiple": plan.multiple,
        "seed": plan.seed,
        "idx_xxh3_128": digest(idx_path(prefix)),
        "versions": versions() | {"numpy": np.__version__},
    }
    path = plan_path(prefix, plan.seq_length, plan.multiple)
    with staged_file(path) as stage, stage.open("wb") as file:
        said = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(file, about=said, bounds=plan.bounds, order=plan.order)
    return path


def read_plan(prefix: str | Path, seq_length: int, multiple: int = 1) -> Plan:
    """The stored plan of a prefix; UserError when there is none, it is damaged, or made for other data."""
    path = plan_path(prefix, seq_length, multiple)
    again = f"mp-pack-data {prefix} --seq-length {seq_length}" + (f" --multiple {multiple}" if multiple > 1 else "")
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with: {again}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            about: dict[str, Any] = json.loads(stored["about"].tobytes())
            plan = Plan(about["seq_length"], about["multiple"], about["seed"], stored["bounds"], stored["order"])
            kind, made_for = about["format"], about["idx_xxh3_128"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a plan, or damaged ({error}); make it again with: {again} --force") from error
    if kind != FORMAT or (plan.seq_length, plan.multiple) != (seq_length, multiple):
        raise UserError(f"{path}: format {kind}, made for other lengths or a newer program; make it again: {again}")
    if made_for != digest(idx_path(prefix)):
        raise UserError(f"{path}: made for other data than {idx_path(prefix)}; make it again with: {again} --force")
    return plan
