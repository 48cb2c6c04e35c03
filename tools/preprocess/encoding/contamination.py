"""Which documents share word n-grams with evaluation files: exact, ten and more MB/s a core."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megapatch.models.cli import UserError, opt

_LOG = logging.getLogger("megapatch.tools.preprocess")
_JSON = (".jsonl", ".ndjson", ".json")
_UNSPACED = (  # Thai, Lao, Myanmar, Khmer, kana, Han: written without blanks between words
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")
_GROUP_CHARACTERS = 1 << 18  # whose words are in memory at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_EXAMPLES = 5
_NONE = 0  # the number of what is no word of an evaluation file, and of what lies between texts


@dataclass(frozen=True, kw_only=True)
class ContaminationOptions:
    """Evaluation files whose texts shall not be trained on."""

    contamination: list[Path] = opt(
        "evaluation files; a document that shares a run of --contamination-ngram words with one is left out. JSON "
        "(.jsonl .json .ndjson): every string in it is a text; else the file is one text. Words are compared without "
        "case and punctuation, and a character of Han, kana, Thai, Lao, Khmer or Myanmar counts as a word; a text or "
        "document of fewer words only as a whole",
        [],
        nargs="+",
        repeat=True,
        metavar="FILE",
    )
    contamination_ngram: int = opt("words in a run", 13, metavar="WORDS")
    on_contamination: Literal["drop", "report"] = opt(
        "drop: leave such documents out, as filtered; report: keep them, and count", "drop"
    )

    def __post_init__(self) -> None:
        if self.contamination_ngram < 1:
            raise ValueError(f"--contamination-ngram {self.contamination_ngram}: expected 1 or more")
        if not self.contamination and (self.on_contamination != "drop" or self.contamination_ngram != 13):
            raise ValueError("--contamination-ngram and --on-contamination need --contamination")
        if callable(after := getattr(super(), "__post_init__", None)):
            after()


def words_of(text: str) -> list[str]:
    """The words that are compared, casefolded: runs of letters, digits and underscores; of scripts without blanks
    between words, characters."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True)
class Hit:
    """A text, by its place in the batch, that shares ``words`` with the evaluation file of number ``file``."""

    text: int
    file: int
    words: str


