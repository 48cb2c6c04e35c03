"""Word n-grams shared with evaluation files, against a search that is too simple to be wrong."""

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapatch.models.cli import UserError
from megapatch.tools.preprocess.encoding.contamination import (
    Contamination,
    ContaminationOptions,
    Hit,
    Spoiled,
    read_evaluation,
    words_of,
)

TEXTS = st.lists(st.text("aB ,é\n", max_size=24), max_size=6)


def naive(files: dict[str, list[str]], ngram: int, texts: list[str]) -> list[tuple[int, int]]:
    """(text, file) of all pairs with a common run of words, or with the same few words."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.casefold())
        if len(words) < ngram:
            return {tuple(words)} if words else set()
        return {tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)}

    return [
        (number, file)
        for number, text in enumerate(texts)
        for file, known in enumerate(files.values())
        if runs(text) & {run for one in known for run in runs(one)}
    ]


@settings(deadline=None, max_examples=300)
@given(files=st.lists(TEXTS, max_size=3), texts=TEXTS, ngram=st.integers(1, 5))
def test_finds_what_a_naive_search_finds(files: list[list[str]], texts: list[str], ngram: int) -> None:
    named = {f"eval{number}": known for number, known in enumerate(files)}
    hits = Contamination(named, ngram)(texts)
    assert [(hit.text, hit.file) for hit in hits] == naive(named, ngram, texts)
    for hit in hits:
        assert f" {hit.words} " in f" {' '.join(words_of(texts[hit.text]))} "


def test_a_run_is_found_in_any_group_of_a_large_batch() -> None:
    words = [f"w{number}" for number in range(40)]
    texts = [
        "filler word " * 30_000,
        "x " + " ".join(words[5:18]),
        "filler " * 50_000,
        " ".join(words[:12]),
        "W0, " * 9,
    ]
    hits = Contamination({"a": ["other"], "b": [" ".join(words).upper()]})(texts)
    assert hits == [Hit(1, 1, " ".join(words[5:18]))]


def test_a_run_does_not_cross_from_one_document_to_the_next() -> None:
    text = "one two three four"
    found = Contamination({"a": [text]}, 4)
    assert found(["zero one two", "three four five"]) == []
    assert found(["zero one two three", "four"]) == []
    assert found([f"zero {text} five"]) == [Hit(0, 0, text)]


def test_every_string_of_json_is_a_text(tmp_path: Path) -> None:
    value = {"question": "deep one", "choices": [{"text": "deep two"}, ["deep three"]], "answer": 4, "no": None}
    pretty, lines, text = tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "c.txt"
    pretty.write_text(json.dumps([value], indent=2))
    lines.write_text(json.dumps(value) + "\n\n" + json.dumps("alone") + "\n")
    text.write_text("first line\nsecond line\n")
    assert read_evaluation([pretty, lines, text]) == {
        str(pretty): ["deep one", "deep two", "deep three"],
        str(lines): ["deep one", "deep two", "deep three", "alone"],
        str(text): ["first line\nsecond line\n"],
    }


REFUSED = [
    ("a.jsonl", b'{"x": "fine"}\n{"x": \n', ":2: not JSON"),
    ("a.json", b"[1, ", "not JSON"),
    ("a.txt", b"fine \xff", "not UTF-8 at byte 5"),
    ("a.txt", b" ... \n", "holds no words"),
    ("a.json", b'{"x": [1, 2]}', "holds no words"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_a_file_without_texts_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"--contamination {tmp_path / name}") + ".*" + message):
        read_evaluation([tmp_path / name])


@pytest.mark.parametrize(
    "wrong", [{"contamination_ngram": 0}, {"contamination_ngram": 5}, {"on_contamination": "report"}]
)
def test_options_that_cannot_take_effect_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--contamination"):
        ContaminationOptions(**wrong)  # type: ignore[arg-type]


def test_documents_are_counted_by_evaluation_file_and_the_first_are_examples() -> None:
    spoiled = Spoiled(["a", "b"])
    for number in range(8):
        spoiled.absorb([Hit(number, number % 2, string.ascii_letters[number])])
    assert spoiled.documents == {"a": 4, "b": 4}
    assert [example["words"] for example in spoiled.examples] == list("abcde")


def test_scripts_without_blanks_are_compared_by_character() -> None:
    question = "从前有一座山，山里有一座庙，庙里有个老和尚在讲故事"
    assert words_of("Ab 漢字cd かな") == ["ab", "漢", "字", "cd", "か", "な"]
    found = Contamination({"eval": [question]})(
        ["他说：" + question + "。完", question[:10], "山里有个人在讲别的事，与此无关，也不重复"]
    )
    assert [(hit.text, hit.file) for hit in found] == [(0, 0)]
