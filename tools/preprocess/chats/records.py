"""Conversations, preference pairs and prompts from records in the shapes in which they are published."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megapatch.models.chat import ASSISTANT, Chat
from megapatch.models.chat_template import REASONING, Message
from megapatch.tools.preprocess.reading.records import BadRecord

ChatFormat = Literal["auto", "messages", "conversations", "instruction", "completion", "preference", "prompts"]
_ROLES = {  # names of ShareGPT-like data -> roles that chat templates know
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that begin alike; only what follows the prompt has weight."""

    chosen: Chat
    rejected: Chat


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to be answered, and the answer to be compared with, where there is one."""

    chat: Chat
    answer: str | None


def take_messages(record: Record) -> Chat:
    """``messages``: objects with ``role`` and ``content``; beside them ``tools``."""
    return _chat(_list(record, "messages"), record, "messages")


def take_conversations(record: Record) -> Chat:
    """``conversations``: objects with ``from`` and ``value``; beside them ``system`` and ``tools``."""
    listed = _list(record, "conversations")
    messages = [_from_sharegpt(one, f"conversations[{number}]") for number, one in enumerate(listed)]
    return _chat([*_system(record), *messages], record, "conversations")


def take_instruction(record: Record) -> Chat:
    """``instruction``, ``input``, ``output``; beside them ``system`` and ``history``: [question, answer] pairs."""
    question = _text(record, "instruction")
    if record.get("input"):
        question += "\n" + _text(record, "input")
    messages = _system(record)
    for number, pair in enumerate(_list(record, "history") if record.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord(f"history[{number}] is {_kind(pair)}, expected an array of two strings")
        messages += [_message("user", pair[0]), _message(ASSISTANT, pair[1])]
    return _chat([*messages, _message("user", question), _message(ASSISTANT, _text(record, "output"))], record, "")


def take_completion(record: Record) -> Chat:
    """``prompt`` and ``completion``, each text or messages; only the completion has weight."""
    return _answered(record, "completion", _prompt(record))


def take_auto(record: Record) -> Chat:
    """A conversation in the shape that its keys say."""
    for key, take in _BY_KEY.items():
        if key in record:
            return take(record)
    if "chosen" in record and "rejected" in record:
        raise BadRecord("keys 'chosen' and 'rejected': preference data, which need --chat-format preference")
    if "prompt" in record:
        raise BadRecord("key 'prompt' without 'completion': a prompt alone needs --chat-format prompts")
    raise BadRecord(f"none of the keys {', '.join(map(repr, _BY_KEY))}; keys found: {_keys(record)}")


def take_preference(record: Record) -> Preference:
    """``prompt``, ``chosen``, ``rejected``, each text or messages; without ``prompt``, what both begin with is one."""
    if record.get("prompt") is not None:
        prompt = _prompt(record)
    else:
        prompt = _shared(_list(record, "chosen"), _list(record, "rejected"))
    return Preference(_answered(record, "chosen", prompt), _answered(record, "rejected", prompt))


def take_prompt(record: Record) -> Prompt:
    """``prompt``, text or messages; ``answer``, text or a number, may be there."""
    messages, answer = _prompt(record), record.get("answer")
    if isinstance(answer, int | float):
        answer = json.dumps(answer)
    if answer is not None and not isinstance(answer, str):
        raise BadRecord(f"'answer' is {_kind(answer)}, expected a string or a number")
    if messages[-1]["role"] == ASSISTANT:
        raise BadRecord("'prompt' ends with a message of the assistant, expected one to be answered")
    return Prompt(_chat(messages, record, "prompt"), answer)


_BY_KEY: dict[str, Callable[[Record], Chat]] = {
    "messages": take_messages,
    "conversations": take_conversations,
    "instruction": take_instruction,
    "completion": take_completion,
}
_TAKES: dict[str, Callable[[Record], Any]] = _BY_KEY | {
    "auto": take_auto,
    "preference": take_preference,
    "prompts": take_prompt,
}


def taker(form: ChatFormat) -> Callable[[Any], Any]:
    """What makes a Chat, a Preference or a Prompt of a record's JSON value, or raises BadRecord."""
    take = _TAKES[form]

    def checked(record: Any) -> Any:
        if not isinstance(record, dict):
            raise BadRecord(f"{_kind(record)} found, expected an object")
        return take(record)

    return checked


def _answered(record: Record, key: str, prompt: list[Message]) -> Chat:
    """The prompt and what stands under ``key``, which may repeat the prompt; only what follows it has weight."""
    answer = _value(record, key)
    if isinstance(answer, str):
        answer = [_message(ASSISTANT, answer)]
    elif not isinstance(answer, list):
        raise BadRecord(f"{key!r} is {_kind(answer)}, expected a string or an array of messages")
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    chat = _chat([*prompt, *answer], record, key)
    weights = chat.weights or _usual_weights(chat.messages)
    return Chat(chat.messages, chat.tools, [0.0] * len(prompt) + weights[len(prompt) :])


