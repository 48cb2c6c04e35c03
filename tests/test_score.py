"""mp-score: its log-likelihoods are those of transformers, its counts and errors those of the definitions."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_model

from megapatch.models.indexed_data import bin_path, idx_path, write_index
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.generate.held_out import Cutting
from megapatch.tools.generate.means import ratio, share
from megapatch.tools.generate.score import main

TOLERANCE = 1e-5  # of a log-likelihood, relative: sums over tokens and layers are taken in another order
FAMILIES = ("llama", "gpt2", "qwen3_moe", "deepseek_v3", "bloom")
TEXTS = ["The quick brown fox jumps over the lazy dog; naïve café.\n" * 3, "x", "A second text."]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
QUESTIONS = [
    {"prompt": "2 + 2 =", "choices": [" 3", " 4", " forty"], "answer": 1},
    {"prompt": "The sky is ", "choices": ["blue", "loud"], "answer": "blue", "id": "sky"},
    {"messages": [{"role": "user", "content": "Hi"}], "choices": ["Hello", "Bye"], "answer": 0},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and transformers' model of each family; 64 positions."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for family in FAMILIES:
        reference = tiny_model(folder / family, family, vocab_size=260, bos_token_id=256, eos_token_id=256)
        byte_tokenizer(folder / family)
        (folder / family / "chat_template.jinja").write_text(TEMPLATE)
        found[family] = (folder / family, reference)
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def logprob(reference: Any, context: list[int], target: list[int]) -> float:
    """The log-likelihood of a target by transformers."""
    ids = [*context, *target]
    with torch.no_grad():
        logits = reference(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[at]].item() for at in range(len(context), len(ids)))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_those_of_transformers(
    family: str, models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reference = models[family]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    asked = ["--model", folder, "--text", tmp_path / "t.jsonl", "--tasks", tmp_path / "q.jsonl"]
    window, stride = 64, 24  # as long as the model's positions
    perplexity, choice = run(
        capsys, *asked, "--window", window, "--stride", stride, "--samples", tmp_path / "s.jsonl", "--batch-size", 3
    )
    samples, encode = rows(tmp_path / "s.jsonl"), Tokenizer(folder).encode
    expected = []
    for text in TEXTS:
        ids, total, at = [256, *encode(text)], 0.0, 1
        while at < len(ids):
            stop = min(len(ids), at + (window if at == 1 else stride))
            start = max(0, stop - window - 1)
            total += logprob(reference, ids[start:at], ids[at:stop])
            at = stop
        expected.append(total)
    assert [row["logprob"] for row in samples[:3]] == pytest.approx(expected, rel=TOLERANCE)
    lengths = [len(text.encode()) for text in TEXTS]
    assert (perplexity["documents"], perplexity["tokens"], perplexity["bytes"]) == (3, sum(lengths), sum(lengths))
    assert perplexity["words"] == sum(len(text.split()) for text in TEXTS)
    mean = -sum(expected) / sum(lengths)
    assert perplexity["nll_per_token"] == pytest.approx(mean, rel=TOLERANCE)
    assert perplexity["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=TOLERANCE)
    assert perplexity["nll_per_word"] == pytest.approx(mean * sum(lengths) / perplexity["words"], rel=TOLERANCE)
    contexts = ["2 + 2 =", "The sky is", "<user>Hi<a>"]
    for one, context, sample in zip(QUESTIONS, contexts, samples[3:], strict=True):
        blank = " " if context.endswith("is") else ""
        each = [logprob(reference, encode(context), encode(blank + text)) for text in one["choices"]]
        assert sample["logprobs"] == pytest.approx(each, rel=TOLERANCE)
        assert sample["chosen"] == each.index(max(each))
    right = [row["right"] for row in samples[3:]]
    assert (choice["questions"], choice["right"], choice["accuracy"]) == (3, sum(right), sum(right) / 3)
    assert samples[4]["id"] == "sky" and samples[4]["answer"] == 0


def test_windows_score_every_token_once_with_the_context_stated() -> None:
    for window, stride, length in ((4, 4, 12), (4, 1, 12), (5, 3, 14), (64, 64, 3), (4, 2, 2), (3, 3, 1)):
        cut = list(Cutting(window, stride, None).windows([length]))
        scored = [at for one in cut for at in range(one.first, one.stop)]
        assert scored == list(range(1, length))
        for number, one in enumerate(cut):
            assert one.stop - 1 - one.start <= window, "tokens that are read"
            assert number == 0 or one.stop - one.first <= stride
            assert number == 0 or one.stop - 1 - one.start == window, "as much context as there is room for"


def test_means_and_standard_errors() -> None:
    assert share([True, True, False, False]) == (0.5, math.sqrt(0.25 / 3))
    assert share([True]) == (1.0, None)
    mean, error = ratio([10.0, 0.0, 2.0], [2, 2, 2])
    assert mean == 2.0 and error == pytest.approx(torch.tensor([5.0, 0.0, 1.0]).std().item() / math.sqrt(3))
    assert ratio([3.0], [2]) == (1.5, None)


def write_data(prefix: Path, documents: list[list[int]]) -> None:
    import numpy as np

    np.concatenate([np.array(one, np.uint16) for one in documents]).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.array([len(one) for one in documents], np.int32), np.dtype(np.uint16))


def test_data_of_the_trainer_and_its_text_are_scored_alike(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reference = models["llama"]
    encode = Tokenizer(folder).encode
    write_data(tmp_path / "d", [encode(text) for text in TEXTS])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert convert(["--source", str(folder), "--target", str(tmp_path / "core")]) == 0
    base = ["--data", tmp_path / "d", "--text", tmp_path / "t.jsonl", "--text-key", "body"]
    data, text = run(capsys, "--model", tmp_path / "core", *base)
    assert data["nll_per_token"] == text["nll_per_token"] and "bytes" not in data
    assert (data["window"], data["stride"], data["prefix"]) == (64, 64, 256)
    first, _ = run(capsys, "--model", tmp_path / "core", *base, "--limit", 1, "--no-prefix")
    assert (first["documents"], first["tokens"], first["prefix"]) == (1, len(encode(TEXTS[0])) - 1, None)
    assert first["nll_per_token_stderr"] is None and "bytes" not in _
    ids = encode(TEXTS[0])[:60]
    (tmp_path / "short.txt").write_bytes(TEXTS[0].encode()[:60])
    (short,) = run(capsys, "--model", tmp_path / "core", "--text", tmp_path / "short.txt", "--no-prefix")
    assert short["nll_per_token"] == pytest.approx(-logprob(reference, ids[:1], ids[1:]) / 59, rel=TOLERANCE)


def test_exact_matches_are_counted(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megapatch.tools.generate.generate import main as generate

    folder, _ = models["llama"]
    assert generate(["--model", str(folder), "--prompt", "abc", "--max-new-tokens", "5"]) == 0
    said = json.loads(capsys.readouterr().out)["text"]
    lines = [
        {"prompt": "abc", "answer": ["no", f" {said} "], "max_new_tokens": 5},
        {"prompt": "abc", "answer": "no", "max_new_tokens": 5},
        {"prompt": "abc", "answer": said, "max_new_tokens": 5, "stop": said[1]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = run(capsys, "--model", folder, "--tasks", tmp_path / "q.jsonl", "--samples", tmp_path / "s.jsonl")
    assert [one["right"] for one in rows(tmp_path / "s.jsonl")] == [True, False, False]
    assert row == {
        "data": str(tmp_path / "q.jsonl"),
        "measure": "exact match",
        "questions": 3,
        "right": 1,
        "accuracy": 1 / 3,
        "accuracy_stderr": pytest.approx(1 / 3),
    }
    (row,) = run(capsys, "--model", folder, "--tasks", tmp_path / "q.jsonl", "--extract", "(?s).(.)", "--ignore-case")
    assert row["right"] == 0


def test_an_answer_is_the_last_match_of_the_pattern() -> None:
    import re

    from megapatch.tools.generate.questions import Match

    number = Match(re.compile("#### (-?[0-9]+)"))
    assert number.said("#### 1 ... #### -12 apples") == "-12" and number.said("12") is None
    assert Match(re.compile("[0-9]+")).said("3, then 4") == "4"
    assert Match(ignore_case=True).said(" Paris\n") == "paris"


BAD_LINES = {
    '{"prompt": "a"}': "q.jsonl:1: answer None; expected a text",
    '{"prompt": "a", "choices": ["x"], "answer": 0}': "q.jsonl:1: choices ['x']; expected a list of two texts",
    '{"prompt": "a", "choices": ["x", "y"], "answer": 2}': "q.jsonl:1: answer 2; expected one of the choices",
    '{"prompt": "a", "choices": ["x", "y"], "answer": "z"}': "q.jsonl:1: answer 'z'; expected one of the choices",
    '{"prompt": "", "choices": ["x", "y"], "answer": 0}': "q.jsonl:1: the prompt has no tokens",
    '{"prompt": "a", "answer": "b", "temperature": 1}': "q.jsonl:1: field 'temperature' is not known",
    '{"messages": [{"role": "wizard", "content": "a"}], "answer": "b"}': "q.jsonl:1: messages[0]: unknown role",
    "{": "q.jsonl:1: not JSON",
    "": "q.jsonl:1: an empty line; expected one object a line",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_question_is_named(
    line: str, models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    assert main(["--model", str(models["llama"][0]), "--tasks", str(tmp_path / "q.jsonl")]) == 1
    err = capsys.readouterr().err
    assert BAD_LINES[line] in err and len(err.splitlines()) == 1


def test_what_cannot_be_scored_is_one_line(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(models["llama"][0])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "t.jsonl").write_text('{"body": "a"}\n')
    write_data(tmp_path / "d", [[1, 999]])
    cases: dict[str, list[str]] = {
        "no document with a token to score": ["--text", str(tmp_path / "empty.txt")],
        "t.jsonl:1: 'text' is null; expected text": ["--text", str(tmp_path / "t.jsonl")],
        "token id 999 in document 0; the model has 0 to 259": ["--data", str(tmp_path / "d")],
        "--window 65: the model takes 64 tokens": ["--data", str(tmp_path / "d"), "--window", "65"],
        "no such file": ["--data", str(tmp_path / "absent")],
    }
    for message, arguments in cases.items():
        capsys.readouterr()
        assert main(["--model", folder, *arguments]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    for message, arguments in {
        "expected --data, --text or --tasks": [],
        "--stride 9 is more than --window 8": ["--data", "d", "--window", "8", "--stride", "9"],
        "--limit 0: must be at least 1": ["--data", "d", "--limit", "0"],
        "--extract (: not a regular expression": ["--tasks", "q", "--extract", "("],
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(["--model", folder, *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def near(value: Any) -> Any:
    return pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value


def test_two_processes_score_alike_and_write_once(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    asked = [
        "--model",
        str(models["llama"][0]),
        "--text",
        str(tmp_path / "t.jsonl"),
        "--tasks",
        str(tmp_path / "q.jsonl"),
    ]
    alone = run(capsys, *asked)
    tool = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tool += ["-m", "megapatch.tools.generate.score", "--tp", "2", *asked, "--samples", str(tmp_path / "s.jsonl")]
    ended = subprocess.run(tool, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    together = [json.loads(line) for line in ended.stdout.splitlines()]
    for one, two in zip(alone, together, strict=True):
        assert {name: near(value) for name, value in two.items()} == one
    assert len(rows(tmp_path / "s.jsonl")) == len(TEXTS) + len(QUESTIONS)
