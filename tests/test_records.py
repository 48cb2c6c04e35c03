"""Records of JSON lines: the same with and without orjson, and every bad one with its place and reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_files import options, read_with_bad

from megapatch.tools.preprocess.reading import records
from megapatch.tools.preprocess.reading.inputs import Piece, chunks, find_sources
from megapatch.tools.preprocess.reading.json_lines import BadRecord, fast_loads, loads
from megapatch.tools.preprocess.reading.pieces import LineNumbers
from megapatch.tools.preprocess.reading.records import read_records, text_of

BOUNDED = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(params=[True, False], ids=["orjson", "json"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        pytest.importorskip("orjson", reason="extra `data` is not installed")
    else:
        monkeypatch.setattr(records, "fast_loads", None)


def one(line: bytes, *keys: str) -> tuple[str, ...] | str:
    """The texts of a line, or why there are none and at which byte."""
    piece = Piece("a.jsonl", "jsonl", 100, len(line), line)
    found = read_records(piece, text_of(keys or ("text",)))
    if found.taken:
        assert (len(found.taken), found.tally.num_bad) == (1, 0)
        return found.taken[0]
    (bad,) = found.tally.bad
    return f"{bad.offset - 100 if bad.offset is not None else None}: {bad.reason}"


CASES: list[tuple[bytes, tuple[str, ...] | str]] = [
    (b'{"text": "a", "text": "b"}', ("b",)),
    (b' {"text" : "\\u00e9\\ud83d\\ude00"} \r', ("é😀",)),
    (b'{"x": "\\ud800", "text": "a"}', ("a",)),
    (b'{"x": 1' + b"0" * 5000 + b', "text": "a"}', ("a",)),
    (b'{"x": -1.5e999, "text": "\\u0000"}', ("\0",)),
    (b'{"x": ' + b"[" * 1023 + b"]" * 1023 + b', "text": "a"}', ("a",)),
    (b'{"x": ' + b"[" * 1024 + b"]" * 1024 + b', "text": "a"}', "0: not JSON that can be read (nested more than 1,024"),
    (b'{"text": "' + b"[{" * 2000 + b'\\"' + b"[{" * 2000 + b'", "x": 1e999}', ("[{" * 2000 + '"' + "[{" * 2000,)),
    (b'{"text": "a", "x": NaN}', "0: not JSON (NaN is not a JSON value)"),
    (b'{"text": "a", "x": Infinity}', "0: not JSON (Infinity is not a JSON value)"),
    (b'{"text": "x"', "12: not JSON (Expecting ',' delimiter)"),
    (b'{"text": tru}', "9: not JSON (Expecting value)"),
    ('{"é€": tru}'.encode(), "10: not JSON (Expecting value)"),
    (b'{"text": "a\tb"}', "11: not JSON (Invalid control character at)"),
    (b'{"text": "a\x00b"}', "11: not JSON (Invalid control character at)"),
    (b"\x00\x00", "0: not JSON (Expecting value)"),
    (b'{"text": "a"} x', "14: not JSON (Extra data)"),
    (b"[1]", "0: an array found, expected an object with the key 'text'"),
    (b"null", "0: null found, expected an object"),
    (b'"text"', "0: a string found, expected an object"),
    (b'{"id": 1, "body": "x"}', "0: no key 'text'; keys found: 'id', 'body'; choose with --text-key"),
    (b"{}", "0: no key 'text'; keys found: none"),
    (b'{"text": null}', "0: 'text' is null, expected a string"),
    (b'{"text": 12}', "0: 'text' is a number, expected a string"),
    (b'{"text": true}', "0: 'text' is a boolean, expected a string"),
    (b'{"text": ["a"]}', "0: 'text' is an array, expected a string"),
    (b'{"text": "\\ud800"}', "0: lone surrogate \\ud800, half of a character"),
    (b'{"text": "a\xffb"}', "11: not UTF-8 (byte 0xff: invalid start byte)"),
    (b'{"text": "\xed\xa0\x80"}', "10: not UTF-8 (byte 0xed: invalid continuation byte)"),
    (b'{"text": "a"}\xef\xbb\xbf', "13: not JSON (Extra data)"),
]


@pytest.mark.parametrize("line, wanted", CASES, ids=range(len(CASES)))
def test_lines_mean_the_same_with_and_without_orjson(parser: None, line: bytes, wanted: tuple[str, ...] | str) -> None:
    found = one(line)
    assert found == wanted if isinstance(wanted, tuple) else str(found).startswith(wanted)


KEYS = [
    (("a", "b"), {"b": "2", "a": "1"}, ("1", "2")),
    (("meta.text",), {"meta": {"text": "x"}}, ("x",)),
    (("meta.text",), {"meta.text": "own", "meta": {"text": "x"}}, ("own",)),
    (("a.b.c",), {"a": {"b.c": "x", "b": {"c": "y"}}}, ("x",)),
    (("a.b.c",), {"a": {"b": {"c": "y"}}}, ("y",)),
    (("a", "b"), {"a": "1"}, "0: no key 'b'; keys found: 'a'"),
    (("a", "b"), {"a": "1", "b": 2}, "0: 'b' is a number, expected a string"),
    (("meta.text",), {"meta": "x"}, "0: no key 'meta.text'; keys found: 'meta'"),
    (("meta.text",), {"meta": {"text": None}}, "0: 'meta.text' is null, expected a string"),
]


@pytest.mark.parametrize("keys, value, wanted", KEYS)
def test_keys_look_into_objects(keys: tuple[str, ...], value: Any, wanted: tuple[str, ...] | str) -> None:
    found = one(json.dumps(value).encode(), *keys)
    assert found == wanted if isinstance(wanted, tuple) else str(found).startswith(wanted)


def test_raw_bytes_and_all_bad_lines_are_kept_when_asked(tmp_path: Path) -> None:
    data = b"".join(b'{"x": %d}\r\n' % i for i in range(40))
    piece = Piece("a.jsonl", "jsonl", 0, len(data), data)
    some, all_of_them = (read_records(piece, text_of(["text"]), keep_raw=keep).tally for keep in (False, True))
    assert (some.num_bad, len(some.bad), {bad.raw for bad in some.bad}) == (40, 10, {None})
    assert [bad.raw for bad in all_of_them.bad] == [b'{"x": %d}\r' % i for i in range(40)]
    assert all_of_them.piece.data is None
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    ((place, bad),) = read_with_bad([tmp_path / "a.txt"], keep_raw=True, text_key=["text"])[1]
    assert (place, bad.raw) == (f"{tmp_path}/a.txt (byte 5)", b"ab\xff")


def test_lines_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * 1000)
    numbers = LineNumbers()
    starts = [0, 300, 300, 2997, 30]
    assert [numbers.before(Piece(str(path), "jsonl", start, 3)) for start in starts] == [0, 100, 100, 999, 10]


def values() -> st.SearchStrategy[Any]:
    edges = st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30, -0.0, 5e-324])
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | edges
    leaves = st.none() | st.booleans() | numbers | st.text()
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def same(one: Any, other: Any) -> bool:
    """Equal also in the kind of numbers, and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and (not isinstance(one, float) or math.copysign(1, one) == math.copysign(1, other))


