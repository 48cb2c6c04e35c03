"""What may stand behind a Tokenizer: `tokenizers`, or transformers for what exists as Python code only."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from megapatch.models import spm_file
from megapatch.models.cli import UserError
from megapatch.models.tokenizer_folder import SPECIAL, Folder, add_tokens, said_around, token_text

FAST, SPM = "tokenizer.json", "tokenizer.model"
EXTRA = "pip install 'megapatch[tokenizers]'"
PLAIN_SPM = (  # classes that are their SentencePiece model and no more; Baichuan's, code of the folder, is Llama's
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "BaichuanTokenizer",
)
_PROBE = "a"


class Engine(Protocol):
    """What a tokenizer needs; encoding adds no special tokens."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def vocabulary(self) -> dict[str, int]: ...
    def size(self) -> int:
        """The largest id + 1, also where ids have holes."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text."""

    def special(self, name: str) -> int | None:
        """The id of eos_token and the like where the folder's files do not say it."""

    def prefix(self) -> list[int]:
        """The special ids that the model expects before a text."""

    def suffix(self) -> list[int]:
        """The special ids that the model expects after a text."""

    def special_tokens(self) -> dict[int, str]:
        """The text of each token that is special, by id."""


class Fast:
    """The `tokenizers` library on a tokenizer.json, on a SentencePiece model, or on what transformers made."""

    def __init__(
        self, folder: Folder, backend: Any, special: Mapping[str, str | None], around: tuple[list[int], list[int]]
    ) -> None:
        self.backend, self._special, (self._prefix, self._suffix) = backend, special, around
        add_tokens(folder, backend)
        backend.no_truncation()  # a tokenizer.json may hold a maximum length: it would cut documents in silence
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            raise UserError(f"{folder.path / FAST}: model.dropout {backend.model.dropout} makes ids random; set null")

    def encode(self, texts: list[str]) -> list[list[int]]:
        prepared = [self.prepared(text) for text in texts]
        return [one.ids for one in self.backend.encode_batch_fast(prepared, add_special_tokens=False)]

    def prepared(self, text: str) -> str:
        """A text as the backend takes it."""
        return text

    def take_literally(self) -> None:
        """From now on, special tokens that a text spells out are text like any other."""
        self.backend.encode_special_tokens = True

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return cast(str, self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def vocabulary(self) -> dict[str, int]:
        return cast(dict[str, int], self.backend.get_vocab(with_added_tokens=True))

    def size(self) -> int:
        return max(self.vocabulary().values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        return cast(int | None, self.backend.token_to_id(token))

    def special(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self.token_id(token)

    def prefix(self) -> list[int]:
        return self._prefix

    def suffix(self) -> list[int]:
        return self._suffix

    def special_tokens(self) -> dict[int, str]:
        added = self.backend.get_added_tokens_decoder().items()
        return {number: token.content for number, token in added if token.special}


class Spm(Fast):
    """A SentencePiece model, whose texts begin with a blank."""

    def __init__(self, folder: Folder, model: spm_file.Model) -> None:
        said = {name: token_text(folder.config.get(name)) for name in SPECIAL}
        special = model.special() | {name: text for name, text in said.items() if text}
        super().__init__(folder, spm_file.backend(model), special, ([], []))
        self._model = model
        self._prefix, self._suffix = said_around(folder, self.special)

    def prepared(self, text: str) -> str:
        return self._model.led(text, literal=self.backend.encode_special_tokens)


class Slow:
    """A tokenizer that exists only as Python code in transformers, or in its folder."""

    def __init__(self, python_tokenizer: Any) -> None:
        self.python_tokenizer = python_tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        made = self.python_tokenizer  # not its encode: with transformers 5, that of ChatGLM fails in padding nothing
        return [cast(list[int], made.convert_tokens_to_ids(made.tokenize(text))) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return cast(
            str,
            self.python_tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            ),
        )

    def vocabulary(self) -> dict[str, int]:
        return cast(dict[str, int], self.python_tokenizer.get_vocab())

    def size(self) -> int:  # each of these leaves out special tokens in one model or another
        made = self.python_tokenizer
        ids = (*self.vocabulary().values(), *made.added_tokens_decoder)
        return max(len(made), made.vocab_size, max(ids, default=-1) + 1)

    def token_id(self, token: str) -> int | None:
        made = self.python_tokenizer
        found, unknown = made.convert_tokens_to_ids(token), made.unk_token
        missing = unknown not in (None, token) and found == made.convert_tokens_to_ids(unknown)
        return None if missing else cast(int | None, found)

    def special(self, name: str) -> int | None:
        return cast(int | None, getattr(self.python_tokenizer, f"{name}_id", None))

    def prefix(self) -> list[int]:
        return self._around()[0]

    def suffix(self) -> list[int]:
        return self._around()[1]

    def _around(self) -> tuple[list[int], list[int]]:
        ids = self.encode([_PROBE])[0]
        return around(self.python_tokenizer.build_inputs_with_special_tokens(ids), ids)

    def special_tokens(self) -> dict[int, str]:
        made = self.python_tokenizer
        added = {number: str(token) for number, token in made.added_tokens_decoder.items() if token.special}
        return added | dict(zip(made.all_special_ids, made.all_special_tokens, strict=True))


def load(folder: Folder, trust_remote_code: bool) -> Engine:
    """The engine for what the folder holds."""
    model = folder.path / SPM
    for path in (folder.path / FAST, model):
        _refuse_pointer(path)
    if (folder.path / FAST).is_file():
        return _of_json(folder)
    spm = model.is_file() and spm_file.is_spm(model)
    plain = folder.config.get("tokenizer_class", None if folder.code else PLAIN_SPM[0]) in PLAIN_SPM
    if spm and plain:
        return Spm(folder, spm_file.read(model))
    if folder.code:
        _refuse_code(folder, folder.code, trust_remote_code)
    else:
        _refuse_missing(model, spm)
    return _of_transformers(folder, trust_remote_code)


def _refuse_code(folder: Folder, code: str, trust_remote_code: bool) -> None:
    if not trust_remote_code:
        raise UserError(
            f"{folder.path}: its tokenizer is Python code of the folder ({code} in tokenizer_config.json), "
            "which is not run unasked; read it, then give --trust-remote-code, or put a tokenizer.json there"
        )
    if "--" in code:
        raise UserError(f"{folder.path}: the code of its tokenizer lies elsewhere ({code}); put the files there")


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and path.open("rb").read(30).startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a pointer of Git LFS, not the file itself; get it with: git lfs pull")


def _of_json(folder: Folder) -> Engine:
    import tokenizers

    path = folder.path / FAST
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer that this version of `tokenizers` reads ({error})") from error
    if "add_bos_token" in folder.config:  # transformers lets it decide, whatever tokenizer.json says
        said = said_around(folder, lambda name: backend.token_to_id(token_text(folder.config.get(name)) or ""))
        return Fast(folder, backend, {}, said)
    with_special, without = (backend.encode(_PROBE, add_special_tokens=add).ids for add in (True, False))
    return Fast(folder, backend, {}, around(with_special, without))


def _of_transformers(folder: Folder, trust_remote_code: bool) -> Engine:
    import transformers

    try:
        made = transformers.AutoTokenizer.from_pretrained(
            str(folder.path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # its many ways to say that a package or a file is missing; remote code may raise all
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{folder.path}: no tokenizer.json, and transformers {transformers.__version__} cannot load the rest "
            f"({reason}); install what it names, or make a tokenizer.json with a version that can"
        ) from error
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None:
        return Slow(made)
    special = {name: getattr(made, name, None) for name in SPECIAL}
    return Fast(folder, backend, special, around(made.encode(_PROBE), made.encode(_PROBE, add_special_tokens=False)))


def _refuse_missing(model: Path, spm: bool) -> None:
    """Name the packages that transformers needs for a tokenizer.model: it would take it for another format."""
    if not model.is_file():
        return
    if spm:
        spm_file.read(model)  # or transformers takes a damaged one for another format
    needed = ("sentencepiece", "google.protobuf") if spm else ("tiktoken",)
    missing = [name for name in needed if not _is_there(name)]
    if missing:
        raise UserError(f"{model}: transformers needs {' and '.join(missing)} to read it; {EXTRA}")


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def around(whole: list[int], part: list[int]) -> tuple[list[int], list[int]]:
    """What comes before and after ``part`` in ``whole``; nothing where it is not there."""
    at = next((n for n in range(len(whole)) if whole[n : n + len(part)] == part), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(part) :])
