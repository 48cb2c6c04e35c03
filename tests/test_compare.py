"""mp-convert --verify: source and target read again and compared range by range; the first that departs is named."""

import json
import os
from pathlib import Path

import hostile
import pytest

from megapatch.tools.convert.convert import main


def run(source: Path, target: Path, *more: str) -> int:
    return main(["--source", str(source), "--target", str(target), *more])


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return hostile.small_folder(tmp_path_factory.mktemp("x") / "hf", "mixtral")


@pytest.fixture(scope="module")
def core(hf, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("y") / "core"
    assert run(hf, target) == 0
    return target


WAYS: dict[str, tuple[str, list[str], str]] = {
    "to core": ("hf", [], "release"),
    "to core, cast": ("hf", ["--dtype", "fp32"], "release"),
    "to core, cut": ("hf", ["--chunk", "tp=2,ep=2"], "release"),
    "to ranks": ("hf", ["--to", "legacy", "--tp", "2", "--pp", "2"], "release"),
    "to Hugging Face": ("core", [], ""),
    "to Hugging Face, cast": ("core", ["--dtype", "fp16"], ""),
    "sharded anew": ("hf", ["--to", "hf", "--max-shard-size", "30KB"], ""),
}


@pytest.fixture(params=WAYS)
def way(request, hf, core, tmp_path) -> tuple[Path, Path, list[str], Path]:
    """Source, target, options, and the folder of the files; written and compared."""
    kind, options, inside = WAYS[request.param]
    source, target = {"hf": hf, "core": core}[kind], tmp_path / "target"
    assert run(source, target, "--verify", *options) == 0
    return source, target, options, target / inside


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_what_was_written_is_equal_and_comparing_writes_nothing(way):
    source, target, options, _ = way
    before = state(target)
    assert run(source, target, "--verify", *options) == 0
    assert state(target) == before


def test_a_bit_that_differs_in_any_tensor_is_named(way, capsys):
    source, target, options, folder = way
    (folder / "manifest.json").unlink()  # the source alone is enough
    assert run(source, target.with_name("none"), "--dry-run", *options) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines[:: max(1, len(lines) // 60)]:
        path = folder / line["file"]
        data = bytearray(path.read_bytes())
        at = line["offset"] + line["bytes"] // 2
        data[at] ^= 16
        path.write_bytes(data)
        assert run(source, target, "--verify", *options) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"mp-convert: error: {path}: ") and f"byte {at} " in told
        assert line.get("tensor", "header") in told
        data[at] ^= 16
        path.write_bytes(data)
    assert run(source, target, "--verify", *options) == 0


def test_a_file_that_is_missing_longer_is_told(way, capsys):
    source, target, options, folder = way
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    size = path.stat().st_size
    os.truncate(path, size + 1)
    assert run(source, target, "--verify", *options) == 1
    assert f"{path}: {size + 1} bytes, the plan writes {size}" in capsys.readouterr().err
    path.unlink()
    assert run(source, target, "--verify", *options) == 1
    assert f"{path}: missing; the plan writes {size} bytes there" in capsys.readouterr().err


def test_a_file_that_the_source_lacks_is_mentioned(hf, core, capsys):
    (core / "release" / "notes.txt").write_text("mine")
    assert run(hf, core, "--verify") == 0
    (core / "release" / "notes.txt").unlink()
    assert "not looked at, as the source has nothing like it: notes.txt" in capsys.readouterr().err


def test_a_manifest_that_names_another_digest_is_told(hf, tmp_path, capsys):
    from megapatch.models import commit

    assert run(hf, tmp_path / "core") == 0
    release = tmp_path / "core" / "release"
    (release / "manifest.json").unlink()
    commit.seal(release, tool="x", digests={"common.pt": "0" * 32})
    assert run(hf, tmp_path / "core", "--verify") == 1
    assert "common.pt: as the source has it, but manifest.json has another digest" in capsys.readouterr().err


def test_other_options_and_other_weights_are_found(hf, core, tmp_path, capsys):
    assert run(hf, core, "--verify", "--dtype", "fp32") == 1
    assert "with the same options?" in capsys.readouterr().err
    other = hostile.small_folder(tmp_path / "hf", "mixtral")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert run(other, core, "--verify") == 1
    assert "decoder.final_layernorm.weight departs from" in capsys.readouterr().err


def test_verify_and_dry_run_exclude_each_other(hf, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(hf, tmp_path / "x", "--verify", "--dry-run")
    assert stopped.value.code == 2 and "--verify: not with --dry-run" in capsys.readouterr().err
