"""An output of mp-generate is complete, or goes on with --resume to the very same lines."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_tokenizer, tiny_model

from megapatch.tools.generate.generate import main
from megapatch.tools.generate.journal import Journal

WORKER = Path(__file__).parent / "generate_kill_worker.py"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model and 24 prompts, two of them with several samples."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder / "hf", "qwen3", vocab_size=260)
    byte_tokenizer(folder / "hf")
    lines = [{"prompt": "a" * (1 + i % 7), "id": f"p{i}", "max_new_tokens": 1 + i * 7 % 23} for i in range(24)]
    for i in (3, 11):
        lines[i] |= {"n": 3, "temperature": 1}
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--model", str(folder / "hf"), "--input", str(folder / "in.jsonl"), "--batch-size", "4"]


@pytest.fixture(scope="module")
def expected(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a run that nothing stops."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main([*asked, "--output", str(output)]) == 0
    return output.read_text().split("\n")[:-1]


@pytest.mark.parametrize(("order", "seed"), [("input", 0), ("finished", 1)])
def test_a_run_killed_again_and_again_ends_with_the_same_lines(
    order: str, seed: int, asked: list[str], expected: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, str(WORKER), str(seed), str(output), *asked, "--order", order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout.splitlines()[-1])
    assert len(left) >= 3 and left == sorted(left), "killed several times, and never fewer rows than before"
    found = output.read_text().split("\n")[:-1]
    assert sorted(found) == sorted(expected) and len(expected) == 28
    assert found == expected or order == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def interrupted(output: Path, asked: list[str], rows: list[str], torn: str = "") -> Path:
    """An output as a killed run leaves it, and its settings from a run that finds a bad line after it has begun."""
    partial = output.with_name(f"{output.name}.partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megapatch.tools.generate.generate._run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("megapatch.tools.generate.journal.Journal.__exit__", lambda self, *_: self._file.close())
        assert main([*asked, "--output", str(output)]) == 130
    partial.write_text("".join(row + "\n" for row in rows) + torn)
    return partial


def test_what_decided_the_lines_is_not_written_again_where_a_kill_could_tear_it(
    asked: list[str], expected: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    about = interrupted(output, asked, expected[:5]).with_name("out.jsonl.partial.json")
    before = about.read_bytes(), about.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megapatch.tools.generate.generate._run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*asked, "--output", str(output), "--resume"]) == 130
    assert (about.read_bytes(), about.stat().st_mtime_ns) == before


def test_a_torn_last_line_is_cut_and_written_anew(
    asked: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    interrupted(output, asked, expected[:5], expected[5][:-9])
    assert main([*asked, "--output", str(output), "--resume"]) == 0
    assert output.read_text().split("\n")[:-1] == expected
    err = capsys.readouterr().err
    assert (
        f"cut {len(expected[5][:-9].encode())} bytes of a torn last line" in err and "5 rows are there already" in err
    )


def test_a_finished_output_takes_further_prompts(
    asked: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, more = tmp_path / "out.jsonl", tmp_path / "more.jsonl"
    assert main([*asked, "--output", str(output), "--resume"]) == 0, "nothing there yet"
    before = output.read_bytes()
    assert main([*asked, "--output", str(output), "--resume"]) == 0
    assert output.read_bytes() == before and "every prompt has its row already" in capsys.readouterr().err
    lines = Path(asked[3]).read_text()
    more.write_text(lines + json.dumps({"prompt": "more", "id": "more"}) + "\n")
    assert main([*asked[:3], str(more), "--output", str(output), "--resume"]) == 0
    assert output.read_text().split("\n")[:-1][:-1] == expected and len(expected) == 28
    more.write_text(lines.replace('"a"', '"b"', 1))
    assert main([*asked[:3], str(more), "--output", str(output), "--resume"]) == 1
    err = capsys.readouterr().err
    assert "--resume: the output has id 'p0' with the prompt 'a', the input with 'b'" in err
    assert "out.jsonl: is finished; whether its rows were made with the same options is not known" in err
    assert {path.name for path in tmp_path.iterdir()} == {"more.jsonl", "out.jsonl"}, "a refusal leaves it as it was"


def test_what_must_not_be_mixed_is_refused(
    asked: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    partial = interrupted(output, asked, expected[:2])
    given = [*asked, "--output", str(output)]
    capsys.readouterr()
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([*given, "--resume"]) == 1
    cases = {
        "another run is writing it": None,
        "go on with it by --resume": given,
        "made with logprobs false, now true; give the same options, or start again with --force": [
            *given,
            "--resume",
            "--logprobs",
        ],
        "made with sampling": [*given, "--resume", "--seed", "4"],
        "made with precision": [*given, "--resume", "--precision", "bf16"],
    }
    for message, arguments in cases.items():
        assert arguments is None or main(arguments) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    partial.write_text("{\n")
    assert main([*given, "--resume"]) == 1
    assert f"{partial}:1: not JSON" in capsys.readouterr().err
    assert main([*given, "--resume", "--batch-size", "2"]) == 1, "the batch size is not one of the settings"
    assert main([*given, "--force"]) == 0
    assert output.read_text().split("\n")[:-1] == expected


def test_a_failing_run_leaves_what_was_done(
    asked: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megapatch.tools.generate.progress import Progress

    output, done = tmp_path / "out.jsonl", Progress.done

    def fail(self: Progress, completion: object) -> None:
        done(self, completion)
        if self.num_done == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "done", fail)
    assert main([*asked, "--output", str(output)]) == 130
    partial = tmp_path / "out.jsonl.partial"
    left = partial.read_text().split("\n")[:-1]
    assert not output.exists() and 1 <= len(left) <= 14 and left == expected[: len(left)]
    monkeypatch.undo()
    assert main([*asked, "--output", str(output), "--resume"]) == 0
    assert output.read_text().split("\n")[:-1] == expected


def test_a_full_disk_leaves_whole_lines(
    asked: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full:
        """A file on a disk that has room for a few rows and a half."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, sum(len(row.encode()) + 1 for row in expected[:4]) + 20

        def write(self, content: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            took = self.file.write(content[: self.room])
            self.room -= took
            return took

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    output, enter = tmp_path / "out.jsonl", Journal.__enter__

    def entered(self: Journal) -> Journal:
        self._file = Full(self._file)  # type: ignore[assignment]
        return enter(self)

    monkeypatch.setattr(Journal, "__enter__", entered)
    assert main([*asked, "--output", str(output)]) == 1
    assert "disk full" in capsys.readouterr().err.splitlines()[-1]
    partial = tmp_path / "out.jsonl.partial"
    assert partial.read_text().split("\n")[:-1] == expected[:4] and not output.exists()
    monkeypatch.undo()
    assert main([*asked, "--output", str(output), "--resume"]) == 0
    assert output.read_text().split("\n")[:-1] == expected


def test_wrong_usage(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for message, flags in {
        "--resume needs --output FILE": ["--resume"],
        "--resume and --force contradict": ["--resume", "--force", "--output", "x"],
        "--chat writes to the terminal": ["--chat", "--output", "x"],
        "--context-length 1": ["--context-length", "1"],
        "--logit-bias 3: expected ID=NUMBER": ["--logit-bias", "3"],
        "--cache-mib 0: must be at least 1": ["--cache-mib", "0"],
    }.items():
        given = asked[:2] if "--chat" in flags else asked
        with pytest.raises(SystemExit) as ended:
            main([*given, *flags])
        assert ended.value.code == 2 and message in capsys.readouterr().err
