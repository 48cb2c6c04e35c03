"""mp-train-tokenizer: a folder that transformers loads, the same each time, with any text encodable."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megapatch.models.commit import verify
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.train_tokenizer import main

TEXT = Path(__file__).read_text() + "– é€漢"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def train(source: Path, output: Path, *more: str) -> int:
    return main(["--input", str(source), "--output", str(output), "--vocab-size", "350", *more])


def test_vocabulary_has_the_size_asked_and_special_tokens_come_first(source: Path, tmp_path: Path) -> None:
    more = ("--special-tokens", "<|end|>", "<|pad|>", "--chat-template", "chatml")
    assert train(source, tmp_path / "tok", *more) == 0
    made = Tokenizer(tmp_path / "tok")
    assert (made.vocab_size, len(made.vocabulary)) == (350, 350)
    special = ["<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert [made.token_id(token) for token in special] == [0, 1, 2, 3]
    assert (made.eod_id, made.pad_id, made.stop_ids) == (0, 0, (0, 3))
    assert made.encode("".join(special)) == [0, 1, 2, 3]
    assert made.decode(made.encode("a<|end|>b"), skip_special_tokens=True) == "ab"
    assert len(made.encode(TEXT)) < 0.7 * len(TEXT.encode())


def test_folder_is_complete_and_verifies(source: Path, tmp_path: Path) -> None:
    assert train(source, tmp_path / "tok") == 0
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == [
        "generation_config.json",
        "manifest.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert verify(tmp_path / "tok")
    about = json.loads((tmp_path / "tok" / "manifest.json").read_text())
    assert about["counts"] == {"lines": 1, "documents": 1, "empty": 0, "bad": 0}
    assert about["inputs"] == {"files": 1, "bytes": source.stat().st_size}


def test_transformers_gives_the_same_ids(source: Path, tmp_path: Path) -> None:
    import transformers

    assert train(source, tmp_path / "tok", "--chat-template", "chatml") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
    ours = Tokenizer(tmp_path / "tok")
    for text in (TEXT, "  é€😀\r\n\t 12345 <|im_start|>x", ""):
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.all_special_tokens == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_chat_template_marks_what_the_assistant_says(source: Path, tmp_path: Path) -> None:
    import transformers

    assert train(source, tmp_path / "tok", "--chat-template", "chatml") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    made = theirs.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert theirs.decode(said) == "Hello!<|im_end|>"


def test_files_are_the_same_each_time_and_for_any_number_of_threads(source: Path, tmp_path: Path) -> None:
    assert train(source, tmp_path / "first") == 0
    tool = [sys.executable, "-m", "megapatch.tools.preprocess.train_tokenizer", "--vocab-size", "350"]
    argv = [*tool, "--input", str(source), "--output", str(tmp_path / "second")]
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "7"}
    subprocess.run(argv, check=True, env=environment)
    names = [path.name for path in (tmp_path / "first").iterdir()]
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_json_lines_teach_the_same_as_their_text(tmp_path: Path) -> None:
    lines = TEXT.splitlines(keepends=True)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, line in enumerate(lines):
        (folder / f"{i:04}.txt").write_text(line)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    assert train(tmp_path / "a.jsonl", tmp_path / "one", "--text-key", "body") == 0
    assert train(folder, tmp_path / "two", "--glob", "*.txt") == 0
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()


_TEMPLATE = """{{ eos_token }}{% for message in messages %}
[{{ message.role }}]<|begin|>{{ message.content }}<|end|>
{%- endfor %}{% if add_generation_prompt %}[assistant]<|begin|>{% endif %}
"""


def test_a_template_of_ones_own_is_rendered_by_transformers(source: Path, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "chat.jinja").write_text(_TEMPLATE)
    more = ("--chat-template", str(tmp_path / "chat.jinja"), "--special-tokens", "<|eot|>", "<|begin|>", "<|end|>")
    assert train(source, tmp_path / "tok", *more) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
    assert theirs.chat_template == _TEMPLATE
    assert theirs.apply_chat_template(MESSAGES[1:3], tokenize=False, add_generation_prompt=True) == (
        "<|eot|>[user]<|begin|>Hi<|end|>[assistant]<|begin|>Hello!<|end|>[assistant]<|begin|>"
    )
    ids = theirs.apply_chat_template(MESSAGES[1:2], return_dict=True)["input_ids"]
    assert [ids.count(i) for i in range(3)] == [1, 1, 1] and ids[-1] == 2
    assert Tokenizer(tmp_path / "tok").stop_ids == (0, 2)


TEMPLATES = [
    ("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "uses <|user|>, which are no --special-tokens"),
    (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}",
        "uses <|assistant|> <|user|>, which are no --special-tokens",
    ),
    ("{% for m in messages %}", "chat.jinja: line 1: not a chat template"),
    ("caf\xe9", "--chat-template chat.jinja: not UTF-8 at byte 3"),
    (None, "chat.jinja: No such file"),
]


@pytest.mark.parametrize("template, message", TEMPLATES, ids=[one[1][:26] for one in TEMPLATES])
def test_a_template_that_cannot_work_is_refused_before_learning(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    template: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if template is not None:
        Path("chat.jinja").write_text(template, encoding="latin-1")
    assert train(source, tmp_path / "tok", "--chat-template", "chat.jinja") == 1
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "tok").exists()


def test_several_keys_of_compressed_lines_teach_and_bad_lines_are_put_aside(tmp_path: Path) -> None:
    lines = TEXT.splitlines(keepends=True)
    good = [json.dumps({"a": line, "b": {"c": line[::-1]}}) for line in lines]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join([*good[:9], '{"a": 1}', "", *good[9:]]).encode()))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"a": line, "b.c": line[::-1]}) + "\n" for line in lines))
    keep = ("--on-bad-line", f"quarantine={tmp_path}/bad")
    over = ("--on-bad-line", f"quarantine={tmp_path}/a.jsonl.gz", "--force")
    assert train(tmp_path / "a.jsonl.gz", tmp_path / "none", "--text-key", "a", "b.c", *over) == 1
    assert train(tmp_path / "a.jsonl.gz", tmp_path / "one", "--text-key", "a", "b.c", *keep) == 0
    assert train(tmp_path / "b.jsonl", tmp_path / "two", "--text-key", "a", "b.c") == 0
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    counts = json.loads((tmp_path / "one" / "manifest.json").read_text())["counts"]
    assert counts == {"lines": len(lines) + 2, "documents": len(lines), "empty": 1, "bad": 1}
    assert (tmp_path / "bad").read_bytes() == b'{"a": 1}\n'
    reason = json.loads((tmp_path / "bad.reasons.jsonl").read_text())
    offset = len("\n".join([*good[:9], ""]).encode())
    assert (reason["place"], reason["reason"]) == (
        f"{tmp_path}/a.jsonl.gz:10 (byte {offset})",
        "'a' is a number, expected a string",
    )
    assert train(tmp_path / "a.jsonl.gz", tmp_path / "three", "--text-key", "a", *keep) == 1  # never over a file


def test_too_little_text_gives_fewer_tokens_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("ab ab")
    assert train(tmp_path / "text.txt", tmp_path / "tok") == 0
    assert Tokenizer(tmp_path / "tok").vocab_size == 258  # 256 bytes, the special token and "ab"
    assert "258 tokens learned, 350 asked" in capfd.readouterr().err


FAILURES = [
    (b"\xff", (), "text.txt (byte 0): not UTF-8"),
    (b"", (), "no documents in --input (1 lines = 0 documents + 1 empty + 0 bad"),
    (b"ab", ("--format", "jsonl"), "text.txt:1 (byte 0): not JSON"),
]


@pytest.mark.parametrize("content, more, message", FAILURES, ids=[one[2] for one in FAILURES])
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, more: tuple[str, ...], message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert train(tmp_path / "text.txt", tmp_path / "tok", *more) == 1
    assert message in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "megapatch.tools.preprocess.train_tokenizer", "--vocab-size", "350"]
    argv = [*tool, "--input", "-", "--output", str(tmp_path / "tok"), "--verbose"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdin and run.stderr
        run.stdin.write(b'{"text": "x"}\n' * 200_000)  # more than a pipe holds: the tool reads by then
        run.stdin.flush()
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays_unless_forced(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "mine.txt").write_text("mine")
    assert train(source, tmp_path / "tok") == 1
    assert "tok: exists already" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "tok").iterdir()] == ["mine.txt"]
    assert train(source, tmp_path / "tok", "--force") == 0
    assert not (tmp_path / "tok" / "mine.txt").exists()


USAGE = [
    (("--vocab-size", "256"), "--vocab-size 256: expected 257 or more"),
    (("--vocab-size", "258", "--chat-template", "chatml"), "--vocab-size 258: expected 259 or more"),
    (("--special-tokens", "<a>", "<a>"), "one is empty or named twice"),
    (("--special-tokens", "<|im_end|>", "--chat-template", "chatml"), "one is empty or named twice"),
    (("--min-frequency", "0"), "--min-frequency 0: expected 1 or more"),
]


@pytest.mark.parametrize("more, message", USAGE, ids=[one[1][:26] for one in USAGE])
def test_wrong_usage_is_exit_status_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        train(source, tmp_path / "tok", *more)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tok").exists()
