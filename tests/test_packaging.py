"""What is installed: the packages, the commands, the wheel's content, and exact versions for all that it needs."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, EXTRAS = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]
FLOORS = ("models", "tools", "trainer")


def sources() -> list[Path]:
    """Every source file that belongs into the wheel, relative to the checkout."""
    return sorted(p.relative_to(ROOT) for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


def test_the_package_list_is_the_folders():
    folders = {path.parent for path in sources()}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(
        ".".join(("megapatch", *folder.parts)) for folder in folders
    )
    assert [str(f) for f in folders if not (ROOT / f / "__init__.py").exists()] == []


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_a_command_has_a_main_that_takes_arguments_and_returns_a_status(command):
    module, _, function = PROJECT["scripts"][command].partition(":")
    path = ROOT / (module.removeprefix("megapatch.").replace(".", "/") + ".py")
    mains = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert [(ast.unparse(m.returns), m.args.args[0].arg, len(m.args.defaults)) for m in mains] == [("int", "argv", 1)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources so that nothing left in build/ gets into it."""
    copy = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in (*FLOORS, "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = (copy / "dist").iterdir()
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_sources_and_nothing_else(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(f"megapatch/{path.as_posix()}" for path in sources())


def test_the_wheel_carries_commands_extras_and_licence(wheel):
    info = f"megapatch-{PROJECT['version']}.dist-info"
    entries = wheel.read(f"{info}/entry_points.txt").decode().splitlines()
    assert {e.split(" = ")[0] for e in entries if "=" in e} == set(PROJECT["scripts"])
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M)) == set(EXTRAS)
    assert "License-Expression: Apache-2.0" in metadata and "+cpu" not in metadata
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")


def test_the_extras_are_those_that_the_documentation_names():
    assert set(EXTRAS) == {"gpu", "data", "fast", "tb", "tokenizers", "wandb", "eval", "dev"}


def pins(name: str) -> dict[str, str]:
    """Package -> version of a constraint file and those that it includes; every line must be exact."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints" / name).read_text().splitlines():
        if included := re.fullmatch(r"-c (\S+)", line):
            found |= pins(included[1])
        elif line and not line.startswith("#"):
            exact = re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([0-9][a-z0-9.]*)", line)
            assert exact, f"{name}: {line}"
            assert exact[1] not in found, f"{name}: {exact[1]} twice"
            found[exact[1]] = exact[2]
    return found


ASKED = [("cpu.txt", r) for extra in EXTRAS if extra != "gpu" for r in EXTRAS[extra]]
ASKED += [("cpu.txt", r) for r in PROJECT["dependencies"]] + [("cu130.txt", r) for r in EXTRAS["gpu"]]


@pytest.mark.parametrize(("name", "asked"), ASKED, ids=[f"{n}-{r}" for n, r in ASKED])
def test_every_requirement_has_one_exact_version_that_it_allows(name, asked):
    requirement = Requirement(asked)
    assert pins(name)[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_requirement_of_a_requirement_is_pinned_too():
    pinned, waiting = pins("cpu.txt"), [Requirement(r) for r in (*PROJECT["dependencies"], *EXTRAS["dev"])]
    seen: set[str] = set()
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in seen:
            continue
        seen.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement)
    assert len(seen) > 30 and seen - set(pinned) == set()


def test_a_release_is_never_bound_to_one_build_of_torch():
    assert pins("cpu.txt")["torch"] == pins("cu130.txt")["torch"]
    assert not any("+" in version for version in pins("cu130.txt").values())
