"""Texts to ids: control of the engine, bos and eod, special tokens in texts, and the dtype that core's reader takes."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from preprocess_data import make_tokenizer, outputs, run, write_jsonl
from tokenizer_folders import CODE, sentencepiece, tiktoken

from megapatch.models.cli import UserError
from megapatch.models.indexed_data import IndexedDocuments, dtype_for, read_manifest
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.encoding import encoder as module
from megapatch.tools.preprocess.encoding.around import Around
from megapatch.tools.preprocess.encoding.characters import risky
from megapatch.tools.preprocess.encoding.encoder import EncodeOptions, Encoder
from megapatch.tools.preprocess.encoding.engine import Choice, Reference
from megapatch.tools.preprocess.encoding.watch import Report, Watch

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("encoder"))


class Wrong(Reference):
    """An engine that is wrong about some texts: it gives their last id twice."""

    name = "wrong"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        pairs = zip(texts, super().encode(texts), strict=True)
        return [np.append(ids, ids[-1]) if "wrong" in text else ids for text, ids in pairs]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(reference: Reference, wanted: str) -> Choice:
        return Choice(Wrong(reference.tokenizer), None, risky(False), 7)

    monkeypatch.setattr(module, "choose", choose)


def compared(text: str) -> bool:
    return bool(xxhash.xxh3_64_intdigest(text.encode()) % 1000 == 0)


def found_by_hash(start: int, number: int, kind: str) -> list[str]:
    """Texts that a run compares with the reference wherever they stand."""
    texts = (f"{kind} {count}" for count in range(start, start + 10_000_000))
    return [text for text, _ in zip(filter(compared, texts), range(number), strict=False)]


def engine_of(prefix: Path) -> dict[str, Any]:
    manifest = read_manifest(prefix)
    assert manifest is not None
    found = manifest["engine"]
    assert isinstance(found, dict)
    return found


FILLER = [f"plain {number}" for number in range(400)]
UNSEEN = "wrong but never compared"


@pytest.mark.parametrize(
    ("num_wrong", "verdict"), [(0, "exact"), (2, "differences corrected"), (3, "changed to the reference")]
)
def test_a_wrong_engine_is_corrected_and_then_changed_whatever_the_workers(
    num_wrong: int, verdict: str, tok: Path, tmp_path: Path, wrong: None
) -> None:
    assert not compared(UNSEEN)
    texts = [*FILLER, UNSEEN, *found_by_hash(0, num_wrong, "wrong"), *FILLER, UNSEEN]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    made = set()
    for workers in ("1", "3"):
        prefix = tmp_path / f"with{workers}"
        more = ("--workers", workers, "--chunk-bytes", "2000")
        assert run(tok, prefix, source, more=more) == 0
        made.add((outputs(prefix), json.dumps(engine_of(prefix))))
    assert len(made) == 1
    engine = engine_of(prefix)
    assert (engine["verdict"], engine["differed"]) == (verdict, num_wrong)
    assert (engine["switched_at"] is not None) == (num_wrong == 3)
    assert ("'wrong " in str(engine["example"])) == (num_wrong > 0)
    tokenizer = Tokenizer(tok)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    for place in (len(FILLER), len(texts) - 1)[: 1 if num_wrong == 3 else 2]:  # no one looked, and the last engine ...
        expected[place].insert(-1, expected[place][-2])
    assert [ids.tolist() for ids in IndexedDocuments(prefix)] == expected  # ... was the reference after three


def test_the_first_documents_are_compared(tok: Path, wrong: None) -> None:
    encoder = Encoder(Tokenizer(tok), EncodeOptions())
    texts = [*FILLER[:199], "wrong at the end", "wrong too late"]
    encoded = encoder(texts, first=True)
    assert (encoded.report.compared, encoded.report.differed) == (200, 1)
    assert encoder(texts).report.compared == 0
    long = ["plain " * 100_000] * 3
    assert encoder(long, first=True).report.compared == 1  # about a megabyte


def test_characters_of_uncertain_age_go_to_the_reference(tok: Path, wrong: None) -> None:
    encoder = Encoder(Tokenizer(tok), EncodeOptions())
    encoded = encoder(["wrong \U000323b0", "plain \u4e2d"], first=True)
    assert (encoded.report.by_reference, encoded.report.compared, encoded.report.differed) == (1, 1, 0)
    assert encoded.ids.tolist() == [one for text in ("wrong \U000323b0", "plain \u4e2d") for one in encode(tok, text)]


def encode(folder: Path, text: str) -> list[int]:
    return Tokenizer(folder).encode(text)


def test_after_an_order_the_reference_encodes(tok: Path, wrong: None) -> None:
    encoder = Encoder(Tokenizer(tok), EncodeOptions())
    watch = encoder.watch()
    assert watch.order() is None
    assert watch.absorb(Report(fast=True, texts=9, compared=5, differed=3, example="says so")) is None
    late = encoder(["wrong"])
    order = watch.absorb(late.report)
    assert order is not None and watch.texts == 9  # the late one is not counted
    again = Watch.of(json.loads(json.dumps(asdict(watch))))
    assert again == watch and again.order() == order
    encoder.obey(order)
    redone = encoder(["wrong"])
    assert redone.ids.tolist() == encode(tok, "wrong") != late.ids.tolist()
    assert watch.absorb(redone.report) is None and watch.texts == 10
    told = watch.verdict()
    assert (told["switched_at"], told["example"], told["engine"]["name"]) == (1, "says so", "wrong")


@given(
    lengths=st.lists(st.integers(0, 5), max_size=8),
    before=st.lists(st.integers(100, 109), max_size=2),
    after=st.lists(st.integers(200, 209), max_size=2),
)
def test_bos_and_eod_stand_around_each_document(lengths: list[int], before: list[int], after: list[int]) -> None:
    ids = np.arange(sum(lengths), dtype=np.uint16)
    ends = np.cumsum([0, *lengths])
    expected = [
        one for at, size in enumerate(lengths) for one in (*before, *ids[ends[at] : ends[at] + size].tolist(), *after)
    ]
    made = Around(tuple(before), tuple(after)).put(ids, np.array(lengths, np.int64))
    assert made.tolist() == expected and made.dtype == ids.dtype


def configured(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a folder with other settings in tokenizer_config.json."""
    shutil.copytree(folder, target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


POLICIES: list[tuple[dict[str, Any], dict[str, Any], Any]] = [  # settings, options, ids around or what is refused
    ({}, {}, ((), ("eos",))),
    ({}, {"eod": "no"}, ((), ())),
    ({}, {"bos": "no"}, ((), ("eos",))),
    ({}, {"bos": "yes"}, "--bos yes, but it has no bos_token and puts nothing before a text; give --bos no, or name"),
    ({"bos_token": "a"}, {}, ((), ("eos",))),
    ({"bos_token": "a"}, {"bos": "yes"}, (("bos",), ("eos",))),
    ({"bos_token": "a", "add_bos_token": True}, {}, "begins every text with a (NUMBER) by its own configuration; give"),
    ({"bos_token": "a", "add_bos_token": True}, {"bos": "yes"}, (("bos",), ("eos",))),
    ({"bos_token": "a", "add_bos_token": True}, {"bos": "no"}, ((), ("eos",))),
    ({"add_bos_token": False, "add_eos_token": True}, {}, ((), ("eos",))),
]


@pytest.mark.parametrize(("settings", "options", "expected"), POLICIES)
def test_bos_and_eod_are_checked_against_the_tokenizer(
    settings: dict[str, Any], options: dict[str, Any], expected: Any, tok: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(configured(tok, tmp_path / "tok", **settings))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected).replace("NUMBER", r"\d+")):
            Encoder(tokenizer, EncodeOptions(**options))
        return
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eod_id}
    around = Encoder(tokenizer, EncodeOptions(**options)).around
    assert [[*around.before], [*around.after]] == [[names[one] for one in side] for side in expected]


