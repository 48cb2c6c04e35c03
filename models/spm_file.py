"""A SentencePiece tokenizer.model as a `tokenizers` backend: read here, so that neither library nor code is needed.

The file is a protocol buffer, ModelProto of sentencepiece_model.proto (google/sentencepiece); its fields are numbered
there. The ids are the library's own for all text (of unigram models but for ties between equally good cuts); besides,
control pieces such as </s> that a text spells out are tokens, as in transformers.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
BLANK = "▁"  # what the pieces have for a blank
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TYPE, _SUFFIX, _BYTE_FALLBACK, _UNK, _BOS, _EOS, _PAD = 3, 24, 35, 45, 46, 47, 48  # of the trainer's settings
_CHARSMAP, _DUMMY_PREFIX, _SQUEEZE, _ESCAPE = 2, 3, 4, 5  # of the normalizer's


@dataclass(frozen=True)
class Model:
    """A tokenizer.model: (text, score, kind) of each piece in the order of ids, and the settings by field number."""

    path: Path
    pieces: list[tuple[str, float, int]]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]

    @property
    def control(self) -> tuple[str, ...]:
        """The pieces that stand for no text."""
        return tuple(text for text, _, kind in self.pieces if kind in (UNKNOWN, CONTROL))

    @property
    def leads(self) -> bool:
        """Whether texts begin with a blank that a normalizer cannot add: it would add one after each token, too."""
        return bool(self.normalizer.get(_DUMMY_PREFIX, 1)) and not self.normalizer.get(_SQUEEZE, 1)

    def led(self, text: str, *, literal: bool = False) -> str:
        """A text as ``backend`` takes it; what begins with a control piece is as it is, unless that is mere text."""
        as_it_is = not self.leads or (text.startswith(self.control) and not literal)
        return text if as_it_is or not text else BLANK + text

    def special(self) -> dict[str, str]:
        """eos_token and the like -> piece; those that the model has."""
        names = {"unk_token": (_UNK, "<unk>"), "bos_token": (_BOS, "<s>"), "eos_token": (_EOS, "</s>")}
        names["pad_token"] = (_PAD, "<pad>")
        said = {name: self.trainer.get(field, b"").decode() or usual for name, (field, usual) in names.items()}
        return {name: text for name, text in said.items() if text in self.control}


def is_spm(path: Path) -> bool:
    """Whether a file begins as a SentencePiece model does: with a piece (tiktoken's files begin with a letter)."""
    with path.open("rb") as file:
        return file.read(1) == bytes([_PIECES << 3 | 2])


def read(path: Path) -> Model:
    """The model in a file; one that is damaged or of a kind that is not supported is a UserError."""
    try:
        fields = [(number, value) for number, value in _fields(path.read_bytes())]
        pieces = [_piece(value) for number, value in fields if number == _PIECES]
        parts = {number: dict(_fields(value)) for number, value in fields if number != _PIECES}
    except (LookupError, ValueError, TypeError, struct.error) as error:
        raise UserError(f"{path}: not a SentencePiece model, or damaged ({error}); get the file again") from error
    model = Model(path, pieces, parts.get(_TRAINER, {}), parts.get(_NORMALIZER, {}))
    unsupported = {
        "a model type other than unigram and BPE": model.trainer.get(_TYPE, UNIGRAM) not in (UNIGRAM, BPE),
        "blanks at the end of words": model.trainer.get(_SUFFIX, 0),
        "blanks that stay blanks": not model.normalizer.get(_ESCAPE, 1),
        "rules for decoding": parts.get(_DENORMALIZER, {}).get(_CHARSMAP),
        "unused pieces": any(kind == UNUSED for _, _, kind in pieces),
        "no unknown piece": not any(kind == UNKNOWN for _, _, kind in pieces),
        "user-defined pieces and without repeated blanks": (
            model.normalizer.get(_SQUEEZE, 1) and any(kind == USER_DEFINED for _, _, kind in pieces)
        ),
    }
    for what in (what for what, found in unsupported.items() if found):
        raise UserError(f"{path}: a SentencePiece model with {what} is not supported; use the model's tokenizer.json")
    return model


def backend(model: Model) -> Any:
    """A `tokenizers.Tokenizer` with the ids of the model for texts that ``led`` has been over."""
    from tokenizers import AddedToken, Tokenizer, decoders

    made = Tokenizer(_engine(model))
    made.normalizer = _normalizer(model)
    decoding = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if model.normalizer.get(_DUMMY_PREFIX, 1) else []
    made.decoder = decoders.Sequence([*decoding, *strip])
    for text, _, kind in model.pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(text, normalized=False, special=kind != USER_DEFINED)])
    return made


def _engine(model: Model) -> Any:
    from tokenizers import models

    unknown = next(n for n, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    fallback = bool(model.trainer.get(_BYTE_FALLBACK, 0))
    if model.trainer.get(_TYPE, UNIGRAM) == UNIGRAM:
        return models.Unigram([(text, score) for text, score, _ in model.pieces], unknown, fallback)
    vocabulary = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=merges(model.pieces),
        unk_token=model.pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=fallback,
    )


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best score first: SentencePiece merges any two that do."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    found = []
    for number, (text, score) in enumerate(scores.items()):
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        found += [(-score, number, pair) for pair in pairs if pair[0] in scores and pair[1] in scores]
    return [pair for _, _, pair in sorted(found, key=lambda entry: entry[:2])]


def _normalizer(model: Model) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if charsmap := model.normalizer.get(_CHARSMAP):
        steps.append(normalizers.Precompiled(charsmap))
    if model.normalizer.get(_SQUEEZE, 1):
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.normalizer.get(_DUMMY_PREFIX, 1) and not model.leads:
        steps.append(normalizers.Prepend(BLANK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def _piece(message: bytes) -> tuple[str, float, int]:
    said = dict(_fields(message))
    return said[1].decode(), struct.unpack("<f", said.get(2, b"\0\0\0\0"))[0], said.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: integers, or the bytes of all else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if at + size > len(message):
            raise ValueError(f"field {key >> 3} is cut short")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
