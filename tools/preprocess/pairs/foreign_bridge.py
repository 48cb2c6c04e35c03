"""Megatron-Bridge's packed parquet: a row has input_ids, loss_mask shifted to the labels, and seq_start_id.

Its reader feeds all but the last token of each conversation, so a row of seq_length holds as many tokens and one more
for each conversation. Facts from src/megatron/bridge/data/packing/{algorithms,gpt_sft,parquet}.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.packed_rows import Conversation, Conversations
from megapatch.models.packing import make_plan, refuse_long
from megapatch.tools.preprocess.pairs.foreign_checks import (
    Counts,
    refuse_first_trained,
    refuse_short,
    refuse_weights,
    segments,
)

FORMAT = "bridge"
COLUMNS = ("input_ids", "loss_mask", "seq_start_id")
_GROUP = 500  # rows of a row group, as Megatron-Bridge writes


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet (UserError where they are not installed)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("--format bridge: needs pyarrow; pip install 'megapatch[data]'") from error
    return pyarrow, pyarrow.parquet


def refuse(data: Conversations, seq_length: int) -> None:
    """Refuse what the format cannot hold."""
    refuse_weights(data, FORMAT)
    refuse_short(data, FORMAT, 2)
    refuse_long(data.prefix, data.lengths, seq_length + 1, f"--seq-length {seq_length} and 1, the last being no input")
    refuse_first_trained(data, FORMAT)


def write(data: Conversations, path: Path, *, seq_length: int, seed: int, tell: Callable) -> Counts:
    """Write packed rows; ``tell`` is called with the bytes and tokens of each row group."""
    pa, parquet = pyarrow()
    plan, counts = make_plan(data.lengths - 1, seq_length, seed=seed), Counts()
    kinds = zip(COLUMNS, (pa.int32(), pa.int8(), pa.int32()), strict=True)
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds])
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, plan.num_rows, _GROUP):
            rows = range(start, min(start + _GROUP, plan.num_rows))
            before = counts.tokens
            parts = [_row(data, plan.row(number), counts) for number in rows]
            columns = [_lists(pa, [part[n] for part in parts], schema.field(n).type) for n in range(len(COLUMNS))]
            table = pa.Table.from_arrays(columns, schema=schema)
            writer.write_table(table, row_group_size=_GROUP)
            tell(table.nbytes, counts.tokens - before)
    counts.rows = plan.num_rows
    counts.padding = plan.num_rows * seq_length - (counts.tokens - counts.conversations)
    return counts


def _row(data: Conversations, members: np.ndarray, counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids [n], loss_mask [n] and seq_start_id [conversations] of one row."""
    parts = [data[number] for number in members.tolist()]
    for one in parts:
        counts.add(one.ids, one.mask)
    mask = np.concatenate([np.append(one.mask[1:], 0) for one in parts])  # by labels; the last token has none
    lengths = data.lengths[members]
    return np.concatenate([one.ids for one in parts]), mask, np.cumsum(lengths) - lengths


def _lists(pa: Any, parts: list[np.ndarray], kind: Any) -> Any:
    """A column with one list for each array."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(part) for part in parts])]).astype(np.int32)
    values = pa.array(np.concatenate(parts), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def read(name: str, counts: Counts) -> Iterator[tuple[str, Conversation]]:
    """The conversations of a packed parquet file, row by row, each after its place."""
    pa, parquet = pyarrow()
    try:
        file = parquet.ParquetFile(name)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: not a parquet file ({error}); is it complete?") from error
    if missing := set(COLUMNS) - set(file.schema_arrow.names):
        raise UserError(f"{name}: no column {', '.join(sorted(missing))}; these are not data of --format {FORMAT}")
    for batch in file.iter_batches(_GROUP, columns=list(COLUMNS)):
        columns = [_arrays(name, column, batch.column(column)) for column in COLUMNS]
        for ids, mask, starts in zip(*columns, strict=True):
            yield from _conversations(f"{name}: row {counts.rows:,}", ids, mask, starts)
            counts.rows += 1


def _arrays(name: str, column: str, lists: Any) -> list[np.ndarray]:
    """One array for each list of a column."""
    import pyarrow.types as types

    is_list = types.is_list(lists.type) or types.is_large_list(lists.type)
    if not is_list or lists.null_count or lists.flatten().null_count:
        raise UserError(f"{name}: column {column} is {lists.type}, or has nulls; expected lists of numbers")
    values = lists.flatten().to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iub":
        raise UserError(f"{name}: column {column} has {values.dtype}; expected whole numbers")
    ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
    return np.split(values, ends[:-1])


def _conversations(
    place: str, ids: np.ndarray, mask: np.ndarray, starts: np.ndarray
) -> Iterator[tuple[str, Conversation]]:
    """The conversations of one row."""
    if len(mask) != len(ids) or not len(starts) or starts[0] != 0:
        raise UserError(f"{place}: {len(ids):,} input_ids, {len(mask):,} in loss_mask, seq_start_id {starts[:3]}...")
    if (np.diff(np.append(starts.astype(np.int64), len(ids))) <= 0).any():
        raise UserError(f"{place}: seq_start_id does not rise, or ends behind the {len(ids):,} input_ids")
    for begin, end in segments(starts, len(ids)):
        here = mask[begin:end].astype(np.int64)
        if here[-1] or not np.isin(here, (0, 1)).all():
            raise UserError(f"{place}: loss_mask holds {here[-1]} at the end of a conversation, or more than 0 and 1")
        yield place, Conversation(ids[begin:end], np.append(0, here[:-1]).astype(np.uint8), None)