def _shared(one: list[Any], other: list[Any]) -> list[Message]:
    """The messages that both begin with, up to the last that is not the assistant's."""
    number = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    while number and isinstance(one[number - 1], dict) and one[number - 1].get("role") == ASSISTANT:
        number -= 1
    if not number:
        raise BadRecord("no key 'prompt', and 'chosen' and 'rejected' do not begin with the same messages")
    return one[:number]


def _prompt(record: Record) -> list[Message]:
    prompt = _value(record, "prompt")
    if isinstance(prompt, str):
        return [*_system(record), _message("user", prompt)]
    if not isinstance(prompt, list) or not prompt:
        found = "an empty array" if prompt == [] else _kind(prompt)
        raise BadRecord(f"'prompt' is {found}, expected a string or an array of messages")
    return [*_system(record), *(_checked(message, f"prompt[{number}]") for number, message in enumerate(prompt))]


def _from_sharegpt(one: Any, where: str) -> Message:
    if not isinstance(one, dict):
        raise BadRecord(f"{where} is {_kind(one)}, expected an object")
    if "role" in one and "from" not in one:
        return one
    name, value = one.get("from"), one.get("value")
    if name == "function_call":
        call = _parsed(value, where)
        return {"role": ASSISTANT, "content": "", "tool_calls": [{"type": "function", "function": call}]}
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRecord(f"{where}: 'from' is {name!r}, expected one of {', '.join([*_ROLES, 'function_call'])}")
    if not isinstance(value, str):
        raise BadRecord(f"{where}: 'value' is {_kind(value)}, expected a string")
    more = {key: entry for key, entry in one.items() if key not in ("from", "value")}
    return {"role": role, "content": value, **more}


def _chat(messages: list[Any], record: Record, where: str) -> Chat:
    """Checked messages, with their weights taken out of them, and the record's tools."""
    if not messages:
        raise BadRecord(f"{where!r} is empty, expected messages")
    weights: list[float] | None = None
    plain = []
    for number, message in enumerate(messages):
        _checked(message, f"{where}[{number}]")
        if "weight" in message or "train" in message:
            weight = _weight(message, f"{where}[{number}]")
            message = {key: value for key, value in message.items() if key not in ("weight", "train")}
            if weight is not None:
                weights = weights or _usual_weights(messages)
                weights[number] = weight
        plain.append(message)
    return Chat(plain, _tools(record), weights)


def _usual_weights(messages: list[Any]) -> list[float]:
    return [float(isinstance(message, dict) and message.get("role") == ASSISTANT) for message in messages]


def _checked(message: Any, where: str) -> Message:
    """The message, when it is one."""
    if not isinstance(message, dict):
        raise BadRecord(f"{where} is {_kind(message)}, expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRecord(f"{where}: 'role' is {_kind(role)}, expected a string; keys found: {_keys(message)}")
    if isinstance(content, str):
        return message
    if content is None:
        if not any(message.get(key) for key in ("tool_calls", *REASONING)):
            raise BadRecord(
                f"{where}: 'content' is null, expected a string or an array of typed parts"
                if "content" in message
                else f"{where}: no 'content'; keys found: {_keys(message)}"
            )
    elif not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise BadRecord(f"{where}: 'content' is {_kind(content)}, expected a string or an array of typed parts")
    elif other := [part["type"] for part in content if part["type"] != "text"]:
        raise BadRecord(f"{where}: 'content' has a part of type {other[0]!r}; only text can be encoded")
    return message


def _weight(message: Message, where: str) -> float | None:
    """What ``weight`` or ``train`` says; None where they are null."""
    said = [(key, message[key]) for key in ("weight", "train") if message.get(key) is not None]
    if len(said) > 1:
        raise BadRecord(f"{where}: both 'weight' and 'train'; expected one of them")
    if not said:
        return None
    key, value = said[0]
    if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
        raise BadRecord(f"{where}: {key!r} is {value!r}, expected 0 or more")
    if value and message["role"] != ASSISTANT:
        raise BadRecord(f"{where}: {key!r} is {value!r} for {message['role']!r}; only the assistant's can be trained")
    return float(value)


def _tools(record: Record) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str):  # as tables hold them, whose columns have one type
        tools = _parsed(tools, "tools") if tools else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(f"'tools' is {_kind(tools)}, expected an array of objects")
    return tools


def _parsed(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise BadRecord(f"{where}: {_kind(text)} found, expected JSON ({error})") from None


def _system(record: Record) -> list[Message]:
    return [_message("system", _text(record, "system"))] if record.get("system") else []


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _value(record: Record, key: str) -> Any:
    if key not in record:
        raise BadRecord(f"no key {key!r}; keys found: {_keys(record)}")
    return record[key]


def _text(record: Record, key: str) -> str:
    value = _value(record, key)
    if not isinstance(value, str):
        raise BadRecord(f"{key!r} is {_kind(value)}, expected a string")
    return value


def _list(record: Record, key: str) -> list[Any]:
    value = _value(record, key)
    if not isinstance(value, list):
        raise BadRecord(f"{key!r} is {_kind(value)}, expected an array")
    return value


def _keys(record: Record) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "none"


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")
