"""The architecture, held by reading the sources: floors, sizes, words that have one place, light executables."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("models", "tools", "trainer")
SOURCES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in SOURCES]
TREES = {name: ast.parse(path.read_text()) for name, path in zip(NAMES, SOURCES, strict=True)}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

CUDA_HERE = ("models/device.py", "models/patches/", "tools/offload_bench/measure.py")
UPSTREAM_NAMES = re.compile("get_cuda_rng_tracker|CudaGraphScope")  # the tracker serves every device; a pickled class
HEAVY = {"torch", "transformers", "megatron", "safetensors", "tokenizers", "tensorboard", "wandb", "pyarrow"}
LONGEST_FILE, LONGEST_FAMILY, LONGEST_FUNCTION = 300, 80, 60


def imports(tree: ast.AST) -> set[str]:
    """Every megapatch module that the tree imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full: from megapatch.models..."
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.split(".")[0] in ("megapatch", *FLOORS, "tests")}


def allowed(name: str) -> tuple[str, ...]:
    """The prefixes that a file may import from."""
    if name.startswith("models/families/") and not name.endswith("__init__.py"):
        here = ("megapatch.models.family.", "megapatch.models.rules.", "megapatch.models.families.")
        return (*here, "megapatch.models.cli.UserError.")
    if name.startswith("tools/"):
        return ("megapatch.models.", f"megapatch.tools.{name.split('/')[1]}.")
    return ("megapatch.models.", "megapatch.trainer.") if name.startswith("trainer/") else ("megapatch.models.",)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_from_its_floor_and_below(name):
    assert {m for m in imports(TREES[name]) if not f"{m}.".startswith(allowed(name))} == set()


def test_the_check_of_floors_sees_a_wrong_import():
    wrong = ast.parse("def f():\n    from megapatch.tools.preprocess.reading import records")
    assert imports(wrong) == {"megapatch.tools.preprocess.reading.records"}
    assert not "megapatch.tools.preprocess.reading.records.".startswith(allowed("tools/convert/convert.py"))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(CUDA_HERE)])
def test_the_accelerator_is_named_only_where_devices_are_handled(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if "cuda" in UPSTREAM_NAMES.sub("", line).lower()] == []


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("models/families/")])
def test_no_branch_on_the_model_type_outside_the_families(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if re.search(r"model_type(['\"]\])? *(==|!=|(not )?in )", line)] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("models/families/")])
def test_a_family_is_a_page_at_most(name):
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST_FAMILY


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_for(name):
    assert not (ROOT / name).read_text().strip() or ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", NAMES)
def test_annotations_stay_types_where_options_are_declared(name):
    options = any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "opt" for n in ast.walk(TREES[name]))
    future = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in ast.walk(TREES[name]))
    assert not (options and future)


def third_party() -> set[str]:
    """Import names of what we depend on, and of the standard library."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)]
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0].replace("-", "_").lower() for requirement in asked}
    return names | {"megatron", "flash_attn", "datasets"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("models/")])
def test_no_file_hides_a_library_when_its_folder_is_run_from(name):
    assert Path(name).stem not in third_party() - {"__main__"}


def module_level(tree: ast.Module) -> set[str]:
    """Modules imported as the file is imported; not those inside functions or under TYPE_CHECKING."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            skipped = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            waiting += node.orelse if skipped else list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("command", SCRIPTS)
def test_an_executable_imports_nothing_heavy_before_its_work(command):
    """By reading, so that the chain of files is named; test_help measures the same."""
    waiting = [(SCRIPTS[command].split(":")[0],)]
    seen = set()
    while waiting:
        chain = waiting.pop()
        name = chain[-1].removeprefix("megapatch.").replace(".", "/") + ".py"
        for module in module_level(TREES[name]) - seen:
            assert module.split(".")[0] not in HEAVY, " -> ".join((*chain, module))
            seen.add(module)
            if module.removeprefix("megapatch.").replace(".", "/") + ".py" in TREES:
                waiting.append((*chain, module))


def test_importing_every_executable_loads_nothing_heavy():
    modules = [target.split(":")[0] for target in SCRIPTS.values()]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {name.split(".")[0] for name in loaded} & HEAVY == set()


@pytest.mark.parametrize("command", SCRIPTS)
def test_an_executable_runs_as_a_file_a_module_and_a_command(command):
    name = SCRIPTS[command].split(":")[0].removeprefix("megapatch.").replace(".", "/") + ".py"
    assert ast.unparse(TREES[name].body[-1]) == "if __name__ == '__main__':\n    raise SystemExit(main())"


def test_no_path_of_a_machine_and_no_unfinished_work():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    marks = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|/ho" + "me/|/wo" + "rk/|/ro" + "ot/|Not" + "ImplementedError")
    found = []
    for name in tracked:
        if name.endswith((".py", ".sh", ".sbatch", ".md", ".toml", ".txt", "run")) and (ROOT / name).exists():
            found += [f"{name}: {line}" for line in (ROOT / name).read_text().splitlines() if marks.search(line)]
    assert found == []
