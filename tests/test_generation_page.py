"""docs/generation.md is true: its flags and fields exist, and the progress that it shows is what is drawn."""

import io
import re
import sys
from pathlib import Path

import pytest

from megapatch.models import cli
from megapatch.models.request import Request, Sampling
from megapatch.tools.generate import generate, lines, questions, score
from megapatch.tools.generate.progress import Progress, most_tokens

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "generation.md").read_text()
OTHERS = {"--tp", "--pp", "--ep", "--verbose"}
LM_EVAL = {
    "--model_args",
    "--batch_size",
    "--tasks",
    "--output_path",
    "--model",
    "--model-path",
    "--source",
    "--target",
}


def flags(options: type) -> set[str]:
    return {flag for action in cli.parser(options, prog="mp")._actions for flag in action.option_strings}


def test_every_flag_exists() -> None:
    known = flags(generate.Options) | flags(score.Options) | OTHERS | LM_EVAL
    found = set(re.findall(r"--[a-z][\w-]*", PAGE))
    assert len(found) > 30 and found - known == set()


def test_every_field_is_explained_in_the_page_and_in_the_help() -> None:
    for name in lines.FIELDS:
        assert f"`{name}`" in PAGE, name
        assert re.search(rf"\b{name}\b", generate.EXAMPLES), name
    for name in questions.FIELDS:
        assert re.search(rf"\b{name}\b", score.EXAMPLES), name
    for name in ("sample", "stop", "prompt_top_logprobs", "usage", "timings", "finish_reason"):
        assert f"`{name}`" in PAGE, name


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:tests|models)/[\w/.]+)`", PAGE):
        assert (ROOT / name).exists(), name


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from megapatch.models.generation.engine import Statistics
    from megapatch.models.generation.sequences import Completion

    monkeypatch.setattr(sys, "stderr", Terminal())
    requests = [Request([1] * 50, Sampling(max_new_tokens=51)) for _ in range(4)]
    with Progress([most_tokens(one) for one in requests]) as progress:
        for number, one in enumerate(requests):
            progress.on_step(Statistics(prefill_tokens=50 * (number + 1), decode_tokens=10 * number))
            progress.done(Completion(number, one, [2] * 11, "", "stop", [], []))
        assert progress._bar.total == 4 * 60, "what ended early is taken off"
        progress._bar.refresh()
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    pattern = r"\d of 4 prompts: +\d+%\|.*\| \d+/\d+ \[\d\d:\d\d<[\d:?]+, +[\d.?kM]+ tokens/s\]"
    assert re.search(pattern, shown), shown
    lines = [line for line in PAGE.splitlines() if " of 48 prompts: " in line]
    recorded = r"\d+ of 48 prompts: +\d+%\|.*\| [\d.]+k?/[\d.]+k \[\d\d:\d\d<\d\d:\d\d, \d+ tokens/s\]"
    assert len(lines) >= 4 and all(re.fullmatch(recorded, line) for line in lines)
