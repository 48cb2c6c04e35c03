"""From a conversation to texts with the characters to be trained on; one conversation gives one text, or several where
the model's template writes earlier turns differently once the conversation goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from megapatch.models.chat_template import ChatError, Message, Rendered, Span, Template

ASSISTANT = "assistant"
OnRewritten = Literal["fail", "split", "keep"]
_REASONING = "reasoning_content"
_SHOWN = 30  # characters of a text in messages


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. ``weights`` has the weight of each message; None: 1 for the assistant's, 0 for all others."""

    messages: list[Message]
    tools: list[Any] | None = None
    weights: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, and its trained parts: spans [start, end) in characters, in order, and the weight of each.

    ``literal``: parts that spell a special token and are to be encoded as text.
    """

    text: str
    spans: list[Span]
    weights: list[float]
    literal: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Renderer:
    """A template and how to use it. ``with_tools`` is for conversations with tools, where the tokenizer has another;
    ``ends`` are the special tokens by their text: blanks after the last of them in a turn are not trained."""

    template: Template
    with_tools: Template | None = None
    ends: Sequence[str] = ()
    on_rewritten: OnRewritten = "fail"
    train_generation_prompt: bool = False

    def template_for(self, chat: Chat) -> Template:
        """The template that writes this conversation."""
        return self.with_tools if self.with_tools is not None and chat.tools else self.template

    def prompt(self, chat: Chat) -> str:
        """The text of a conversation whose next words are the assistant's."""
        return self.template_for(chat).render(chat.messages, chat.tools, add_generation_prompt=True).text

    def samples(self, chat: Chat) -> list[Sample]:
        """Texts in which each turn with a weight is trained once, as the model would have said it; one at least."""
        template = self.template_for(chat)
        whole = template.render(chat.messages, chat.tools)
        turns = [i for i, message in enumerate(chat.messages) if message.get("role") == ASSISTANT]
        if template.tagged and (self.on_rewritten == "keep" or not self._suspicious(template, chat, whole, turns)):
            return [self._tagged(template, chat, whole, turns)]
        trained = [turn for turn in turns if chat.weights is None or chat.weights[turn]]
        return _Turns(self, template, chat, trained).samples(whole)

    def _suspicious(self, template: Template, chat: Chat, whole: Rendered, turns: list[int]) -> bool:
        """May a turn of ``whole`` read otherwise than when it was said? Then each is rendered on its own."""
        if len(whole.spans) != len(turns) or (len(turns) > 1 and rewrites(template)):
            return True
        return any(
            not _says(whole.text[start:end], chat.messages[turn])
            for turn, (start, end) in zip(turns[:-1], whole.spans, strict=False)
        )

    def _tagged(self, template: Template, chat: Chat, whole: Rendered, turns: list[int]) -> Sample:
        weights = [1.0] * len(whole.spans)
        if chat.weights is not None:
            if len(whole.spans) != len(turns):
                raise ChatError(
                    f"{len(turns)} assistant messages have weights, but the template tags {len(whole.spans)} parts"
                )
            weights = [chat.weights[turn] for turn in turns]
        return self.sample(template, whole.text, whole.spans, weights)

    def sample(self, template: Template, text: str, spans: list[Span], weights: list[float]) -> Sample:
        """Leaves out what has weight 0, and adds the generation prompts where they shall be trained."""
        kept = [(span, weight) for span, weight in zip(spans, weights, strict=True) if weight and span[0] < span[1]]
        if self.train_generation_prompt:
            prompt = generation_prompt(template)
            kept = [((start - _ending(text, start, prompt), end), weight) for (start, end), weight in kept]
        return Sample(text, [span for span, _ in kept], [weight for _, weight in kept])

    @cached_property
    def texts_of_ends(self) -> tuple[str, ...]:
        """``ends`` without empty ones, as str.endswith takes them."""
        return tuple(filter(None, self.ends))

    def trimmed(self, text: str, start: int, end: int) -> Span:
        """A turn without the blanks after its last special token, which the model never says."""
        last = len(text[start:end].rstrip())
        return (start, start + last) if text[start : start + last].endswith(self.texts_of_ends) else (start, end)


