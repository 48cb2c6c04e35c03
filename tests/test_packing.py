"""Packing plans: full rows, nothing cut, the same for the same seed, refused for other data; and the rows they give."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_pairs import write_pair, write_set

from megapatch.models import packed_rows, packing
from megapatch.models.cli import UserError
from megapatch.tools.preprocess.pack_data import main

SHAPES = [  # lengths, row, multiple
    ([3, 3, 3, 3, 4], 8, 1),
    ([8] * 5, 8, 1),
    ([1] * 100, 7, 1),
    ([5, 1, 8, 2, 7, 3, 6, 4], 8, 1),
    ([1, 2, 3, 5, 8, 13], 16, 4),
    ([], 8, 1),
    ([0, 4, 0], 4, 2),
]


def log_normal(count: int, longest: int, middle: float = 6.0) -> np.ndarray:
    """Lengths as of real conversations."""
    chance = np.random.default_rng(0)
    return np.clip(chance.lognormal(middle, 1.0, count).astype(np.int32), 8, longest)


def filled(plan: packing.Plan, lengths: np.ndarray) -> np.ndarray:
    """Tokens in each row with the padding of each conversation [rows]."""
    padded = -(-lengths.astype(np.int64) // plan.multiple) * plan.multiple
    return np.array([padded[plan.row(i)].sum() for i in range(plan.num_rows)], np.int64)


def written_out(lengths: list[int], capacity: int) -> int:
    """Rows of best fit decreasing, one conversation at a time."""
    rooms: list[int] = []
    for length in sorted(filter(None, lengths), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@pytest.mark.parametrize(("lengths", "row", "multiple"), SHAPES)
def test_every_conversation_is_in_one_row_and_no_row_overflows(lengths: list[int], row: int, multiple: int) -> None:
    given = np.array(lengths, np.int32)
    plan = packing.make_plan(given, row, multiple=multiple)
    assert sorted(plan.order.tolist()) == np.flatnonzero(given).tolist()
    assert (filled(plan, given) <= row).all()
    assert plan.num_rows == written_out([-(-n // multiple) for n in lengths], row // multiple)


def test_rows_are_as_few_as_best_fit_one_at_a_time_makes() -> None:
    for seed in range(30):
        chance = np.random.default_rng(seed)
        lengths = chance.integers(1, 60, chance.integers(1, 300)).astype(np.int32)
        assert packing.make_plan(lengths, 64, seed=seed).num_rows == written_out(lengths.tolist(), 64)


@pytest.mark.parametrize("row", [2048, 4096, 8192])
def test_rows_of_real_lengths_are_full(row: int) -> None:
    lengths = log_normal(100_000, row)
    plan = packing.make_plan(lengths, row)
    assert lengths.sum() / (plan.num_rows * row) >= 0.999


def test_many_different_lengths_take_no_longer_than_a_moment() -> None:
    lengths = np.random.default_rng(0).integers(1, 131_073, 100_000).astype(np.int32)
    started = time.process_time()
    plan = packing.make_plan(lengths, 131_072)
    assert time.process_time() - started < 5  # 0.3 where nothing else runs
    assert lengths.sum(dtype=np.int64) / (plan.num_rows * 131_072) >= 0.995


def test_the_plan_depends_on_the_seed_alone() -> None:
    lengths = log_normal(5000, 4096)
    one, same, other = (packing.make_plan(lengths, 4096, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.order, same.order) and np.array_equal(one.bounds, same.bounds)
    assert not np.array_equal(one.order, other.order) and one.num_rows == other.num_rows


def test_long_and_short_come_anywhere_in_a_row_and_full_rows_anywhere() -> None:
    lengths = np.array([30, 1] * 4000, np.int32)
    plan = packing.make_plan(lengths, 31)
    first = lengths[plan.order[plan.bounds[:-1]]]
    assert 0.45 < (first == 30).mean() < 0.55  # of 4,000 rows
    assert abs(np.corrcoef(plan.order[:-1], plan.order[1:])[0, 1]) < 0.05


def test_a_plan_comes_back_from_disk(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.b", [[1] * n for n in (3, 5, 2)], np.uint16)
    made = packing.pack(tmp_path / "a.b", 8, multiple=2, seed=3)
    path = packing.write_plan(tmp_path / "a.b", made)
    assert path == tmp_path / "a.b.pack-8-m2.npz"
    found = packing.read_plan(tmp_path / "a.b", 8, 2)
    assert (found.seq_length, found.multiple, found.seed) == (8, 2, 3)
    assert np.array_equal(found.order, made.order) and np.array_equal(found.bounds, made.bounds)


def test_the_file_of_a_plan_is_the_same_bytes_again(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[1] * n for n in (3, 5, 2)], np.uint16)
    assert main([str(tmp_path / "a"), "--seq-length", "8"]) == 0
    first = packing.plan_path(tmp_path / "a", 8).read_bytes()
    assert main([str(tmp_path / "a"), "--seq-length", "8", "--force"]) == 0
    assert packing.plan_path(tmp_path / "a", 8).read_bytes() == first


def spoil_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def spoil_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"order.npy") + 150] ^= 1
    path.write_bytes(bytes(data))


def spoil_pickle(path: Path) -> None:
    np.savez(path.open("wb"), about=np.array([{}], object), bounds=np.zeros(1), order=np.zeros(0))


def spoil_other_length(path: Path) -> None:
    with np.load(path) as stored:
        parts = dict(stored)
    about = json.loads(parts["about"].tobytes()) | {"seq_length": 16}
    parts["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(path.open("wb"), **parts)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "no such file; make it with: mp-pack-data "),
        (spoil_truncate, "not a plan, or damaged"),
        (spoil_flip, "not a plan, or damaged"),
        (spoil_pickle, "not a plan, or damaged"),
        (spoil_other_length, "made for other lengths"),
    ],
)
def test_a_plan_that_is_not_there_or_damaged_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[1] * 30, [2] * 5], np.uint16)
    assert main([str(tmp_path / "a"), "--seq-length", "32"]) == 0
    spoil(packing.plan_path(tmp_path / "a", 32))
    with pytest.raises(UserError, match=message) as raised:
        packing.read_plan(tmp_path / "a", 32)
    assert "\n" not in str(raised.value)


def test_a_plan_for_other_data_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[1] * 3, [2] * 5], np.uint16)
    assert main([str(tmp_path / "a"), "--seq-length", "8"]) == 0
    write_pair(tmp_path / "a", [[1] * 5, [2] * 3], np.uint16)
    with pytest.raises(UserError, match=r"made for other data than .*a\.idx; make it again with: mp-pack-data"):
        packing.read_plan(tmp_path / "a", 8)


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "a", [[1] * n for n in (3, 5, 2, 0, 8)], np.uint16)
    assert main([str(tmp_path / "a"), "--seq-length", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said.pop("seconds") > 0 and said == {
        "plan": str(tmp_path / "a.pack-8.npz"),
        "rows": 3,
        "seq_length": 8,
        "multiple": 1,
        "conversations": 4,
        "empty": 1,
        "tokens": 18,
        "padding": 6,
        "fill_percent": 75.0,
        "least_per_row": 1,
        "most_per_row": 2,
    }
    assert "1 conversations without tokens are in no row" in err
    assert main([str(tmp_path / "a"), "--seq-length", "16"]) == 0
    out, _ = capsys.readouterr()
    assert "2 rows of 16 tokens, 56.250 % full (18 tokens, 14 padding)" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            "--seq-length 4",
            1,
            "2 of 3 conversations are longer than --seq-length 4 (first: number 1, 5 tokens; longest",
        ),
        ("--seq-length 9 --multiple 2", 2, "--seq-length 9: must be a multiple of --multiple 2"),
        ("--seq-length 8 --multiple 0", 2, "--multiple 0: must be at least 1"),
        ("--seq-length 8 --seed -1", 2, "--seed -1: must be 0 or more"),
        ("--seq-length 10", 1, "a.pack-10.npz: exists already"),
    ],
)
def test_mistakes_are_told(
    words: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path / "a", [[1] * n for n in (3, 5, 9)], np.uint16)
    (tmp_path / "a.pack-10.npz").write_bytes(b"old")
    try:
        found = main([str(tmp_path / "a"), *words.split()])
    except SystemExit as left:
        found = left.code
    assert found == status and message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.pack-10.npz"]
    assert (tmp_path / "a.pack-10.npz").read_bytes() == b"old"


DATA = [([11, 12, 13], [0, 1, 1]), ([21, 22], [0, 1]), ([31], [1]), ([41, 42, 43, 44], [1, 0, 0, 1])]


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("full", [True, False])
def test_rows_hold_what_each_conversation_holds(multiple: int, full: bool, tmp_path: Path) -> None:
    write_set(tmp_path / "a", DATA)
    plan = packing.pack(tmp_path / "a", 8, multiple=multiple, seed=1)
    rows = packed_rows.PackedRows(tmp_path / "a", plan, pad_id=9, full=full)
    seen: list[int] = []
    for row in (rows[i] for i in range(len(rows))):
        bounds = row.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(row.tokens)) and (not full or bounds[-1] == 8)
        assert row.max_seqlen == max(b - a for a, b in pairwise(bounds))
        for place, number in enumerate(row.conversations.tolist()):
            ids, mask = DATA[number]
            start, stop = bounds[place : place + 2]
            padding = stop - start - len(ids)
            assert 0 <= padding < multiple
            assert row.tokens[start:stop].tolist() == ids + [9] * padding
            assert row.labels[start:stop].tolist() == ids[1:] + [9] * (padding + 1)
            assert row.loss_mask[start:stop].tolist() == mask[1:] + [0] * (padding + 1)
            assert row.position_ids[start:stop].tolist() == list(range(stop - start))
            seen.append(number)
        rest = slice(bounds[len(row.conversations)], None)
        assert set(row.tokens[rest].tolist()) <= {9} and not row.loss_mask[rest].any()
        assert row.position_ids[rest].tolist() == list(range(len(row.tokens) - rest.start))
        kinds = (row.tokens, row.labels, row.position_ids, row.loss_mask, row.cu_seqlens)
        assert [array.dtype.name for array in kinds] == ["int64", "int64", "int64", "float32", "int32"]
    assert sorted(seen) == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert np.array_equal(rows[-1].tokens, rows[len(rows) - 1].tokens)


def test_rows_of_one_conversation_each(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [*DATA, ([], [])])
    lengths = packed_rows.Conversations(tmp_path / "a").lengths
    plan = packed_rows.one_by_one(lengths, 8)
    rows = packed_rows.PackedRows(tmp_path / "a", plan, full=False)
    assert [row.tokens.tolist() for row in (rows[i] for i in range(len(rows)))] == [ids for ids, _ in DATA]
    mixed = packed_rows.one_by_one(np.ones(50, np.int64), 8, seed=1).order.tolist()
    assert sorted(mixed) == list(range(50)) and mixed != list(range(50))


def test_weights_count_where_tokens_are_trained(tmp_path: Path) -> None:
    write_set(tmp_path / "a", DATA, [[1.0, 0.5, 1], [1, 0.25], [1], [1, 3, 1, 2]])
    rows = packed_rows.PackedRows(
        tmp_path / "a", packed_rows.one_by_one(np.array([3, 2, 1, 4]), 4), pad_id=0, full=False
    )
    assert [rows[i].loss_mask.tolist() for i in range(4)] == [[0.5, 1, 0], [0.25, 0], [0], [0, 0, 2, 0]]


def spoil_no_mask(prefix: Path) -> str:
    Path(f"{prefix}_mask.idx").unlink()
    return "a_mask.idx: no such file"


def spoil_mask_of_others(prefix: Path) -> str:
    write_pair(Path(f"{prefix}_mask"), [[1] * 4, [1] * 2, [1], [1] * 3], np.uint8)
    return "a_mask.idx: not of the same conversations as "


def spoil_mask_dtype(prefix: Path) -> str:
    write_pair(Path(f"{prefix}_mask"), [mask for _, mask in DATA], np.uint16)
    return "a_mask.idx: uint16 found, expected uint8"


def spoil_mask_values(prefix: Path) -> str:
    write_pair(Path(f"{prefix}_mask"), [[2] * len(mask) for _, mask in DATA], np.uint8)
    return "a_mask.bin: 2 in conversation "


def spoil_shorter_data(prefix: Path) -> str:
    write_set(prefix, DATA[:2])
    return "a: 2 conversations, the plan names more"


@pytest.mark.parametrize(
    "spoil", [spoil_no_mask, spoil_mask_of_others, spoil_mask_dtype, spoil_mask_values, spoil_shorter_data]
)
def test_data_that_do_not_belong_together_are_refused(spoil: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "a", DATA)
    plan = packing.pack(tmp_path / "a", 8)
    message = spoil(tmp_path / "a")
    with pytest.raises(UserError) as raised:
        rows = packed_rows.PackedRows(tmp_path / "a", plan)
        [rows[i] for i in range(len(rows))]
    assert message in str(raised.value)
