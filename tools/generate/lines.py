"""What one line of the input may say, checked: fields of megapatch's own, or of the OpenAI batch format."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.request import Sampling

NUMBERS = {field.name: field.type for field in fields(Sampling) if field.type in (int, float, bool)}
CONTENT = ("prompt", "prompt_token_ids", "messages")
FIELDS = ("id", *CONTENT, "tools", *NUMBERS, "stop", "stop_token_ids", "logit_bias", "logprobs")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_LARGEST = 1 << 62  # integers of any size are JSON
_MOST_TEXTS = 10_000  # of one prompt
_WORDS = {int: "an integer", float: "a number", bool: "true or false"}

_ENDPOINTS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_ENVELOPE = ("custom_id", "method", "url", "body")
_RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",  # of vLLM, as are top_k, min_p, repetition_penalty and stop_token_ids
}
_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_ONLY = {"stream": False, "echo": False, "best_of": 1, "parallel_tool_calls": True, "tool_choice": "auto"}


class BadLine(UserError):
    """A line that cannot be used; --on-bad-line says what then happens."""


def parsed(text: str, where: str) -> dict[str, Any]:
    """The JSON object of a line."""
    if not text.strip():
        raise BadLine(f"{where}: an empty line; expected one object a line")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"{where}: not JSON ({error}); expected one object a line, or give --format text") from error
    if not isinstance(found, dict):
        raise BadLine(f"{where}: JSON {type(found).__name__} found; expected an object")
    return found


def of_openai(line: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The endpoint of a line of an OpenAI batch, and what it asks for in our own words."""
    url, body = _envelope(line, where)
    said = {name: value for name, value in body.items() if value is not None and name not in _WITHOUT_EFFECT}
    for name, only in _ONLY.items():
        if said.pop(name, only) != only:
            raise BadLine(f"{where}: {name} {body[name]!r} is not supported; leave it out")
    if unknown := sorted(set(said) - ({*FIELDS, *_RENAMED} - {"id"})):
        raise BadLine(f"{where}: field {unknown[0]!r} is not known in the body of {url}; leave it out")
    if _ENDPOINTS[url] not in said:
        raise BadLine(f"{where}: no {_ENDPOINTS[url]} in the body of {url}")
    made = {"id": line["custom_id"], **{_RENAMED.get(name, name): value for name, value in said.items()}}
    if isinstance(made.get("prompt"), list):
        made["prompt_token_ids"] = made.pop("prompt")
    if not isinstance(made.get("logprobs", False), bool):  # of /v1/completions: how many alternatives
        made |= {"logprobs": True, "top_logprobs": made["logprobs"]}
    if made.get("temperature") == 0:  # there they are without effect, and often given
        made = {name: value for name, value in made.items() if name not in ("top_p", "top_k", "min_p")}
    return url, made


def _envelope(line: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    if missing := [name for name in _ENVELOPE if name not in line]:
        raise BadLine(f"{where}: no {missing[0]}; a line of an OpenAI batch has {', '.join(_ENVELOPE)}")
    url, body = line["url"], line["body"]
    if not isinstance(url, str) or url not in _ENDPOINTS or line["method"] != "POST":
        raise BadLine(f"{where}: {line['method']} {url!r}; expected POST and one of {', '.join(_ENDPOINTS)}")
    if not isinstance(body, dict):
        raise BadLine(f"{where}: body is a JSON {type(body).__name__}; expected an object")
    return url, body


def checked(line: Mapping[str, Any], where: str) -> None:
    """Refuse fields that are not known, and lines without exactly one prompt."""
    if unknown := sorted(set(line) - set(FIELDS)):
        hint = "; for OpenAI batches give --format openai" if unknown[0] in (*_ENVELOPE, *_RENAMED) else ""
        raise BadLine(f"{where}: field {unknown[0]!r} is not known; known: {', '.join(FIELDS)}{hint}")
    if sum(line.get(name) is not None for name in CONTENT) != 1:
        raise BadLine(f"{where}: expected one of {', '.join(CONTENT[:-1])} and {CONTENT[-1]}")


def sampling(line: Mapping[str, Any], default: Sampling, where: str) -> Sampling:
    """The line's own fields over ``default``; stop strings, stop ids and biases add to those."""
    changes: dict[str, Any] = {}
    for name, kind in NUMBERS.items():
        value = line.get(name)
        if value is None:
            continue
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, bool | int | kind):
            raise BadLine(f"{where}: {name} {value!r}; expected {_WORDS[kind]}")
        if abs(value) > _LARGEST:
            raise BadLine(f"{where}: {name}: a number of {len(str(value))} digits; expected a smaller one")
        changes[name] = value
    stop = line.get("stop") or ([] if line.get("stop") != "" else [""])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise BadLine(f"{where}: stop {stop!r}; expected a string or a list of strings")
    changes["stop"] = (*default.stop, *stop)
    stop_ids = line.get("stop_token_ids") or []
    if not integers(stop_ids):
        raise BadLine(f"{where}: stop_token_ids {stop_ids!r}; expected a list of integers")
    changes["stop_token_ids"] = (*default.stop_token_ids, *stop_ids)
    changes["logit_bias"] = {**default.logit_bias, **_biases(line.get("logit_bias") or {}, where)}
    if changes.get("n", default.n) > _MOST_TEXTS:
        raise BadLine(f"{where}: n {changes['n']}: at most {_MOST_TEXTS}")
    try:
        return replace(default, **changes)
    except ValueError as error:
        raise BadLine(f"{where}: {error}") from error


def _biases(said: Any, where: str) -> dict[int, float]:
    try:
        return {int(token): _number(value) for token, value in said.items()}
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise BadLine(f"{where}: logit_bias {str(said)[:60]}; expected an object of token ids and numbers") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)


def messages(said: Any, known: Callable[[str], bool], where: str) -> list[dict[str, Any]]:
    """The messages of a line; ``known``: whether the template knows a further role. Parts of a text become one."""
    if not isinstance(said, list) or not said:
        raise BadLine(f"{where}: messages {str(said)[:60]}; expected a list of objects with role and content")
    found = []
    for number, message in enumerate(said):
        here = f"{where}: messages[{number}]"
        if not isinstance(message, dict):
            raise BadLine(f"{here} is a JSON {type(message).__name__}; expected an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not (role in ROLES or known(role)):
            raise BadLine(f"{here}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
        found.append({**message, "content": _text(message.get("content"), here, bool(message.get("tool_calls")))})
    if found[-1]["role"] == "assistant":
        raise BadLine(f"{where}: the last of messages is the assistant's; its next words are what is asked for")
    return found


def _text(content: Any, where: str, may_lack: bool) -> str:
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadLine(f"{where}: content {str(content)[:60]!r}; expected text")
    return content


def integers(value: Any) -> bool:
    """Whether it is a list of integers."""
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
