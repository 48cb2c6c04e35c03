"""README.md is true: its commands run, in order, and print what it shows; flags and layouts in its tables exist."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import test_layouts
from pages import matches, printed, shown

from megapatch.models import cli
from megapatch.tools.convert.list_families import BEGIN, END, describe
from megapatch.trainer.options import PretrainOptions

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NOT_RUN = {  # all that is shown and not run here, by how the block starts
    "pip install -c constraints/cu130.txt": "needs a GPU; the options of its last line are parsed below",
    "#SBATCH": "an excerpt of scripts/slurm/pretrain.sbatch, which test_slurm.py runs; compared with it below",
    "RUN=experiment CLUSTER_ENV": "needs Slurm; test_slurm_loopback.py runs it where Slurm is installed",
    "ARGS=train.args SAVE=run sbatch": "needs Slurm; test_slurm_loopback.py submits it where Slurm is installed",
}


RUN = [(text, output) for text, output in shown(README) if not text.startswith(tuple(NOT_RUN))]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the blocks that can run print, stdout and stderr together, in one shell and one empty folder."""
    folder = tmp_path_factory.mktemp("readme")
    found = printed([text for text, _ in RUN], folder)
    assert {"report.html", "exported", "run", "core", "data.idx"} <= {p.name for p in folder.iterdir()}
    return found


@pytest.mark.parametrize("number", range(len(RUN)), ids=[text.split("\n")[-2][:40] for text, _ in RUN])
def test_a_command_prints_what_is_shown(outputs: list[str], number: int) -> None:
    expected = RUN[number][1]
    assert expected is not None, "show the output of each command that runs"
    assert matches(expected, outputs[number]), f"shown:\n{expected}\nprinted:\n{outputs[number]}"


def test_the_comparison_sees_other_words() -> None:
    page = 'a: 1,024 tokens -> tok\n...\n{"ok": true, "text": "...", "n": 3}\n'
    assert matches(page, 'a: 9 tokens -> tok\nx\ny\n{"ok": true, "text": "z 7", "n": 1.5e-06}\n')
    for wrong in (
        'a: 9 token -> tok\n{"ok": true, "text": "", "n": 1}\n',
        'a: 9 tokens -> tok\n{"ok": false, "text": "", "n": 1}\n',
        'a: 9 tokens -> tok\n{"ok": true, "text": "", "n": 1}\nmore\n',
        'warning\na: 9 tokens -> tok\n{"ok": true, "text": "", "n": 1}\n',
    ):
        assert not matches(page, wrong), wrong


def test_every_command_is_shown_running_and_all_that_does_not_run_is_known() -> None:
    text = "\n".join(text for text, _ in RUN)
    assert {name for name in COMMANDS if not re.search(rf"\b{name} -", text) and f"{name} @" not in text} == set()
    for start in NOT_RUN:
        assert any(block.startswith(start) for block, _ in shown(README)), f"not in README.md any more: {start}"


def test_the_quickstart_is_shown_as_it_prints() -> None:
    """The steps and the script's own checks; test_quickstart.py runs it."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    for name in re.findall(r'^(?:    )?(?:step|verify mp-check --name) "([^"]*)"', script, re.M):
        assert name.replace("$half", "30") in README, name
    for name in re.findall(r"scripts/[\w/.]+|tests/[\w/.]+|constraints/[\w.]+|CONTRIBUTING.md", README):
        assert (ROOT / name.rstrip(".")).exists(), name


def flags(command: str) -> set[str]:
    """The long and short flags of a command."""
    module = importlib.import_module(COMMANDS[command].split(":")[0])
    given: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", lambda options, work, **_: given.update(options=options) or 0)
        module.main([])
    made = cli.parser(given["options"], prog=command)
    return {flag for action in made._actions for flag in action.option_strings}


def test_every_flag_on_our_side_of_the_migration_table_exists() -> None:
    rows = [line.split(" | ") for line in README.splitlines() if line.startswith("| ") and " | " in line]
    table = rows[next(i for i, row in enumerate(rows) if row[0] == "| there") + 1 :]
    command, seen = "", 0
    for theirs, ours in table:
        command = next(iter(re.findall(r"`(mp-[\w-]+)", ours)), command)
        text = re.sub(r"`--pp` x L|.*--load.*", "", theirs) + ours if ours.startswith("the same") else ours
        for flag in re.findall(r"--[a-z][\w-]*", text):
            assert flag in flags(command), f"{command} has no {flag}: {theirs} | {ours}"
            seen += 1
    assert seen > 40


def test_every_layout_in_the_table_is_tested() -> None:
    section = README.split("## Layouts")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ") and "`" in line]
    tables = [{**test_layouts.TABLES[name].layouts, **test_layouts.SLOW[name].layouts} for name in test_layouts.TABLES]
    tested = [{flags for _, flags in table.values()} for table in tables]
    seen = 0
    for _, _, *columns, _ in rows:
        for known, column in zip(tested, columns, strict=True):
            for layout in re.findall(r"`(--[^`]*)`", column):
                assert layout in known, layout
                seen += 1
    assert seen > 15


def test_the_families_named_are_those_there_are() -> None:
    shown = [line.strip("| ").split(" | ") for line in README.partition(BEGIN)[2].partition(END)[0].splitlines()[3:]]
    rows = [list(row.cells) for row in describe({})]
    assert [cells[:3] for cells in shown] == [cells[:3] for cells in rows], "run scripts/architectures.sh"
    assert all(0 <= float(measured) <= 1e-5 for *_, measured in shown)


def test_the_command_for_gpus_is_parsed() -> None:
    (line,) = re.findall(r"^torchrun .* mp-pretrain @train.args (.*--precision bf16.*)$", README, re.M)
    given = ["--model", "m", "--data-path", "d", "--train-iters", "1", *line.split()]
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(given)
    assert (options.tp, options.precision, options.use_distributed_optimizer) == (8, "bf16", True)


def test_the_excerpt_is_of_the_script() -> None:
    script = (ROOT / "scripts" / "slurm" / "pretrain.sbatch").read_text().splitlines()
    (excerpt,) = [text for text, _ in shown(README) if text.startswith("#SBATCH")]
    at = -1
    for line in excerpt.splitlines():
        assert line in script[at + 1 :], line
        at = script.index(line, at + 1)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 490
