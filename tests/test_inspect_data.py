"""mp-inspect-data: counts are exact, damage and differences end with 1, text shows what is special and trained."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_pairs import EOD, SPECIAL, byte_tokenizer, text, write_manifest, write_pair, write_tables

from megapatch.models.indexed_data import bin_path, idx_path, manifest_path
from megapatch.tools.preprocess.inspect_data import main
from megapatch.tools.preprocess.merge_data import main as merge
from megapatch.tools.preprocess.pairs import data_scan
from megapatch.tools.preprocess.preprocess import main as preprocess

DOCUMENTS = [text("Hello<eos>"), [], text("a<eos>b<eos>"), text("no end"), text("é\x1b[31m<|user|>\n<eos>")]
DOCUMENTS += [text("x" * n + "<eos>") for n in range(1, 200)]
ENGINE = {"engine": {"name": "gigatoken", "version": "0.10"}, "compared": 7, "switched_at": None}


@pytest.fixture
def tok(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "tok")


@pytest.fixture
def data(tmp_path: Path, tok: Path) -> Path:
    prefix = write_pair(tmp_path / "data.v1", DOCUMENTS)
    write_manifest(prefix, tok, DOCUMENTS, engine=ENGINE, options={"eod": "yes", "bos": None})
    return prefix


def told(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> Any:
    """What --json prints."""
    assert main([*map(str, argv), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> str:
    assert main([str(word) for word in argv]) == status
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_counts_are_those_of_the_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path, dtype: Any
) -> None:
    prefix = write_pair(tmp_path / "data", DOCUMENTS, dtype)
    (said,) = told(capsys, prefix, "--tokenizer", tok)
    lengths = sorted(map(len, DOCUMENTS))
    tokens = sum(lengths)
    assert said["dtype"] == np.dtype(dtype).name
    assert (said["documents"], said["sequences"], said["empty_documents"]) == (204, 204, 1)
    assert (said["tokens"], said["bytes"]["bin"]) == (tokens, tokens * np.dtype(dtype).itemsize)
    assert said["ids"] == {"smallest": 10, "largest": 257, "vocab_size": 259}
    assert said["eod"] == {"id": EOD, "documents": 202, "rate": 202 / 203, "inside": 1}
    shape = said["lengths"]
    assert (shape["min"], shape["max"], shape["mean"]) == (0, 200, tokens / 204)
    assert (shape["median"], shape["p99"]) == (lengths[101], lengths[201])  # ceil(share x 204) documents are not longer
    for low, high, count in shape["histogram"]:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in shape["histogram"]) == 204
    assert said["problems"] == []


def test_counts_do_not_depend_on_how_much_is_read_at_a_time(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(capsys, data)
    monkeypatch.setattr(data_scan, "_DOCUMENTS", 3)
    monkeypatch.setattr(data_scan, "_BUFFER_BYTES", 14)
    monkeypatch.setattr(data_scan, "_EXACT", 50)
    assert told(capsys, data) == whole


def test_a_document_of_several_sequences_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    prefix = write_tables(tmp_path / "data", [[[1, 2], [3]], [], [[4, 5, EOD]]])
    (said,) = told(capsys, prefix, "--tokenizer", tok)
    assert (said["documents"], said["sequences"], said["empty_documents"]) == (3, 3, 1)
    assert said["eod"] == {"id": EOD, "documents": 1, "rate": 0.5, "inside": 0}
    assert (said["lengths"]["min"], said["lengths"]["max"]) == (0, 3)


def test_a_pair_without_tokens_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = told(capsys, write_pair(tmp_path / "data", []))
    assert (said["documents"], said["tokens"], said["lengths"]["max"], said["ids"]["largest"]) == (0, 0, None, None)
    assert "documents 0, in 0 sequences" in printed(capsys, tmp_path / "data")


def test_people_are_told_the_same(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)  # a long path would be told on two lines
    lines = printed(capsys, data.name).splitlines()
    assert f"pair      {data.name}.bin and .idx, format corpus, uint16" in lines
    assert "documents 204, 1 of them empty, in 204 sequences" in lines
    assert "ids       10 to 257, of a vocabulary of 259" in lines
    assert "eod       id 256 ends 202 documents, 99.51 %; 1 inside documents" in lines
    assert "engine    engine gigatoken 0.10, compared 7" in lines and "options   eod yes" in lines
    bars = [line for line in lines if line.endswith(("█", "#"))]
    assert len({line.index("%") for line in bars}) == 1, "aligned"
    assert bars[-1].split()[:4] == ["128", "to", "255", "73"]


def change(at: int, data: bytes, path: Callable[[Path], Path] = bin_path) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        old = path(prefix).read_bytes()
        path(prefix).write_bytes(old[:at] + data + old[at + len(data) :])

    return damage


def other_index(prefix: Path) -> None:
    """An index that is whole and fits the .bin, but is not the one of the manifest."""
    write_pair(prefix.parent / "other", [[1] * sum(map(len, DOCUMENTS))])
    idx_path(prefix).write_bytes(idx_path(prefix.parent / "other").read_bytes())


WRONG = {  # what: (damage, words of the plain report, words of --verify); None: the exit status is 0
    "nothing": (lambda prefix: None, None, None),
    "another id": (change(0, b"\x01"), None, "data.v1.bin: xxh3-128 "),
    "an id beyond the vocabulary": (
        change(0, b"\xff\xff"),
        "id 65,535 found, expected ids below the vocabulary of 259",
        "id 65,535",
    ),
    "another index": (other_index, None, "data.v1.idx: xxh3-128 "),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("way", [0, 1], ids=["plain", "verify"])
def test_damage_is_told_and_ends_with_1(data: Path, capsys: pytest.CaptureFixture[str], case: str, way: int) -> None:
    WRONG[case][0](data)
    expected = WRONG[case][1 + way]
    more = ["--verify"] if way else []
    (said,) = told(capsys, data, *more, status=0 if expected is None else 1)
    assert len(said["problems"]) >= (expected is not None)
    assert expected is None or expected in said["problems"][0]
    out = printed(capsys, data, *more, status=0 if expected is None else 1)
    assert ("PROBLEM" in out) == (expected is not None)


SHORT = {
    "a short .bin": (lambda prefix: os.truncate(bin_path(prefix), 10), "data.v1.bin: 10 bytes found"),
    "offsets": (change(50, b"\xff", idx_path), "data.v1.idx: lengths and offsets contradict"),
    "no .idx": (lambda prefix: idx_path(prefix).unlink(), "data.v1.idx: no such file"),
    "a stale manifest": (lambda prefix: write_pair(prefix, [[1]]), "data.v1.manifest.json: does not describe"),
}


@pytest.mark.parametrize("case", SHORT)
def test_what_does_not_fit_together_is_an_error(data: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    SHORT[case][0](data)
    assert main([str(data)]) == 1
    assert SHORT[case][1] in capsys.readouterr().err


def test_verify_without_manifest_says_what_was_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = told(capsys, write_pair(tmp_path / "data", DOCUMENTS), "--verify")
    assert any("no digests in a manifest to compare with" in note for note in said["notes"])


def test_another_tokenizer_than_the_manifests_is_a_problem(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = byte_tokenizer(data.parent / "other", ["<eos>", "<|a|>", "<|b|>"])
    (said,) = told(capsys, data, "--tokenizer", other, status=1)
    assert "another tokenizer" in said["problems"][0]


@pytest.mark.parametrize(
    "vocab_size, dtype, expected",
    [(65_499, np.uint16, 0), (65_500, np.int32, 1), (65_536, np.int32, 1), (65_537, np.int32, 0)],
)
def test_the_trap_between_megatron_cores_two_thresholds_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path, vocab_size: int, dtype: Any, expected: int
) -> None:
    prefix = write_pair(tmp_path / "data", DOCUMENTS, dtype)
    write_manifest(prefix, None, DOCUMENTS, tokenizer={"vocab_size": vocab_size, "eod_id": 256})
    (said,) = told(capsys, prefix)
    assert sum("--per-dataset-sequences-path" in note for note in said["notes"]) == expected


def test_documents_are_decoded_with_special_tokens_in_brackets(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, data, "--document", 0, 2, 4, -1)
    assert out.startswith(
        f"{data} document 0: 6 tokens\nHello⟦<eos>⟧\n\n{data} document 2: 4 tokens\na⟦<eos>⟧b⟦<eos>⟧\n"
    )
    assert "é\\x1b[31m⟦<|user|>⟧\n⟦<eos>⟧\n" in out, "no control characters on a terminal"
    assert f"{data} document 203: 200 tokens\n{'x' * 199}⟦<eos>⟧\n" in out


def test_text_that_spells_a_special_token_is_not_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path
) -> None:
    prefix = write_pair(tmp_path / "data", [[*b"<eos>", EOD, 300]])
    (said,) = told(capsys, prefix, "--document", 0, "--tokenizer", tok)
    assert said["spans"] == [
        {"text": "<eos>", "special": False},
        {"text": "<eos>", "special": True},
        {"text": "id 300", "special": True},
    ]


CHAT = text("<|user|>hi<eos><|assistant|>yes, é<eos>")
MASK = [0] * 5 + [1] * (len(CHAT) - 5)


def chat(folder: Path, tok: Path) -> Path:
    prefix = write_pair(folder / "chat", [text("<|user|>a<eos>"), CHAT])
    write_pair(folder / "chat_mask", [[0, 0, 0], MASK], np.uint8)
    write_manifest(prefix, tok, [CHAT], format="chat")
    return prefix


def test_trained_tokens_are_in_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    out = printed(capsys, chat(tmp_path, tok), "--mask", "--document", 1)
    assert out.splitlines()[1] == "⟦<|user|>⟧hi⟦<eos>⟧⟦<|assistant|>⟧«yes, é⟦<eos>⟧»"
    (said,) = told(capsys, tmp_path / "chat", "--mask", "--document", 1)
    assert [(span["text"], span["trained"]) for span in said["spans"]] == [
        ("<|user|>", False),
        ("hi", False),
        ("<eos>", False),
        ("<|assistant|>", False),
        ("yes, é", True),
        ("<eos>", True),
    ]


def on_terminal(argv: list[str], **environment: str) -> str:
    """What a process prints on a terminal of its own."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "megapatch.tools.preprocess.inspect_data", *argv]
    given = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    with subprocess.Popen(words, stdout=theirs, stderr=subprocess.DEVNULL, env=given) as process:
        os.close(theirs)
        found = b""
        with io.FileIO(ours) as reader:
            try:
                while block := reader.read(1 << 16):
                    found += block
            except OSError:  # the terminal is gone with its last process
                pass
    assert process.returncode == 0
    return found.decode().replace("\r\n", "\n")


