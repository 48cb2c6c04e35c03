"""The two libraries behind a Tokenizer: `tokenizers`, and transformers where a model has only Python code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from megapatch.models.cli import UserError


class Engine(Protocol):
    """What a tokenizer needs: encoding without added special tokens, decoding, and the vocabulary."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def vocabulary(self) -> dict[str, int]: ...


class Fast:
    """The `tokenizers` library on a tokenizer.json, or on what transformers made of an older folder."""

    def __init__(self, source: Any) -> None:
        import tokenizers

        self.backend = source
        if isinstance(source, Path):
            try:
                self.backend = tokenizers.Tokenizer.from_file(str(source))
            except Exception as error:  # the library raises bare Exception
                raise UserError(
                    f"{source}: not a tokenizer that this version of `tokenizers` reads ({error})"
                ) from error
        self.backend.no_truncation()  # a tokenizer.json may hold a maximum length: it would cut documents in silence
        self.backend.no_padding()
        if getattr(self.backend.model, "dropout", None):
            raise UserError(f"{source}: model.dropout {self.backend.model.dropout} makes ids random; set it to null")

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return cast(str, self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def vocabulary(self) -> dict[str, int]:
        return cast(dict[str, int], self.backend.get_vocab(with_added_tokens=True))


class Slow:
    """A tokenizer that exists only as Python code in transformers."""

    def __init__(self, python_tokenizer: Any) -> None:
        self.python_tokenizer = python_tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self.python_tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return cast(
            str,
            self.python_tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            ),
        )

    def vocabulary(self) -> dict[str, int]:
        return cast(dict[str, int], self.python_tokenizer.get_vocab())


def load_slow(folder: Path, trust_remote_code: bool) -> Engine:
    """The tokenizer of a folder without tokenizer.json, through transformers."""
    import transformers

    try:
        made = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # its many ways to say that a package, a file or the permission is missing
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: no tokenizer.json, and transformers cannot load the rest ({reason})") from error
    backend = getattr(made, "backend_tokenizer", None)
    return Slow(made) if backend is None else Fast(backend)
