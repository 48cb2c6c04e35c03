"""The gigatoken library as an engine: some thirty times faster than `tokenizers`, and not trusted."""

import importlib.metadata
import importlib.util
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.tokenizer import Tokenizer

_PANIC = "PanicException"  # of Rust code; no Exception, and its class cannot be imported
_STATM = Path("/proc/self/statm")
_MAX_GROWTH = 96 << 20  # bytes of memory gained before the engine is loaded again, which takes a twentieth of a second
_EXTRA = "pip install 'megapatch[fast]'"


class Unusable(Exception):
    """Why an engine cannot serve, in words."""


class Gigatoken:
    """gigatoken on what the reference has loaded. It runs in the calling thread: nothing stands in a fork's way."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        fast = tokenizer.fast
        if fast is None:
            raise Unusable(f"the tokenizer of {tokenizer.folder} is Python code, which gigatoken cannot run")
        if importlib.util.find_spec("gigatoken") is None:
            raise Unusable(f"gigatoken is not installed ({_EXTRA})")
        self.version = importlib.metadata.version("gigatoken")
        self._json, self._prepared, self._least = fast.backend.to_str(), fast.prepared, 0
        try:
            self._load()
        except BaseException as error:  # the library raises what it likes for what it does not know
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise Unusable(f"gigatoken {self.version} cannot load {tokenizer.folder} ({_reason(error)})") from error
        if self._backend.vocab_size > tokenizer.vocab_size:  # ids are stored in as few bytes as the vocabulary needs
            found = self._backend.vocab_size
            raise Unusable(f"gigatoken {self.version} has {found} ids, tokenizers {tokenizer.vocab_size}")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32 [tokens]. One call a text: a batch would come back through `awkward`, which
        costs half a second to import and is no faster."""
        now = _resident()
        self._least = min(self._least, now)  # what is given back after a load is given back late
        if now - self._least > _MAX_GROWTH:
            self._load()
        encode, prepared = self._backend.encode, self._prepared
        return [encode(prepared(text)) for text in texts]

    def _load(self) -> None:
        """Load, again where it was: the library remembers each word that it has met and never forgets one."""
        from gigatoken import gigatoken_rs

        self._backend: Any = None  # the old one's memory goes first
        self._backend = gigatoken_rs.load_hf_json(self._json)
        self._least = _resident()


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say (it is no Linux)."""
    try:
        return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE
    except FileNotFoundError:
        return 0


def _reason(error: BaseException) -> str:
    said = str(error).partition("Location:")[0]  # of its own source
    return " ".join(said.split())[:200] or type(error).__name__