def post_processed(folder: Path, target: Path, single: str) -> Path:
    """A copy of a folder whose post-processor puts tokens around a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(folder, target)
    backend = Backend.from_file(str(target / "tokenizer.json"))
    special = [(token, backend.token_to_id(token)) for token in single.split() if token != "$A"]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    backend.save(str(target / "tokenizer.json"))
    return target


def test_tokens_of_a_post_processor_are_checked(tok: Path, tmp_path: Path) -> None:
    after = Tokenizer(post_processed(tok, tmp_path / "after", "$A b"))
    number = after.token_id("b")
    with pytest.raises(UserError, match=rf"ends every text with b \({number}\) .* but its eos token is .*--eod no"):
        Encoder(after, EncodeOptions())
    assert Encoder(after, EncodeOptions(eod="no")).around == Around()
    fitting = Tokenizer(post_processed(tok, tmp_path / "fitting", f"x $A {END}"))
    assert fitting.suffix_ids == (fitting.eod_id,)
    assert Encoder(fitting, EncodeOptions(bos="yes")).around == Around(fitting.prefix_ids, (fitting.eod_id,))


def test_a_prefix_of_several_tokens_begins_each_document(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As [gMASK] sop of ChatGLM."""
    assert "build_inputs_with_special_tokens" in CODE
    tokenizer = Tokenizer(tiktoken(tmp_path / "own", tmp_path / "canary"), trust_remote_code=True)
    with pytest.raises(UserError, match=r"begins every text with .+ \(7\) .+ \(8\) by its own configuration"):
        Encoder(tokenizer, EncodeOptions())
    with caplog.at_level(logging.INFO, "megapatch"):
        encoder = Encoder(tokenizer, EncodeOptions(bos="yes"))
    assert "(7)" in caplog.text and "(8)" in caplog.text and f"({tokenizer.eod_id})" in caplog.text
    assert encoder.framed(encoder(["a", "", "b"])).tolist() == [7, 8, 97, 256, 7, 8, 98, 256]
    with pytest.raises(UserError, match="--special-in-text literal: its tokenizer is Python code"):
        Encoder(tokenizer, EncodeOptions(bos="no", special_in_text="literal"))


