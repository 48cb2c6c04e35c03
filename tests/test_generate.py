"""mp-generate: files, stdin and flags in, JSON lines out, from Hugging Face folders and core checkpoints."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_tokenizer, letter_tokenizer, tiny_model
from transformers import CONFIG_MAPPING

from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.generate.generate import main

TEXTS = ["Hello, world", "x", "naïve café", "The quick brown fox jumps"]
SHORT = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer of 257 tokens; the model has 260."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    tiny_model(folder, "qwen3", vocab_size=260)
    return byte_tokenizer(folder)


@pytest.fixture
def give_stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def flags(texts: list[str]) -> list[str]:
    return [word for text in texts for word in ("--prompt", text)]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """The rows that a run writes to stdout."""
    assert main([*map(str, arguments)]) == 0
    return rows(capsys.readouterr().out)


def test_flags_give_one_row_for_each_prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "--model", model, *flags(TEXTS), *SHORT, "--logprobs", "--batch-size", 3)
    tokenizer = Tokenizer(model)
    assert [row["prompt"] for row in found] == TEXTS
    assert [(row["id"], row["index"]) for row in found] == [(i, i) for i in range(4)]
    for row in found:
        assert list(row) == ["id", "index", "prompt", "text", "token_ids", "finish_reason", "logprobs", "usage"]
        assert row["usage"] == {"prompt_tokens": len(row["prompt"].encode()), "completion_tokens": 8}
        assert row["text"] == tokenizer.decode(row["token_ids"]).rstrip("\ufffd")
        assert len(row["logprobs"]) == 8
        assert max(row["logprobs"]) < 0


def test_text_and_json_lines_from_files_and_stdin_are_the_same(
    model: Path, tmp_path: Path, give_stdin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(capsys, "--model", model, *flags(TEXTS), *SHORT)
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("".join(f"{one}\n" for one in TEXTS))
    lines.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in TEXTS))
    for file in (text, lines):
        assert run(capsys, "--model", model, "--input", file, *SHORT) == expected
        give_stdin(file.read_text())
        assert run(capsys, "--model", model, "--input", "-", *SHORT) == expected
    reader, writer = os.pipe()
    os.write(writer, text.read_bytes())
    os.close(writer)
    assert run(capsys, "--model", model, "--input", f"/dev/fd/{reader}", *SHORT) == expected  # <(command) of a shell
    ids = [{"prompt_token_ids": Tokenizer(model).encode(one)} for one in TEXTS]
    lines.write_text("".join(json.dumps(one) + "\n" for one in ids))
    for row in expected:
        del row["prompt"]
    assert run(capsys, "--model", model, "--input", lines, *SHORT) == expected


def test_braces_are_text_when_the_format_says_so(
    model: Path, give_stdin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin("{not json\n")
    (row,) = run(capsys, "--model", model, "--input", "-", "--format", "text", *SHORT)
    assert row["prompt"] == "{not json"


def test_a_line_overrides_the_options(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "abc", "id": "plain"},
        {"prompt": "abc", "id": "short", "max_new_tokens": 3},
        {"prompt": "abc", "id": "hot", "temperature": 1, "top_k": 100, "top_p": 0.9, "seed": 3},
        {"prompt": "abc", "id": 7, "stop_token_ids": []},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, short, hot, seven = run(capsys, "--model", model, "--input", file, *SHORT)
    assert [row["id"] for row in (plain, short, hot, seven)] == ["plain", "short", "hot", 7]
    assert short["token_ids"] == plain["token_ids"][:3]
    assert short["finish_reason"] == "length"
    assert hot["token_ids"] != plain["token_ids"] == seven["token_ids"]
    lines = [lines[2], {**lines[1], "stop_token_ids": plain["token_ids"][1:2]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, stopped = run(capsys, "--model", model, "--input", file, *SHORT, "--batch-size", 1)
    assert again["token_ids"] == hot["token_ids"], "whatever the others are"
    assert stopped["token_ids"] == plain["token_ids"][:2]
    assert stopped["finish_reason"] == "stop"


def test_stop_flags_end_the_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (full,) = run(capsys, "--model", model, "--prompt", "abc", "--max-new-tokens", 40)
    text = full["text"]
    stop = next(text[i : i + 2] for i in range(3, len(text)) if text[i : i + 2].isascii())
    (row,) = run(
        capsys, "--model", model, "--prompt", "abc", "--max-new-tokens", 40, "--stop", "absent", "--stop", stop
    )
    assert row["text"] == text[: text.find(stop)]
    assert row["finish_reason"] == "stop"
    first = full["token_ids"][0]
    (row,) = run(capsys, "--model", model, "--prompt", "abc", "--stop-token-id", first)
    assert (row["text"], row["token_ids"], row["finish_reason"]) == ("", [first], "stop")


def test_eos_of_the_generation_config_ends_the_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (full,) = run(capsys, "--model", model, "--prompt", "abc", *SHORT)
    folder = byte_tokenizer(tmp_path / "tokenizer")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, full["token_ids"][2]]}))
    (row,) = run(capsys, "--model", model, "--tokenizer", folder, "--prompt", "abc", *SHORT)
    assert row["finish_reason"] == "stop"
    assert row["token_ids"] == full["token_ids"][: full["token_ids"].index(full["token_ids"][2]) + 1]


def test_add_bos_puts_it_first(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, "--model", model, "--prompt", "abc", "--add-bos", *SHORT)
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"prompt_token_ids": [256, *Tokenizer(model).encode("abc")]}))
    (same,) = run(capsys, "--model", model, "--input", lines, *SHORT)
    assert row["token_ids"] == same["token_ids"]
    assert row["usage"]["prompt_tokens"] == 4


def test_a_core_checkpoint_gives_what_its_hugging_face_folder_gives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(capsys, "--model", model, *flags(TEXTS), *SHORT)
    assert convert(["--source", str(model), "--target", str(tmp_path / "core")]) == 0
    capsys.readouterr()
    for folder in (tmp_path / "core", tmp_path / "core" / "release"):
        assert run(capsys, "--model", folder, *flags(TEXTS), *SHORT) == expected


def test_generation_ends_at_the_model_s_longest_length(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, "--model", model, "--prompt", "a" * 60, "--max-new-tokens", 100)
    assert row["usage"] == {"prompt_tokens": 60, "completion_tokens": 4}
    assert row["finish_reason"] == "length"


def test_bf16_runs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, "--model", model, "--prompt", "abc", "--precision", "bf16", *SHORT)
    assert row["usage"]["completion_tokens"] == 8


def test_an_output_file_is_written_whole_and_never_over_another(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(capsys, "--model", model, *flags(TEXTS), *SHORT)
    target = tmp_path / "out.jsonl"
    arguments = ["--model", str(model), *flags(TEXTS), *SHORT, "--output", str(target)]
    assert main(arguments) == 0
    assert rows(target.read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert main(arguments) == 1
    assert f"{target}: exists already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


BAD_LINES = {
    "{": "in.jsonl:2: not JSON",
    "[]": "in.jsonl:2: JSON list found",
    "{}": "in.jsonl:2: expected one of prompt, prompt_token_ids and messages",
    '{"prompt": ""}': "in.jsonl:2: the prompt has no tokens",
    '{"prompt": 5}': "in.jsonl:2: prompt '5'; expected a string",
    '{"prompt": "a", "temprature": 1}': "in.jsonl:2: field 'temprature' is not known",
    '{"prompt": "a", "temperature": "1"}': "in.jsonl:2: temperature '1'; expected a number",
    '{"prompt": "a", "top_k": 1.5}': "in.jsonl:2: top_k 1.5; expected an integer",
    '{"prompt": "a", "top_p": 0.5}': "in.jsonl:2: top-k, top-p and min-p choose nothing at temperature 0",
    '{"prompt": "a", "stop": [1]}': "in.jsonl:2: stop [1]",
    '{"prompt": "a", "stop": ""}': "in.jsonl:2: stop: an empty string",
    '{"prompt": "a", "id": 0}': "in.jsonl:2: id 0 is that of line 1",
    '{"prompt": "a", "id": null}': "in.jsonl:2: id None",
    '{"prompt_token_ids": [260]}': "in.jsonl:2: token id 260 in the prompt; the model has 0 to 259",
    '{"prompt_token_ids": "12"}': "in.jsonl:2: prompt_token_ids 12",
    json.dumps({"prompt": "a" * 64}): "in.jsonl:2: the prompt has 64 tokens and leaves no room",
    "\udcff": "in.jsonl:2: not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_generated(
    line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(('{"prompt": "good"}\n' + line + "\n").encode(errors="surrogateescape"))
    assert main(["--model", str(model), "--input", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert BAD_LINES[line] in err
    assert len(err.splitlines()) == 1


USAGE = {
    "expected either --prompt TEXT or --input FILE": [],
    "expected either": ["--prompt", "a", "--input", "-"],
    "generation runs with --cp 1": ["--prompt", "a", "--cp", "2"],
    "--batch-size 0": ["--prompt", "a", "--batch-size", "0"],
    "max-new-tokens 0": ["--prompt", "a", "--max-new-tokens", "0"],
    "temperature -1.0": ["--prompt", "a", "--temperature", "-1"],
    "top-p 0.0": ["--prompt", "a", "--temperature", "1", "--top-p", "0"],
    "top-k, top-p and min-p choose nothing at temperature 0": ["--prompt", "a", "--top-k", "5"],
}


@pytest.mark.parametrize("message", USAGE)
def test_wrong_usage_exits_with_2(message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(model), *USAGE[message]])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_fit_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    tiny_model(small, "llama")
    plain = letter_tokenizer(tmp_path / "plain")
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert convert(["--source", str(model), "--target", str(tmp_path / "core")]) == 0
    base = ["--model", str(model)]
    cases: dict[str, list[str]] = {
        "the tokenizer has ids up to 256, the model's vocab_size is 96": [
            "--model",
            str(small),
            "--tokenizer",
            str(model),
        ],
        "config.json": ["--model", str(tmp_path / "absent")],
        "no tokenizer": ["--model", str(small)],
        "names no bos_token": [*base, "--tokenizer", str(plain), "--add-bos"],
        "1 processes, but this layout is for 2": [*base, "--tp", "2"],
        "is a core checkpoint; make a Hugging Face folder of it with mp-convert": [
            "--model",
            str(tmp_path / "core"),
            "--engine",
            "transformers",
        ],
    }
    for message, arguments in cases.items():
        capsys.readouterr()
        assert main([*arguments, "--prompt", "a"]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    for message, name in {"no such file": "absent.txt", "is a folder": "core", "empty; expected": "empty.txt"}.items():
        assert main([*base, "--input", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


def test_the_transformers_engine_refuses_a_model_type_that_transformers_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "m", "qwen")
    folder = str(letter_tokenizer(tmp_path / "m"))
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "qwen")  # there for other tests only
    asked = ["--model", folder, "--prompt", "a", "--max-new-tokens", "2"]
    assert main([*asked, "--engine", "transformers"]) == 1
    told = capsys.readouterr().err
    assert "model_type 'qwen': transformers has no such model; use --engine megapatch" in told.splitlines()[-1]
    assert main(asked) == 0


def test_two_processes_read_stdin_once_and_write_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--model", str(model), *SHORT, "--temperature", "1", "--top-p", "0.9"]
    expected = run(capsys, *settings, *flags(TEXTS))
    tool = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tool += ["-m", "megapatch.tools.generate.generate", "--tp", "2", "--input", "-", *settings]
    ended = subprocess.run(tool, input="\n".join(TEXTS), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert rows(ended.stdout) == expected
