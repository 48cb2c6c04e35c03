"""The chat template of a tokenizer, ready to render."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapatch.models.chat_template import ChatError, Template, compile_template
from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer
from megapatch.models.tokenizer_folder import SPECIAL, token_text

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # variables that come from the conversations
_MARKER = re.compile(r"<\|[^|<>\s]+\|>")  # how special tokens are written by most
_ASK = {"role": "user", "content": "a"}
_PROBES = ([_ASK], [_ASK, {"role": "assistant", "content": "b"}, _ASK], [{"role": "system", "content": "c"}, _ASK])
_DEFAULT, _TOOLS = "default", "tool_use"  # the name that transformers looks for when a conversation has tools


def load_templates(
    tokenizer: Tokenizer,
    wanted: str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
) -> tuple[Template, Template | None]:
    """The template named ``wanted``, or in that file, or the tokenizer's own, and another one for tools if it has one.

    ``arguments`` are further variables that the template sees; ``date`` is what it takes for today.
    """
    variables = special_variables(tokenizer) | dict(arguments or {})
    texts = tokenizer.chat_templates
    if wanted is not None and wanted not in texts:
        made = [compile_template(_read(tokenizer, wanted), variables, where=wanted, date=date)]
        _refuse_unused(arguments or {}, made)
        return made[0], None
    name = _DEFAULT if wanted is None else wanted
    if name not in texts:
        found = f"only {', '.join(texts)}; choose one with --template" if texts else "none"
        raise UserError(
            f"{tokenizer.folder}: no chat template ({found}); give the model's with --template FILE, or put it there "
            "as chat_template.jinja"
        )
    made = [
        compile_template(texts[one], variables, where=f"{tokenizer.folder}: chat template {one}", date=date)
        for one in (name, _TOOLS)
        if one in texts
    ]
    with_tools = made[1] if wanted is None and len(made) > 1 else None
    _refuse_unused(arguments or {}, [made[0], with_tools] if with_tools else made[:1])
    return made[0], with_tools


def split_markers(tokenizer: Tokenizer, template: Template) -> list[str]:
    """The <|markers|> that the template writes and that are no tokens, so that they would be cut into pieces."""
    found: set[str] = set()
    for messages in _PROBES:
        try:
            found.update(_MARKER.findall(template.render(messages, add_generation_prompt=True).text))
        except ChatError:  # no template takes all of the probes
            continue
    return sorted(marker for marker in found if tokenizer.token_id(marker) is None)


def _refuse_unused(arguments: Mapping[str, Any], templates: Sequence[Template]) -> None:
    """A UserError for a variable that no template looks at."""
    known = set().union(*(template.names for template in templates))
    if unused := sorted(arguments.keys() - known):
        other = ", ".join(sorted(known - {*RESERVED, *SPECIAL})) or "no further variable"
        raise UserError(
            f"--template-arguments: the chat template does not use {', '.join(unused)}; it looks at {other}"
        )


def _read(tokenizer: Tokenizer, wanted: str) -> str:
    path = Path(wanted)
    if not path.is_file():
        named = ", ".join(tokenizer.chat_templates) or "none"
        raise UserError(f"--template {wanted}: neither a file nor a template of {tokenizer.folder} (it has: {named})")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("chat_template"), str):
        raise UserError(f"{path}: no key 'chat_template' with text; give a Jinja file, or a tokenizer_config.json")
    return str(found["chat_template"])


def special_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token and the like -> text, as templates see them."""
    files = [tokenizer.config]
    path = tokenizer.folder / "special_tokens_map.json"
    if path.is_file():
        files.append(json.loads(path.read_bytes()))
    found = {}
    for name in SPECIAL:
        text = next((text for said in files if (text := token_text(said.get(name)))), None)
        if text is not None:
            found[name] = text
    for name, number in (("bos_token", tokenizer.bos_id), ("pad_token", tokenizer.pad_id)):
        if name not in found and number is not None and number in tokenizer.special_tokens:
            found[name] = tokenizer.special_tokens[number]
    return found
