"""Other projects' formats: there and back exactly, as their own readers read them, and refused where they would not."""

import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_pairs import write_pair, write_set
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megapatch.models import packing
from megapatch.models.indexed_data import IndexedDocuments, read_index, read_manifest
from megapatch.models.packed_rows import Conversations
from megapatch.tools.preprocess.export_data import main as export_data
from megapatch.tools.preprocess.import_data import main as import_data

S = 64
IGNORED = -100


def byte_tokenizer(folder: Path) -> Path:
    """256 tokens, one a byte."""
    made = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return saved(made, folder)


def large_tokenizer(folder: Path) -> Path:
    """70,000 tokens: ids are int32."""
    return saved(Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, "w0")), folder)


def saved(made: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def chats(count: int = 200, vocabulary: int = 256, longest: int = S - 1) -> list[tuple[list[int], list[int]]]:
    """Conversations (ids, mask), each with something trained, not its first token; id 0 and the largest are there."""
    chance = np.random.default_rng(0)
    made = []
    for length in np.clip(chance.lognormal(3, 0.8, count), 2, longest).astype(int).tolist():
        mask = chance.integers(2, size=length)
        mask[0], mask[-1] = 0, 1
        made.append((chance.integers(vocabulary, size=length).tolist(), mask.tolist()))
    made[0][0][:2] = [vocabulary - 1, 0]
    made[1][0][-1] = 0  # -1 - 0 is still a mark
    return made


def contents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    found = Conversations(prefix)
    return [(found[i].ids.tolist(), found[i].mask.tolist()) for i in range(len(found))]


def files(prefix: Path) -> dict[str, bytes]:
    """The data files of a prefix, by what follows it."""
    return {
        p.name.removeprefix(prefix.name): p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}*.[bi][id][nx]")
    }


