"""A model's own chat template: Jinja text from its tokenizer folder, rendered as transformers would, without it.

A template sees ``messages``, ``tools``, ``add_generation_prompt`` and the tokenizer's special tokens by name. What
stands between ``{% generation %}`` and ``{% endgeneration %}`` is what the model itself says; it comes back as spans.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from megapatch.models.cli import UserError

LEAST_JINJA = (3, 1, 6)  # older ones have known ways out of the sandbox, and templates come with models of others
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # around what the model says; noncharacters, which no text holds
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first or second
Message = dict[str, Any]
Span = tuple[int, int]


class ChatError(ValueError):
    """Why a conversation cannot be rendered, masked or encoded."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation, and what its generation tags enclose: [start, end) in characters, in order."""

    text: str
    spans: list[Span]


class Template:
    """A compiled template; ``variables`` are what it sees beside the conversation, ``date`` what it calls now."""

    def __init__(self, text: str, variables: Mapping[str, Any], date: datetime.date | None = None) -> None:
        self.text = text
        made = _environment(date)
        self._template = made.from_string(text)
        self._names = jinja2.meta.find_undeclared_variables(made.parse(text)) - made.globals.keys()
        self._variables = {**self._template.globals, "documents": None, **variables}
        self.tagged = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text))

    @property
    def names(self) -> set[str]:
        """The variables that the template looks at and does not set itself."""
        return set(self._names)

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """The text of ``messages``; what the template refuses or cannot render is a ChatError."""
        try:
            seen = {
                **self._variables,
                "messages": [_as_templates_expect(message) for message in messages],
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
            context = self._template.new_context(seen, shared=True)  # which need not copy the globals each time
            text = "".join(self._template.root_render_func(context))
        except UserError:
            raise
        except Exception as error:  # a template is code of others on data of others: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"the chat template refuses it: {reason[:200]}") from error
        if not self.tagged:
            return Rendered(text, [])
        return _unmarked(text)


def compile_template(
    text: str, variables: Mapping[str, Any], *, where: str, date: datetime.date | None = None
) -> Template:
    """A Template; one that is not valid Jinja is a UserError that names ``where`` it came from."""
    found = tuple(int(number) for number in re.findall(r"\d+", jinja2.__version__)[:3])
    if found < LEAST_JINJA:
        least = ".".join(map(str, LEAST_JINJA))
        raise UserError(
            f"jinja2 {jinja2.__version__} found, {least} or newer needed for chat templates: pip install -U jinja2"
        )
    try:
        return Template(text, variables, date)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: not a chat template ({error.message})") from error


def _unmarked(marked: str) -> Rendered:
    """The text without its marks, and where they were."""
    first, *others = marked.split(_OPEN)
    parts, spans, at = [first], [], len(first)
    for part in others:
        said, _, rest = part.partition(_CLOSE)
        spans.append((at, at + len(said)))
        at += len(said) + len(rest)
        parts += (said, rest)
    if at != len(marked) - 2 * len(others) or _CLOSE in first or any(_CLOSE in part for part in parts[2::2]):
        raise ChatError("a message holds U+FDD0 or U+FDD1, which are no characters, or generation tags are nested")
    return Rendered("".join(parts), spans)


def _as_templates_expect(message: Message) -> Message:
    """A message without nulls (which templates would write as 'None'), its reasoning under the names they read."""
    if None in message.values():
        message = {key: value for key, value in message.items() if value is not None}
    for key in REASONING:
        if key in message:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return message


def _environment(date: datetime.date | None) -> jinja2.Environment:
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["namespace"] = _Namespace

    def now(form: str) -> str:
        if date is None:
            raise UserError("the chat template writes today's date; fix it with --date, or each day makes other data")
        return date.strftime(form)

    made.globals["strftime_now"] = now
    return made


class _Generation(jinja2.ext.Extension):
    """The block tag ``generation``: marks around its body, which keeps its variables to itself."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE)]
        return [marks[0], jinja2.nodes.Scope(body).set_lineno(line), marks[1]]


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose names may not reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self: a template may use every word
        for name in dict(*args[1:], **kwargs):
            _refuse_internal(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have {name!r}")


def _refuse(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
