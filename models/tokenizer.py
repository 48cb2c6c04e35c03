"""A tokenizer from a Hugging Face folder: text to ids, ids to text; transformers only where there is no other way."""

import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.commit import digest
from megapatch.models.tokenizer_engine import FAST, Fast, load
from megapatch.models.tokenizer_folder import Folder, token_text

VOCABULARIES = (
    FAST,
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.model",  # ice_text.model of ChatGLM, tiktoken.model of Moonlight
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
CODE = "*.py"  # copied with a tokenizer that is Python code
TRACKER = "latest_checkpointed_iteration.txt"
_BATCH_CHARACTERS = 1 << 19  # per call of the engine, whose results take ~100 bytes a token
_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not, or not yet, a character


class Tokenizer:
    """The tokenizer of a Hugging Face folder, a core checkpoint or a checkpoint root; adds no special tokens."""

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        self.folder = find_tokenizer(Path(folder))
        self.config = _read_json(self.folder / "tokenizer_config.json")
        self._engine = load(_described(self.folder), trust_remote_code)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; special tokens only where the text spells them out."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [ids for batch in _batches(texts) for ids in self._engine.encode(batch)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after another, int32 [tokens], and how many each has, int64 [texts]."""
        flat, lengths = [np.zeros(0, np.int32)], []
        for batch in _batches(texts):
            for ids in self._engine.encode(batch):
                flat.append(np.array(ids, np.int32))
                lengths.append(len(ids))
        return np.concatenate(flat), np.array(lengths, np.int64)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._engine.decode(ids, skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = False) -> "TextStream":
        """A decoder that takes ids one at a time, for text shown while it is generated."""
        return TextStream(self, skip_special_tokens)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added tokens included."""
        return self._engine.vocabulary()

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1, also where ids have holes."""
        return self._engine.size()

    @cached_property
    def eod_id(self) -> int:
        """The id that ends a document: the eos token of the folder's configuration."""
        found = self._special("eos_token")
        for name in ("generation_config.json", "config.json"):
            found = next(iter(self._eos_of(name)), None) if found is None else found
        if found is None:
            raise UserError(
                f"{self.folder}: no end-of-document token; expected eos_token in tokenizer_config.json or "
                "special_tokens_map.json, or eos_token_id in generation_config.json or config.json; add one of them"
            )
        return found

    @cached_property
    def bos_id(self) -> int | None:
        """The id of the configured bos token, None where there is none."""
        return self._special("bos_token")

    @cached_property
    def pad_id(self) -> int | None:
        """The id of the configured pad token, None where there is none."""
        return self._special("pad_token")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text: those of generation_config.json, else ``eod_id``."""
        return self._eos_of("generation_config.json") or (self.eod_id,)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The special ids that the model expects before a text: bos of Llama 2, [gMASK] sop of ChatGLM, often none."""
        return tuple(self._engine.prefix())

    @cached_property
    def suffix_ids(self) -> tuple[int, ...]:
        """The special ids that the model expects after a text, mostly none."""
        return tuple(self._engine.suffix())

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Id -> text of the special tokens."""
        return self._engine.special_tokens()

    @property
    def engine_version(self) -> str:
        """The version of the library that makes ids."""
        return importlib.metadata.version("tokenizers" if self.fast else "transformers")

    @property
    def fast(self) -> Fast | None:
        """The engine where it is of the `tokenizers` library, None for Python code."""
        return self._engine if isinstance(self._engine, Fast) else None

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Name -> Jinja text of each chat template; the usual one is "default". Files outdo tokenizer_config.json."""
        said = _read_json(self.folder / "chat_template.json").get("chat_template") or self.config.get("chat_template")
        listed = said if isinstance(said, list) else [{"name": "default", "template": said}] if said else []
        found = {entry["name"]: entry["template"] for entry in listed}
        for path in sorted(
            [*self.folder.glob("chat_template.jinja"), *self.folder.glob("additional_chat_templates/*")]
        ):
            found["default" if path.parent == self.folder else path.stem] = path.read_text(encoding="utf-8")
        return found

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of tokenizer.json (or the vocabulary file where there is none), as hex digits."""
        patterns = (*VOCABULARIES, "tokenizer_config.json")
        return digest(next(path for pattern in patterns for path in sorted(self.folder.glob(pattern))))

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, None when the vocabulary lacks it."""
        return self._engine.token_id(token)

    def _special(self, name: str) -> int | None:
        for where in ("tokenizer_config.json", "special_tokens_map.json"):
            token = token_text(_read_json(self.folder / where).get(name))
            if token is None:
                continue
            found = self.token_id(token)
            if found is None:
                raise UserError(f"{self.folder / where}: {name} {token!r} is not in the vocabulary; correct it")
            return found
        return self._engine.special(name)

    def _eos_of(self, file: str) -> tuple[int, ...]:
        eos = _read_json(self.folder / file).get("eos_token_id")
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


class TextStream:
    """Text piece by piece: the pieces of ``push`` and the last ``finish`` add up to ``decode`` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []  # those already shown, kept for the decoder's context, then those held back
        self._num_shown = 0

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._ids.append(int(token_id))
        piece = self._pending()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._ids, self._num_shown = self._ids[self._num_shown :], len(self._ids) - self._num_shown
        return piece

    def finish(self) -> str:
        """The text held back, U+FFFD for an unfinished character; the stream then starts anew."""
        piece = self._pending()
        self._ids, self._num_shown = [], 0
        return piece

    def _pending(self) -> str:
        shown = self._decode(self._ids[: self._num_shown])
        return self._decode(self._ids)[len(shown) :]


def find_tokenizer(folder: Path) -> Path:
    """The folder that holds the tokenizer: ``folder``, its ``hf``, or that of the root's latest checkpoint."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with {FAST}")
    for candidate in (folder, folder / "hf"):
        if (candidate / FAST).is_file():
            return candidate
    tracker = folder / TRACKER
    if tracker.is_file():
        return find_tokenizer(folder / _tracked(tracker))
    for candidate in (folder / "hf", folder):
        if any(any(candidate.glob(name)) for name in (*VOCABULARIES, "tokenizer_config.json")):
            return candidate
    raise UserError(
        f"{folder}: no tokenizer; looked for {FAST} and {', '.join(VOCABULARIES[1:])} there and in {folder / 'hf'}, "
        f"and for {TRACKER}; copy the tokenizer files of the model there"
    )


def _tracked(tracker: Path) -> str:
    text = tracker.read_text().strip()
    if text == "release":
        return text
    if not text.isdigit():
        raise UserError(f"{tracker}: {text[:40]!r} found, expected an iteration number or 'release'")
    return f"iter_{int(text):07d}"


def _described(folder: Path) -> Folder:
    return Folder(folder, _read_json(folder / "tokenizer_config.json"), _read_json(folder / "added_tokens.json"))


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat-template and generation files into the folder ``target``; the names copied."""
    found = find_tokenizer(source)
    patterns = (*TOKENIZER_FILES, CODE) if _described(found).code else TOKENIZER_FILES
    names = sorted({path.relative_to(found) for pattern in patterns for path in found.glob(pattern)})
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found / name, target / name)
    return [name.as_posix() for name in names]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """``texts`` in lists of about half a million characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: JSON {type(found).__name__} found, expected an object")
    return found
