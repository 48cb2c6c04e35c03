"""The gigatoken library as an engine: some thirty times faster than `tokenizers`, and not trusted."""

import importlib.metadata
import importlib.util
from collections.abc import Sequence

import numpy as np

from megapatch.models.tokenizer import Tokenizer

_PANIC = "PanicException"  # of Rust code; no Exception, and its class cannot be imported
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
        from gigatoken import gigatoken_rs

        self.version = importlib.metadata.version("gigatoken")
        try:
            backend = gigatoken_rs.load_hf_json(fast.backend.to_str())
        except BaseException as error:  # the library raises what it likes for what it does not know
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise Unusable(f"gigatoken {self.version} cannot load {tokenizer.folder} ({_reason(error)})") from error
        if backend.vocab_size > tokenizer.vocab_size:  # ids are stored in as few bytes as the vocabulary needs
            raise Unusable(f"gigatoken {self.version} has {backend.vocab_size} ids, tokenizers {tokenizer.vocab_size}")
        self._encode, self._prepared = backend.encode, fast.prepared

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32 [tokens]. One call a text: a batch would come back through `awkward`, which
        costs half a second to import and is no faster."""
        encode, prepared = self._encode, self._prepared
        return [encode(prepared(text)) for text in texts]


def _reason(error: BaseException) -> str:
    said = str(error).partition("Location:")[0]  # of its own source
    return " ".join(said.split())[:200] or type(error).__name__
