"""docs/add-a-family.md is true: its family is made in a checkout of its own, and all that it says happens."""

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import matches, printed

from megapatch.models import families, family, rules
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.verify.verify import main as verify

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "add-a-family.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", PAGE, re.M)
FAMILY = next(text for _, title, text in BLOCKS if title == "models/families/phi3.py")
SHOWN = [(text, BLOCKS[n + 1][2]) for n, (kind, _, text) in enumerate(BLOCKS) if kind == "bash"]


def installed(checkout: Path) -> None:
    """Do by hand what the page has its reader write: the family, and the entries of its tests."""
    tests = (checkout / "tests" / "test_families.py").read_text()
    for kind, title, text in BLOCKS:
        if title.startswith("models/"):
            (checkout / title).write_text(text)
        elif kind == "python":
            start = re.search(rf"^{title}\b.*= {{.*$", tests, re.M)
            assert start, f"tests/test_families.py has no {title}"
            tests = tests[: start.end()] + "\n" + text + tests[start.end() :]
    (checkout / "tests" / "test_families.py").write_text(tests)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, imported before the one that is installed by all that runs with ``environment``."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    folder.mkdir()
    for name in ("models", "tools", "trainer", "tests", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "build" / "ns").mkdir(parents=True)
    (folder / "build" / "ns" / "megapatch").symlink_to(folder)
    installed(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(checkout: Path) -> list[str]:
    """What the page's commands print, stdout and stderr together, in one shell."""
    environment = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(checkout / "build" / "ns")}
    return printed([text for text, _ in SHOWN], checkout, environment, 500)


@pytest.mark.parametrize("number", range(len(SHOWN)), ids=[text.split("\n")[-2][:40] for text, _ in SHOWN])
def test_a_command_of_the_page_prints_what_it_shows(outputs: list[str], number: int) -> None:
    shown = SHOWN[number][1]
    assert matches(shown, outputs[number]), f"shown:\n{shown}\nprinted:\n{outputs[number]}"


MISTAKES = [row.strip("| ").split(" | ") for row in PAGE.partition("| in place of ")[2].splitlines()[2:]]


@pytest.fixture
def family_file(tmp_path: Path) -> Iterator[Path]:
    """A further folder of families, with the page's."""
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "phi3.py").write_text(FAMILY)
    name = f"{families.__name__}.phi3"
    families.__path__.append(str(folder))
    sys.modules.pop(name, None)
    family.known.cache_clear()
    yield folder / "phi3.py"
    families.__path__.remove(str(folder))
    sys.modules.pop(name, None)
    family.known.cache_clear()


@pytest.mark.parametrize(("right", "wrong", "told"), MISTAKES, ids=[row[1] for row in MISTAKES])
def test_a_mistake_is_told_as_the_page_says(
    right: str,
    wrong: str,
    told: str,
    family_file: Path,
    checkout: Path,
    outputs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert FAMILY.count(right.strip("`")) == 1, right
    family_file.write_text(FAMILY.replace(right.strip("`"), wrong.strip("`")))
    source, target = str(checkout / "build" / "phi3" / "hf"), str(tmp_path / "core")
    status = convert(["--source", source, "--target", target])
    status = status or verify(["--source", source, "--target", target, "--atol", "1e-5"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and re.search(".*".join(re.escape(part.strip()) for part in told.split("...")), said), said


def test_every_field_of_a_family_and_of_a_rule_is_explained() -> None:
    fields = [field.name for kind in (family.Family, rules.Rule) for field in dataclasses.fields(kind)]
    assert [name for name in fields if f"`{name}`" not in PAGE] == []


def test_the_files_that_the_page_names_have_what_it_says() -> None:
    table = [
        row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| `") and row.endswith(".py` |")
    ]
    assert len(table) > 8
    for names, _, example in table:
        text = (ROOT / "models" / "families" / example.strip("`")).read_text()
        assert any(f"{name}=" in text for name in re.findall(r"`(\w+)`", names)), (names, example)
    for name in re.findall(r"`((?:tests|models|scripts)/[\w/.]+)`", PAGE):
        assert (ROOT / name).exists() or name in ("models/families/phi3.py",), name


def test_the_page_takes_fifteen_minutes() -> None:
    assert len(PAGE.splitlines()) <= 200 and len(FAMILY.splitlines()) <= 40
