"""mp-preprocess on files of any bytes: each line is a document, empty or bad, as the json module and tokenizers say."""

import gzip
import importlib.util
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preprocess_data import make_tokenizer

from megapatch.models.indexed_data import IndexedDocuments
from megapatch.tools.preprocess.preprocess import main

BLANK, BAD = object(), object()
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "\n", "<|endoftext|>", "é", "e\u0301", "\u2028", "\ufeff", "\x00", "漢字 😀", "\x85", "a" * 5000]
    ),
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), TEXTS)
KEYS = st.sampled_from(["text", "Text", "id", "", "té"])


def spelled(pairs: list[tuple[str, Any]], ascii_only: bool, blanks: str) -> bytes:
    """A JSON object with these keys in this order, also where one comes twice."""
    words = [
        f"{json.dumps(key, ensure_ascii=ascii_only)}{blanks}:{blanks}{json.dumps(value, ensure_ascii=ascii_only)}"
        for key, value in pairs
    ]
    return f"{blanks}{{{(blanks + ',').join(words)}{blanks}}}{blanks}".encode()


OBJECTS = st.builds(
    spelled,
    st.lists(st.tuples(KEYS, VALUES), max_size=3).flatmap(
        lambda others: st.tuples(st.just(others), TEXTS, st.integers(0, len(others))).map(
            lambda made: [*made[0][: made[2]], ("text", made[1]), *made[0][made[2] :]]
        )
    ),
    st.booleans(),
    st.sampled_from(["", " ", "\t", " \r"]),
)
DAMAGED = st.builds(
    lambda line, at, byte: line[:at] + byte + line[at + 1 :], OBJECTS, st.integers(0, 40), st.binary(max_size=2)
)
ODD = st.sampled_from(
    [
        b"",
        b"   \t",
        b"\r",
        b"null",
        b"[]",
        b"{}",
        b'{"text": null}',
        b'{"text": 1}',
        b'{"text": ["a"]}',
        b'{"text": "a", "text": null}',
        b'{"text": null, "text": "a"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\udc00\\ud800"}',
        b'{"text": "\\ud83d\\ude00"}',
        b'{"\\ud800": 1, "text": "a"}',
        b'{"x": NaN, "text": "a"}',
        b'{"x": Infinity, "text": "a"}',
        b'{"x": 1e999, "text": "a"}',
        b'{"x": 01, "text": "a"}',
        b'{"x": 1.e3, "text": "a"}',
        b'{"text": "tab\there"}',
        b'{"text": "a",}',
        b"{'text': 'a'}",
        b'{"text": "a"} x',
        b'{"text": "a"}{"text": "b"}',
        b'{"text": "\\x41"}',
        b'{"text": "a\xff"}',
        b'{"x": "\xed\xa0\x80", "text": "a"}',
        b'{"text": "\xc0\x80"}',
        b'{"text": "\xf4\x90\x80\x80"}',
        b'\xef\xbb\xbf{"text": "a"}',
        '{"text": "a"}'.encode("utf-16"),
        b"[" * 5000,
        b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ]
)
LINES = st.one_of(OBJECTS, OBJECTS, DAMAGED, ODD, st.binary(max_size=20))
FILES = st.tuples(st.lists(LINES, max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.booleans()).map(
    lambda made: made[1].join(made[0]) + (made[1] if made[2] else b"")
)


def refuse(constant: str) -> None:
    raise ValueError(constant)


def text_of(line: bytes) -> Any:
    """The text of a line, BLANK or BAD: the oracle."""
    if not line.strip():
        return BLANK
    try:
        value = json.loads(line.decode(), parse_constant=refuse)
        text = value["text"]
        text.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return BAD
    return text


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("properties"))


