"""The fast engine gives the reference's ids, or is not used; and it is said why."""

import json
import logging
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import HARD, SPELLED, bytelevel, sentencepiece, tiktoken, vocab_and_merges
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.encoding import gigatoken_engine
from megapatch.tools.preprocess.encoding.adversarial import hard_texts
from megapatch.tools.preprocess.encoding.characters import outside, risky
from megapatch.tools.preprocess.encoding.engine import Choice, Reference, choose

pytest.importorskip("gigatoken")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bytelevel(tmp_path_factory.mktemp("engine") / "tok")


def words(expression: str) -> Any:
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda backend: setattr(backend, name, value)


def adding(content: str, **flags: bool) -> Callable[[Any], None]:
    return lambda backend: backend.add_tokens([AddedToken(content, **{"normalized": False} | flags)])


def changed(folder: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a folder with another backend."""
    shutil.copytree(folder, target)
    backend = Backend.from_file(str(target / "tokenizer.json"))
    change(backend)
    backend.save(str(target / "tokenizer.json"))
    return target


def chosen(folder: Path, wanted: str = "auto", **settings: Any) -> Choice:
    return choose(Reference(Tokenizer(folder, **settings)), wanted)


SERVED = {
    "qwen": setting("normalizer", None),
    "nfc": setting("normalizer", normalizers.NFC()),
    "llama3": setting("pre_tokenizer", words(LLAMA3)),
    "gpt2": setting("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": setting("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lstrip": adding("<tag>", lstrip=True, special=True),
    "rstrip": adding("<tag>", rstrip=True),
    "normalized": adding("<tag>", normalized=True, special=True),
    "part of another": adding("<|im_st"),
    "blanks": adding("  "),
}
REFUSED = {
    "single word": (adding("<tag>", single_word=True), "where tokenizers gives"),
    "lower case": (setting("normalizer", normalizers.Lowercase()), "cannot load"),
    "NFKC": (setting("normalizer", normalizers.NFKC()), "cannot load"),
    "other words": (setting("pre_tokenizer", words(r"\p{L}{1,5}|\s+|.")), "cannot load"),
}


@pytest.mark.parametrize("kind", SERVED)
def test_gigatoken_serves_byte_level_bpe_exactly(kind: str, folder: Path, tmp_path: Path) -> None:
    choice = chosen(changed(folder, tmp_path / "tok", SERVED[kind]))
    assert choice.fast is not None and choice.fast.name == "gigatoken" and choice.reason is None
    assert choice.compared > 900


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gigatoken_cannot_do_is_said_and_left_to_the_reference(
    kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, why = REFUSED[kind]
    target = changed(folder, tmp_path / "tok", change)
    with caplog.at_level(logging.INFO, "megapatch"):
        choice = chosen(target)
    assert choice.fast is None and choice.reason is not None and why in choice.reason
    assert [record.getMessage() for record in caplog.records] == [f"engine tokenizers: {choice.reason}"]
    with pytest.raises(UserError, match=f"--engine gigatoken: .*{why}.*; use --engine auto or tokenizers"):
        chosen(target, "gigatoken")


def test_vocabularies_without_tokenizer_json(tmp_path: Path) -> None:
    for kind in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        (tmp_path / kind).mkdir()
        assert chosen(vocab_and_merges(kind, tmp_path / kind / "tok")).reason is None


@pytest.mark.parametrize(
    ("settings", "why"),
    [({}, None), ({"byte_fallback": False}, "cannot load"), ({"kind": "unigram"}, "Unigram")],
    ids=["bpe", "no bytes", "unigram"],
)
def test_sentencepiece_models(settings: dict[str, Any], why: str | None, tmp_path: Path) -> None:
    choice = chosen(sentencepiece(tmp_path / "spm", **settings))
    assert (choice.reason is None) if why is None else (why in str(choice.reason))


def test_a_tokenizer_that_is_python_code_uses_the_reference(tmp_path: Path) -> None:
    folder = tiktoken(tmp_path / "own", tmp_path / "canary")
    choice = chosen(folder, trust_remote_code=True)
    assert choice.fast is None and "is Python code, which gigatoken cannot run" in str(choice.reason)


def test_without_gigatoken_the_reference_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gigatoken_engine.importlib.util, "find_spec", lambda name: None)
    assert chosen(folder).reason == "gigatoken is not installed (pip install 'megapatch[fast]')"
    with pytest.raises(UserError, match="--engine gigatoken: gigatoken is not installed"):
        chosen(folder, "gigatoken")
    assert chosen(folder, "tokenizers").reason == "--engine tokenizers"


def test_ids_that_the_folder_alone_adds_are_known_to_both(folder: Path, tmp_path: Path) -> None:
    """added_tokens.json names a token that tokenizer.json lacks."""
    shutil.copytree(folder, tmp_path / "tok")
    (tmp_path / "tok" / "added_tokens.json").write_text(json.dumps({"<new>": 600}))
    choice = chosen(tmp_path / "tok", "gigatoken")
    assert choice.fast is not None and choice.fast.encode(["a<new>b"])[0].tolist()[1] == 600


def test_a_panic_of_the_library_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gigatoken import gigatoken_rs

    class PanicException(BaseException):
        pass

    def panic(_: str) -> None:
        raise PanicException("index out of bounds\nLocation: src/x.rs")

    monkeypatch.setattr(gigatoken_rs, "load_hf_json", panic)
    assert str(chosen(folder).reason).endswith("(index out of bounds)")


def all_same(choice: Choice, reference: Reference, texts: list[str]) -> bool:
    assert choice.fast is not None
    pairs = zip(choice.fast.encode(texts), reference.encode(texts), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "nfc"])
def test_safe_characters_are_the_same_to_both(normalizer: Any, folder: Path, tmp_path: Path) -> None:
    """Every 11th of all characters in several places, and marks in random order."""
    target = changed(folder, tmp_path / "tok", setting("normalizer", normalizer))
    reference = Reference(Tokenizer(target))
    choice = choose(reference, "gigatoken")
    table = choice.risky
    assert np.array_equal(table, risky(normalizer is not None))
    safe = [chr(code) for code in np.flatnonzero(~table).tolist() if not 0xD800 <= code < 0xE000]
    places = [f"x {one}a1{one}{one}'s {one}\n\u0301{one}\u0323e{one}" for one in safe[::11]]
    assert len(places) > 10_000 and all_same(choice, reference, places)
    chance = random.Random(0)
    marks = [one for one in safe if unicodedata.combining(one) or unicodedata.decomposition(one)]
    assert all_same(choice, reference, ["".join(chance.choices([*marks, "e", "\u1100"], k=30)) for _ in range(3000)])


def test_characters_that_engines_may_know_by_other_tables_are_found() -> None:
    unassigned, new_mark, old_mark = "\U000323b0", "\u08d3", "\u0301"
    texts = ["ascii", f"e{old_mark}", f"\u4e2d{unassigned}", f"a{new_mark}", "\ue000\U0010fffd", "", "\u0378"]
    assert outside(texts, risky(False)) == [2, 6]
    assert outside(texts, risky(True)) == [2, 3, 6]


def test_hard_texts_are_many_different_and_always_the_same(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    texts = hard_texts(tokenizer)
    assert texts == hard_texts(tokenizer) and len(set(texts)) == len(texts) > 1000
    whole = "".join(texts)
    assert whole.encode().decode() == whole  # no half characters
    for hard in ("\u00a0", "\u200d", "\r\n", "\x00", "\u0301\u0327", "<|im_start|>", "\U00030000", "'LL", "a" * 1000):
        assert hard in whole


_ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_PIECES = st.one_of(_ANY, st.sampled_from([*HARD, *SPELLED, "<|endoftext|>", "'s", "\r\n", "\u00a0"]))


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Reference, Choice]:
    reference = Reference(Tokenizer(folder))
    return reference, choose(reference, "gigatoken")


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(st.lists(_PIECES, max_size=6).map("".join), min_size=1, max_size=8))
def test_any_text_of_safe_characters_is_the_same_to_both(both: tuple[Reference, Choice], texts: list[str]) -> None:
    reference, choice = both
    left_out = outside(texts, choice.risky)
    assert all_same(choice, reference, [text for number, text in enumerate(texts) if number not in left_out])


def test_an_id_beyond_the_vocabulary_is_not_stored(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.vocab_size = 50  # what a tokenizer that is Python code may claim
    with pytest.raises(UserError, match=r"gives id \d+, but its vocabulary ends before 50; correct the vocabulary"):
        Reference(tokenizer).encode(["plain text"])
    assert str(choose(Reference(tokenizer), "auto").reason).endswith("has 600 ids, tokenizers 50")


def test_an_engine_that_has_grown_is_loaded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gigatoken_engine.Gigatoken(Tokenizer(folder))
    first, backend = engine.encode(HARD), engine._backend
    assert engine._backend is backend
    grown = engine._least + gigatoken_engine._MAX_GROWTH + 1
    monkeypatch.setattr(gigatoken_engine, "_resident", lambda: grown)
    second = engine.encode(HARD)
    assert engine._backend is not backend
    backend = engine._backend
    third = engine.encode(HARD)  # what has grown besides does not count again
    assert engine._backend is backend
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in second] == [ids.tolist() for ids in third]


def test_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 20 << 20 < gigatoken_engine._resident() < 1 << 40
    monkeypatch.setattr(gigatoken_engine, "_STATM", Path("/no/such/file"))
    assert gigatoken_engine._resident() == 0