SPELLING = ["fine", f"a{END}b{END}", "fine <|endof", f"{END}"]


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize("mode", ["allow", "literal", "fail"])
def test_special_tokens_in_texts(
    mode: str, engine: str, tok: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "gigatoken":
        pytest.importorskip("gigatoken")
    source = write_jsonl(tmp_path / "a.jsonl", SPELLING)
    more = ("--special-in-text", mode, "--engine", engine, "--on-bad-line", "skip")
    assert run(tok, tmp_path / "out", source, more=more) == 0
    tokenizer = Tokenizer(tok)
    kept = SPELLING if mode != "fail" else [text for text in SPELLING if END not in text]
    documents = [ids.tolist() for ids in IndexedDocuments(tmp_path / "out")]
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == kept
    assert sum(ids[:-1].count(tokenizer.eod_id) for ids in documents) == (3 if mode == "allow" else 0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest["special_in_text"] == ({END: 3} if mode == "allow" else {})
    assert manifest["counts"]["bad"] == (2 if mode == "fail" else 0)
    place = f"{source}:2 (byte "
    said = [line for line in capsys.readouterr().err.splitlines() if place in line]
    assert len(said) == (mode == "fail")
    assert all(f"spells out the special token '{END}' at character 1 of its text" in one for one in said)


def test_literal_texts_are_as_if_the_token_did_not_exist(tmp_path: Path) -> None:
    """Also at the beginning of a text for SentencePiece, where a blank comes first."""
    folder = sentencepiece(tmp_path / "spm")
    encoder = Encoder(Tokenizer(folder), EncodeOptions(special_in_text="literal"))
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = ["<s>at once", "in </s> it", "none", "<unk>"]
    encoded = encoder(texts)
    assert encoded.ids.tolist() == [one for text in texts for one in library.encode(text)]
    assert not {0, 1, 2} & set(encoded.ids.tolist())


def test_only_what_is_a_token_there_is_refused(tok: Path, tmp_path: Path) -> None:
    """A token that must stand alone, and one that is found only after a normalizer."""
    from tokenizers import AddedToken, normalizers
    from tokenizers import Tokenizer as Backend

    shutil.copytree(tok, tmp_path / "tok")
    backend = Backend.from_file(str(tmp_path / "tok" / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.add_tokens([AddedToken("tag", single_word=True, special=True, normalized=False)])
    backend.add_tokens([AddedToken("<hidden>", special=True, normalized=True)])
    backend.save(str(tmp_path / "tok" / "tokenizer.json"))
    special = Encoder(Tokenizer(tmp_path / "tok"), EncodeOptions(special_in_text="fail")).special
    for fine in ("a stage", "tags", "hidden", "< hidden>"):
        special.refuse(fine)
    with pytest.raises(ValueError, match="special token 'tag' at character 2"):
        special.refuse("a tag")
    with pytest.raises(ValueError, match="special token '<hidden>'"):
        special.refuse("<HIDDEN>")


@pytest.mark.parametrize("holes", [[0, 1], [3, 400, 9000, 65000], []])
def test_special_tokens_are_counted_wherever_their_ids_lie(holes: list[int], tok: Path) -> None:
    tokenizer = Tokenizer(tok)
    tokenizer.special_tokens = {number: f"<{number}>" for number in holes}
    encoder = Encoder.__new__(Encoder)
    encoder.special = module.Special(tokenizer, "allow")
    for dtype in (np.uint16, np.int32):
        ids = np.random.default_rng(0).integers(0, 65_490, 100_000).astype(dtype)
        expected = {f"<{number}>": int((ids == number).sum()) for number in holes if (ids == number).any()}
        assert encoder.special.counts(ids) == expected
    parts = [np.array([5, 65000, 3], np.uint32), np.array([], np.uint32), np.array([7], np.uint32), np.array([400])]
    assert encoder.special.holders(parts) == {at for at, part in enumerate(parts) if set(holes) & set(part.tolist())}


def test_documents_that_are_not_kept_leave_no_trace(tok: Path) -> None:
    encoder = Encoder(Tokenizer(tok), EncodeOptions())
    encoded = encoder(["one", "", "two", "three"])
    end = [Tokenizer(tok).eod_id]
    one, two, three = (encode(tok, text) for text in ("one", "two", "three"))
    assert encoder.framed(encoded).tolist() == one + end + two + end + three + end
    assert encoder.framed(encoded, np.array([False, True, True, False])).tolist() == end + two + end
    assert encoder.framed(encoder([])).tolist() == []


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_536, 65_537])
def test_cores_reader_and_the_dtype(vocab_size: int) -> None:
    """The builder writes uint16 below 65,500 ids. GPTDataset does not read the dtype in the .idx but guesses it, when
    it is given the lengths of data sets (--per-dataset-sequences-path): uint16 up to 65,536. Between, it is wrong."""
    from types import SimpleNamespace

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=8,
        blend=None,
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=SimpleNamespace(vocab_size=vocab_size),
    )
    written = dtype_for(vocab_size)
    assert written == DType.optimal_dtype(vocab_size)
    guessed = DType.dtype_from_code(config.token_dtype_code)
    assert (written == guessed) == (not 65_500 <= vocab_size <= 65_536)
