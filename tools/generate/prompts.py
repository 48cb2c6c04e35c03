"""Prompts from text or JSON lines; every line is checked before anything is generated."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megapatch.models.cli import UserError
from megapatch.models.request import Request, Sampling
from megapatch.models.tokenizer import Tokenizer

Format = Literal["auto", "jsonl", "text"]
_NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}
_FIELDS = ("id", "prompt", "prompt_token_ids", *_NUMBERS, "stop", "stop_token_ids")


@dataclass(frozen=True)
class Prompt:
    """One line of the input."""

    id: str | int  # as the line says, or its index from 0
    text: str | None  # None when the line holds token ids
    request: Request


@dataclass(frozen=True)
class Reader:
    """Turns lines into prompts for one model."""

    tokenizer: Tokenizer
    vocab_size: int
    max_length: int  # tokens of a prompt with its completion
    sampling: Sampling  # for what a line does not say
    add_bos: bool = False

    def read(self, source: str, format: Format) -> list[Prompt]:
        """The prompts of a file, or of stdin when ``source`` is '-'."""
        if source == "-":
            return self._lines(sys.stdin.buffer, "stdin", format)
        path = Path(source)
        if not path.exists() or path.is_dir():  # a pipe, such as <(command), is as good as a file
            found = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {found}; expected prompts, one a line")
        if format == "auto" and path.suffix in (".jsonl", ".txt"):
            format = "jsonl" if path.suffix == ".jsonl" else "text"
        with path.open("rb") as file:
            return self._lines(file, source, format)

    def texts(self, texts: Iterable[str]) -> list[Prompt]:
        """Prompts of the command line."""
        return [self._prompt({"prompt": text}, index, f"--prompt {text!r}") for index, text in enumerate(texts)]

    def _lines(self, file: BinaryIO, name: str, format: Format) -> list[Prompt]:
        prompts: list[Prompt] = []
        first_line: dict[str | int, int] = {}
        for number, text in _decoded(file, name):
            if format == "auto":
                format = "jsonl" if text.lstrip().startswith("{") else "text"
            where = f"{name}:{number}"
            prompt = self._prompt(_object(text, where) if format == "jsonl" else {"prompt": text}, number - 1, where)
            if prompt.id in first_line:
                raise UserError(f"{where}: id {prompt.id!r} is that of line {first_line[prompt.id]}; ids must differ")
            first_line[prompt.id] = number
            prompts.append(prompt)
        if not prompts:
            raise UserError(f"{name}: empty; expected prompts, one a line")
        return prompts

    def _prompt(self, line: Mapping[str, Any], index: int, where: str) -> Prompt:
        if unknown := sorted(set(line) - set(_FIELDS)):
            raise UserError(f"{where}: field {unknown[0]!r} is not known; known: {', '.join(_FIELDS)}")
        name = line.get("id", index)
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(f"{where}: id {name!r}; expected a string or an integer")
        text, ids = line.get("prompt"), line.get("prompt_token_ids")
        if (text is None) == (ids is None):
            raise UserError(f"{where}: expected one of prompt and prompt_token_ids")
        if ids is None:
            ids = self._encode(text, where)
        elif not _integers(ids):
            raise UserError(f"{where}: prompt_token_ids {str(ids)[:60]}; expected a list of integers")
        request = Request(ids, self._sampling(line, where), key=str(name))
        if problem := request.problem(self.vocab_size, self.max_length):
            raise UserError(f"{where}: {problem}")
        return Prompt(name, text, request)

    def _encode(self, text: Any, where: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"{where}: prompt {str(text)[:60]!r}; expected a string")
        ids = self.tokenizer.encode(text)
        if not self.add_bos:
            return ids
        bos = self.tokenizer.bos_id
        assert self.tokenizer.prefix_ids or bos is not None, "checked when the tool started"
        return [*(self.tokenizer.prefix_ids or (bos,)), *ids]

    def _sampling(self, line: Mapping[str, Any], where: str) -> Sampling:
        """The line's own fields over the command line's; stop strings and ids add to those."""
        changes: dict[str, Any] = {}
        for name, kind in _NUMBERS.items():
            value = line.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | kind):
                raise UserError(f"{where}: {name} {value!r}; expected {'an integer' if kind is int else 'a number'}")
            changes[name] = value
        stop = line.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise UserError(f"{where}: stop {stop!r}; expected a string or a list of strings")
        stop_ids = line.get("stop_token_ids", [])
        if not _integers(stop_ids):
            raise UserError(f"{where}: stop_token_ids {stop_ids!r}; expected a list of integers")
        changes["stop"] = (*self.sampling.stop, *stop)
        changes["stop_token_ids"] = (*self.sampling.stop_token_ids, *stop_ids)
        try:
            return replace(self.sampling, **changes)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


def _decoded(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and the lines without their ends."""
    for number, raw in enumerate(file, start=1):
        try:
            yield number, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: not UTF-8 ({error.reason}); convert the file") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); expected one object a line, or give --format text") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: JSON {type(found).__name__} found; expected an object")
    return found


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
