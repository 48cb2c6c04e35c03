"""What a conversation says and its template does not write: reasoning, calls, content without a place in it."""

from collections.abc import Iterable
from typing import Any

from megapatch.models.chat import ASSISTANT, Chat
from megapatch.models.chat_template import REASONING, ChatError, Message, Template

TOOLS = -1  # in the place of a message's number
_SIGN = "Qx{}zk{}w"  # put where a field's text stood, to see whether the template writes it
Unshown = tuple[int, str]  # number of a message, or TOOLS, and its field


def unshown(template: Template, chat: Chat, text: str) -> list[Unshown]:
    """The fields of each message, and ``tools``, that the template leaves out of the conversation's ``text``.

    A field counts as shown where the template writes it while its message is the last: what is taken out of history
    later is another matter. Content that is in ``text`` as it stands is not looked at again.
    """
    asked: list[Unshown] = []
    at = 0
    for number, message in enumerate(chat.messages):
        at, found = _behind(message.get("content"), text, at)
        if not found or len(message) > 2:  # more than role and content
            asked += [(number, name) for name in _fields(message) if name != "content" or not found]
    if chat.tools:
        asked.append((TOOLS, "tools"))
    if not asked:
        return []
    signed = _signed(chat, asked)
    whole = _rendered(template, signed, len(chat.messages))
    missing = [one for one in asked if not _shows(whole, one)]
    return [one for one in missing if one[0] == TOOLS or not _shows(_rendered(template, signed, one[0] + 1), one)]


def silent_turn(chat: Chat, hidden: Iterable[Unshown]) -> int | None:
    """The first message of the assistant that says something of which nothing is shown."""
    for number in sorted({number for number, _ in hidden if number != TOOLS}):
        lost = {name for where, name in hidden if where == number}
        if chat.messages[number].get("role") == ASSISTANT and lost >= set(_fields(chat.messages[number])):
            return number
    return None


def says_something(message: Message) -> bool:
    """Whether a message has more than blanks."""
    return bool(_fields(message))


def _fields(message: Message) -> list[str]:
    """The fields that say something; reasoning by the first of its names that does."""
    found = ["content"] if _parts(message.get("content")) else []
    found += [name for name in REASONING if message.get(name)][:1]
    return [*found, "tool_calls"] if message.get("tool_calls") else found


def _parts(content: Any) -> list[str]:
    """The texts of a content, without the blanks around them; none of an empty one."""
    texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content or ()]
    return [text.strip() for text in texts if text.strip()]


def _behind(content: Any, text: str, at: int) -> tuple[int, bool]:
    """Whether all of a content is in ``text`` from ``at`` on, and where it ends there."""
    for part in [content.strip()] if type(content) is str else _parts(content):
        place = text.find(part, at)
        if place < 0:
            return at, False
        at = place + len(part)
    return at, True


def _shows(text: str | None, one: Unshown) -> bool:
    """Whether the signs of a field are in ``text``; a text that cannot be made (None) tells nothing."""
    return text is None or all(sign in text for sign in _signs(one))


def _signs(one: Unshown) -> list[str]:
    number, name = one
    return [_SIGN.format(name[:2], number)] + ([_SIGN.format("ar", number)] if name == "tool_calls" else [])


def _rendered(template: Template, chat: Chat, number: int) -> str | None:
    try:
        return template.render(chat.messages[:number], chat.tools).text
    except ChatError:  # a template may look into a text, and want another there
        return None


def _signed(chat: Chat, asked: Iterable[Unshown]) -> Chat:
    """The conversation with signs in the place of what is asked for."""
    messages, tools = [dict(message) for message in chat.messages], chat.tools
    for one in asked:
        sign, *more = _signs(one)
        if one == (TOOLS, "tools"):
            tools = [_named(tool, sign) for tool in tools or ()]
            continue
        message = messages[one[0]]
        value = message[one[1]]
        if one[1] == "tool_calls":
            message["tool_calls"] = [_called(call, sign, more[0]) for call in value]
        elif isinstance(value, list):
            message[one[1]] = [{"type": "text", "text": sign}]
        else:
            message[one[1]] = sign
    return Chat(messages, tools)


def _named(tool: Any, name: str) -> Any:
    """A tool with another name; as OpenAI writes it, in ``function``, or without."""
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _named(tool["function"], name)}
    return {**tool, "name": name}


def _called(call: Any, name: str, value: str) -> Any:
    """A call with signs for its name and for what it passes; where it passes nothing the name stands for both."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _called(call["function"], name, value)}
    given = call.get("arguments")
    if isinstance(given, dict) and given:
        return {**call, "name": name, "arguments": dict.fromkeys(given, value)}
    if isinstance(given, str) and given.strip(" {}"):
        return {**call, "name": name, "arguments": f'{{"{value}": 1}}'}
    return {**call, "name": name + value}
