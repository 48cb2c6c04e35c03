"""mp-generate --chat between two answers: what is typed, and what is not."""

import sys
from typing import Any

import pytest

from megapatch.tools.generate.talk import Conversation


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_at_the_prompt_of_a_terminal_does_not_cost_the_conversation(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader: Any = None  # not asked, as nothing is said
    left = [KeyboardInterrupt, EOFError]

    def typed(_: str) -> str:
        raise left.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    if terminal:
        assert Conversation(reader).ask() is None and not left
        assert "/exit or Ctrl-D leaves" in capsys.readouterr().err
    else:
        with pytest.raises(KeyboardInterrupt):
            Conversation(reader).ask()
