"""mp-preprocess killed at each system call on an output: nothing torn loads, --resume gives the same bytes."""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from preprocess_data import make_tokenizer
from test_commit import needs_strace

from megapatch.models.indexed_data import read_index
from megapatch.tools.preprocess.preprocess import main

CODE = """
import sys
from megapatch.tools.preprocess.run import run_state
from megapatch.tools.preprocess.preprocess import main
run_state.EVERY_S, run_state._SHARE = 0.0, 0  # a state on the disk after every chunk
sys.exit(main(sys.argv[1:]))
"""
LOOKS = re.compile(r"stat|access|read|seek|getdents|open\b|ioctl|close|mmap|madvise|munmap|fcntl|exec")
VERSIONS = re.compile(rb'"versions": \{[^}]*\}')  # with git's, which may change while this runs
CALL = re.compile(r"^(\d+) +(\w+)\((.*)$", re.M)


class Case:
    """A run of a few chunks, whose outputs are split, deduplicated and have bad lines put aside."""

    def __init__(self, folder: Path, tok: Path) -> None:
        self.folder, self.prefix = folder, folder / "out" / "data"
        old, source = folder / "old.jsonl", folder / "in.jsonl"
        old.write_text("".join(f'{{"text": "old {n}"}}\n' for n in range(20)))
        lines = [f'{{"text": "document {n % 90} of many"}}' if n % 40 != 7 else "{bad" for n in range(200)]
        source.write_text("\n".join(lines) + "\n")
        shared = ["--tokenizer", str(tok), "--output-prefix", str(self.prefix), "--split", "80,20,0"]
        shared += ["--workers", "1", "--chunk-bytes", "2500", "--engine", "tokenizers", "--input"]
        self.argv = [*shared, str(source), "--deduplicate", "--on-bad-line", f"quarantine={folder / 'out' / 'bad'}"]
        assert main([*shared, str(old)]) == 0
        self.old = self.found()
        assert main([*self.argv, "--force"]) == 0
        self.new = self.found()

    def found(self) -> dict[str, bytes]:
        """The files of the output folder, those of PREFIX.partial left out; of manifests all but the versions."""
        found = {path.name: path.read_bytes() for path in sorted(self.prefix.parent.iterdir()) if path.is_file()}
        return {name: said if not name.endswith(".json") else VERSIONS.sub(b"", said) for name, said in found.items()}

    def begin(self, old: bool) -> None:
        """An output folder with the old files, or without any."""
        shutil.rmtree(self.prefix.parent)
        self.prefix.parent.mkdir()
        for name, content in self.old.items() if old else ():
            (self.prefix.parent / name).write_bytes(content)

    def traced(self, *options: str) -> int:
        """Exit status of the run in a process of its own under strace; negative or above 128: killed."""
        run = ["strace", "-f", "-qq", "--seccomp-bpf", *options, sys.executable, "-Bc", CODE, *self.argv, "--force"]
        return subprocess.run(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode

    def calls(self) -> tuple[list[str], dict[str, int]]:
        """The paths that a run touches, and how often each system call does, by the process that does it most."""
        log = self.folder / "calls"
        assert self.traced("-y", "-o", str(log), "-e", "trace=%file,%desc") == 0
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        paths = set()
        for pid, call, rest in CALL.findall(log.read_text()):
            named = re.findall(rf'[<"]({re.escape(str(self.prefix.parent))}[^">]*)[">]', rest)
            if named and not LOOKS.search(call):
                counts[call][pid] += 1
                paths.update(named)
        assert self.found() == self.new
        return sorted(paths), {call: max(by_process.values()) for call, by_process in counts.items()}

    def loadable(self) -> list[str]:
        """The prefixes in the output folder that a loader would take."""
        return [name.removesuffix(".idx") for name in self.found() if name.endswith(".idx")]

    def check_killed(self) -> None:
        """What can be loaded is whole, with its own manifest, old or new."""
        found = self.found()
        for prefix in self.loadable():
            read_index(self.prefix.parent / prefix)
            mine = [f"{prefix}.{kind}" for kind in ("bin", "idx", "manifest.json")]
            trio = [found[name] for name in mine]
            assert trio in ([self.old.get(name) for name in mine], [self.new[name] for name in mine]), prefix

    def check_resumed(self) -> None:
        """--resume ends with the files of the uninterrupted run, and nothing else. Where nothing was begun, or all is
        done already, there is nothing to resume, and only --force replaces what stands."""
        begun = (self.prefix.parent / "data.partial" / "state.json").exists()
        again = "--force" if not begun and self.found() in (self.old, self.new) else "--resume"
        assert main([*self.argv, again]) == 0
        assert self.found() == self.new
        assert [path.name for path in self.prefix.parent.iterdir() if path.is_dir()] == []


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("strace")
    return Case(folder, make_tokenizer(folder))


def kill_at(case: Case, most: int) -> None:
    """Kill at up to ``most`` calls of each kind, spread from the first to the last."""
    case.begin(old=True)
    paths, counts = case.calls()
    assert {"openat", "pwrite64", "rename", "unlink", "fsync", "ftruncate"} <= counts.keys(), counts
    chosen = [word for path in paths for word in ("-P", path)]
    kills = 0
    for call, count in sorted(counts.items()):
        steps = sorted({1 + round(at * (count - 1) / max(most - 1, 1)) for at in range(most)})
        for number, step in enumerate(steps):
            case.begin(old=number % 2 == 0)
            kills += case.traced(*chosen, "-o", os.devnull, "-e", f"inject={call}:signal=KILL:when={step}") != 0
            case.check_killed()
            case.check_resumed()
    assert kills >= len(counts)


@needs_strace
def test_a_kill_at_a_system_call_of_each_kind_leaves_nothing_torn_and_can_be_resumed(case: Case) -> None:
    kill_at(case, 3)


@needs_strace
@pytest.mark.slow
def test_a_kill_at_every_system_call_leaves_nothing_torn_and_can_be_resumed(case: Case) -> None:
    kill_at(case, 1000)