@BOUNDED
@given(values(), st.booleans())
def test_orjson_and_the_standard_library_agree_on_values(value: Any, ascii_only: bool) -> None:
    orjson = pytest.importorskip("orjson", reason="extra `data` is not installed")
    line = json.dumps(value, ensure_ascii=ascii_only).encode()
    ours = loads(line)
    assert same(ours, orjson.loads(line))
    if not any(isinstance(number, int) and not -(2**63) <= number < 2**64 for number in _leaves(value)):
        assert same(ours, json.loads(line))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]


SNIPPETS = [b'{"text": "', b'"}', b"\n", b"\r\n", b" ", b"[", b"]", b"{", b"}", b'"', b"\\", b"\\ud83d", b"\\u0041"]
SNIPPETS += [
    b"1",
    b"-",
    b".",
    b"e9",
    b"NaN",
    b"null",
    b"\xff",
    "é".encode(),
    b"\xef\xbb\xbf",
    b"\0",
    b"text",
    b":",
    b",",
]
soup = st.lists(st.sampled_from(SNIPPETS) | st.binary(max_size=3), max_size=40).map(b"".join)
json_lines = st.lists(
    st.text(max_size=8).map(lambda text: json.dumps({"text": text}).encode()) | soup | st.just(b""), max_size=12
).map(b"\n".join)


@BOUNDED
@given(soup)
def test_orjson_refuses_what_the_standard_library_refuses(line: bytes) -> None:
    """orjson may refuse more, for then the standard library is asked; it must not accept more, or something else."""
    if fast_loads is None:
        pytest.skip("extra `data` is not installed")
    try:
        fast = fast_loads(line)
    except ValueError:
        return
    assert same(fast, loads(line))


def reference(data: bytes) -> tuple[list[str], list[int], int]:
    """Texts, offsets at which bad lines begin, and lines, by json.loads alone."""
    texts, bad, offset = [], [], 0
    lines = data.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    for line in lines:
        begin = offset
        offset += len(line) + 1
        line = line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode(), parse_constant=lambda _: 1 / 0)["text"]
            text.encode()  # not a string, or half a character
        except (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError):
            bad.append(begin)
        else:
            texts.append(text)
    return texts, bad, len(lines)


@BOUNDED
@given(json_lines, st.integers(1, 80), st.integers(1, 5))
def test_any_bytes_any_cut_any_shards_give_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk_bytes: int, shards: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "soup.jsonl"
    path.write_bytes(b"{}\n" + data)  # not the beginning of one value over all lines
    texts, bad, num_lines = reference(path.read_bytes())
    found: list[str] = []
    offsets, counted, content = [], 0, b""
    sources = find_sources(options([path], text_key=["text"]))
    for shard in range(shards):
        for chunk in chunks(sources, chunk_bytes, shard=(shard, shards)):
            for piece in chunk:
                content += piece.read()
                got = read_records(piece, text_of(["text"]), keep_raw=True)
                found += [text for (text,) in got.taken]
                offsets += [one.offset for one in got.tally.bad]
                counted += got.tally.num_lines
    assert (content, found, counted, len(offsets)) == (path.read_bytes(), texts, num_lines, len(bad))
    for offset, begin in zip(offsets, bad, strict=True):
        assert offset is not None and begin <= offset and b"\n" not in path.read_bytes()[begin:offset]


def test_a_bad_record_is_no_json_error() -> None:
    with pytest.raises(BadRecord) as error:
        loads(b"{")
    assert (error.value.reason, error.value.offset) == (
        "not JSON (Expecting property name enclosed in double quotes)",
        1,
    )
