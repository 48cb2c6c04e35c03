"""What a tokenizer folder has beside tokenizer.json: special tokens by their purpose, and the chat template."""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.chatml import CHATML

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_MARKER = re.compile(r"<\|[^|<>\s]+\|>")  # how special tokens are written by most
_SAID = "what the assistant says"  # no template has it


def read_template(name: str, special: Sequence[str]) -> str | None:
    """The chat template that --chat-template names: none, chatml or a Jinja file, which may only use ``special``."""
    if name == "none":
        return None
    text = CHATML if name == "chatml" else _read(Path(name))
    missing = sorted({*_MARKER.findall(text + _rendered(text, name, special))} - {*special})
    if missing:
        raise UserError(
            f"--chat-template {name}: uses {' '.join(missing)}, which are no --special-tokens and would be split into "
            "pieces; add them there"
        )
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {path}: not UTF-8 at byte {error.start}") from None


def _rendered(text: str, name: str, special: Sequence[str]) -> str:
    """A short conversation, '' where the template refuses it; a template that is none is a UserError."""
    from megapatch.models.chat_template import ChatError, compile_template

    tokens = {"bos_token": "", "eos_token": special[0], "pad_token": special[0]}
    template = compile_template(text, tokens, where=name, date=datetime.date(2000, 1, 1))
    try:
        return template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _SAID}]).text
    except ChatError:
        return ""


def _stops(template: str | None, special: Sequence[str]) -> list[int]:
    """Ids after which a model stops: the first token, and the one that the template puts after what it says."""
    after = _rendered(template, "template", special).partition(_SAID)[2].lstrip() if template else ""
    ends = [special[0], *(token for token in special[1:] if after.startswith(token))]
    return [special.index(token) for token in ends]


def side_files(special: Sequence[str], template: str | None) -> dict[str, Any]:
    """The files beside tokenizer.json, by name: text, or a value to be written as JSON."""
    end, stops = special[0], _stops(template, special)
    tokens: dict[str, Any] = {"eos_token": end, "pad_token": end}
    if others := list(special[1:]):
        tokens["additional_special_tokens"] = others
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
        "special_tokens_map.json": tokens,
        "generation_config.json": {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": 0},
    }
    return files if template is None else {**files, "chat_template.jinja": template}
