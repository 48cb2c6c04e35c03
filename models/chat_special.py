"""Special tokens that a message spells out: the template's own are tokens, those of messages may be forged."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from megapatch.models.chat import Chat, Sample
from megapatch.models.chat_template import ChatError, Span

_OPEN, _CLOSE = "\ufdd2", "\ufdd3"  # around special tokens that shall stay text; noncharacters, which no text holds
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_ESCAPED = "\\ufdd"  # a mark that a template has written as JSON escapes it


class Special:
    """Finds the texts of special tokens in conversations, and keeps them text where that is wanted."""

    def __init__(self, tokens: list[str]) -> None:
        tokens = sorted(filter(None, tokens), key=len, reverse=True)  # of two that begin alike the longer one is meant
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._heads = tuple({token[:2] for token in tokens})

    def spelled(self, chat: Chat) -> list[str]:
        """The special tokens in what messages and tools say, in order."""
        text = "\0".join(_strings([*chat.messages, *(chat.tools or ())]))
        if not any(head in text for head in self._heads):
            return []
        return self._pattern.findall(text)

    def marked(self, chat: Chat) -> Chat:
        """The conversation with marks around special tokens in its messages and tools."""
        return Chat(self._mark(chat.messages), self._mark(chat.tools), chat.weights)

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            if _MARKS.search(value):
                raise ChatError("a message holds U+FDD2 or U+FDD3, which are no characters")
            return self._pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
        if isinstance(value, dict):
            return {key: entry if key == "role" else self._mark(entry) for key, entry in value.items()}
        return [self._mark(entry) for entry in value] if isinstance(value, list) else value

    def unmarked(self, sample: Sample) -> Sample:
        """The sample of a marked conversation without marks, and which parts of it shall stay text."""
        places = [found.start() for found in _MARKS.finditer(sample.text)]
        kinds = "".join(_MARKS.findall(sample.text))
        if kinds != (_OPEN + _CLOSE) * (len(kinds) // 2) or _ESCAPED in sample.text:
            raise ChatError("the template takes a special token apart that a message spells out")

        def moved(at: int) -> int:
            return at - bisect_left(places, at)

        text = _MARKS.sub("", sample.text)
        spans = [(moved(start), moved(end)) for start, end in sample.spans]
        literal = tuple((moved(places[i]), moved(places[i + 1])) for i in range(0, len(places), 2))
        return Sample(text, spans, sample.weights, literal)

    def pieces(self, text: str, literal: tuple[Span, ...]) -> Iterator[tuple[str, bool]]:
        """``text`` cut at its special tokens, but for those at ``literal``; each piece, and whether it is a token."""
        kept, at = {start for start, _ in literal}, 0
        for found in self._pattern.finditer(text):
            if found.start() not in kept:
                if at < found.start():
                    yield text[at : found.start()], False
                yield found.group(), True
                at = found.end()
        if at < len(text):
            yield text[at:], False


def _strings(value: Any) -> Iterator[str]:
    """Every text in JSON values, roles and keys left out."""
    for entry in value:
        for key, part in entry.items() if isinstance(entry, dict) else ((None, entry),):
            if isinstance(part, str):
                if key != "role":
                    yield part
            elif isinstance(part, list | tuple):
                yield from _strings(part)
            elif isinstance(part, dict):
                yield from _strings([part])
