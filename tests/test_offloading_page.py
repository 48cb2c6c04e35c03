"""docs/offloading.md names flags that exist, and its picture is a sweep's."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megapatch.models import cli
from megapatch.tools.offload_bench.offload_bench import Options as Bench
from megapatch.trainer.options import PretrainOptions

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "offloading.md").read_text()
COMMANDS = re.findall(r"^(mp-[\w-]+) (.*)$", PAGE.replace("\\\n", " "), re.M)


def test_every_flag_of_the_page_exists() -> None:
    known = {
        flag
        for options in (Bench, PretrainOptions)
        for action in cli.parser(options, prog="x")._actions
        for flag in action.option_strings
    }
    named = set(re.findall(r"--[a-z][\w-]*", PAGE))
    assert len(named) > 10 and named <= known


def test_the_pages_commands_are_parsed() -> None:
    assert COMMANDS
    for name, words in COMMANDS:
        own, _, given = words.partition(" -- ")
        assert name == "mp-offload-bench"
        cli.parser(Bench, prog=name).parse_args(own.split())
        more = "--save s --train-iters 1 --init-from c --data-path d"  # what its @file would hold
        cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(
            [*more.split(), *(word for word in given.split() if not word.startswith("@"))]
        )


@pytest.mark.parametrize(
    "said", ["optimizer in host memory", "recomputation", "activations in host memory", "emulated"]
)
def test_the_picture_is_a_sweeps_and_says_what_it_is(said: str) -> None:
    drawn = ElementTree.fromstring((DOCS / "offloading.svg").read_text())
    assert said in "".join(drawn.itertext())


def test_the_table_has_the_points_of_the_picture() -> None:
    points = re.findall(r"^\| (optimizer|recompute|activations) (\S+) \| ([\d,]+) \|", PAGE, re.M)
    circles = re.findall(r'class="dot c\d"', (DOCS / "offloading.svg").read_text())
    assert len(points) == len(circles) >= 8