def lines_of(data: bytes) -> list[bytes]:
    """The lines of a file, without a byte-order mark at its start."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines if lines[-1] else lines[:-1]


def whole_array(data: bytes) -> bool:
    """Does it look like one JSON value over several lines, which is refused at once?"""
    return (
        lines_of(data)[:1] != [] and lines_of(data)[0].strip()[:1] in (b"[", b"{") and text_of(lines_of(data)[0]) is BAD
    )


def check(prefix: Path, tok: Path, files: list[bytes]) -> list[Any]:
    """PREFIX holds what the oracle says of these files, and the counts add up; what became of each line."""
    oracle = tokenizers.Tokenizer.from_file(str(tok / "tokenizer.json"))
    eod = oracle.token_to_id("<|endoftext|>")
    texts = [text_of(line) for data in files for line in lines_of(data)]
    ids = [oracle.encode(text, add_special_tokens=False).ids for text in texts if text not in (BLANK, BAD)]
    expected = [[*some, eod] for some in ids if some]
    counts = json.loads(Path(f"{prefix}.manifest.json").read_text())["counts"]
    kinds = {"documents": len(expected), "bad": texts.count(BAD), "filtered": 0, "duplicate": 0}
    kinds["empty"] = texts.count(BLANK) + len(ids) - len(expected)
    assert {kind: counts[kind] for kind in kinds} == kinds
    assert counts["lines"] == len(texts) == sum(kinds.values())
    assert counts["tokens"] == sum(map(len, expected))
    assert [document.tolist() for document in IndexedDocuments(prefix)] == expected
    return texts


def preprocess(tok: Path, prefix: Path, *argv: str) -> int:
    return main(["--tokenizer", str(tok), "--output-prefix", str(prefix), "--force", *argv])


ENGINES = ["tokenizers", *(["gigatoken"] if importlib.util.find_spec("gigatoken") else [])]
OFTEN = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("engine", ENGINES)
@OFTEN
@given(
    files=st.lists(FILES.filter(lambda data: not whole_array(data)), min_size=1, max_size=3),
    chunk_bytes=st.sampled_from(["1", "7", "64", "1000000"]),
    workers=st.sampled_from(["1", "2"]),
    packed=st.booleans(),
)
def test_every_line_is_a_document_or_is_counted(
    tok: Path, tmp_path: Path, engine: str, files: list[bytes], chunk_bytes: str, workers: str, packed: bool
) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    files = [*files, b'{"text": "one is good"}\n']
    names = []
    for number, data in enumerate(files):
        name = tmp_path / f"{number}.jsonl{'.gz' if packed and number else ''}"
        name.write_bytes(gzip.compress(data) if name.suffix == ".gz" else data)
        names.append(str(name))
    aside = tmp_path / "bad.jsonl"
    words = ["--chunk-bytes", chunk_bytes, "--workers", workers, "--engine", engine]
    assert preprocess(tok, tmp_path / "out", "--input", *names, *words, "--on-bad-line", f"quarantine={aside}") == 0
    texts = check(tmp_path / "out", tok, files)
    bad = [
        line
        for line, text in zip((line for data in files for line in lines_of(data)), texts, strict=True)
        if text is BAD
    ]
    assert aside.read_bytes() == b"".join(line + b"\n" for line in bad)
    reasons = [json.loads(line) for line in Path(f"{aside}.reasons.jsonl").read_text().splitlines()]
    assert [one["bytes"] for one in reasons] == [len(line) for line in bad]


DAMAGE: list[Callable[[bytes], bytes]] = [
    lambda line: line[:-2],  # torn
    lambda line: line.replace(b'"text"', b'"txet"'),
    lambda line: b'{"text": null}',
    lambda line: line.replace(b"a", b"\xe9"),  # latin-1
    lambda line: line[:-1] + b', "x": "' + b"\\ud800" + b'", "text": "\\udfff"}',
    lambda line: line + line,
    lambda line: b"[" + line + b"]",
    lambda line: b"\x00" * len(line),  # a hole that a crash left
]


def test_a_thousand_damaged_lines_are_all_counted_and_kept_aside(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(7)
    lines = [json.dumps({"text": f"a line {n} of many, many words"}).encode() for n in range(5000)]
    for number in (damaged := sorted(chance.sample(range(1, 5000), 1000))):
        lines[number] = DAMAGE[number % len(DAMAGE)](lines[number])
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    aside = tmp_path / "bad.jsonl"
    words = ["--input", str(tmp_path / "in.jsonl"), "--chunk-bytes", "20000", "--workers", "2"]
    assert preprocess(tok, tmp_path / "out", *words, "--on-bad-line", f"quarantine={aside}") == 0
    texts = check(tmp_path / "out", tok, [b"\n".join(lines)])
    assert [number for number, text in enumerate(texts) if text is BAD] == damaged
    law = "5,000 lines = 4,000 documents + 0 empty + 1,000 bad + 0 filtered + 0 duplicate"
    assert law in capfd.readouterr().err
    assert aside.read_bytes() == b"".join(lines[number] + b"\n" for number in damaged)
    reasons = [json.loads(line) for line in Path(f"{aside}.reasons.jsonl").read_text().splitlines()]
    assert [one["place"].partition(" ")[0] for one in reasons] == [f"{tmp_path}/in.jsonl:{n + 1}" for n in damaged]


def long_line(num_bytes: int) -> bytes:
    """A line of JSON with one text."""
    return json.dumps({"text": ("a long, long text\n" * (num_bytes // 18))[:num_bytes]}).encode()


@pytest.mark.parametrize(
    "num_bytes", [pytest.param(5_000_000, id="5 MB"), pytest.param(100_000_000, id="100 MB", marks=pytest.mark.slow)]
)
def test_a_long_line_is_one_document(tok: Path, tmp_path: Path, num_bytes: int) -> None:
    data = b'{"text": "before"}\n' + long_line(num_bytes) + b'\n{"text": "after"}\n'
    (tmp_path / "in.jsonl").write_bytes(data)
    words = ["--input", str(tmp_path / "in.jsonl"), "--workers", "2", "--chunk-bytes", "65536"]
    assert preprocess(tok, tmp_path / "out", *words) == 0
    check(tmp_path / "out", tok, [data])


def test_a_stream_is_as_a_file(tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\r\n".join([b'{"text": "one"}', b"", b'{"text": ""}', long_line(300_000), b'{"text": "two"}'])
    for name, sent in (("plain", data), ("packed", gzip.compress(data))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
        assert preprocess(tok, tmp_path / name, "--input", "-", "--chunk-bytes", "1000", "--workers", "2") == 0
        check(tmp_path / name, tok, [data])
