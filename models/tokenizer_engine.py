"""What may stand behind a Tokenizer: `tokenizers`, or transformers for what exists as Python code only."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from megapatch.models import spm_file
from megapatch.models.cli import UserError

FAST, SPM = "tokenizer.json", "tokenizer.model"
EXTRA = "pip install 'megapatch[tokenizers]'"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_PROBE = "a"


class Engine(Protocol):
    """What a tokenizer needs; encoding adds no special tokens."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def vocabulary(self) -> dict[str, int]: ...
    def special(self, name: str) -> int | None:
        """The id of eos_token and the like where the folder's files do not say it."""

    def prefix(self) -> list[int]:
        """The special ids that the model expects before a text."""


@dataclass(frozen=True)
class Folder:
    """A folder with a tokenizer, and what it says of it."""

    path: Path
    config: Mapping[str, Any]  # tokenizer_config.json
    added: Mapping[str, Any]  # added_tokens.json: text -> id

    @property
    def code(self) -> str | None:
        """The class, in a Python file of the folder, that is the tokenizer."""
        said = self.config.get("auto_map")
        said = said.get("AutoTokenizer") if isinstance(said, dict) else said
        names = said if isinstance(said, list) else [said]
        return next((name for name in reversed(names) if isinstance(name, str)), None)


class Fast:
    """The `tokenizers` library on a tokenizer.json, on a SentencePiece model, or on what transformers made."""

    def __init__(self, folder: Folder, backend: Any, special: Mapping[str, str | None], prefix: list[int]) -> None:
        self.backend, self._special, self._prefix = backend, special, prefix
        add_tokens(folder, backend)
        backend.no_truncation()  # a tokenizer.json may hold a maximum length: it would cut documents in silence
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            raise UserError(f"{folder.path / FAST}: model.dropout {backend.model.dropout} makes ids random; set null")

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return cast(str, self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def vocabulary(self) -> dict[str, int]:
        return cast(dict[str, int], self.backend.get_vocab(with_added_tokens=True))

    def special(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def prefix(self) -> list[int]:
        return self._prefix


class Slow:
    """A tokenizer that exists only as Python code in transformers, or in its folder."""

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

    def special(self, name: str) -> int | None:
        return cast(int | None, getattr(self.python_tokenizer, f"{name}_id", None))

    def prefix(self) -> list[int]:
        return before(self.python_tokenizer.encode(_PROBE), self.encode([_PROBE])[0])


def load(folder: Folder, trust_remote_code: bool) -> Engine:
    """The engine for what the folder holds."""
    if (folder.path / FAST).is_file():
        return _of_json(folder)
    if folder.code and not trust_remote_code:
        raise UserError(
            f"{folder.path}: its tokenizer is Python code of the folder ({folder.code} in tokenizer_config.json), "
            "which is not run unasked; read it, then give --trust-remote-code, or put a tokenizer.json there"
        )
    if folder.code and "--" in folder.code:
        raise UserError(f"{folder.path}: the code of its tokenizer lies elsewhere ({folder.code}); put the files there")
    model = folder.path / SPM
    spm = not folder.code and model.is_file() and spm_file.is_spm(model)
    if spm and folder.config.get("tokenizer_class", _LLAMA[0]) in _LLAMA:
        return _of_spm(folder, spm_file.read(model))
    if not folder.code:
        _refuse_missing(model, spm)
    return _of_transformers(folder, trust_remote_code)


def _of_json(folder: Folder) -> Engine:
    import tokenizers

    path = folder.path / FAST
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer that this version of `tokenizers` reads ({error})") from error
    if "add_bos_token" in folder.config:  # transformers lets it decide, whatever tokenizer.json says
        bos = backend.token_to_id(token_text(folder.config.get("bos_token")) or "")
        return Fast(folder, backend, {}, [bos] if folder.config["add_bos_token"] and bos is not None else [])
    with_special, without = (backend.encode(_PROBE, add_special_tokens=add).ids for add in (True, False))
    return Fast(folder, backend, {}, before(with_special, without))


def _of_spm(folder: Folder, model: spm_file.Model) -> Engine:
    backend, special = spm_file.backend(model), model.special()
    for name in special.keys() & folder.config.keys():
        special[name] = token_text(folder.config[name]) or special[name]
    bos = backend.token_to_id(special.get("bos_token", ""))
    return Fast(folder, backend, special, [bos] if folder.config.get("add_bos_token") and bos is not None else [])


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
    prefix = before(made.encode(_PROBE), made.encode(_PROBE, add_special_tokens=False))
    return Fast(folder, backend, special, prefix)


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


def before(whole: list[int], part: list[int]) -> list[int]:
    """What comes before ``part`` in ``whole``."""
    at = next((n for n in range(len(whole)) if whole[n : n + len(part)] == part), 0)
    return whole[:at]


def add_tokens(folder: Folder, backend: Any) -> None:
    """Make added tokens of those that only the files beside tokenizer.json name, as transformers does."""
    from tokenizers import AddedToken

    said = {int(number): token for number, token in (folder.config.get("added_tokens_decoder") or {}).items()}
    said |= {number: text for text, number in folder.added.items() if number not in said}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token in sorted(said.items()):
        settings = dict(token) if isinstance(token, dict) else {"content": token, "special": False}
        text = settings.pop("content")
        if text not in known:
            flags = {key: bool(value) for key, value in settings.items() if key != "__type"}
            backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != number:
            raise UserError(
                f"{folder.path}: {text!r} is token {number} in its configuration, {backend.token_to_id(text)} in its "
                "vocabulary; the files are not of one tokenizer"
            )
    known |= {token.content for token in backend.get_added_tokens_decoder().values()}
    for text in map(token_text, [folder.config.get(name) for name in SPECIAL]):
        if text is not None and text not in known and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def token_text(token: Any) -> str | None:
    """The text of a token as configurations have it: text, an object with ``content``, or nothing."""
    return token.get("content") if isinstance(token, dict) else token
