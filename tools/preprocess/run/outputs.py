"""The end of a run: indices and manifests of all outputs, put in place together, every .idx last."""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.commit import digest, make_parents, real
from megapatch.models.data_formats import PAIRS
from megapatch.models.indexed_data import bin_path, idx_path, manifest_path, write_index
from megapatch.tools.preprocess.reading.sources import QUARANTINE
from megapatch.tools.preprocess.run.job import Job, Output, Written
from megapatch.tools.preprocess.run.run_state import RunState
from megapatch.tools.preprocess.run.stopping import Stopping


def targets(output: Output) -> list[Path]:
    """Where the files of an output will be."""
    return [bin_path(output.prefix), idx_path(output.prefix), manifest_path(output.prefix)]


def refuse_existing(job: Job[Any], force: bool) -> None:
    """Refuse to write over any file, unless ``force``."""
    for path in [*_of_outputs(job), *job.also]:
        if path.exists() and not (force and path.is_file()):
            advice = "or replace it with --force" if path.is_file() else "it is no regular file"
            raise UserError(f"{path}: exists already; choose another {_option(job, path)}, {advice}")


def refuse_clashes(job: Job[Any], inputs: Iterable[str]) -> None:
    """Refuse to write over a file that is read, or to put bad lines where an output goes."""
    read = {os.path.realpath(path) for path in inputs}
    written = [os.path.realpath(path) for path in (*_of_outputs(job), *job.also)]
    for path in [*_of_outputs(job), *job.also]:
        if os.path.realpath(path) in read:
            raise UserError(f"{path}: is an input, and would be written over; choose another {_option(job, path)}")
    for path in job.put_aside:
        if written.count(os.path.realpath(path)) > 1:
            raise UserError(f"{path}: is written by this run already; choose another {_option(job, path)}")


def _of_outputs(job: Job[Any]) -> list[Path]:
    return [path for output in job.outputs for path in targets(output)]


def _former(prefix: Path) -> list[Path]:
    """What lies there of a set that this run replaces: its pairs, arguments for the trainer, plans for packing."""
    try:
        said = json.loads(manifest_path(prefix).read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    ends = PAIRS.get(said.get("format", ""), ()) if isinstance(said, dict) else ()
    pairs = [path for end in ends for path in (idx_path(f"{prefix}{end}"), bin_path(f"{prefix}{end}"))]
    plans = [path for end in ends for path in prefix.parent.glob(f"{glob.escape(prefix.name + end)}.pack-*.npz")]
    return [path for path in (*pairs, Path(f"{prefix}.args"), *plans) if ends and path.is_file()]


def _option(job: Job[Any], path: Path) -> str:
    """The option that names a file."""
    return f"{QUARANTINE}FILE" if path in job.put_aside else "--output-prefix"


def complete(job: Job[Any], prefix: Path, run: str) -> bool:
    """Whether the run of this digest has finished: its manifests say so."""
    found = [manifest_path(one) for one in {prefix, *(output.prefix for output in job.outputs)}]
    said = [json.loads(path.read_bytes()) for path in found if path.is_file()]
    return bool(said) and all(isinstance(one, dict) and one.get("run") == run for one in said)


def publish(
    state: RunState, job: Job[Any], inputs: Sequence[Mapping[str, Any]], run: str, stopping: Stopping
) -> list[Written]:
    """Write what is missing and rename everything; all outputs appear or none. Manifests get the run's digest."""
    state.save()
    kept = [number for number, keep in enumerate(job.kept()) if keep]
    with stopping.at_rest():  # digests take a while
        written = [_finish(state, number, job.outputs[number]) for number in kept]
    small = []
    for position, (path, content) in enumerate(job.files(written, inputs, state.folder).items()):
        stage = content if isinstance(content, Path) else state.folder / f"{position}.file"
        if isinstance(content, bytes):
            stage.write_bytes(_with_run(path, content, run))
        small.append((_near(stage, _target(path)), _target(path)))
    bins = [(state.folder / f"{n}.bin", _target(bin_path(job.outputs[n].prefix))) for n in kept]
    indices = [(state.folder / f"{n}.idx", _target(idx_path(job.outputs[n].prefix))) for n in kept]
    former = [path for prefix in {state.prefix, *(output.prefix for output in job.outputs)} for path in _former(prefix)]
    old = [_target(path) for path in (*_of_outputs(job), *job.also, *former)]
    stale = sorted(old, key=lambda path: path.suffix != ".idx")  # an old index must never stand beside a new .bin
    state.commit([*bins, *small, *indices], stale)
    return written


def _finish(state: RunState, number: int, output: Output) -> Written:
    binary, index = state.folder / f"{number}.bin", state.folder / f"{number}.idx"
    lengths = state.lengths(number)
    write_index(index, lengths, output.dtype)
    num_bytes = binary.stat().st_size
    assert state.sizes[f"{number}.bin"] == num_bytes, f"{binary}: {num_bytes} bytes, {state.sizes} written"
    return Written(output, len(lengths), num_bytes // output.dtype.itemsize, digest(binary), digest(index))


def _with_run(path: Path, content: bytes, run: str) -> bytes:
    if not path.name.endswith(".manifest.json"):
        return content
    return (json.dumps(json.loads(content) | {"run": run}, indent=1) + "\n").encode()


def _target(path: Path) -> Path:
    make_parents(path.absolute())
    return real(path)  # of a symbolic link its target, so that the link stays


def _near(stage: Path, target: Path) -> Path:
    """``stage``, or a copy beside the target where that is on another file system."""
    if stage.stat().st_dev == target.parent.stat().st_dev:
        return stage
    copied = target.with_name(f"{target.name}.partial")
    shutil.copyfile(stage, copied)
    return copied
