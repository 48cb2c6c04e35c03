"""Questions with known answers: multiple choice by likelihood, exact match by generation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.request import Request
from megapatch.tools.generate import lines
from megapatch.tools.generate.likelihood import Pair, Scored, encode_pair
from megapatch.tools.generate.lines import BadLine
from megapatch.tools.generate.means import share
from megapatch.tools.generate.prompts import Reader

FIELDS = ("id", "prompt", "messages", "choices", "answer", "max_new_tokens", "stop")


@dataclass(frozen=True)
class Question:
    """One line; with ``choices`` the answer is one of them, else any of ``answers`` is to be generated."""

    name: str | int
    where: str
    text: str
    choices: tuple[str, ...] = ()
    right: int = 0
    answers: tuple[str, ...] = ()
    request: Request | None = None


@dataclass(frozen=True)
class File:
    """Questions of one file."""

    name: str
    questions: Sequence[Question]

    def longest(self, reader: Reader) -> int:
        """Tokens of the longest prompt with its answer."""
        made = [pair for question in self.questions for pair in pairs(question, reader)]
        choices = [len(pair.context) + len(pair.target) for pair in made]
        asked = [question.request for question in self.questions if question.request is not None]
        texts = [len(one.prompt) + one.sampling.max_new_tokens for one in asked]
        return max([*choices, *(min(length, reader.max_length) for length in texts)])


def read(path: Path, reader: Reader, limit: int | None) -> list[Question]:
    """The questions of a file of JSON lines (UserError that names the line)."""
    found = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if limit is not None and number > limit:
                break
            where = f"{path}:{number}"
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise BadLine(f"{where}: not UTF-8 ({error.reason}); convert the file") from error
            found.append(_question(lines.parsed(text, where), number - 1, where, reader))
    if not found:
        raise UserError(f"{path}: empty; expected questions, one a line")
    return found


def _question(line: dict[str, Any], index: int, where: str, reader: Reader) -> Question:
    if unknown := sorted(set(line) - set(FIELDS)):
        raise BadLine(f"{where}: field {unknown[0]!r} is not known; known: {', '.join(FIELDS)}")
    asked = {name: line[name] for name in line if name not in ("choices", "answer")}
    prompt = reader.prompt(asked, index, where)
    assert prompt.text is not None
    if "choices" not in line:
        said = line.get("answer")
        answers: Any = [said] if isinstance(said, str) else said
        if not _texts(answers):
            raise BadLine(f"{where}: answer {str(line.get('answer'))[:40]}; expected a text, or a list of right ones")
        return Question(prompt.id, where, prompt.text, answers=tuple(answers), request=prompt.request)
    choices = line["choices"]
    if not _texts(choices) or len(choices) < 2 or "" in choices:
        raise BadLine(f"{where}: choices {str(choices)[:60]}; expected a list of two texts or more")
    return Question(prompt.id, where, prompt.text, tuple(choices), _right(line.get("answer"), choices, where))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _right(answer: Any, choices: list[str], where: str) -> int:
    """The place of the right choice: its number from 0, or its text."""
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise BadLine(f"{where}: answer {answer!r}; expected one of the choices, or its number from 0")


def pairs(question: Question, reader: Reader) -> list[Pair]:
    """Context and target for each choice; a context that is too long loses its beginning."""
    found = []
    beginning = list(reader.tokenizer.prefix_ids)
    for choice in question.choices:
        context, target = encode_pair(reader.tokenizer.encode, question.text, choice)
        context = [*beginning, *context]
        if not context or not target or len(target) > reader.max_length:
            raise UserError(
                f"{question.where}: the choice {choice[:40]!r} has {len(target)} tokens after {len(context)}"
            )
        found.append(Pair(context[-(reader.max_length + 1 - len(target)) :], target))
    return found


def choose(question: Question, scored: Sequence[Scored]) -> dict[str, Any]:
    """What a question's scores say: the likeliest choice, and the likeliest for its length in characters."""
    totals = [one.total for one in scored]
    each = [total / len(choice) for total, choice in zip(totals, question.choices, strict=True)]
    chosen, chosen_norm = totals.index(max(totals)), each.index(max(each))
    return {
        "id": question.name,
        "answer": question.right,
        "chosen": chosen,
        "chosen_norm": chosen_norm,
        "logprobs": totals,
        "right": chosen == question.right,
        "right_norm": chosen_norm == question.right,
    }


@dataclass(frozen=True)
class Match:
    """How a generated text is compared with the right ones."""

    extract: re.Pattern[str] | None = None
    ignore_case: bool = False

    def row(self, question: Question, text: str) -> dict[str, Any]:
        """What was said, and whether it is right."""
        said = self.said(text)
        right = said is not None and said in {self._plain(answer) for answer in question.answers}
        return {"id": question.name, "answer": list(question.answers), "text": text, "found": said, "right": right}

    def said(self, text: str) -> str | None:
        """The answer in a text: its last match of the pattern, or all of it, without blanks around."""
        if self.extract is not None:
            found = list(self.extract.finditer(text))
            if not found:
                return None
            text = next((group for group in found[-1].groups() if group is not None), found[-1][0])
        return self._plain(text)

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


def results(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of question in a file."""
    found = []
    for measure, kept in (
        ("multiple choice", [row for row in rows if "chosen" in row]),
        ("exact match", [row for row in rows if "chosen" not in row]),
    ):
        if not kept:
            continue
        accuracy, error = share([row["right"] for row in kept])
        made = {"data": name, "measure": measure, "questions": len(kept), "right": sum(row["right"] for row in kept)}
        made |= {"accuracy": accuracy, "accuracy_stderr": error}
        if measure == "multiple choice":
            made["accuracy_norm"], made["accuracy_norm_stderr"] = share([row["right_norm"] for row in kept])
        found.append(made)
    return found
