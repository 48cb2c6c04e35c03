"""mp-preprocess: duplicates, shares by hash, several keys and shards, each independent of workers and order."""

import json
import random
from pathlib import Path

import pytest
from preprocess_data import make_tokenizer, outputs, run, write_jsonl

from megapatch.models.indexed_data import IndexedDocuments
from megapatch.models.tokenizer import Tokenizer

TEXTS = [f"text {number % 170} of several" for number in range(400)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("preprocess"))


def texts(tok: Path, prefix: Path) -> list[str]:
    tokenizer = Tokenizer(tok)
    return [tokenizer.decode(document.tolist()[:-1]) for document in IndexedDocuments(prefix)]


@pytest.mark.parametrize("workers, chunk_bytes", [("1", "100000"), ("3", "100"), ("2", "3000")])
def test_the_first_of_equal_texts_stays(tok: Path, tmp_path: Path, workers: str, chunk_bytes: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    more = ("--deduplicate", "--workers", workers, "--chunk-bytes", chunk_bytes)
    assert run(tok, tmp_path / "out", source, source, more=more) == 0
    assert texts(tok, tmp_path / "out") == list(dict.fromkeys(TEXTS))
    assert json.loads((tmp_path / "out.manifest.json").read_text())["counts"]["duplicate"] == 800 - 170


def test_a_text_has_one_share_in_any_order_shard_and_number_of_workers(tok: Path, tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    second = write_jsonl(tmp_path / "b.jsonl", shuffled)
    split = ("--split", "70,20,10")
    assert run(tok, tmp_path / "a", first, more=(*split, "--workers", "3", "--chunk-bytes", "500")) == 0
    assert run(tok, tmp_path / "b", second, more=split) == 0
    assert run(tok, tmp_path / "c", second, more=(*split, "--shards", "2", "--shard", "1")) == 0
    assert run(tok, tmp_path / "d", first, more=(*split, "--split-seed", "1")) == 0
    shares = {
        name: [texts(tok, tmp_path / f"{name}_{share}") for share in ("train", "valid", "test")] for name in "abcd"
    }
    for ours, shuffled_ones, part in zip(shares["a"], shares["b"], shares["c"], strict=True):
        assert sorted(ours) == sorted(shuffled_ones)
        assert ours == [text for text in TEXTS if text in set(ours)]
        assert shuffled_ones[len(shuffled_ones) - len(part) :] == part
    assert shares["a"][0] != shares["d"][0]
    sizes = [len(set(share)) for share in shares["a"]]
    assert sum(sizes) == 170 and sizes[0] > 100 and sizes[1] > 15 and sizes[2] > 5
    flags = {"train": "--data-path", "valid": "--valid-data-path", "test": "--test-data-path"}
    argument = (tmp_path / "a.args").read_text()
    assert argument == "".join(f"{flag} {tmp_path / f'a_{share}'}\n" for share, flag in flags.items())


def test_a_share_of_zero_is_not_written(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert run(tok, tmp_path / "out" / "data", source, more=("--split", "1,0,1")) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.idx"))
    assert names == ["data_test.idx", "data_train.idx"]


def test_several_keys_give_parallel_outputs(tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(f"question {n % 9}", f"answer {n % 7}" if n % 5 else "") for n in range(60)]
    values = [{"q": question, "meta": {"a": answer}} for question, answer in pairs] + [{"q": "", "meta": {"a": ""}}]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(value) + "\n" for value in values))
    more = ("--text-key", "q", "meta.a", "--deduplicate", "--chunk-bytes", "200", "--json")
    assert run(tok, tmp_path / "out", source, more=more) == 0
    kept = list(dict.fromkeys(pairs))
    assert list(zip(texts(tok, tmp_path / "out_q"), texts(tok, tmp_path / "out_meta.a"), strict=True)) == kept
    told = json.loads(capsys.readouterr().out)
    assert [one["documents"] for one in told] == [len(kept)] * 2
    assert told[0]["counts"] == told[1]["counts"]
    assert told[0] == json.loads((tmp_path / "out_q.manifest.json").read_text())
    assert (told[0]["counts"]["empty"], told[0]["counts"]["duplicate"]) == (1, len(pairs) - len(kept))
    assert (tmp_path / "out.args").read_text() == f"--data-path {tmp_path / 'out_q'} {tmp_path / 'out_meta.a'}\n"


def test_shards_in_order_are_the_undivided_documents(tok: Path, tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    assert run(tok, tmp_path / "whole", first, second) == 0
    lines = []
    for shard in range(5):
        more = ("--shards", "5", "--shard", str(shard), "--chunk-bytes", "700")
        assert run(tok, tmp_path / f"part{shard}", first, second, more=more) == 0
        lines.append(json.loads((tmp_path / f"part{shard}.manifest.json").read_text())["counts"]["lines"])
    parts = [outputs(tmp_path / f"part{shard}")[0] for shard in range(5)]
    assert b"".join(parts) == outputs(tmp_path / "whole")[0]
    assert sum(lines) == len(TEXTS) + 3


def test_a_shard_without_lines_is_an_empty_output(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    for shard, count in ((0, 1), (1, 0)):
        assert run(tok, tmp_path / f"p{shard}", source, more=("--shards", "2", "--shard", str(shard))) == 0
        assert len(IndexedDocuments(tmp_path / f"p{shard}")) == count


def test_bad_lines_of_many_megabytes_pass_through(tok: Path, tmp_path: Path) -> None:
    huge = b'{"text": "' + b"x" * (6 << 20)  # far more than a pipe holds, from every worker at once
    source, bad = tmp_path / "a.jsonl", tmp_path / "bad"
    source.write_bytes((huge + b'\n{"text": "fine"}\n') * 4)
    more = ("--on-bad-line", f"quarantine={bad}", "--workers", "3", "--chunk-bytes", "1000")
    assert run(tok, tmp_path / "out", source, more=more) == 0
    assert bad.read_bytes() == (huge + b"\n") * 4
    assert len(IndexedDocuments(tmp_path / "out")) == 4


def test_contaminated_documents_are_dropped_or_reported(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one two three four", "nothing of it", "they say: Two, three four!"])
    (tmp_path / "eval.txt").write_text("zero one TWO three four five")
    words = ("--contamination", str(tmp_path / "eval.txt"), "--contamination-ngram", "3")
    for mode, kept in (("drop", 1), ("report", 3)):
        more = (*words, "--on-contamination", mode, "--force")
        assert run(tok, tmp_path / "out", source, more=more) == 0
        about = json.loads((tmp_path / "out.manifest.json").read_text())
        assert about["contamination"]["documents"] == {str(tmp_path / "eval.txt"): 2}
        assert about["counts"]["filtered_by_reason"] == ({"contaminated": 2} if mode == "drop" else {})
        assert about["documents"] == kept and "nothing of it" in texts(tok, tmp_path / "out")


USAGE = [
    (["--split", "98"], "--split 98: expected two or three whole numbers such as 98,1,1"),
    (["--split", "a,b"], "--split a,b: expected two or three"),
    (["--split", "0,0"], "--split 0,0: expected two or three"),
    (["--split-seed", "3"], "--split-seed 3 needs --split"),
    (["--max-tokens", "0"], "--max-tokens 0: expected 1 or more"),
    (
        ["--min-document-tokens", "9", "--max-document-tokens", "3"],
        "--min-document-tokens 9: expected 0 or more, and at",
    ),
    (["--resume", "--force"], "give one of them"),
]


@pytest.mark.parametrize("more, message", USAGE)
def test_wrong_usage_is_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, tmp_path / "out", "a", more=tuple(more))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
