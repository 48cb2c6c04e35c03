"""Completions as JSON lines, in the order of the input, each as soon as those before it are there."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megapatch.models.cli import UserError
from megapatch.models.commit import staged_file
from megapatch.tools.generate.prompts import Prompt

if TYPE_CHECKING:
    from megapatch.models.generation.engine import Statistics
    from megapatch.models.generation.sequences import Completion

log = logging.getLogger(__name__)
EVERY_S = 10.0


@contextmanager
def opened(target: str | None) -> Iterator[TextIO]:
    """stdout for '-', nowhere for None, else a file that has this name only when it is complete."""
    if target == "-":
        yield sys.stdout
        return
    if target is None:
        with open(os.devnull, "w") as file:
            yield file
        return
    with staged_file(Path(target)) as stage, stage.open("w", encoding="utf-8") as file:
        yield file


def refuse_existing(target: str, force: bool) -> None:
    """Refuse an output that would be overwritten, before any work."""
    if target != "-" and Path(target).exists() and not force:
        raise UserError(f"{target}: exists already; remove it, choose another --output, or pass --force")


class Results:
    """Takes completions in any order, writes them in that of the prompts."""

    def __init__(self, prompts: Sequence[Prompt], file: TextIO, logprobs: bool) -> None:
        self.prompts, self.file, self.logprobs = prompts, file, logprobs
        self.waiting: dict[int, Any] = {}  # completions by number
        self.num_written = self.num_done = 0
        self._started = self._told = time.monotonic()

    def take(self, completion: "Completion") -> None:
        """Write what is next in line."""
        self.waiting[completion.number] = completion
        self.num_done += 1
        while self.num_written in self.waiting:
            row = self._row(self.waiting.pop(self.num_written))
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
            self.num_written += 1

    def tell(self, statistics: "Statistics") -> None:
        """Say on stderr, every now and then, how far it is."""
        now = time.monotonic()
        if now - self._told >= EVERY_S:
            self._told = now
            rate = (statistics.prefill_tokens + statistics.decode_tokens) / (now - self._started)
            log.info("%d of %d prompts done, %.1f tokens/s", self.num_done, len(self.prompts), rate)

    def _row(self, completion: "Completion") -> dict[str, Any]:
        prompt = self.prompts[completion.number]
        row: dict[str, Any] = {"id": prompt.id, "index": completion.number}
        if prompt.text is not None:
            row["prompt"] = prompt.text
        row |= {"text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason}
        if self.logprobs:
            row["logprobs"] = completion.logprobs
        row["usage"] = {"prompt_tokens": len(prompt.request.prompt), "completion_tokens": len(completion.token_ids)}
        return row


def closing_line(statistics: "Statistics") -> str:
    """Tokens and rates of a whole run."""
    prefill, decode = (
        f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s"
        for tokens, seconds in (
            (statistics.prefill_tokens, statistics.prefill_s),
            (statistics.decode_tokens, statistics.decode_s),
        )
    )
    return f"prefill: {prefill}; decode: {decode}"