class Contamination:
    """The n-grams of evaluation ``files`` (path -> texts), to be looked for in other texts."""

    def __init__(self, files: Mapping[str, Iterable[str]], ngram: int = 13) -> None:
        self.files, self.ngram = list(files), ngram
        self._number: dict[str, int] = {}  # word -> 1, 2, ...
        self._short: dict[tuple[str, ...], list[int]] = {}  # a whole text of fewer words -> its files
        rows, owners = [np.zeros((0, ngram), np.int32)], [np.zeros(0, np.int32)]
        for file, texts in enumerate(files.values()):
            for windows in (self._learn(text, file) for text in texts):
                rows.append(windows)
                owners.append(np.full(len(windows), file, np.int32))
        self._words = list(self._number)
        ngrams, files_of = np.concatenate(rows), np.concatenate(owners)
        hashes = _hash_rows(ngrams)
        order = np.lexsort((files_of, hashes))
        same = np.zeros(len(order), bool)  # as the one before it, in the same file
        ordered = hashes[order], files_of[order]
        same[1:] = (ordered[0][1:] == ordered[0][:-1]) & (ordered[1][1:] == ordered[1][:-1])
        self._hashes, self._owners, self._ngrams = ordered[0][~same], ordered[1][~same], ngrams[order][~same]
        self._mask = np.uint64((1 << max(10, len(self._hashes).bit_length() + 4)) - 1)
        self._seen = np.zeros(int(self._mask) + 1, bool)  # which low bits occur: rules out nearly all at once
        self._seen[self._hashes & self._mask] = True

    def __call__(self, texts: Sequence[str]) -> list[Hit]:
        """One Hit for each text and file that share an n-gram, in the order of texts, then files."""
        return [hit for start, group in _groups(texts) for hit in self._hits(start, group)]

    def _learn(self, text: str, file: int) -> np.ndarray:
        """Number the words of an evaluation text; its n-grams, int32 [n-grams, n]."""
        words = words_of(text)
        if 0 < len(words) < self.ngram:
            owners = self._short.setdefault(tuple(words), [])
            owners += [file] * (file not in owners)
        if len(words) < self.ngram:
            return np.zeros((0, self.ngram), np.int32)
        numbers = [self._number.setdefault(word, len(self._number) + 1) for word in words]
        return np.lib.stride_tricks.sliding_window_view(np.array(numbers, np.int32), self.ngram)

    def _hits(self, start: int, texts: Sequence[str]) -> Iterator[Hit]:
        found: dict[tuple[int, int], str] = {}
        numbers: list[int] = []
        ends = []
        get = self._number.get
        for text, words in enumerate(map(words_of, texts)):
            if len(words) < self.ngram:
                found |= {(text, file): " ".join(words) for file in self._short.get(tuple(words), ())}
            numbers += [get(word, _NONE) for word in words]
            numbers.append(_NONE)
            ends.append(len(numbers))
        places, entries = self._matches(np.array(numbers, np.int32))
        holders = np.searchsorted(ends, places, "right")
        pairs, firsts = np.unique(np.stack([holders, self._owners[entries]], axis=1), axis=0, return_index=True)
        for (text, file), entry in zip(pairs.tolist(), entries[firsts].tolist(), strict=True):
            found[text, file] = " ".join(self._words[number - 1] for number in self._ngrams[entry])
        yield from (Hit(start + text, file, said) for (text, file), said in sorted(found.items()))

    def _matches(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in ``numbers`` and entries of the tables, of every n-gram found, compared word by word."""
        if len(numbers) < self.ngram or not len(self._hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        hashes = _hash_windows(numbers, self.ngram)
        places = np.flatnonzero(self._seen[hashes & self._mask])
        entries = np.searchsorted(self._hashes, hashes[places])
        windows = np.lib.stride_tricks.sliding_window_view(numbers, self.ngram)
        found = []
        while len(places):  # entries of one hash follow one another: of several files, or unequal by chance
            same = self._hashes[np.minimum(entries, len(self._hashes) - 1)] == hashes[places]
            same &= entries < len(self._hashes)
            places, entries = places[same], entries[same]
            equal = (self._ngrams[entries] == windows[places]).all(axis=1)
            found.append((places[equal], entries[equal]))
            entries = entries + 1
        none = np.zeros(0, np.int64)
        return np.concatenate([none, *(one for one, _ in found)]), np.concatenate([none, *(one for _, one in found)])


@dataclass
class Spoiled:
    """What the parent counts, in input order: documents that share words with each evaluation file, and examples."""

    files: list[str]
    documents: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    def absorb(self, hits: Sequence[Hit]) -> None:
        """Count a chunk."""
        for hit in hits:
            name = self.files[hit.file]
            self.documents[name] = self.documents.get(name, 0) + 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append({"file": name, "words": hit.words})
                _LOG.warning("a document shares with %s: %s", name, hit.words[:200])


def read_evaluation(paths: Sequence[Path]) -> dict[str, list[str]]:
    """The texts of evaluation files, by path; what cannot be read is a UserError."""
    files = {str(path): _texts(path) for path in paths}
    for path, texts in files.items():
        if not any(map(words_of, texts)):
            raise UserError(f"--contamination {path}: holds no words; expected a text, or JSON with strings")
    return files


def _texts(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--contamination {path}: no such file; expected a text, or JSON (.jsonl .ndjson .json)")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--contamination {path}: not UTF-8 at byte {error.start}; unpack or convert it") from error
    return list(_strings(_json(path, text))) if path.suffix in _JSON else [text]


def _json(path: Path, text: str) -> Any:
    """The values of JSON lines, or of a file that is one JSON value."""
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if path.suffix != ".json":
                raise UserError(f"--contamination {path}:{number}: not JSON ({error}); mend or remove it") from error
            return _whole(path, text)
    return values


def _whole(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"--contamination {path}: not JSON ({error}); mend it") from error


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value at any depth, but for keys."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case list() as values:
                waiting += reversed(values)
            case dict() as pairs:
                waiting += reversed(pairs.values())


def _groups(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    start = characters = 0
    for end, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= _GROUP_CHARACTERS or end == len(texts):
            yield start, texts[start:end]
            start, characters = end, 0


def _hash_windows(numbers: np.ndarray, ngram: int) -> np.ndarray:
    """uint64 [len - ngram + 1]: a hash of each run of ``ngram`` numbers."""
    mixed = _mixed(numbers)
    size = len(numbers) - ngram + 1
    hashes = np.zeros(size, np.uint64)
    for step in range(ngram):
        hashes *= _FACTOR
        hashes += mixed[step : step + size]
    return hashes ^ (hashes >> np.uint64(29))


def _hash_rows(rows: np.ndarray) -> np.ndarray:
    """The same of each row of int32 [n-grams, n]."""
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes *= _FACTOR
        hashes += _mixed(column)
    return hashes ^ (hashes >> np.uint64(29))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64: numbers spread over 64 bits (the finalizer of splitmix64)."""
    mixed = numbers.astype(np.uint64) * _FACTOR
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
