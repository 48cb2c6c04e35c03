"""Two pairs compared, document by document: the first difference, and how many there are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.indexed_data import IndexedDocuments, release
from megapatch.tools.preprocess.pairs.show_document import Decoder, rendered

_DOCUMENTS, _TOKENS = 1 << 16, 1 << 20  # at a time
_CONTEXT = 12  # tokens shown on either side of the first difference


@dataclass
class Difference:
    """``first`` is (document, token in it), None where all documents of both are the same."""

    differing: int = 0  # of the documents that both have
    first: tuple[int, int] | None = None


def compare(one: IndexedDocuments, two: IndexedDocuments) -> Difference:
    """Compare the documents at the same places."""
    found = Difference()
    common = min(len(one), len(two))
    for at in range(0, common, _DOCUMENTS):
        end = min(at + _DOCUMENTS, common)
        starts, others = one.index.starts(at, end), two.index.starts(at, end)
        unlike = np.diff(starts) != np.diff(others)
        if not unlike.any():
            unlike = _unlike(one.ids, two.ids, starts, others)
        else:
            for i in np.flatnonzero(~unlike).tolist():
                unlike[i] = not np.array_equal(one[at + i], two[at + i])
        if unlike.any() and found.first is None:
            document = at + int(np.argmax(unlike))
            found.first = (document, _first(one[document], two[document]))
        found.differing += int(unlike.sum())
        for data in (one, two):
            data.index.release()
            release(data.ids)
    if found.first is None and len(one) != len(two):
        found.first = (common, 0)
    return found


def _unlike(ids: np.ndarray, other: np.ndarray, starts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which documents differ, bool [documents], of two runs of documents of the same lengths."""
    unlike = np.zeros(len(starts) - 1, bool)
    shift = int(others[0] - starts[0])
    for at in range(int(starts[0]), int(starts[-1]), _TOKENS):
        end = min(at + _TOKENS, int(starts[-1]))
        places = at + np.flatnonzero(ids[at:end] != other[at + shift : end + shift])
        unlike[np.searchsorted(starts, places, "right") - 1] = True
        release(ids)
        release(other)
    return unlike


def _first(one: np.ndarray, two: np.ndarray) -> int:
    common = min(len(one), len(two))
    places = np.flatnonzero(one[:common] != two[:common])
    return int(places[0]) if len(places) else common


def told(
    prefixes: tuple[str | Path, str | Path],
    pairs: tuple[IndexedDocuments, IndexedDocuments],
    found: Difference,
    decoder: Decoder | None,
) -> dict[str, Any]:
    """The outcome as JSON values; ``context`` only with a tokenizer."""
    first: dict[str, Any] | None = None
    if found.first is not None:
        document, token = found.first
        both = [data[document] if document < len(data) else np.zeros(0, data.ids.dtype) for data in pairs]
        first = {"document": document, "token": token}
        first["ids"] = [ids[token].item() if token < len(ids) else None for ids in both]
        if decoder is not None:
            begin = max(0, token - _CONTEXT)
            first["context"] = [rendered(decoder.spans(ids[begin : token + _CONTEXT]), False) for ids in both]
    dtypes = [data.index.dtype.name for data in pairs]
    return {
        "prefixes": [str(prefix) for prefix in prefixes],
        "same": first is None and dtypes[0] == dtypes[1],
        "dtypes": dtypes,
        "documents": [len(data) for data in pairs],
        "tokens": [data.index.num_tokens for data in pairs],
        "differing_documents": found.differing,
        "first": first,
    }


def lines(said: dict[str, Any]) -> list[str]:
    """The outcome for people."""
    left, right = said["prefixes"]
    if said["same"]:
        return [f"{left} and {right} hold the same {said['documents'][0]:,} documents, {said['tokens'][0]:,} tokens"]
    words = [f"{left} and {right} differ"]
    for name in ("dtypes", "documents", "tokens"):
        one, two = said[name]
        if one != two:
            words.append(f"{name:<10}{one} and {two}" if name == "dtypes" else f"{name:<10}{one:,} and {two:,}")
    words.append(f"{said['differing_documents']:,} of the documents at the same places differ")
    if first := said["first"]:
        ids = ["the end" if one is None else f"id {one}" for one in first["ids"]]
        words.append(f"first in document {first['document']}, token {first['token']}: {ids[0]} and {ids[1]}")
        words += [f"  {name}: {text!r}" for name, text in zip((left, right), first.get("context", ()), strict=False)]
    return words
