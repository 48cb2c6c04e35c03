"""A fault at every change that mp-convert makes to the disk: old or new is there, and the next run completes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from convert_faults import NOT_MET, tree
from model_folders import make
from slow_cases import marked

from megapatch.models.core_files import TRACKER
from megapatch.tools.convert.convert import main
from megapatch.tools.convert.execute import LAST

Tree = dict[str, str]  # a file's digest by its path
WORKER = Path(__file__).with_name("convert_faults.py")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A model of several files in both forms, and what is replaced by --force in each."""
    root = tmp_path_factory.mktemp("sources")
    hf = make(root / "hf", "qwen3", "20KB", num_hidden_layers=1)
    assert main(["--source", str(hf), "--target", str(root / "core")]) == 0
    (root / "old core" / "release").mkdir(parents=True)
    (root / "old core" / "release" / "precious").write_text("x")
    (root / "old core" / TRACKER).write_text("release")
    (root / "old hf").mkdir()
    (root / "old hf" / "precious").write_text("x")
    return {path.name: path for path in root.iterdir()}


def faults(source: Path, old: Path | None, fault: str, kept_bytes: int, work: Path) -> list[dict]:
    """What tests/convert_faults.py found at each step; the last one met no fault."""
    given = {"source": str(source), "old": old and str(old), "fault": fault, "kept_bytes": kept_bytes}
    command = [sys.executable, str(WORKER), json.dumps(given | {"work": str(work)})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[-1]["status"] == NOT_MET and len(found) > 40
    return found


def below(folder: str, tree: Tree) -> Tree:
    """The files in a folder of the tree, but for a tracker's temporary name, which nobody knows again."""
    said = {k.removeprefix(folder): v for k, v in tree.items() if k.startswith(folder)}
    return {k: v for k, v in said.items() if not k.startswith(f"{TRACKER}.tmp-")}


def old_or_new(place: str, found: Tree, new: Tree, old: Tree) -> str:
    """Which of them the folder is; it must be one of them, or absent where there was none."""
    there = below(place, found)
    assert there in (below(place, old), below(place, new)), place
    return "new" if there == below(place, new) else "old"


TO_CORE, TO_HF = ("hf", "core", "out/release/"), ("core", "hf", "out/")  # source, target, where the weights are
FAULTS = [  # the fault, whether there was something before, and how many finished bytes a failed run keeps
    (*TO_CORE, "kill", False, 1),
    (*TO_CORE, "kill", True, 1),
    (*TO_CORE, "ENOSPC", False, 64 << 20),
    (*TO_HF, "kill", False, 1),
    (*TO_HF, "kill", True, 1),
    (*TO_HF, "EIO for good", True, 1),
]
QUICK = [FAULTS[1], FAULTS[2], FAULTS[5]]  # in the default suite


@pytest.mark.parametrize("source, kind, place, fault, force, kept_bytes", marked(FAULTS, QUICK))
def test_a_fault_at_every_change_leaves_old_or_new(source, kind, place, fault, force, kept_bytes, sources, tmp_path):
    old_folder = sources[f"old {kind}"] if force else None
    *steps, last = faults(sources[source], old_folder, fault, kept_bytes, tmp_path)
    new, old = last["second"], {f"out/{name}": said for name, said in tree(old_folder).items()} if force else {}
    seen = set()
    for step in steps:
        finished = {name: said for name, said in step["first"].items() if ".tmp-" not in name}
        seen.add(old_or_new(place, finished, new, old))
        never_loadable_before_the_end(step["first"], below(place, new))
        told_in_one_line(step, fault)
        assert step["again"] == 0, step["told_again"]
        assert below("out/", step["second"]) == below("out/", new)
    assert seen == {"old", "new"}
    assert any("going on with" in step["told_again"] for step in steps) == (kept_bytes == 1)


def told_in_one_line(step: dict, fault: str) -> None:
    """A killed run says nothing, a failed one the cause, and what it keeps."""
    if fault == "kill":
        assert step["status"] == 9 and "error" not in step["told"]
        return
    if step["status"] == 0:  # a folder that is there already could not be made
        assert step["told"] == "" and fault == "ENOSPC"
        return
    assert step["status"] == 1, step["told"]
    *talk, error = step["told"].splitlines()
    cause = "disk full (" if fault == "ENOSPC" else "Input/output error"
    assert error.startswith("mp-convert: error: /") and cause in error
    assert all("kept" in line and "goes on from them" in line for line in talk)


def never_loadable_before_the_end(first: Tree, new: Tree) -> None:
    """A staging folder has no file by which loaders know a checkpoint unless all others are there and complete."""
    (stage,) = {name.partition(".tmp-stage/")[0] for name in first if ".tmp-stage/" in name} or {""}
    staged = below(f"{stage}.tmp-stage/", first)
    if any(Path(name).name in LAST for name in staged) and "precious" not in staged:
        other = {name: said for name, said in new.items() if Path(name).name not in (*LAST, "manifest.json")}
        assert other.items() <= staged.items()
