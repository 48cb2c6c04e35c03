"""docs/data-formats.md is true: its commands run, in order, and print what it shows; what it names is there."""

import re
from pathlib import Path

import pytest
from pages import matches, printed, shown

from megapatch.models.data_formats import PAIRS
from megapatch.models.indexed_data import DTYPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "data-formats.md").read_text()
SHOWN = shown(PAGE)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the page's commands print, in one shell and one empty folder."""
    pytest.importorskip("gigatoken", reason="extra `fast`: the page says which engine was taken")
    return printed([text for text, _ in SHOWN], tmp_path_factory.mktemp("formats"), {"NO_COLOR": "1"})


@pytest.mark.parametrize("number", range(len(SHOWN)), ids=[text.split("\n")[-2][:40] for text, _ in SHOWN])
def test_a_command_of_the_page_prints_what_it_shows(outputs: list[str], number: int) -> None:
    expected = SHOWN[number][1]
    assert expected is not None, "show the output of each command"
    assert matches(expected, outputs[number]), f"shown:\n{expected}\nprinted:\n{outputs[number]}"


def test_the_counts_of_damaged_lines_are_exact(outputs: list[str]) -> None:
    laws = [line for text in outputs for line in text.splitlines() if " lines = " in line and " 1,000 bad + " in line]
    assert len(laws) == 3, "the run that put them aside, the one that was stopped, and the one with shares"
    for law in laws:
        lines, *kinds = (int(figure.replace(",", "")) for figure in re.findall(r"\d[\d,]*", law))
        assert lines == sum(kinds) > 3000


def test_every_kind_of_pair_and_every_type_is_explained() -> None:
    ends = {end for pairs in PAIRS.values() for end in pairs if end}
    assert {end for end in ends if f"PREFIX{end}" not in PAGE and not end.endswith("_mask")} == set()
    assert [f"{code} {name}" for code, name in DTYPES.items() if f"{code} {name}" not in PAGE] == []
