"""Prompts from text, JSON lines, OpenAI batches or flags; every line is checked before anything is generated."""

import codecs
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megapatch.models.chat import Chat, Renderer
from megapatch.models.chat_template import ChatError
from megapatch.models.cli import UserError
from megapatch.models.request import Request, Sampling
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.generate import lines
from megapatch.tools.generate.lines import BadLine

log = logging.getLogger(__name__)
Format = Literal["auto", "jsonl", "text", "openai"]
OnBadLine = Literal["fail", "skip"]


@dataclass(frozen=True)
class Prompt:
    """One line of the input."""

    id: str | int  # as the line says, or its index from 0
    index: int  # of its line, from 0
    text: str | None  # with the chat template's words; None when the line holds token ids
    request: Request
    logprobs: bool = False  # whether they are asked for
    url: str | None = None  # of a line of an OpenAI batch

    def requests(self) -> list[Request]:
        """One for each of its samples."""
        alone = replace(self.request, sampling=replace(self.request.sampling, n=1))
        return [replace(alone, sample=i) for i in range(self.request.sampling.n)]


@dataclass(frozen=True)
class Reader:
    """Turns lines into prompts for one model."""

    tokenizer: Tokenizer
    vocab_size: int
    max_length: int  # tokens of a prompt with its completion
    sampling: Sampling  # for what a line does not say
    renderer: Renderer | UserError  # or why there is none
    add_bos: bool = False
    logprobs: bool = False
    as_chat: bool = False
    system: str | None = None
    on_bad_line: OnBadLine = "fail"

    def read(self, source: str, format: Format) -> list[Prompt]:
        """The prompts of a file, or of stdin when ``source`` is '-'."""
        if source == "-":
            return self._lines(sys.stdin.buffer, "stdin", format)
        path = Path(source)
        if not path.exists() or path.is_dir():  # a pipe, such as <(command), is as good as a file
            found = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {found}; expected prompts, one a line")
        if format == "auto" and path.suffix == ".txt":
            format = "text"
        with path.open("rb") as file:
            return self._lines(file, source, format)

    def texts(self, texts: Iterable[str]) -> list[Prompt]:
        """Prompts of the command line."""
        return [self.prompt({"prompt": text}, index, f"--prompt {text!r}") for index, text in enumerate(texts)]

    def _lines(self, file: BinaryIO, name: str, format: Format) -> list[Prompt]:
        prompts: list[Prompt] = []
        first_line: dict[str | int, int] = {}
        number = skipped = 0
        for number, raw in enumerate(file, start=1):
            where = f"{name}:{number}"
            try:
                text = _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, where)
                format = _format(text, name) if format == "auto" else format
                prompt = self._of_line(text, format, number - 1, where)
                if prompt.id in first_line:
                    raise BadLine(f"{where}: id {prompt.id!r} is that of line {first_line[prompt.id]}; ids must differ")
            except BadLine as error:
                if self.on_bad_line == "fail":
                    raise
                skipped += 1
                log.warning("%s; skipped", error)
                continue
            first_line[prompt.id] = number
            prompts.append(prompt)
        if not prompts:
            raise UserError(f"{name}: {'empty' if not number else 'no good line'}; expected prompts, one a line")
        if skipped:
            log.warning("%s: %d of %d lines skipped", name, skipped, number)
        return prompts

    def _of_line(self, text: str, format: Format, index: int, where: str) -> Prompt:
        if format == "text":
            return self.prompt({"prompt": text}, index, where)
        line = lines.parsed(text, where)
        if format == "jsonl":
            return self.prompt(line, index, where)
        url, line = lines.of_openai(line, where)
        return replace(self.prompt(line, index, where), url=url)

    def prompt(self, line: Mapping[str, Any], index: int, where: str) -> Prompt:
        """One line in our own words (BadLine when it cannot be used)."""
        lines.checked(line, where)
        name = line.get("id", index)
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise BadLine(f"{where}: id {name!r}; expected a string or an integer")
        logprobs = line.get("logprobs", self.logprobs)
        if not isinstance(logprobs, bool):
            raise BadLine(f"{where}: logprobs {logprobs!r}; expected true or false")
        text, ids = self._content(line, where)
        request = Request(ids, lines.sampling(line, self.sampling, where), key=str(name))
        if problem := request.problem(self.vocab_size, self.max_length):
            raise BadLine(f"{where}: {problem}")
        return Prompt(name, index, text, request, logprobs)

    def _content(self, line: Mapping[str, Any], where: str) -> tuple[str | None, list[int]]:
        """The text of a prompt, if there is one, and its ids."""
        if (ids := line.get("prompt_token_ids")) is not None:
            if not lines.integers(ids):
                raise BadLine(f"{where}: prompt_token_ids {str(ids)[:60]}; expected a list of integers")
            return None, ids
        text, messages, tools = line.get("prompt"), line.get("messages"), line.get("tools")
        if messages is None and not isinstance(text, str):
            raise BadLine(f"{where}: prompt {str(text)[:60]!r}; expected a string")
        if messages is None and self.as_chat:
            if not text:
                raise BadLine(f"{where}: the prompt has no tokens; expected at least 1")
            messages = [{"role": "user", "content": text}]
        if messages is not None:
            text = _unicode(self.rendered(messages, tools, where), where)
            return text, self.tokenizer.encode(text)  # the template writes bos itself where the model wants it
        if tools is not None:
            raise BadLine(f"{where}: tools go with messages")
        assert isinstance(text, str)
        return _unicode(text, where), [*self._beginning(), *self.tokenizer.encode(text)]

    def _beginning(self) -> list[int]:
        if not self.add_bos:
            return []
        bos = self.tokenizer.bos_id
        assert self.tokenizer.prefix_ids or bos is not None, "checked when the tool started"
        return [*(self.tokenizer.prefix_ids or (bos,))]

    def rendered(self, messages: Any, tools: Any, where: str) -> str:
        """The text of a conversation whose next words are the assistant's."""
        if isinstance(self.renderer, UserError):
            raise self.renderer
        template = self.renderer.template.text
        found = lines.messages(messages, lambda role: f"'{role}'" in template or f'"{role}"' in template, where)
        if self.system is not None and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": self.system})
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise BadLine(f"{where}: tools {str(tools)[:60]}; expected a list of objects")
        try:
            return self.renderer.prompt(Chat(found, tools))
        except ChatError as error:
            raise BadLine(f"{where}: {error}") from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadLine(f"{where}: not UTF-8 ({error.reason}); convert the file") from error


def _unicode(text: str, where: str) -> str:
    """The text itself; half a surrogate pair, which JSON can spell, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{where}: {text[error.start : error.end]!r} is half a character; correct the text") from error
    return text


def _format(text: str, name: str) -> Literal["jsonl", "text", "openai"]:
    """What the first line looks like."""
    if not text.lstrip().startswith("{") and not name.endswith(".jsonl"):
        return "text"
    return "openai" if '"custom_id"' in text and '"body"' in text else "jsonl"
