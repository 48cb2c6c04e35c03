"""Completions as JSON lines: what a row says, in which order rows are written, and which are there already."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megapatch.models.cli import UserError
from megapatch.models.request import Request
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.generate.prompts import Prompt

if TYPE_CHECKING:
    from megapatch.models.generation.sequences import Completion, Piece

Row = dict[str, Any]


@dataclass
class Task:
    """What one row of the output waits for: a sample of a prompt; all samples for a row of an OpenAI batch."""

    prompt: Prompt
    requests: list[Request]
    found: list["Completion"] = field(default_factory=list)

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the same name is of the same prompt."""
        text = row.get("prompt", self.prompt.text)
        return text == self.prompt.text or self.prompt.url is not None


def tasks(prompts: Iterable[Prompt]) -> Iterator[Task]:
    """The rows to be written, in the order of the input."""
    for prompt in prompts:
        requests = prompt.requests()
        yield from [Task(prompt, requests)] if prompt.url else [Task(prompt, [one]) for one in requests]


def remaining(wanted: Iterable[Task], rows: Iterable[Row]) -> list[Task]:
    """The tasks without those whose rows are there (UserError: a row of that name has another prompt)."""
    there = {_name(row): row for row in rows}
    found = []
    for task in wanted:
        sample = 0 if task.prompt.url else task.requests[0].sample
        row = there.get((task.prompt.id, sample))
        if row is None:
            found.append(task)
        elif not task.matches(row):
            raise UserError(
                f"--resume: the output has id {task.prompt.id!r} with the prompt {str(row.get('prompt'))[:40]!r}, the "
                f"input with {str(task.prompt.text)[:40]!r}; choose another --output"
            )
    return found


def _name(row: Row) -> tuple[Any, int]:
    return (row["custom_id"], 0) if "custom_id" in row else (row.get("id"), row.get("sample", 0))


class Clock:
    """When each request was begun, had its first token and ended, in seconds."""

    def __init__(self) -> None:
        self.begun: dict[int, float] = {}
        self.first: dict[int, float] = {}

    def watched(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests, each noted as it is taken."""
        for number, request in enumerate(requests):
            self.begun[number] = time.monotonic()
            yield request

    def on_piece(self, piece: "Piece") -> None:
        """Note the first token of a request."""
        self.first.setdefault(piece.number, time.monotonic())

    def timings(self, number: int) -> dict[str, float]:
        """Of a request that ends now."""
        start, now = self.begun[number], time.monotonic()
        first = self.first.get(number, now)
        return {"first_token_s": round(first - start, 4), "total_s": round(now - start, 4)}


class Results:
    """Takes completions in any order, writes rows in that of the prompts or as they finish."""

    def __init__(
        self,
        wanted: Sequence[Task],
        write: Callable[[Row], None],
        tokenizer: Tokenizer,
        *,
        order: Literal["input", "finished"] = "input",
        model: str = "",
        clock: Clock | None = None,
    ) -> None:
        self.tasks, self._write, self._tokenizer, self._order = wanted, write, tokenizer, order
        self._model, self._clock = model, clock
        self.requests = [request for task in wanted for request in task.requests]
        self._task_of = [number for number, task in enumerate(wanted) for _ in task.requests]
        self._waiting: dict[int, Row] = {}
        self._next = self.num_done = 0

    def take(self, completion: "Completion") -> None:
        """Write the rows that are now due."""
        number = self._task_of[completion.number]
        task = self.tasks[number]
        task.found.append(completion)
        if len(task.found) < len(task.requests):
            return
        task.found.sort(key=lambda one: one.request.sample)
        row = openai_row(task, self._tokenizer, self._model) if task.prompt.url else native_row(task, self._tokenizer)
        if self._clock:
            row["timings"] = self._clock.timings(completion.number)
        task.found.clear()
        self.num_done += 1
        if self._order == "finished":
            self._write(row)
            return
        self._waiting[number] = row
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1


def native_row(task: Task, tokenizer: Tokenizer) -> Row:
    """A row of our own format, of one sample."""
    (completion,), prompt, sampling = task.found, task.prompt, task.requests[0].sampling
    row: Row = {"id": prompt.id, "index": prompt.index}
    if prompt.request.sampling.n > 1:
        row["sample"] = completion.request.sample
    if prompt.text is not None:
        row["prompt"] = prompt.text
    row |= {"text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason}
    if completion.finish_reason == "stop":
        row["stop"] = completion.stop
    if prompt.logprobs:
        row["logprobs"] = completion.logprobs
    if sampling.top_logprobs:
        row["top_logprobs"] = completion.top_logprobs
    if sampling.prompt_logprobs:
        row["prompt_logprobs"] = [None, *completion.prompt_logprobs]  # nothing comes before the first token
        if sampling.top_logprobs:
            row["prompt_top_logprobs"] = [None, *completion.prompt_top_logprobs]
    return row | {"usage": _usage(task)}


def openai_row(task: Task, tokenizer: Tokenizer, model: str) -> Row:
    """A row of an OpenAI batch's output, with all samples of a prompt."""
    chat = task.prompt.url == "/v1/chat/completions"
    name = f"{'chatcmpl' if chat else 'cmpl'}-{task.prompt.index}"
    usage = _usage(task)
    body = {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(task, completion, chat, tokenizer) for completion in task.found],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }
    response = {"status_code": 200, "request_id": f"req-{task.prompt.index}", "body": body}
    return {
        "id": f"batch_req_{task.prompt.index}",
        "custom_id": task.prompt.id,
        "response": response,
        "error": None,
    }


def _choice(task: Task, completion: "Completion", chat: bool, tokenizer: Tokenizer) -> Row:
    said = {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
    logprobs = None
    if task.prompt.logprobs:
        logprobs = (_chat_logprobs if chat else _text_logprobs)(completion, tokenizer)
    return {
        "index": completion.request.sample,
        **said,
        "finish_reason": completion.finish_reason,
        "logprobs": logprobs,
    }


def _chat_logprobs(completion: "Completion", tokenizer: Tokenizer) -> Row:
    def entry(token: int, logprob: float) -> Row:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    tops = completion.top_logprobs or [{} for _ in completion.token_ids]
    return {
        "content": [
            {**entry(token, logprob), "top_logprobs": [entry(*one) for one in top.items()]}
            for token, logprob, top in zip(completion.token_ids, completion.logprobs, tops, strict=True)
        ]
    }


def _text_logprobs(completion: "Completion", tokenizer: Tokenizer) -> Row:
    return {
        "tokens": [tokenizer.decode([token]) for token in completion.token_ids],
        "token_logprobs": completion.logprobs,
        "top_logprobs": [
            {tokenizer.decode([token]): logprob for token, logprob in top.items()} for top in completion.top_logprobs
        ],
    }


def _usage(task: Task) -> dict[str, int]:
    return {
        "prompt_tokens": len(task.prompt.request.prompt),
        "completion_tokens": sum(len(completion.token_ids) for completion in task.found),
    }
