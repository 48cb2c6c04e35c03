"""mp-generate --chat: a conversation in a terminal, each answer shown while it is generated."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megapatch.models import parallel
from megapatch.models.cli import UserError
from megapatch.tools.generate.loading import Source
from megapatch.tools.generate.prompts import Prompt, Reader

if TYPE_CHECKING:
    from megapatch.models.generation.sequences import Piece
    from megapatch.tools.generate.generate import Options

log = logging.getLogger(__name__)
_HELP = """/help      this list
/reset     forget the conversation
/retry     answer the last message again, with other random numbers
/history   show the conversation
/exit      leave, as does the end of the input (Ctrl-D); Ctrl-C stops an answer"""


class Conversation:
    """The messages so far, and what the user types."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.messages: list[dict[str, Any]] = []
        self.tries = 0

    def ask(self) -> Prompt | None:
        """The next thing that is asked of the model; None when the user leaves."""
        while True:
            said = _typed()
            if said is None or said.strip() == "/exit":
                return None
            if not said.strip():
                continue
            if said.startswith("/"):
                if prompt := self._command(said.strip()):
                    return prompt
                continue
            self.messages.append({"role": "user", "content": said})
            self.tries = 0
            if prompt := self._prompt():
                return prompt
            self.messages.pop()

    def _prompt(self) -> Prompt | None:
        """The conversation as a prompt; a complaint and None where it cannot be one."""
        turn = len(self.messages) // 2
        try:
            return self.reader.prompt({"messages": self.messages, "id": f"{turn}.{self.tries}"}, turn, "conversation")
        except UserError as error:
            _tell(f"{error}; /reset starts anew")
            return None

    def _command(self, said: str) -> Prompt | None:
        if said == "/reset":
            self.messages.clear()
            _tell("forgotten")
        elif said == "/history":
            for message in self.messages:
                _tell(f"{message['role']}: {message['content']}")
        elif said == "/retry" and self.messages:
            self.messages.pop()
            self.tries += 1
            return self._prompt()
        else:
            _tell(_HELP)
        return None

    def answer(self, text: str) -> None:
        """What the model said."""
        self.messages.append({"role": "assistant", "content": text})


def talk(options: "Options", source: Source, reader: Reader) -> None:
    """Ask and answer until the user leaves."""
    from megapatch.tools.generate import loading

    first = os.environ.get("RANK", "0") == "0"
    conversation = Conversation(reader)
    with loading.processes(options) as device:
        chunks = loading.load(options, source, device)
        show = _show if first else None
        draft = loading.loaded_draft(options.draft, options.draft_tokens, options, source, device)
        settings = draft | {"batch_size": 1, "keep": True, "on_piece": show}
        made = loading.engine(options, source, chunks, reader.max_length, **settings)
        if first:
            _tell("/help lists the commands")
        while (prompt := loading.shared(conversation.ask() if first else None)) is not None:
            conversation.answer(_answered(made, prompt, first))


def _answered(engine: Any, prompt: Prompt, first: bool) -> str:
    """The model's words, shown as they come. One process may be stopped by Ctrl-C; then they are those so far."""
    kept: list[str] = []
    show: Callable[[Piece], None] | None = engine.on_piece

    def on_piece(piece: "Piece") -> None:
        kept.append(piece.text)
        if show:
            show(piece)

    engine.on_piece = on_piece
    try:
        (completion,) = engine.run([prompt.request])
    except KeyboardInterrupt:
        if parallel.world_size() > 1:  # the others would wait for this one
            raise
        _tell("stopped")
        return "".join(kept)
    finally:
        engine.on_piece = show
        if first:
            print(flush=True)
    if first and completion.finish_reason == "length":
        _tell("cut off at --max-new-tokens or --context-length")
    return completion.text


def _show(piece: "Piece") -> None:
    sys.stdout.write(piece.text)
    sys.stdout.flush()


def _typed() -> str | None:
    """A line of the user, with line editing on a terminal; None at the end."""
    if terminal := sys.stdin.isatty():
        import readline  # noqa: F401  input() then edits lines

        prompt = "> "
    else:
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not terminal:
            raise
        _tell("\n/exit or Ctrl-D leaves")  # meant for an answer that had just ended, it would cost the conversation
        return ""


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