class _Turns:
    """Finds the turns of a conversation by rendering what comes before and up to each of them."""

    def __init__(self, renderer: Renderer, template: Template, chat: Chat, turns: list[int]) -> None:
        self.renderer, self.template, self.chat, self.turns = renderer, template, chat, turns
        self._rendered: dict[tuple[int, bool], Rendered] = {}

    def upto(self, number: int, prompt: bool = False) -> Rendered:
        """The first ``number`` messages, with the generation prompt or without."""
        if (number, prompt) not in self._rendered:
            self._rendered[number, prompt] = self.template.render(
                self.chat.messages[:number], self.chat.tools, add_generation_prompt=prompt
            )
        return self._rendered[number, prompt]

    def samples(self, whole: Rendered) -> list[Sample]:
        self._rendered[len(self.chat.messages), False] = whole
        found, left, number = [], self.turns, len(self.chat.messages)
        while True:
            spans = {turn: self.spans(turn, self.upto(number)) for turn in left if turn < number}
            kept = {turn: some for turn, some in spans.items() if some is not None}
            left = [turn for turn in left if turn not in kept]
            found.append(self._sample(self.upto(number).text, kept))
            if not left:
                return [sample for sample in found if sample.spans] or found[:1]
            self._refuse(left, number)
            number = left[-1] + 1

    def _sample(self, text: str, kept: Mapping[int, list[Span]]) -> Sample:
        weights = self.chat.weights
        pairs = [(span, 1.0 if weights is None else weights[turn]) for turn, spans in kept.items() for span in spans]
        return self.renderer.sample(self.template, text, [span for span, _ in pairs], [weight for _, weight in pairs])

    def _refuse(self, left: list[int], number: int) -> None:
        if left[-1] + 1 == number:
            before, said = self.upto(number - 1, prompt=True).text, self.upto(number).text
            written = said[max(0, len(before) - _SHOWN) :][: 2 * _SHOWN]
            raise ChatError(
                f"messages[{number - 1}]: the generation prompt ends with {before[-_SHOWN:]!r}, but the turn is "
                f"written {written!r}, so that where the assistant begins is unknown; "
                "see --template-arguments, or give a template with generation tags"
            )
        if self.renderer.on_rewritten == "fail":
            raise ChatError(
                f"messages[{left[-1]}]: the template writes this turn differently once the conversation goes on; "
                "--on-rewritten-history split makes samples in which each turn reads as it was said"
            )

    def spans(self, turn: int, whole: Rendered) -> list[Span] | None:
        """What ``turn`` says in ``whole``; None where it does not read there as when it was said."""
        said = self.upto(turn + 1)
        end = self._shared(said.text, whole.text)
        if end is None:
            return None
        if self.template.tagged:
            kept = [span for span in said.spans if span[1] <= end]
            later = said.spans[len(kept) :]
            same = whole.spans[: len(kept)] == kept and all(start >= end for start, _ in later)
            return kept[len(self.upto(turn).spans) :] if same else None
        before = self.upto(turn, prompt=True).text
        if not said.text.startswith(before):
            return None
        return [self.renderer.trimmed(said.text, len(before), end)]

    def _shared(self, said: str, whole: str) -> int | None:
        """Where in both the turn ends that ``said`` ends with; None where ``whole`` reads otherwise.

        Phi-3 writes an end of the conversation after its last turn, which is no part of the turn.
        """
        if whole.startswith(said):
            return len(said)
        ends = self.renderer.texts_of_ends
        same = next((i for i, (a, b) in enumerate(zip(said, whole, strict=False)) if a != b), len(whole))
        end = max((at + len(token) for token in ends if (at := said.rfind(token, 0, same)) >= 0), default=0)
        while end < same and said[end].isspace():
            end += 1
        closing = said[end:]
        for token in ends:
            closing = closing.replace(token, "")
        return None if closing.strip() else end


def _says(text: str, message: Message) -> bool:
    """Whether ``text`` holds all that a message says."""
    for part in (message.get("content"), message.get(_REASONING)):
        if part and (not isinstance(part, str) or part.strip() not in text):
            return False
    return True


def _ending(text: str, at: int, part: str) -> int:
    """The length of ``part`` where ``text`` has it just before ``at``, else 0."""
    return len(part) if part and text.endswith(part, 0, at) else 0


@cache
def generation_prompt(template: Template) -> str:
    """What the template adds for the assistant to begin; empty where it adds nothing."""
    messages = [{"role": "user", "content": "a"}]
    without, added = (template.render(messages, add_generation_prompt=add).text for add in (False, True))
    return added.removeprefix(without) if added.startswith(without) else ""


def untrained_end(template: Template, specials: Sequence[str]) -> str | None:
    """What of a turn's end is not trained, in words; None where each turn is trained to its end."""
    try:
        said = template.render([_ASK, _SAY])
    except ChatError:
        return None
    if not template.tagged:
        ended = said.text.rstrip().endswith(tuple(filter(None, specials)))
        return None if ended else "the chat template writes no special token after a turn"
    rest = said.text[said.spans[-1][1] :].lstrip() if said.spans else ""
    token = next((token for token in specials if token and rest.startswith(token)), None)
    return f"the generation tags of the chat template leave out {token}, which ends a turn" if token else None


@cache
def rewrites(template: Template) -> bool:
    """Whether the template writes an earlier turn of any of a few short conversations differently."""
    return any(_rewrites(template, *probe) for probe in _PROBES)


def _rewrites(template: Template, messages: list[Message], tools: list[Any] | None = None) -> bool:
    try:
        whole = template.render(messages, tools).text
        parts = [template.render(messages[:number], tools).text for number in range(2, len(messages), 2)]
    except ChatError:  # no template takes all of the probes
        return False
    return not all(whole.startswith(part) for part in parts)


_ASK, _SAY = {"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}
_TOOLS = [{"type": "function", "function": {"name": "f", "description": "c", "parameters": {}}}]
_CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
_CALL, _RESULT = {"role": ASSISTANT, "content": "", "tool_calls": _CALLS}, {"role": "tool", "name": "f", "content": "e"}
_PROBES: tuple[tuple[list[Message], list[Any] | None], ...] = (
    ([_ASK, _SAY, _ASK, _SAY], None),
    ([_ASK, _SAY | {_REASONING: "d"}, _ASK, _SAY | {_REASONING: "d"}], None),
    ([_ASK, _SAY | {"content": "<think>\nd\n</think>\n\nb"}, _ASK, _SAY], None),
    ([_ASK, _CALL, _RESULT, _SAY], _TOOLS),
)