def test_trained_tokens_are_green_on_a_terminal_unless_no_color_is_set(tmp_path: Path, tok: Path) -> None:
    words = [str(chat(tmp_path, tok)), "--mask", "--document", "1"]
    coloured = on_terminal(words)
    assert "\x1b[32myes, é\x1b[0m\x1b[32;7m<eos>\x1b[0m" in coloured and "\x1b[2mhi\x1b[0m" in coloured
    assert "\x1b[7m<|user|>\x1b[0m" in coloured and "«" not in coloured
    plain = on_terminal(words, NO_COLOR="1")
    assert "\x1b" not in plain and "«yes, é⟦<eos>⟧»" in plain


def test_a_chat_tells_how_much_of_it_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    (said,) = told(capsys, chat(tmp_path, tok))
    assert (said["format"], said["trained"], said["tokens"]) == ("chat", sum(MASK), len(CHAT) + 3)


def preference(folder: Path, tok: Path) -> Path:
    prefix = folder / "pairs"
    for end in ("_chosen", "_rejected"):
        write_pair(folder / f"pairs{end}", [CHAT])
        write_pair(folder / f"pairs{end}_mask", [MASK], np.uint8)
    manifest_path(prefix).write_text('{"format": "preference"}')
    return prefix


def test_preference_data_are_told_by_their_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    prefix = preference(tmp_path, tok)
    assert [one["prefix"] for one in told(capsys, prefix)] == [f"{prefix}_chosen", f"{prefix}_rejected"]


