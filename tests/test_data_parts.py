"""One pair of a set (a mask, chosen answers) is told, shown and refused as what it is; errors name what makes data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_data
import pytest

from megapatch.models.cli import UserError
from megapatch.models.data_formats import described
from megapatch.models.indexed_data import bin_path, idx_path, manifest_path
from megapatch.tools.preprocess.export_data import main as export
from megapatch.tools.preprocess.import_data import main as import_data
from megapatch.tools.preprocess.inspect_data import main as inspect
from megapatch.tools.preprocess.merge_data import main as merge
from megapatch.tools.preprocess.pack_data import main as pack
from megapatch.tools.preprocess.preprocess_chat import main as preprocess_chat

ASK, SAY = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
RECORDS = {
    "chats": {"messages": [ASK, {**SAY, "weight": 0.5}]},
    "pairs": {"prompt": [ASK], "chosen": "so", "rejected": "no"},
    "asked": {"prompt": [ASK], "answer": "4 é"},
}
FORMATS = {"chats": "chat", "pairs": "preference", "asked": "prompts"}


@pytest.fixture(scope="module", name="made")
def made_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of each format."""
    folder = tmp_path_factory.mktemp("sets")
    tok = chat_data.make_tokenizer(folder / "tok", chat_data.CHATML, normalizer=None)
    for name, record in RECORDS.items():
        chat_data.write(folder / f"{name}.jsonl", [record])
        words = ["--input", str(folder / f"{name}.jsonl"), "--tokenizer", str(tok), "--workers", "1"]
        more = ["--message-weights"] if name == "chats" else ["--chat-format", FORMATS[name]]
        assert preprocess_chat([*words, *more, "--output-prefix", str(folder / name)]) == 0
    return folder


@pytest.fixture(name="sets")
def copy_of_sets(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "sets")
    monkeypatch.chdir(tmp_path / "sets")
    return tmp_path / "sets"


def printed(capsys: Any, *argv: str) -> list[str]:
    assert inspect(list(argv)) == 0
    return capsys.readouterr().out.splitlines()


