"""What mp-generate tells while it works: rows alone on stdout; memory, progress and rates on stderr."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from tiny_models import chat_model

from megapatch.tools.generate.generate import main

TEXTS = ["Hello, world", "x", "naïve café", "The quick brown fox jumps"]
PROMPTS = [word for text in TEXTS for word in ("--prompt", text)]
SHORT = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model") / "hf")


def test_stdout_has_only_rows_and_stderr_ends_with_rates(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(model), "--prompt", "a", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a"]
    last = err.splitlines()[-1]
    assert "prefill: 1 tokens in" in last and "decode: 7 tokens in" in last and last.endswith("tokens/s")


def test_memory_is_told_before_anything_is_generated(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for choice, copies in (("auto", True), ("never", False)):
        assert main(["--model", str(model), "--prompt", "abc", *SHORT, "--pack-weights", choice]) == 0
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if "memory: " in line]
        assert line.startswith("mp-generate: memory: weights ") and ", keys and values up to 11KiB" in line
        assert ("B, packed copies of them " in line) == copies
        texts.append(out)
    assert texts[0] == texts[1]


def test_progress_is_told_every_now_and_then(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapatch.tools.generate.progress.EVERY_S", 0.0)
    assert main(["--model", str(model), *PROMPTS, *SHORT, "--batch-size", "2"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "prompts done" in line]
    assert len(told) == 16  # forward passes: 2 prompts, 8 tokens each, twice
    assert "mp-generate: 0 of 4 prompts done, " in told[0]
    assert "mp-generate: 2 of 4 prompts done, " in told[8]
    assert told[0].endswith(" left") and " tokens/s, at most 0:00:0" in told[15]


def test_a_terminal_shows_the_bar_on_lines_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert main(["--model", str(model), *PROMPTS, *SHORT, "--output", str(tmp_path / "out.jsonl")]) == 0
    lines = [line for line in re.split(r"[\r\n]+", shown.getvalue()) if line.strip()]
    bars = [" of 4 prompts:" in line for line in lines]
    assert bars == [*sorted(bars[:-1]), False] and sum(bars) >= 2, lines
    assert all(line.startswith("mp-generate: ") != bar for line, bar in zip(lines, bars, strict=True))
