"""docs/fine-tuning.md is true: its commands run, in order, and print what it shows; the flags it names exist."""

import re
from pathlib import Path

import pytest
from pages import matches, printed, shown

from megapatch.models import cli
from megapatch.trainer.tuning.sft_options import SftOptions

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "fine-tuning.md").read_text()
SHOWN = shown(PAGE)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the page's commands print, in one shell and one empty folder."""
    pytest.importorskip("gigatoken", reason="extra `fast`: the page says which engine was taken")
    return printed([text for text, _ in SHOWN], tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("number", range(len(SHOWN)), ids=[text.split("\n")[-2][:40] for text, _ in SHOWN])
def test_a_command_of_the_page_prints_what_it_shows(outputs: list[str], number: int) -> None:
    expected = SHOWN[number][1]
    assert expected is not None, "show the output of each command"
    assert matches(expected, outputs[number]), f"shown:\n{expected}\nprinted:\n{outputs[number]}"


def test_the_flags_named_in_the_text_exist() -> None:
    known = {flag for action in cli.parser(SftOptions, prog="mp-sft")._actions for flag in action.option_strings}
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)
    named = set(re.findall(r"`(--[a-z-]+)`", text))
    assert named - known == {"--max-length"} and len(named) > 8  # of mp-preprocess-chat