PARTS = {
    "chats_mask": "for each token of chats 1 where it is trained, else 0",
    "chats_weight": "for each token of chats how much it counts",
    "pairs_chosen": None,
    "pairs_rejected": None,
    "pairs_chosen_mask": "for each token of pairs_chosen 1 where it is trained, else 0",
    "asked_answer": "the UTF-8 bytes of the answers to asked",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_told_with_its_set_and_the_sets_manifest(sets: Path, capsys: Any, part: str) -> None:
    whole, holds = part.split("_")[0], PARTS[part]
    lines = printed(capsys, part, "--verify")
    assert lines[0].startswith(f"pair      {part}.bin and .idx, format {FORMATS[whole]}, ")
    assert lines[1] == f"part      of {whole}" + (f": {holds}" if holds else "")
    assert f"manifest  {whole}.manifest.json, by mp-preprocess-chat" in lines
    assert not [line for line in lines if line.startswith(("note", "PROBLEM"))]
    names = [line.split()[0] for line in lines if line.strip()]
    assert ("values" in names, "ids" in names) == (bool(holds), not holds)
    assert inspect([part, "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["part_of"], said.get("holds"), said["format"]) == (whole, holds, FORMATS[whole])
    assert ("trained" in said) == (part in ("pairs_chosen", "pairs_rejected") or part.endswith("_mask"))


def test_a_damaged_part_is_found_by_the_digests_of_its_set(sets: Path, capsys: Any) -> None:
    bin_path("pairs_chosen_mask").write_bytes(bytes(bin_path("pairs_chosen_mask").stat().st_size))
    for prefix in ("pairs_chosen", "pairs_chosen_mask", "pairs"):
        assert inspect([prefix, "--verify"]) == 1
        assert "xxh3-128" in capsys.readouterr().out


def test_sets_are_told_with_their_manifest(sets: Path, capsys: Any) -> None:
    for prefix in RECORDS:
        assert f"manifest  {prefix}.manifest.json, by mp-preprocess-chat" in printed(capsys, prefix)


def test_one_side_of_a_preference_is_shown_by_the_tokenizer_of_the_set(sets: Path, capsys: Any) -> None:
    shown = "\n".join(printed(capsys, "pairs_chosen", "--mask"))
    assert shown.startswith("pairs_chosen document 0: ") and "«so" in shown
    assert printed(capsys, "pairs_chosen", "--diff", "pairs_chosen")[1:] == [
        "pairs_chosen_mask and pairs_chosen_mask hold the same 1 documents, "
        f"{bin_path('pairs_chosen_mask').stat().st_size} tokens"
    ]


@pytest.mark.parametrize("part", [part for part, holds in PARTS.items() if holds])
def test_what_holds_no_text_is_not_decoded(sets: Path, capsys: Any, part: str) -> None:
    assert inspect([part, "--document", "0"]) == 1
    err = capsys.readouterr().err
    assert f"error: {part}: holds no text, but {PARTS[part]}; give {part.split('_')[0]}\n" in err


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_is_neither_merged_nor_blended(sets: Path, capsys: Any, part: str) -> None:
    whole = part.split("_")[0]
    found = f"error: {whole}.manifest.json: format {FORMATS[whole]}, of which {part} is a part; "
    assert inspect([part, "--blend"]) == 1
    assert f"{found}mp-pretrain blends corpora\n" in capsys.readouterr().err
    assert merge(["--input", part, "--output-prefix", "all"]) == 1
    assert f"{found}give {whole}, which has all of it\n" in capsys.readouterr().err


def test_a_manifest_of_its_own_goes_before_that_of_a_set(sets: Path) -> None:
    said = {"format": "corpus", "bin_bytes": bin_path("pairs_chosen").stat().st_size}
    manifest_path("pairs_chosen").write_text(json.dumps(said))
    assert (described("pairs_chosen").form, described("pairs_chosen").end) == ("corpus", "")


def test_a_manifest_that_is_not_of_the_set_is_an_error(sets: Path) -> None:
    bin_path("chats").unlink()
    with pytest.raises(
        UserError, match=r"does not describe chats\.bin: no such file, .* make both with mp-preprocess-chat"
    ):
        described("chats_mask")


@pytest.mark.parametrize("more", [[], ["--document", "0"], ["--mask"]])
def test_a_prefix_that_is_not_there_is_named_first(sets: Path, capsys: Any, more: list[str]) -> None:
    assert inspect(["nowhere", *more]) == 1
    assert "error: nowhere.idx: no such file; expected the index of nowhere.bin" in capsys.readouterr().err


def test_a_missing_manifest_is_not_said_to_name_no_tokenizer(sets: Path, capsys: Any) -> None:
    manifest_path("chats").unlink()
    assert inspect(["chats", "--document", "0"]) == 1
    err = capsys.readouterr().err
    assert "chats.manifest.json: no such file, so no tokenizer is named; say which with --tokenizer" in err


JSONL = ["--format", "jsonl", "--output", "-"]
TOOLS: dict[str, Callable[[str], int]] = {
    "mp-inspect-data": lambda prefix: inspect([prefix]),
    "mp-inspect-data --mask": lambda prefix: inspect([prefix, "--mask"]),
    "mp-inspect-data --diff": lambda prefix: inspect([prefix, "--diff", prefix]),
    "mp-export-data": lambda prefix: export([prefix, *JSONL]),
    "mp-pack-data": lambda prefix: pack([prefix, "--seq-length", "64"]),
    "mp-merge-data": lambda prefix: merge(["--input", prefix, "--output-prefix", "all"]),
    "mp-import-data": lambda prefix: import_data(
        ["--format", "pai", "--input", prefix, "--tokenizer", "tok", "--output-prefix", "all"]
    ),
}
LOST = [  # a file that is lost, and who must say of it what makes it
    ("chats_mask.idx", ["mp-inspect-data", "mp-inspect-data --mask", "mp-inspect-data --diff", "mp-export-data"]),
    ("chats_mask.bin", ["mp-inspect-data", "mp-inspect-data --mask", "mp-inspect-data --diff", "mp-export-data"]),
    ("chats.idx", ["mp-inspect-data", "mp-inspect-data --mask", "mp-export-data", "mp-pack-data", "mp-merge-data"]),
]


@pytest.mark.parametrize("lost, tool", [(lost, tool) for lost, tools in LOST for tool in tools])
def test_lost_files_of_chats_are_made_with_the_command_for_chats(sets: Path, capsys: Any, lost: str, tool: str) -> None:
    Path(lost).unlink()
    assert TOOLS[tool]("chats") == 1
    err = capsys.readouterr().err
    assert f"{lost}: no such file" in err and "with mp-preprocess-chat\n" in err


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_prefix_given_with_a_suffix_is_told(sets: Path, capsys: Any, tool: str, suffix: str) -> None:
    assert TOOLS[tool](f"chats{suffix}") == 1
    assert f"error: chats{suffix}: is a file; give its prefix, chats, without {suffix}\n" in capsys.readouterr().err


def test_a_prefix_that_ends_like_a_suffix_is_one(sets: Path) -> None:
    for path in (bin_path, idx_path):
        shutil.copy(path("chats"), path("x.bin"))
    assert inspect(["x.bin"]) == 0
