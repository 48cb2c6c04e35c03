"""Small sets of conversations on disk: PREFIX, PREFIX_mask and, where asked, PREFIX_weight."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.indexed_data import bin_path, idx_path, write_index


def write_pair(prefix: Path, values: Sequence[Sequence[Any]], dtype: Any) -> None:
    """PREFIX.bin and PREFIX.idx, a document for each list of values."""
    flat = np.array([value for one in values for value in one], dtype)
    bin_path(prefix).write_bytes(flat.tobytes())
    write_index(idx_path(prefix), np.array([len(one) for one in values], np.int64), np.dtype(dtype))


def write_set(
    prefix: Path,
    data: Sequence[tuple[Sequence[int], Sequence[int]]],
    weights: Sequence[Sequence[float]] | None = None,
    dtype: Any = np.uint16,
) -> None:
    """Conversations as (ids, mask), and how much each token counts."""
    write_pair(prefix, [ids for ids, _ in data], dtype)
    write_pair(Path(f"{prefix}_mask"), [mask for _, mask in data], np.uint8)
    if weights is not None:
        write_pair(Path(f"{prefix}_weight"), weights, np.float32)
