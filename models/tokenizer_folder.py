"""What the files beside a vocabulary say of a tokenizer: added tokens, and what stands around a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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


def said_around(folder: Folder, special: Callable[[str], int | None]) -> tuple[list[int], list[int]]:
    """The ids before and after a text by add_bos_token and add_eos_token of tokenizer_config.json."""
    ids = {
        name: special(f"{name}_token") if folder.config.get(f"add_{name}_token") else None for name in ("bos", "eos")
    }
    bos, eos = ids["bos"], ids["eos"]
    return [] if bos is None else [bos], [] if eos is None else [eos]


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
