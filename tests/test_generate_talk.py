"""mp-generate --chat: turns, commands, and a real terminal."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import chat_model

from megapatch.tools.generate.generate import main

TURN = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of 64 positions, with a chat template."""
    return chat_model(tmp_path_factory.mktemp("model") / "hf")


def talk(typed: list[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    return main([*arguments, "--chat", *TURN])


def test_turns_are_those_of_the_conversation_so_far(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(["Hi", "", "/history", "Go on", "/reset", "Hi"], monkeypatch, "--model", str(model)) == 0
    out, err = capsys.readouterr()
    messages: list[dict[str, str]] = []
    answers = []
    for said in ("Hi", "Go on"):
        messages.append({"role": "user", "content": said})
        file = tmp_path / "in.jsonl"
        file.write_text(json.dumps({"messages": messages}) + "\n")
        assert main(["--model", str(model), "--input", str(file), *TURN]) == 0
        answers.append(json.loads(capsys.readouterr().out)["text"])
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"
    assert "user: Hi\nassistant: " in err and "forgotten" in err and "cut off at --max-new-tokens" in err


def test_a_turn_reads_what_is_new(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megapatch.tools.generate import loading

    engines: list[Any] = []
    make = loading.engine
    monkeypatch.setattr(loading, "engine", lambda *args, **words: engines.append(make(*args, **words)) or engines[-1])
    assert talk(["Hi", "Go on"], monkeypatch, "--model", str(model)) == 0
    first = "<user>Hi\n<assistant>"
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2
    statistics = engines[0].statistics
    assert statistics.shared_tokens >= len(first), "the first turn is not read again"
    assert statistics.prefill_tokens <= len(first) + 6 * 3 + len("\n<user>Go on\n<assistant>")


def test_retry_draws_other_numbers_and_what_does_not_fit_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["Hi", "/retry", "/nonsense", "x" * 70, "/exit", "never read"]
    assert talk(typed, monkeypatch, "--model", str(model), "--temperature", "1", "--seed", "2") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 2 and "never" not in out
    first, again = out.split("\n")[0], out.split("\n")[1]
    assert first != again
    assert "/retry     answer the last message again" in err
    assert "tokens and leaves no room; the model takes 64 in all; /reset starts anew" in err


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []

    def show(piece: Any) -> None:
        pieces.append(piece.text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("megapatch.tools.generate.talk._show", show)
    assert talk(["Hi", "/history", "/reset", "Hi"], monkeypatch, "--model", str(model)) == 0
    err = capsys.readouterr().err
    assert "stopped" in err and f"assistant: {''.join(pieces[:3])}" in err
    assert pieces[3:5] == pieces[:2] and len(pieces) == 3 + 6


def test_a_terminal_shows_the_answer_while_it_is_generated(model: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "megapatch.tools.generate.generate", "--model", str(model), "--chat", *TURN]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    shown = b""
    try:
        shown += until(ours, b"> ")
        os.write(ours, b"Hi\n")
        shown += until(ours, b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"/help lists the commands" in shown and shown.count(b"> ") == 2


def until(terminal: int, mark: bytes, seconds: float = 120) -> bytes:
    """What the terminal shows up to and with ``mark``."""
    found, end = b"", time.monotonic() + seconds
    while mark not in found:
        assert time.monotonic() < end, found
        if select.select([terminal], [], [], 0.2)[0]:
            found += os.read(terminal, 4096)
    return found
