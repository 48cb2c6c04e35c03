"""mp-convert under bad luck: killed, disk full, source changing, many files; and chunks cut in any way."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import contents

from megapatch.models import core_files, hf_files, shapes
from megapatch.models.core_write import CoreWriter
from megapatch.models.cuts import Region
from megapatch.models.family import placed_rules
from megapatch.tools.convert.convert import main
from megapatch.tools.convert.execute import execute
from megapatch.tools.convert.from_core import matrix_of
from megapatch.tools.convert.plan import Copy, Part, Plan

CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A Hugging Face folder of 250 MB that takes no room on the disk: its weights are a hole."""
    folder = tmp_path_factory.mktemp("large")
    letters = shapes.sizes(CONFIG)
    named = {n: s for p in placed_rules(CONFIG) for n, s in zip(p.hf, shapes.part_shapes(p.rule, letters), strict=True)}
    header, _, size = hf_files.header(hf_files.saved_order([(n, "bfloat16", s) for n, s in named.items()]))
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", size)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert size > 200e6
    return folder


def command(source: Path, target: Path) -> list[str]:
    module = "megapatch.tools.convert.convert"
    return [sys.executable, "-m", module, "--source", str(source), "--target", str(target)]


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.06])
def test_killed_in_the_middle_nothing_has_the_final_name(delay_s, large, tmp_path):
    target = tmp_path / "core"
    child = subprocess.Popen(command(large, target), stderr=subprocess.PIPE)
    while child.poll() is None and not (target.is_dir() and any(target.iterdir())):
        time.sleep(0.001)
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = sorted(path.name for path in target.iterdir())
    if child.returncode == 0:
        pytest.skip("done before the signal came")
    assert "release" not in left and core_files.TRACKER not in left
    assert main(["--source", str(large), "--target", str(target), "--force"]) == 0
    core_files.load_metadata_safely(core_files.resolve(target))


def test_memory_does_not_grow_with_the_model(large, tmp_path):
    code = "import sys; from megapatch.tools.convert.convert import main; main(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    for source, target in ((large, tmp_path / "core"), (tmp_path / "core", tmp_path / "back")):
        own = [sys.executable, "-c", code, *command(source, target)[3:]]
        said = subprocess.run(own, capture_output=True, text=True, check=True).stdout.split()
        assert int(said[-1]) < 100_000  # kB; the model has 250 MB
    assert (tmp_path / "back" / "model.safetensors").stat().st_size == (large / "model.safetensors").stat().st_size


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(large, tmp_path):
    mount = f"mount -t tmpfs -o size=20m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    script = f'{mount} && {{ "$@"; echo $?; ls -A {tmp_path}; }}'
    told = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "-", *command(large, tmp_path / "core")], capture_output=True, text=True
    )
    assert told.stdout == "1\n"
    assert told.stderr.startswith(f"mp-convert: error: {tmp_path}/core/release: disk full (")
    assert told.stderr.count("\n") == 1


def test_a_source_that_shrinks_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    plan = Plan()
    plan.add_file(tmp_path / "a", "b")
    (tmp_path / "a").write_bytes(b"x" * 99)
    (tmp_path / "out").mkdir()
    with pytest.raises(Exception, match="a: became shorter while it was copied; run again"):
        execute(plan.finish(), tmp_path / "out", 1, lambda size: None)


def test_more_files_than_a_process_may_open(tmp_path):
    plan = Plan()
    for n in range(300):
        (tmp_path / f"s{n}").write_bytes(f"{n}".encode())
        plan.add_file(tmp_path / f"s{n}", f"t{n}")
    (tmp_path / "out").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # process groups of other tests may have left some open
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 110, hard))
    try:
        execute(plan.finish(), tmp_path / "out", 3, lambda size: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert contents(tmp_path / "out") == {f"t{n}": f"{n}".encode() for n in range(300)}


def test_a_byte_named_twice_or_not_at_all_stops_the_plan(tmp_path):
    for first, second in ((0, 9), (0, 11), (1, 11)):
        parts = (Part(tmp_path, 0, 10),)
        with pytest.raises(AssertionError, match="is not named once"):
            Plan([Copy("a", "f", first, parts), Copy("b", "f", second, parts)]).finish()


@st.composite
def cut_tensor(draw) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """Shape, (offsets, sizes) of chunks that tile it in an irregular way, and how many axes lead."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    depth = max(0, len(shape) - draw(st.integers(1, 2)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(boxes) - 1))
        offsets, sizes = boxes[at]
        axis = draw(st.integers(0, len(shape) - 1))
        if sizes[axis] > 1:
            cut = draw(st.integers(1, sizes[axis] - 1))
            low = tuple(cut if n == axis else size for n, size in enumerate(sizes))
            high = tuple(size - cut if n == axis else size for n, size in enumerate(sizes))
            moved = tuple(place + cut if n == axis else place for n, place in enumerate(offsets))
            boxes[at : at + 1] = [(offsets, low), (moved, high)]
    return shape, draw(st.permutations(boxes)), depth


def checkpoint_of(folder: Path, tensor: np.ndarray, boxes: list) -> core_files.Checkpoint:
    """A checkpoint with this tensor (as 'a') in these chunks."""
    writer, data = CoreWriter(2), []
    for offsets, sizes in boxes:
        part = tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        data.append((*writer.tensor("a", "float32", tensor.shape, offsets, sizes), part.tobytes()))
    for name, offset, content in (*data, *writer.rest({})):
        with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
            file.seek(offset)
            file.write(content)
    return core_files.Checkpoint(folder)


@given(cut_tensor(), st.data())
def test_any_rectangular_chunks_give_the_tensor_back(tmp_path_factory, cut, data):
    shape, boxes, depth = cut
    folder = tmp_path_factory.mktemp("c")
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    lead = tuple(data.draw(st.integers(0, size - 1)) for size in shape[:depth])
    first = data.draw(st.integers(0, shape[depth] - 1))
    rows = data.draw(st.integers(1, shape[depth] - first))
    wanted = tensor[lead][first : first + rows]
    with checkpoint_of(folder, tensor, boxes) as checkpoint:
        found = matrix_of(checkpoint, checkpoint.tensors["a"], lead)
        part = found.take([Region(first, 0, rows, found.columns)])
        plan = Plan(list(part.copies("w", "out", 0, "float32"))).finish()
    execute(plan, folder, 2, lambda size: None)
    assert (folder / "out").read_bytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4))],
        [((0, 0), (4, 2))],
        [((0, 0), (4, 2)), ((0, 3), (4, 1))],
        [((0, 0), (4, 3)), ((0, 2), (4, 2))],
        [((0, 0), (4, 4)), ((2, 0), (2, 4))],
        [((0, 0), (2, 4)), ((3, 0), (1, 4))],
        [((1, 0), (3, 4))],
    ],
)
def test_chunks_that_leave_gaps_or_overlap_are_told(boxes, tmp_path):
    tensor = np.zeros((4, 4), np.float32)
    with checkpoint_of(tmp_path, tensor, boxes) as checkpoint:
        found = matrix_of(checkpoint, checkpoint.tensors["a"], ())
        with pytest.raises(Exception, match=r"the chunks of a leave a part of it out, or overlap"):
            list(found.copies("w", "out", 0, "float32"))
