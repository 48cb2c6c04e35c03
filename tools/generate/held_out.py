"""Perplexity of held-out documents: of .bin/.idx data, or of text."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import IndexedDocuments
from megapatch.tools.generate.likelihood import Pair
from megapatch.tools.generate.lines import parsed
from megapatch.tools.generate.means import ratio


class Document(NamedTuple):
    """A document; the counts are None where only its ids are known."""

    ids: Any  # a list, or an array that is mapped from a file
    num_bytes: int | None = None
    num_words: int | None = None


class Window(NamedTuple):
    """Tokens [start, stop) of a document that are read, of which those from ``first`` on are scored."""

    document: int
    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Cutting:
    """How documents are cut: ``window`` tokens are read at most, ``stride`` new ones are scored in each further one."""

    window: int
    stride: int
    prefix: int | None  # a token before each document, so that its first one is scored too

    def windows(self, lengths: Iterable[int]) -> Iterator[Window]:
        """Each token of documents of these lengths (prefix included) is scored once, but for the first of each."""
        for document, length in enumerate(lengths):
            scored = 1
            while scored < length:
                stop = min(length, scored + (self.window if scored == 1 else self.stride))
                yield Window(document, max(0, stop - self.window - 1), scored, stop)
                scored = stop

    def ids(self, document: Document) -> list[int]:
        """What is read of a document."""
        return [*([] if self.prefix is None else [self.prefix]), *map(int, document.ids)]


@dataclass(frozen=True)
class File:
    """Documents of one file, and how they are cut."""

    name: str
    documents: Sequence[Document]
    how: Cutting
    vocab_size: int

    def __post_init__(self) -> None:
        if not any(self.lengths[i] > 1 for i in range(len(self.documents))):
            raise UserError(f"{self.name}: no document with a token to score")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, with what comes before it."""
        return [len(document.ids) + (self.how.prefix is not None) for document in self.documents]

    def longest(self, reader: Any) -> int:
        """Tokens of the longest window, and the one after it."""
        return min(self.how.window + 1, max(self.lengths))


def of_data(prefix: Path, limit: int | None) -> list[Document]:
    """Documents of PREFIX.bin/.idx, mapped; they are read when they are needed."""
    documents = IndexedDocuments(prefix)
    if not np.issubdtype(documents.index.dtype, np.integer):
        raise UserError(f"{prefix}.idx: holds {documents.index.dtype.name}, expected token ids")
    return [Document(documents[i]) for i in range(min(len(documents), limit or len(documents)))]


def of_text(path: Path, key: str, encode: Callable[[str], list[int]], limit: int | None) -> list[Document]:
    """A file of text as one document; JSON lines as one each."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file") from error
    texts = [text]
    if path.suffix == ".jsonl":
        lines = text.split("\n")[: -1 if text.endswith("\n") else None][:limit]
        texts = [_field(line, key, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    return [Document(encode(one), len(one.encode()), len(one.split())) for one in texts]


def _field(line: str, key: str, where: str) -> str:
    found = parsed(line, where).get(key)
    if not isinstance(found, str):
        raise UserError(f"{where}: {key!r} is {json.dumps(found)[:40]}; expected text, or name its field by --text-key")
    return found


def result(name: str, documents: Sequence[Document], logprobs: Sequence[float], how: Cutting) -> dict[str, Any]:
    """One row: counts, the mean negative log-likelihood of a token, perplexities, standard errors over documents."""
    tokens = [len(document.ids) - (how.prefix is None) for document in documents]
    losses = [-total for total in logprobs]
    mean, error = ratio(losses, tokens)
    row: dict[str, Any] = {"data": name, "measure": "perplexity", "documents": len(documents), "tokens": sum(tokens)}
    row |= {"window": how.window, "stride": how.stride, "prefix": how.prefix}
    row |= {"nll_per_token": mean, "nll_per_token_stderr": error, "perplexity": math.exp(mean)}
    row["perplexity_stderr"] = None if error is None else math.exp(mean) * error
    counts = {"byte": [one.num_bytes for one in documents], "word": [one.num_words for one in documents]}
    for unit, found in counts.items():
        known = [count for count in found if count is not None]
        if len(known) == len(documents) and any(known) and how.prefix is not None:
            per, error = ratio(losses, known)
            row |= {f"{unit}s": sum(known), f"nll_per_{unit}": per, f"nll_per_{unit}_stderr": error}
            row[f"{unit}_perplexity"] = math.exp(min(per, 700))
            if unit == "byte":
                row["bits_per_byte"] = per / math.log(2)
    return row


def pairs(documents: Sequence[Document], windows: Iterable[Window], how: Cutting, vocab_size: int) -> Iterator[Pair]:
    """What is scored in each window."""
    at, ids = -1, [0]
    for window in windows:
        if window.document != at:
            at, ids = window.document, how.ids(documents[window.document])
            if max(ids) >= vocab_size:
                found = f"token id {max(ids)} in document {at}; the model has 0 to {vocab_size - 1}"
                raise UserError(f"{found}; give data that was made with the model's tokenizer")
        yield Pair(ids[window.start : window.first], ids[window.first : window.stop])