@pytest.mark.parametrize("vocabulary", [256, 70_000])
@pytest.mark.parametrize("form", ["pai", "bridge"])
def test_packed_rows_come_back_in_the_order_of_the_plan(
    form: str, vocabulary: int, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = (byte_tokenizer if vocabulary == 256 else large_tokenizer)(tmp_path / "tok")
    data = chats(vocabulary=vocabulary)
    write_set(tmp_path / "a", data, dtype=np.uint16 if vocabulary == 256 else np.int32)
    there = tmp_path / ("there" if form == "pai" else "there.idx.parquet")
    words = ["--format", form, "--seq-length", str(S), "--seed", "5"]
    assert export_data([str(tmp_path / "a"), *words, "--output", str(there), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    back = ["--format", form, "--input", str(there), "--tokenizer", str(tokenizer), "--output-prefix"]
    assert import_data([*back, str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lengths = np.array([len(ids) - (form == "bridge") for ids, _ in data])
    order = packing.make_plan(lengths, S, seed=5).order.tolist()
    assert contents(tmp_path / "b") == [data[number] for number in order]
    assert read_index(tmp_path / "b").dtype == (np.uint16 if vocabulary == 256 else np.int32)
    tokens, trained = sum(len(ids) for ids, _ in data), sum(sum(mask) for _, mask in data)
    for said in (out, found):
        assert (said["conversations"], said["tokens"], said["trained"]) == (len(data), tokens, trained)
    assert out["rows"] == found["rows"] and out["rows"] * S == lengths.sum() + out["padding"]
    manifest = read_manifest(tmp_path / "b")
    assert manifest and manifest["format"] == "chat" and manifest["tokenizer"]["vocab_size"] == vocabulary
    assert manifest["documents"] == len(data) and set(manifest["pairs"]) == {"_mask"}


@pytest.mark.parametrize("weighted", [False, True])
def test_json_lines_come_back_byte_for_byte(weighted: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tok")
    data = [*chats(), ([7], [1])]
    chance = np.random.default_rng(1)
    weights = [chance.random(len(ids)).astype(np.float32) for ids, _ in data]
    write_set(tmp_path / "a", data, weights if weighted else None)
    there = tmp_path / "there.jsonl"
    assert export_data([str(tmp_path / "a"), "--format", "jsonl", "--output", str(there)]) == 0
    back = ["--format", "jsonl", "--input", str(there), "--tokenizer", str(tokenizer)]
    assert import_data([*back, "--output-prefix", str(tmp_path / "b")]) == 0
    assert files(tmp_path / "b") == files(tmp_path / "a")
    assert len(files(tmp_path / "b")) == (6 if weighted else 4)


def read_as_pai(row: np.ndarray) -> SimpleNamespace:
    """What Pai-Megatron-Patch's loader makes of a row of 2 x s, with --reset-position-ids, from its description."""
    tokens, labels = row[: len(row) // 2].astype(np.int64), row[len(row) // 2 :].astype(np.int64)
    positions, place = [], 0
    for token in tokens.tolist():
        positions.append(place)
        place = 0 if token < 0 else place + 1
    padded = tokens[-1] >= 0
    tokens = np.where(tokens < 0, -tokens - 1, tokens)
    starts = [i for i, position in enumerate(positions) if position == 0]
    bounds = [*starts, len(tokens)]
    assert len(starts) > 1, "the largest of no lengths ends its trainer"
    spans = [slice(a, b) for a, b in pairwise(bounds)][: len(starts) - bool(padded)]
    assert all((labels[span] != IGNORED).any() for span in spans), "it asserts that something is trained"
    return SimpleNamespace(tokens=tokens, labels=labels, spans=spans)


@pytest.mark.parametrize("vocabulary", [256, 70_000])
def test_pais_reader_finds_every_conversation_and_label(vocabulary: int, tmp_path: Path) -> None:
    data = chats(vocabulary=vocabulary)
    write_set(tmp_path / "a", data, dtype=np.uint16 if vocabulary == 256 else np.int32)
    words = ["--format", "pai", "--seq-length", str(S), "--pad-id", "9", "--output", str(tmp_path / "pai")]
    assert export_data([str(tmp_path / "a"), *words]) == 0
    assert read_index(tmp_path / "pai").dtype == np.int32
    assert set(read_index(tmp_path / "pai").lengths.tolist()) == {2 * S}
    seen = []
    for row in map(read_as_pai, IndexedDocuments(tmp_path / "pai")):
        for span in row.spans:
            ids, labels = row.tokens[span].tolist(), row.labels[span].tolist()
            trained = [0, *(int(label != IGNORED) for label in labels[:-1])]
            assert labels == [t if m else IGNORED for t, m in zip(ids[1:], trained[1:], strict=True)] + [IGNORED]
            seen.append((ids, trained))
        rest = row.spans[-1].stop
        assert set(row.labels[rest:].tolist()) <= {IGNORED} and set(row.tokens[rest:].tolist()) <= {9}
    assert sorted(seen) == sorted(data)
    said = read_manifest(tmp_path / "pai")
    assert said and said["options"] == {"seq_length": S, "seed": 0, "pad_id": 9} and said["format"] == "pai"


def test_bridges_reader_finds_every_conversation_and_label(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    data = [*chats(1800), (list(range(S + 1)), [0] * S + [1])]  # a row of inputs, and one label more
    write_set(tmp_path / "a", data)
    there = tmp_path / "a.idx.parquet"
    assert export_data([str(tmp_path / "a"), "--format", "bridge", "--seq-length", str(S), "--output", str(there)]) == 0
    table, metadata = parquet.read_table(there), parquet.read_metadata(there)
    names = dict(input_ids=pa.int32(), loss_mask=pa.int8(), seq_start_id=pa.int32())
    assert {f.name: f.type.value_type for f in table.schema} == names
    assert metadata.num_row_groups > 1 and metadata.row_group(0).num_rows == 500
    seen = []
    for row in table.to_pylist():
        ids, mask, bounds = row["input_ids"], row["loss_mask"], [*row["seq_start_id"], len(row["input_ids"])]
        spans = list(pairwise(bounds))
        assert sum(b - a - 1 for a, b in spans) <= S and len(mask) == len(ids)
        for a, b in spans:  # its collate_fn: inputs [a:b-1], labels [a+1:b], and the mask of the labels [a:b-1]
            assert not mask[b - 1]
            seen.append((ids[a:b], [0, *mask[a : b - 1]]))
    assert sorted(seen) == sorted(data)


def test_lines_have_the_text_that_gives_the_same_ids(tmp_path: Path, capsys: Any) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tok")
    texts = [list("Hi, it's 漢字".encode()), [0xFF, 0x80]]
    table = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode("Hi, it's 漢字").ids
    assert len(encoded) == len(texts[0]) and len(table) == 256
    write_set(tmp_path / "a", [(encoded, [1] * len(encoded)), ([table.index("ÿ")], [1])])
    argv = [str(tmp_path / "a"), "--format", "jsonl", "--tokenizer", str(tokenizer), "--output", "-"]
    assert export_data(argv) == 0
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first == {"input_ids": encoded, "loss_mask": [1] * len(encoded), "text": "Hi, it's 漢字"}
    assert "text" not in second and "1 conversations without text" in err


def test_lines_come_from_stdin_under_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"tokens": [1, 2], "loss_mask": [0, 1]}\n\n{"input_ids": [3], "loss_mask": [true], "text": "x"}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    tokenizer = byte_tokenizer(tmp_path / "tok")
    argv = ["--format", "jsonl", "--input", "-", "--tokenizer", str(tokenizer), "--output-prefix", str(tmp_path / "b")]
    assert import_data(argv) == 0
    assert contents(tmp_path / "b") == [([1, 2], [0, 1]), ([3], [1])]


@pytest.mark.parametrize("kept", [0, 1])
def test_conversations_of_which_nothing_is_trained_are_left_out_and_counted(
    kept: int, tmp_path: Path, capsys: Any
) -> None:
    bad, good = '{"input_ids": [1, 2], "loss_mask": [0, 0]}\n', '{"input_ids": [3], "loss_mask": [1]}\n'
    (tmp_path / "in.jsonl").write_text(bad + good * kept + bad)
    words = [
        "--format",
        "jsonl",
        "--input",
        str(tmp_path / "in.jsonl"),
        "--tokenizer",
        str(byte_tokenizer(tmp_path / "t")),
    ]
    words += ["--output-prefix", str(tmp_path / "b"), "--skip-untrained", "--json"]
    assert import_data(words) == 1 - kept
    out, err = capsys.readouterr()
    if not kept:
        assert "in.jsonl: no conversations with a trained token\n" in err and not list(tmp_path.glob("b*"))
        return
    assert contents(tmp_path / "b") == [([3], [1])] and "2 conversations without a trained token are left out" in err
    said, manifest = json.loads(out), read_manifest(tmp_path / "b")
    assert (said["rows"], said["conversations"], said["untrained"]) == (3, 1, 2)
    assert manifest and manifest["counts"]["untrained"] == 2


GOOD = ([1, 2, 3], [0, 1, 1])
UNFIT = {  # name -> conversations, weights, format, what is told
    "fills a row": ([(list(range(8)), [0] * 7 + [1])], None, "pai", "longer than 7 tokens (one that fills a row ends"),
    "longer than a row": ([([1] * 9, [0] * 8 + [1])], None, "pai", "1 of 1 conversations are longer than 7 tokens"),
    "longer than bridge's": (
        [([1] * 10, [0] * 10)],
        None,
        "bridge",
        "1 of 1 conversations are longer than --seq-length",
    ),
    "nothing trained": (
        [GOOD, ([1, 2], [0, 0])],
        None,
        "pai",
        "1 of 2 conversations have no trained token (first: num",
    ),
    "pai's first": ([GOOD, ([1, 2], [1, 1])], None, "pai", "1 of 2 conversations have a trained first token"),
    "bridge's first": ([([1, 2], [1, 1])], None, "bridge", "1 of 1 conversations have a trained first token"),
    "empty": ([GOOD, ([], [])], None, "pai", "1 of 2 conversations have fewer than 1 tokens (first: number 1)"),
    "one token": ([GOOD, ([1], [0])], None, "bridge", "1 of 2 conversations have fewer than 2 tokens"),
    "pai's weights": ([GOOD], [[1, 0.5, 1]], "pai", "a_weight: --format pai has no place for weights"),
    "bridge's weights": ([GOOD], [[1, 0.5, 1]], "bridge", "a_weight: --format bridge has no place for weights"),
    "none": ([], None, "bridge", "a: no conversations"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_a_format_has_no_place_for_is_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    data, weights, form, message = UNFIT[name]
    write_set(tmp_path / "a", data, weights)
    before = sorted(tmp_path.iterdir())
    there = tmp_path / "out.idx.parquet"
    assert export_data([str(tmp_path / "a"), "--format", form, "--seq-length", "8", "--output", str(there)]) == 1
    assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def pai_row(tokens: list[int], labels: list[int]) -> list[int]:
    return [*tokens, *labels]


BAD_PAI = {  # name -> rows, dtype, what is told
    "unsigned": ([[1, 2, 3, 4]], np.uint16, "uint16 found, expected int32"),
    "not of one length": ([[1, -3, IGNORED, IGNORED], [-3, IGNORED]], np.int32, "sequences of 2 to 4 elements"),
    "odd": ([[1, -3, IGNORED]], np.int32, "sequences of 3 to 3 elements"),
    "no mark": ([[1, 2, IGNORED, IGNORED]], np.int32, "row 0: no mark of an end"),
    "trained padding": (
        [pai_row([-3, 0], [IGNORED, 5])],
        np.int32,
        "row 0: tokens that are trained after the last mark",
    ),
    "labels not shifted": (
        [pai_row([1, -3], [1, IGNORED])],
        np.int32,
        "label 0 of a conversation is 1, the token after",
    ),
    "label at the end": ([pai_row([1, -3], [2, 4])], np.int32, "row 0: label 4 at the end of a conversation"),
    "other vocabulary": (
        [pai_row([300, -3], [2, IGNORED])],
        np.int32,
        "a: row 0: ids 2 to 300, the tokenizer has",
    ),
}


@pytest.mark.parametrize("name", BAD_PAI)
def test_pai_data_that_contradict_themselves_are_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    rows, dtype, message = BAD_PAI[name]
    write_pair(tmp_path / "a", rows, dtype)
    refused(tmp_path, "pai", tmp_path / "a", message, capsys)


def refused(folder: Path, form: str, name: Path, message: str, capsys: Any) -> None:
    """The import fails with one line, and leaves nothing."""
    tokenizer = byte_tokenizer(folder / "tok")
    before = sorted(folder.iterdir())
    argv = ["--format", form, "--input", str(name), "--tokenizer", str(tokenizer), "--output-prefix", str(folder / "b")]
    assert import_data(argv) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


BAD_LINES = {  # name -> second line, what is told
    "not JSON": ('{"input_ids": [1], "loss_mask": [1]', "there.jsonl:2: not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "there.jsonl:2: not JSON"),
    "no object": ("[1, 2]", "there.jsonl:2: list found; expected input_ids"),
    "unknown key": ('{"input_ids": [1], "loss_mask": [1], "labels": [1]}', "2: input_ids, loss_mask, labels found"),
    "both names": ('{"input_ids": [1], "tokens": [1], "loss_mask": [1]}', "2: input_ids, tokens, loss_mask found"),
    "no mask": ('{"input_ids": [1]}', "there.jsonl:2: no key 'loss_mask'; keys found: 'input_ids'"),
    "nothing trained": ('{"input_ids": [1], "loss_mask": [0]}', "there.jsonl:2: no token of it is trained; leave it"),
    "nothing at all": ('{"input_ids": [], "loss_mask": []}', "there.jsonl:2: no token of it is trained; leave it out"),
    "short mask": ('{"input_ids": [1, 2], "loss_mask": [1]}', "2: 1 numbers in loss_mask, 2 in input_ids"),
    "mask of weights": ('{"input_ids": [1], "loss_mask": [2]}', "2: loss_mask holds other numbers than 0 and 1"),
    "fractions": ('{"input_ids": [1.5], "loss_mask": [1]}', "2: input_ids is no list of whole numbers"),
    "words": ('{"input_ids": ["1"], "loss_mask": [1]}', "2: input_ids is no list of whole numbers"),
    "nested": ('{"input_ids": [[1], [1, 2]], "loss_mask": [1]}', "2: input_ids is no list of whole numbers"),
    "huge": ('{"input_ids": [99999999999999999999], "loss_mask": [1]}', "2: input_ids is no list of whole numbers"),
    "negative": ('{"input_ids": [-1], "loss_mask": [1]}', "there.jsonl:2: ids -1 to -1, the tokenizer has 0 to 255"),
    "large id": ('{"input_ids": [256], "loss_mask": [1]}', "there.jsonl:2: ids 256 to 256"),
    "new weights": (
        '{"input_ids": [1], "loss_mask": [1], "weights": [1]}',
        "there.jsonl:2: weights, unlike the first",
    ),
    "no number": (
        '{"input_ids": [1], "loss_mask": [1], "weights": [NaN]}',
        "2: weights holds a number below 0, or one",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_lines_that_contradict_themselves_are_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    line, message = BAD_LINES[name]
    there = tmp_path / "there.jsonl"
    good = b'{"input_ids": [1, 2], "loss_mask": [0, 1]}\n'
    there.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    refused(tmp_path, "jsonl", there, message, capsys)


BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"input_ids": [[1]], "seq_start_id": [[0]]}, "no column loss_mask"),
    "numbers": (
        {"input_ids": [1], "loss_mask": [[0]], "seq_start_id": [[0]]},
        "column input_ids is int64, or has nulls",
    ),
    "nulls": (
        {"input_ids": [None], "loss_mask": [[0]], "seq_start_id": [[0]]},
        "column input_ids is null, or has nulls",
    ),
    "fractions": ({"input_ids": [[0.5]], "loss_mask": [[0]], "seq_start_id": [[0]]}, "input_ids has float64"),
    "short mask": ({"input_ids": [[1, 2]], "loss_mask": [[0]], "seq_start_id": [[0]]}, "row 0: 2 input_ids, 1 in loss"),
    "late start": ({"input_ids": [[1, 2]], "loss_mask": [[0, 0]], "seq_start_id": [[1]]}, "seq_start_id [1]"),
    "falling": ({"input_ids": [[1, 2]], "loss_mask": [[0, 0]], "seq_start_id": [[0, 0]]}, "seq_start_id does not rise"),
    "behind": ({"input_ids": [[1, 2]], "loss_mask": [[0, 0]], "seq_start_id": [[0, 2]]}, "seq_start_id does not rise"),
    "not shifted": (
        {"input_ids": [[1, 2]], "loss_mask": [[0, 1]], "seq_start_id": [[0]]},
        "loss_mask holds 1 at the end",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_contradict_themselves_are_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns, message = BAD_TABLES[name]
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    refused(tmp_path, "bridge", tmp_path / "a.parquet", message, capsys)


def test_a_file_that_is_no_table_or_not_there_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    refused(tmp_path, "bridge", tmp_path / "a.parquet", "a.parquet: not a parquet file", capsys)
    argv = ["--format", "pai", "--input", str(tmp_path / "no"), "--tokenizer", str(tmp_path / "tok"), "--output-prefix"]
    assert import_data([*argv, str(tmp_path / "b")]) == 1
    assert "no.bin: no such file" in capsys.readouterr().err


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_set(tmp_path / "a", [GOOD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    there = tmp_path / "a.idx.parquet"
    assert export_data([str(tmp_path / "a"), "--format", "bridge", "--seq-length", "8", "--output", str(there)]) == 1
    assert "pip install 'megapatch[data]'" in capsys.readouterr().err and not there.exists()


def test_stale_weights_go_when_new_data_have_none(tmp_path: Path, capsys: Any) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tok")
    write_set(tmp_path / "b", [GOOD], [[1, 1, 1]])
    there = tmp_path / "there.jsonl"
    there.write_text('{"input_ids": [1, 2], "loss_mask": [0, 1]}\n')
    argv = ["--format", "jsonl", "--input", str(there), "--tokenizer", str(tokenizer), "--output-prefix"]
    assert import_data([*argv, str(tmp_path / "b")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert import_data([*argv, str(tmp_path / "b"), "--force"]) == 0
    assert contents(tmp_path / "b") == [([1, 2], [0, 1])]
    assert not list(tmp_path.glob("b_weight*")) and not list(tmp_path.glob("*.tmp-*"))


WRONG = {  # words after export's prefix -> what is told
    "--format pai --output x": "--format pai: needs --seq-length of 2 or more",
    "--format jsonl --output x --seq-length 8": "--seq-length: means nothing to --format jsonl",
    "--format bridge --output x.parquet --seq-length 8 --pad-id 1": "--pad-id: means nothing to --format bridge",
    "--format bridge --output x --seq-length 8": "--output x: Megatron-Bridge finds packed data by .idx.parquet",
    "--format pai --output - --seq-length 8": "--output -: only --format jsonl goes to stdout",
    "--format jsonl --output - --json": "--output -: only --format jsonl goes to stdout, and without --json",
    "--format pai --output a --seq-length 8": "--output a: is the input",
    "--format pai --output x --seq-length 8 --seed -1": "--seed: must be 0 or more",
}


@pytest.mark.parametrize("words", WRONG)
def test_options_that_cannot_take_effect_are_wrong_usage(words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        export_data(["a", *words.split()])
    assert left.value.code == 2 and WRONG[words] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format pai --input - --output-prefix b", "--input -: only --format jsonl comes from stdin"),
        ("--format jsonl --input - c --output-prefix b", "--input -: only --format jsonl comes from stdin, and alone"),
        ("--format pai --input b --output-prefix b", "--output-prefix b: is an input"),
    ],
)
def test_inputs_that_cannot_be_are_wrong_usage(words: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        import_data([*words.split(), "--tokenizer", "tok"])
    assert left.value.code == 2 and message in capsys.readouterr().err