def test_both_sides_of_a_preference_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    prefix = preference(tmp_path, tok)
    said = told(capsys, prefix, "--mask", "--tokenizer", tok)
    assert [one["prefix"] for one in said] == [f"{prefix}_chosen", f"{prefix}_rejected"]
    assert [one["spans"][-1] for one in said] == [{"text": "<eos>", "special": True, "trained": True}] * 2


def test_a_prompt_is_shown_with_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    prefix = write_pair(tmp_path / "data", [text("2+2?"), text("3+3?")])
    write_pair(tmp_path / "data_answer", [b"4", "séx\x1b".encode()], np.uint8)
    write_manifest(prefix, tok, [[]], format="prompts")
    assert printed(capsys, prefix, "--document", 1) == f"{prefix} document 1: 4 tokens\n3+3?\nanswer: séx\\x1b\n\n"
    assert [one["answer"] for one in told(capsys, prefix, "--document", 0)] == ["4"]


OTHER = {  # what the other pair has: (documents, dtype, first difference, differing documents)
    "the same": (DOCUMENTS, np.uint16, None, 0),
    "another dtype": (DOCUMENTS, np.int32, None, 0),
    "another token": ([*DOCUMENTS[:2], text("a<eos>c<eos>"), *DOCUMENTS[3:]], np.uint16, (2, 2, [98, 99]), 1),
    "a longer document": ([*DOCUMENTS[:3], text("no end!"), *DOCUMENTS[4:]], np.uint16, (3, 6, [None, 33]), 1),
    "one document less": (DOCUMENTS[:-1], np.uint16, (203, 0, [120, None]), 0),
    "two more, in the middle": ([*DOCUMENTS[:100], [1], [2], *DOCUMENTS[100:]], np.uint16, (100, 0, [120, 1]), 104),
    "none": ([], np.uint16, (0, 0, [72, None]), 0),
}


