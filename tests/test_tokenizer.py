"""Tokenizer: the same ids as transformers, exact text back, and clear words about folders that lack something."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapatch.models.cli import UserError
from megapatch.models.commit import digest
from megapatch.models.tokenizer import Tokenizer, copy_tokenizer, find_tokenizer
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

TEXTS = [
    "",
    "Hello  world\n\n\tdef f(x):\n    return 'é€😀'",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> 1234 it's",
    "\u0301a\u00a0b\u3000漢字 \r\n \x00\x7f",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained ChatML tokenizer of 600 tokens."""
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "text.txt").write_text("Hello world, the quick brown fox; é€😀漢字\n" * 50 + Path(__file__).read_text())
    argv = ["--input", str(root / "text.txt"), "--vocab-size", "600", "--chat-template", "chatml"]
    assert train_tokenizer([*argv, "--output", str(root / "tok")]) == 0
    return root / "tok"


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    shutil.copytree(folder, tmp_path / "tok")
    return tmp_path / "tok"


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: kept for key, kept in value.items() if kept is not None}))


def test_ids_and_text_equal_those_of_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (tokenizer.eod_id, tokenizer.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert tokenizer.vocab_size == len(theirs)


def test_one_batch_and_flat_encoding_agree(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, "long " * 200_000, "x"]
    one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == one
    flat, lengths = tokenizer.encode_flat(texts)
    assert flat.tolist() == [token for ids in one for token in ids]
    assert lengths.tolist() == [len(ids) for ids in one]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 599), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_streamed_pieces_add_up_to_the_decoded_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_stream_holds_a_character_back_until_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦖b")
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "🦖", "b"]
    assert len(pieces) > 3
    assert stream.push(ids[1]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_vocab_size_counts_holes_between_ids(copied: Path) -> None:
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = 70_000
    path.write_text(json.dumps(content))
    made = Tokenizer(copied)
    assert (made.vocab_size, len(made.vocabulary), made.token_id("zzz")) == (70_001, 601, 70_000)


def test_lengths_and_padding_in_tokenizer_json_are_not_applied(copied: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    pad["pad_to_multiple_of"] = None
    edit(copied / "tokenizer.json", truncation=cut, padding=pad)
    assert Tokenizer(copied).encode_batch(["a", "a b c d e f"])[0] == Tokenizer(copied).encode("a")
    assert Tokenizer(copied).decode(Tokenizer(copied).encode("a b c d e f")) == "a b c d e f"
    assert len(Tokenizer(copied).encode("a")) == 1


EOD = [
    ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
    ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, "<|im_end|>"),
    ({"tokenizer_config.json": {"eos_token": None}}, "<|endoftext|>"),
    (
        {
            "tokenizer_config.json": {"eos_token": None},
            "special_tokens_map.json": {"eos_token": None},
            "generation_config.json": {"eos_token_id": [2, 1]},
        },
        "<|im_end|>",
    ),
]


@pytest.mark.parametrize("changes, token", EOD)
def test_eod_is_looked_for_in_this_order(copied: Path, changes: dict[str, dict[str, object]], token: str) -> None:
    for name, change in changes.items():
        edit(copied / name, **change)
    assert Tokenizer(copied).eod_id == Tokenizer(copied).token_id(token)


def test_stop_ids_are_those_of_the_generation_config_else_eod(copied: Path) -> None:
    assert Tokenizer(copied).stop_ids == (0, 2)
    edit(copied / "generation_config.json", eos_token_id=None)
    assert Tokenizer(copied).stop_ids == (0,)


def test_bos_is_none_or_the_configured_token(copied: Path) -> None:
    assert Tokenizer(copied).bos_id is None
    edit(copied / "tokenizer_config.json", bos_token="<|im_start|>")
    assert Tokenizer(copied).bos_id == 1


def test_digest_is_that_of_tokenizer_json(folder: Path) -> None:
    assert Tokenizer(folder).digest == digest(folder / "tokenizer.json")


def test_core_checkpoints_and_their_roots_lead_to_the_hf_folder(folder: Path, tmp_path: Path) -> None:
    for step, tracked in (("iter_0000120", "120\n"), ("release", "release")):
        root = tmp_path / step
        copy_tokenizer(folder, root / step / "hf")
        (root / "latest_checkpointed_iteration.txt").write_text(tracked)
        assert find_tokenizer(root) == find_tokenizer(root / step) == root / step / "hf"
        assert Tokenizer(root).encode("hello") == Tokenizer(folder).encode("hello")


def test_copy_takes_every_tokenizer_file_and_no_weights(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    extra = ["merges.txt", "qwen.tiktoken", "additional_chat_templates/tool.jinja"]
    for name in [*extra, "model.safetensors", "config.json"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    names = copy_tokenizer(source, tmp_path / "target")
    assert names == sorted(
        [
            *extra,
            "chat_template.jinja",
            "generation_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    for name in names:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "target" / "model.safetensors").exists()


def no_eos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "special_tokens_map.json", eos_token=None)
    (folder / "generation_config.json").unlink()


def dropout(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(content))


def bad_tracker(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("soon")


DAMAGE = [
    (shutil.rmtree, "no such folder"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "no tokenizer; looked for tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not JSON"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "JSON list found, expected an object"),
    (no_eos, "no end-of-document token; expected eos_token in tokenizer_config.json"),
    (
        lambda folder: edit(folder / "tokenizer_config.json", eos_token="</s>"),
        "eos_token '</s>' is not in the vocabulary",
    ),
    (dropout, "model.dropout 0.1"),
    (bad_tracker, "'soon' found, expected an iteration number or 'release'"),
]


@pytest.mark.parametrize("damage, message", DAMAGE, ids=[message[:30] for _, message in DAMAGE])
def test_a_damaged_folder_is_named(copied: Path, damage: object, message: str) -> None:
    damage(copied)  # type: ignore[operator]
    with pytest.raises(UserError) as error:
        _ = Tokenizer(copied).eod_id
    assert message in str(error.value) and str(copied) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_vocab_and_merges_goes_through_transformers(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    made = Tokenizer(tmp_path)
    assert made.encode("Hello world é😀") == theirs.encode("Hello world é😀", add_special_tokens=False)
    assert made.decode(made.encode("Hello world é😀")) == "Hello world é😀"
    assert made.eod_id == 0 and made.digest == digest(tmp_path / "vocab.json")


def test_a_tokenizer_in_python_only_works_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"}')
    made = Tokenizer(tmp_path)
    assert made.encode("aé") == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3]
    assert made.decode(made.encode("aé😀")) == "aé😀"
    stream = made.stream()
    assert "".join([stream.push(token) for token in made.encode("aé😀")]) + stream.finish() == "aé😀"
    assert made.eod_id == 1


def test_code_of_a_folder_runs_only_when_asked(tmp_path: Path) -> None:
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        "from transformers import ByT5Tokenizer\nclass Own(ByT5Tokenizer):\n    pass\n"
    )
    with pytest.raises(UserError, match="give --trust-remote-code"):
        Tokenizer(tmp_path)
    assert Tokenizer(tmp_path, trust_remote_code=True).encode("a") == [ord("a") + 3]


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    code = (
        "import sys; from megapatch.models.tokenizer import Tokenizer; t = Tokenizer(sys.argv[1]);"
        "t.encode('a'); t.eod_id; t.vocab_size; print({'torch', 'transformers', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
