"""mp-merge-data: a run is counted once whatever it wrote, and shards that are not one run are told."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_pairs import byte_tokenizer

from megapatch.models.indexed_data import read_manifest
from megapatch.tools.preprocess.inspect_data import main as inspect
from megapatch.tools.preprocess.merge_data import main as merge
from megapatch.tools.preprocess.pairs.merge_runs import counted_once, shard_warnings
from megapatch.tools.preprocess.preprocess import main as preprocess


@pytest.fixture(scope="module", name="made")
def made_corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k_text and k_title of one run, s_train to s_test of another, p0 to p2 as shards."""
    folder = tmp_path_factory.mktemp("runs")
    tok = byte_tokenizer(folder / "tok")
    lines = [json.dumps({"text": f"text {n} " * (n % 5 + 1), "title": f"t{n}"}) for n in range(60)]
    (folder / "in.jsonl").write_text("\n".join([*lines, ""]))
    words = ["--input", str(folder / "in.jsonl"), "--tokenizer", str(tok), "--workers", "1", "--output-prefix"]
    assert preprocess([*words, str(folder / "k"), "--text-key", "text", "title"]) == 0
    assert preprocess([*words, str(folder / "s"), "--split", "60,20,20"]) == 0
    for shard in range(3):
        assert preprocess([*words, str(folder / f"p{shard}"), "--shards", "3", "--shard", str(shard)]) == 0
    return folder


def joined(made: Path, output: Path, *names: str) -> dict[str, Any]:
    assert merge(["--input", *(str(made / name) for name in names), "--output-prefix", str(output)]) == 0
    found = read_manifest(output)
    assert found is not None
    return found


def told(made: Path, name: str) -> dict[str, Any]:
    found = read_manifest(made / name)
    assert found is not None
    return found


SHARES, KEYS = ("s_train", "s_valid", "s_test"), ("k_text", "k_title")


@pytest.mark.parametrize("names", [SHARES, SHARES[:2], KEYS])
def test_outputs_of_one_run_are_counted_once(made: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    said, one = joined(made, tmp_path / "all", *names), told(made, names[0])
    counts = said["counts"]
    for name in ("counts", "sources", "inputs"):
        assert said[name] == one[name]
    assert said["engine"] == [one["engine"]] and said["runs"] == [one["run"]]
    assert counts["lines"] == counts["documents"] == 60
    for name in ("documents", "tokens"):
        assert said[name] == sum(told(made, each)[name] for each in names)


def test_runs_stay_counted_once_when_merged_data_are_merged(made: Path, tmp_path: Path, capsys: Any) -> None:
    joined(made, tmp_path / "two", *SHARES[:2])
    said = joined(made, tmp_path / "all", str(tmp_path / "two"), "s_test", "p0")
    assert said["counts"]["lines"] == 60 + told(made, "p0")["counts"]["lines"]
    assert said["runs"] == [told(made, "s_train")["run"], told(made, "p0")["run"]]
    joined(made, tmp_path / "three", "s_train", "p0")
    joined(made, tmp_path / "four", "s_valid", "p1")
    capsys.readouterr()
    mixed = joined(made, tmp_path / "five", str(tmp_path / "three"), str(tmp_path / "four"))
    assert "counts are left out" in capsys.readouterr().err
    assert not {"counts", "sources", "inputs", "engine"} & mixed.keys() and len(mixed["runs"]) == 3


@pytest.mark.parametrize("name", [*SHARES, *KEYS])
def test_counts_of_a_run_of_several_pairs_are_labelled(made: Path, capsys: Any, name: str) -> None:
    assert inspect([str(made / name)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    pairs = len(SHARES if name in SHARES else KEYS)
    assert f"counts of the whole run, which wrote {pairs} pairs: lines 60, documents 60, " in shown
    assert told(made, name)["outputs"] == [str(made / one) for one in (SHARES if name in SHARES else KEYS)]


def test_counts_of_merged_runs_are_labelled_only_where_they_are_not_the_pairs(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    for names, label in ((SHARES, ""), (SHARES[:2], "of the whole runs"), (KEYS, "of the whole runs")):
        joined(made, tmp_path / names[-1], *names)
        assert inspect([str(tmp_path / names[-1])]) == 0
        assert f"counts {label or 'lines 60'}" in " ".join(capsys.readouterr().out.split())
    assert inspect([str(made / "p0")]) == 0 and "whole run" not in capsys.readouterr().out


ORDERS = {
    "p0 p1 p2": "",
    "p0 p2": "shard 1 of 3 is missing",
    "p2": "shards 0 1 of 3 are missing",
    "p2 p1 p0": "shards come as 2 1 0, not in order",
}


@pytest.mark.parametrize("names", ORDERS)
def test_shards_that_are_not_one_run_are_told(made: Path, tmp_path: Path, capsys: Any, names: str) -> None:
    joined(made, tmp_path / "all", *names.split())
    err = capsys.readouterr().err
    assert ORDERS[names] in err and ("not what one run makes" in err) == bool(ORDERS[names])


def test_merged_shards_are_known_when_they_are_merged_again(made: Path, tmp_path: Path, capsys: Any) -> None:
    joined(made, tmp_path / "two", "p0", "p1")
    capsys.readouterr()
    joined(made, tmp_path / "all", str(tmp_path / "two"), "p2")
    assert "not what one run makes" not in capsys.readouterr().err
    joined(made, tmp_path / "again", "p2", str(tmp_path / "two"))
    assert "shards come as 2 0 1, not in order" in capsys.readouterr().err


def shard(number: int, count: int = 3) -> dict[str, Any]:
    return {"options": {"shards": count, "shard": number}}


def test_whole_sets_one_after_another_are_in_order_and_doubled_shards_are_not() -> None:
    assert not list(shard_warnings([shard(n) for n in (0, 1, 2, 0, 1, 2)]))
    assert not list(shard_warnings([shard(0, 1), {}, *map(shard, range(3)), {}, shard(0, 2), shard(1, 2)]))
    (said,) = shard_warnings([shard(n) for n in (0, 0, 1, 2)])
    assert said.startswith("shard 0 of 3 is there more often than others")
    assert len(list(shard_warnings([shard(n) for n in (0, 1, 10, 2)]))) == 1


def test_what_names_no_run_is_counted_each_time() -> None:
    assert counted_once([{}, {}, {"run": "a"}, {"run": "a"}]) == [0, 1, 2]
    assert counted_once([{"run": "a"}, {"runs": ["a", "b"]}]) == [1]
    assert counted_once([{"runs": ["a", "c"]}, {"runs": ["a", "b"]}]) is None


def test_a_prefix_given_twice_is_wrong_usage(made: Path, tmp_path: Path, capsys: Any) -> None:
    again = str(made / ".." / made.name / "p0")
    with pytest.raises(SystemExit) as caught:
        merge(["--input", str(made / "p0"), again, "--output-prefix", str(tmp_path / "all")])
    assert caught.value.code == 2 and f"--input {again}: given twice; give it once" in capsys.readouterr().err
