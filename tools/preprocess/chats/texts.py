"""From a record to the texts to encode: read, rendered with the model's template, checked for special tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megapatch.models.chat import Chat, Renderer, Sample
from megapatch.models.chat_shown import says_something, silent_turn, unshown
from megapatch.models.chat_special import Special
from megapatch.models.chat_template import ChatError, Message
from megapatch.tools.preprocess.chats.records import Preference, Prompt
from megapatch.tools.preprocess.reading.json_lines import refuse_surrogates
from megapatch.tools.preprocess.reading.records import BadRecord

SpecialInText = Literal["allow", "literal", "fail"]
_SHOWN = 60  # characters of a conversation in examples


@dataclass(frozen=True, slots=True)
class Item:
    """A record: for each output of ids its texts (several where the template rewrites history), and the answer."""

    sides: list[list[Sample]]
    begins: str  # what the first user says, to know the record by
    answer: bytes | None = None
    spelled: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # of "prompt", "chosen" and "rejected" those that say nothing
    unshown: list[str] = field(default_factory=list)  # fields that the template leaves out, one a message


@dataclass(frozen=True)
class Texts:
    """Makes an Item of a JSON value, or raises BadRecord."""

    take: Callable[[Any], Chat | Preference | Prompt]
    renderer: Renderer
    special: Special
    special_in_text: SpecialInText = "allow"
    message_weights: bool = False

    def __call__(self, record: Any) -> Item:
        found = self.take(record)
        try:
            if isinstance(found, Preference):
                return self._preference(found)
            return self._prompt(found) if isinstance(found, Prompt) else self._chat(found)
        except ChatError as error:
            raise BadRecord(str(error)) from None

    def of_row(self, record: Any) -> Item:
        """An Item of a row of a table, whose structs have each key that any row has, null where there is none."""
        return self(_without_nulls(record) if isinstance(record, dict) else record)

    def _chat(self, chat: Chat) -> Item:
        self._refuse_weights(chat)
        samples, spelled = self._samples(chat)
        return Item([samples], _begins(chat), None, spelled, unshown=self._unshown(chat, samples[0].text))

    def _preference(self, pair: Preference) -> Item:
        sides: list[list[Sample]] = []
        spelled, left_out = [], []
        for name, chat in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            self._refuse_weights(chat)
            samples, mine = self._samples(chat)
            if len(samples) > 1:
                raise BadRecord(f"{name!r} has several turns that the template rewrites; only its last can be compared")
            sides.append(samples)
            spelled += mine
            left_out += self._unshown(chat, samples[0].text)
        if [sample.text for sample in sides[0]] == [sample.text for sample in sides[1]]:
            raise BadRecord("'chosen' and 'rejected' are the same, so that there is nothing to prefer")
        parts = {
            "prompt": _of(pair.chosen, trained=False),
            "chosen": _of(pair.chosen, trained=True),
            "rejected": _of(pair.rejected, trained=True),
        }
        empty = [name for name, messages in parts.items() if not any(map(says_something, messages))]
        return Item(sides, _begins(pair.chosen), None, spelled, empty, left_out)

    def _prompt(self, prompt: Prompt) -> Item:
        chat, spelled = self._checked(prompt.chat)
        sample = Sample(self.renderer.prompt(chat), [], [])
        refuse_surrogates(sample.text)
        if chat is not prompt.chat:
            sample = self.special.unmarked(sample)
        refuse_surrogates(prompt.answer)
        answer = None if prompt.answer is None else prompt.answer.encode()
        left_out = self._unshown(prompt.chat, sample.text)
        empty = [] if any(map(says_something, prompt.chat.messages)) else ["prompt"]
        return Item([[sample]], _begins(prompt.chat), answer, spelled, empty, left_out)

    def _samples(self, chat: Chat) -> tuple[list[Sample], list[str]]:
        """The texts of a conversation, each with something to train on, and special tokens that it spells out."""
        checked, spelled = self._checked(chat)
        samples = self.renderer.samples(checked)
        for sample in samples:
            refuse_surrogates(sample.text)
            if not sample.spans:
                raise BadRecord(_nothing_trained(chat))
        if checked is not chat:
            samples = [self.special.unmarked(sample) for sample in samples]
        return samples, spelled

    def _checked(self, chat: Chat) -> tuple[Chat, list[str]]:
        """The conversation, with marks where special tokens shall stay text, and those that it spells out."""
        spelled = self.special.spelled(chat)
        if spelled and self.special_in_text == "fail":
            raise BadRecord(f"a message spells the special token {spelled[0]!r}; mend it, or see --special-in-text")
        return (self.special.marked(chat) if spelled and self.special_in_text == "literal" else chat), spelled

    def _unshown(self, chat: Chat, text: str) -> list[str]:
        """Fields that the template leaves out; a turn of the assistant of which nothing is left is a bad line."""
        hidden = unshown(self.renderer.template_for(chat), chat, text)
        if hidden and (number := silent_turn(chat, hidden)) is not None:
            said = " and ".join(name for where, name in hidden if where == number)
            raise BadRecord(
                f"messages[{number}]: the template writes nothing of what the assistant says here ({said}); give one "
                "that does with --template FILE"
            )
        return [name for _, name in hidden]

    def _refuse_weights(self, chat: Chat) -> None:
        if self.message_weights or chat.weights is None:
            return
        if other := next((weight for weight in chat.weights if weight not in (0, 1)), None):
            raise BadRecord(f"a message has weight {other:g}; weights other than 0 and 1 need --message-weights")


def _of(chat: Chat, *, trained: bool) -> list[Message]:
    """The messages with a weight, or those without."""
    pairs = zip(chat.messages, chat.weights or [], strict=False)
    return [message for message, weight in pairs if (weight > 0) == trained]


def _without_nulls(value: Any) -> Any:
    """The value without members of objects that are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _nothing_trained(chat: Chat) -> str:
    roles = [str(message.get("role")) for message in chat.messages]
    if "assistant" not in roles:
        return f"nothing to train on: no message of the assistant; roles found: {', '.join(dict.fromkeys(roles))}"
    if chat.weights is not None and not any(chat.weights):
        return "nothing to train on: every message has weight 0"
    return "nothing to train on: the template writes nothing of what the assistant says between its generation tags"


def _begins(chat: Chat) -> str:
    said: Mapping[str, Any] = next((one for one in chat.messages if one.get("role") == "user"), chat.messages[0])
    content = said.get("content")
    return content[:_SHOWN] if isinstance(content, str) else ""
