"""mp-preprocess loses nothing in silence: lines = documents + empty + bad + filtered + duplicate, always."""

import json
from pathlib import Path

import damaged
import pytest
from preprocess_data import make_tokenizer, outputs, run, write_jsonl

from megapatch.models.indexed_data import IndexedDocuments
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.run.ledger import KINDS, OTHERS, Ledger


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("preprocess"))


def test_a_thousand_damaged_lines_are_all_accounted_for(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, bad = tmp_path / "a.jsonl", tmp_path / "out" / "bad"
    expected = damaged.make(source)
    assert expected["bad"] == damaged.NUM_DAMAGED
    found = []
    for chunk_bytes in ("5000", "4194304"):
        more = ("--deduplicate", "--on-bad-line", f"quarantine={bad}", "--chunk-bytes", chunk_bytes, "--force")
        assert run(tok, tmp_path / "out" / "data", source, more=more) == 0
        about = json.loads((tmp_path / "out" / "data.manifest.json").read_text())
        counts = about["counts"]
        assert {kind: counts[kind] for kind in expected} == expected
        assert counts["lines"] == sum(counts[kind] for kind in KINDS) == damaged.NUM_LINES
        assert len(IndexedDocuments(tmp_path / "out" / "data")) == counts["documents"]
        assert about["sources"][str(source)] == {kind: counts[kind] for kind in expected} | {"tokens": counts["tokens"]}
        law = f"{damaged.NUM_LINES:,} lines = {counts['documents']:,} documents + {counts['empty']:,} empty"
        assert f"{law} + 1,000 bad + 0 filtered + {counts['duplicate']:,} duplicate\n" in capfd.readouterr().err
        found.append((outputs(tmp_path / "out" / "data"), bad.read_bytes(), counts))
    assert found[0] == found[1]


def test_quarantined_lines_can_be_mended_and_read_again(tok: Path, tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b'{"text": "two"', b"", b'{"text": "caf\xe9"}\r', b'{"text": "four"}']
    source, bad = tmp_path / "a.jsonl", tmp_path / "bad"
    source.write_bytes(b"\n".join(lines))
    assert run(tok, tmp_path / "data", source, more=("--on-bad-line", f"quarantine={bad}")) == 0
    assert bad.read_bytes() == lines[1] + b"\n" + lines[3] + b"\n"
    reasons = [json.loads(line) for line in Path(f"{bad}.reasons.jsonl").read_text().splitlines()]
    assert [reason["place"] for reason in reasons] == [f"{source}:2 (byte 30)", f"{source}:4 (byte 45)"]
    assert [(one["file"], one["line"], one["byte"], one["bytes"]) for one in reasons] == [
        (str(source), 2, 30, 14),
        (str(source), 4, 45, 17),
    ]
    assert reasons[0]["reason"].startswith("not JSON") and reasons[1]["reason"].startswith("not UTF-8")
    mended = bad.read_bytes().replace(b'"two"', b'"two"}').replace(b"\xe9", "é".encode())
    (tmp_path / "mended.jsonl").write_bytes(mended)
    assert run(tok, tmp_path / "again", tmp_path / "mended.jsonl") == 0
    tokenizer = Tokenizer(tok)
    documents = [one.tolist()[:-1] for one in IndexedDocuments(tmp_path / "again")]
    assert documents == tokenizer.encode_batch(["two", "café"])
    assert run(tok, tmp_path / "third", source, more=("--on-bad-line", f"quarantine={bad}")) == 1  # FILE is there


def test_sources_are_counted_by_a_key(tok: Path, tmp_path: Path) -> None:
    values = [{"text": "a b", "of": {"name": "x"}}, {"text": "", "of": {"name": "x"}}, {"text": "c", "of": 3}]
    values += [{"text": "d"}, {"text": "a b", "of": {"name": "y"}}]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(value) + "\n" for value in values))
    assert run(tok, tmp_path / "data", source, more=("--source-key", "of.name", "--deduplicate")) == 0
    about = json.loads((tmp_path / "data.manifest.json").read_text())
    tokens = [len(document) for document in IndexedDocuments(tmp_path / "data")]
    assert about["sources"] == {
        "x": {"documents": 1, "empty": 1, "tokens": tokens[0]},
        "(no of.name)": {"documents": 2, "tokens": tokens[1] + tokens[2]},
        "y": {"duplicate": 1},
    }


def test_many_sources_are_counted_together_beyond_a_thousand(tok: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": "a", "of": f"s{number}"}) + "\n" for number in range(1005)))
    assert run(tok, tmp_path / "data", source, more=("--source-key", "of")) == 0
    sources = json.loads((tmp_path / "data.manifest.json").read_text())["sources"]
    assert (len(sources), sources[OTHERS]["documents"]) == (1001, 5)


def test_a_lost_line_ends_the_run() -> None:
    ledger = Ledger("skip", lines=3)
    ledger.settle("a", {"documents": 2})
    with pytest.raises(AssertionError, match="lines lost"):
        ledger.check()
    ledger.settle("a", {"too_short": 1})
    ledger.check()
    assert ledger.line() == (
        "3 lines = 2 documents + 0 empty + 0 bad + 1 filtered + 0 duplicate; filtered: 1 too_short"
    )
    state = json.loads(json.dumps(ledger.state()))
    state["documents"] -= 1
    with pytest.raises(AssertionError, match="lines lost"):
        Ledger("skip").restore(state)


def test_filters_have_reasons_and_a_limit_of_tokens_stops_the_run(tok: Path, tmp_path: Path) -> None:
    texts = ["a " * count for count in (1, 5, 40, 6, 7, 8)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    lengths = [len(ids) for ids in Tokenizer(tok).encode_batch(texts)]
    more = ("--min-document-tokens", str(lengths[0] + 1), "--max-document-tokens", str(lengths[2] - 1), "--eod", "no")
    assert run(tok, tmp_path / "all", source, more=more) == 0
    counts = json.loads((tmp_path / "all.manifest.json").read_text())["counts"]
    assert counts["filtered_by_reason"] == {"too_short": 1, "too_long": 1}
    assert [len(one) for one in IndexedDocuments(tmp_path / "all")] == [lengths[i] for i in (1, 3, 4, 5)]
    for wanted, expected in ((lengths[1] + 1, 2), (lengths[1] + lengths[3], 2), (lengths[1], 1), (10_000, 4)):
        for chunk_bytes in ("1", "1000000"):
            limit = (*more, "--max-tokens", str(wanted), "--force", "--chunk-bytes", chunk_bytes)
            assert run(tok, tmp_path / "some", source, more=limit) == 0
            assert len(IndexedDocuments(tmp_path / "some")) == expected