@pytest.mark.parametrize("case", OTHER)
def test_the_first_difference_is_found(data: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    documents, dtype, first, differing = OTHER[case]
    other = write_pair(data.parent / "other", documents, dtype)
    same = first is None and dtype is np.uint16
    said = told(capsys, data, "--diff", other, status=0 if same else 1)
    assert (said["same"], said["differing_documents"]) == (same, differing)
    found = said["first"] and (said["first"]["document"], said["first"]["token"], said["first"]["ids"])
    assert found == first
    out = printed(capsys, data, "--diff", other, status=0 if same else 1)
    assert ("hold the same" if same else "differ") in out


def test_the_difference_is_shown_in_its_surroundings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_pair(data.parent / "other", [text("Hallo<eos>"), *DOCUMENTS[1:]])
    assert "first in document 0, token 1: id 101 and id 97" in (out := printed(capsys, data, "--diff", other, status=1))
    assert "'Hello⟦<eos>⟧'" in out and "'Hallo⟦<eos>⟧'" in out


@pytest.mark.parametrize("more, expected", [([], (0.75, 0.25)), (["--temperature", "2"], (0.633975, 0.366025))])
def test_a_blend_is_an_argument_file_for_the_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: tuple[float, float]
) -> None:
    one, two = write_pair(tmp_path / "one", [[1] * 300]), write_pair(tmp_path / "t w o", [[1] * 100])
    assert (
        printed(capsys, one, two, "--blend", *more)
        == f"--data-path {expected[0]:.6g} {one} {expected[1]:.6g} '{two}'\n"
    )
    words = told(capsys, one, two, "--blend", *more)["data_path"]
    assert words[1::2] == [str(one), str(two)] and words[::2] == pytest.approx(expected, abs=1e-6)


def test_a_blend_of_other_formats_or_tokenizers_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str], tok: Path
) -> None:
    other = write_pair(data.parent / "other", DOCUMENTS)
    write_manifest(other, byte_tokenizer(data.parent / "tok2", ["<eos>", "<|a|>", "<|b|>"]), DOCUMENTS)
    for prefix, message in (
        (other, "made with another tokenizer than"),
        (chat(data.parent, tok), "format chat; mp-pretrain blends corpora"),
        (write_pair(data.parent / "none", []), "has no tokens"),
        (data, "given twice"),
    ):
        assert main([str(data), str(prefix), "--blend"]) == 1
        assert message in capsys.readouterr().err


USAGE = [
    (["--verify", "--blend"], "--verify and --blend: give one of them"),
    (["b", "--diff", "c"], "--diff compares one prefix with another; 2 were given"),
    (["--temperature", "2"], "--temperature needs --blend"),
    (["--blend", "--temperature", "0"], "expected a number above 0"),
]


@pytest.mark.parametrize("more, message", USAGE)
def test_options_that_contradict_each_other_are_wrong_usage(
    capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["a", *more])
    assert caught.value.code == 2 and message in capsys.readouterr().err


ERRORS = [
    (["--document", "204"], "--document 204: {data} has 204 documents, counted from 0"),
    (["--document", "-205"], "--document -205: {data} has 204 documents"),
    (["--mask"], "{data}_mask.idx: no such file"),
    (["--document", "0", "--tokenizer", "nowhere"], "nowhere: no such folder"),
]


@pytest.mark.parametrize("more, message", ERRORS)
def test_what_is_not_there_is_named(
    data: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([str(data), *more]) == 1
    assert message.format(data=data) in capsys.readouterr().err


def test_a_tokenizer_that_is_gone_or_changed_is_named(
    data: Path, tok: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer(tok, ["<eos>", "<|a|>", "<|b|>"])
    assert main([str(data), "--document", "0"]) == 1
    assert "tok: is no longer the tokenizer that made" in capsys.readouterr().err
    tok.rename(tok.parent / "elsewhere")
    assert main([str(data), "--document", "0"]) == 1
    assert "tok: no such folder, but" in capsys.readouterr().err


def test_of_many_sources_the_largest_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], tok: Path) -> None:
    for number in range(13):
        (tmp_path / f"{number:02}.txt").write_text("ab " * (number + 1))
    made = ["--glob", "*.txt", "--tokenizer", str(tok), "--output-prefix", str(tmp_path / "out")]
    assert preprocess(["--input", str(tmp_path), *made, "--workers", "1"]) == 0
    assert main([str(tmp_path / "out")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("source")]
    assert len(shown) == 11 and "12.txt" in shown[0] and "03.txt" in shown[9] and "and 3 more" in shown[10]


def test_what_the_tools_write_verifies_and_merged_shards_are_the_whole(
    tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"text {n} " * n + SPECIAL[0] * (n == 3) for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(tok), "--workers", "1", "--output-prefix"]
    assert preprocess([*words, str(tmp_path / "whole")]) == 0
    shards = [str(tmp_path / f"shard{i}") for i in range(2)]
    for i, shard in enumerate(shards):
        assert preprocess([*words, shard, "--shards", "2", "--shard", str(i)]) == 0
    assert merge(["--input", *shards, "--output-prefix", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    whole, merged = told(capsys, tmp_path / "whole", tmp_path / "merged", "--verify")
    assert whole["eod"] == merged["eod"] == {"id": EOD, "documents": 59, "rate": 1.0, "inside": 1}
    assert whole["manifest"]["counts"] == merged["manifest"]["counts"]
    assert told(capsys, tmp_path / "whole", "--diff", tmp_path / "merged")["same"]
