"""Every kind of tokenizer that published models have: the ids of transformers or of SentencePiece itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import HARD, KINDS, ONE_BLANK_FIRST, SPELLED, bytelevel, sentencepiece, write

from megapatch.models import tokenizer_engine
from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer, copy_tokenizer

trainer = pytest.importorskip("sentencepiece", reason="the package sentencepiece trains the models of these tests")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders by the function that makes them, each made once."""
    found: dict[Any, Path] = {}

    def get(make: Any, *arguments: Any) -> Path:
        key = (make, *arguments)
        if key not in found:
            found[key] = make(tmp_path_factory.mktemp("kind") / "folder", *arguments)
        return found[key]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_ids_text_and_special_tokens_are_those_of_transformers(kind: str, made: Callable[..., Path]) -> None:
    import transformers

    folder = made(KINDS[kind])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), Tokenizer(folder)
    for text in HARD + SPELLED + ([] if kind == "tokenizer.model" else ONE_BLANK_FIRST):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert [*ours.prefix_ids, *ids] == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eod_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


def test_what_tokenizer_model_is_read_by(made: Callable[..., Path]) -> None:
    """transformers 5 takes the blank that begins a text for the one that SentencePiece adds, and loses it."""
    import transformers

    folder = made(sentencepiece)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), Tokenizer(folder)
    library = trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ONE_BLANK_FIRST:
        assert ours.encode(text) == library.encode(text) != theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(" lead")) == " lead" != theirs.decode(theirs.encode(" lead"))


SPM = [
    ("bpe", {}),
    ("unigram", {}),
    ("bpe", {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "byte_fallback": False}),
    ("unigram", {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}),
    ("bpe", {"add_dummy_prefix": False}),
    ("bpe", {"bos_id": -1, "pad_id": 3, "eos_piece": "<end>"}),
]


@pytest.mark.parametrize(("kind", "changes"), SPM, ids=[f"{kind}-{'-'.join(said) or 'llama'}" for kind, said in SPM])
def test_ids_of_a_tokenizer_model_are_those_of_sentencepiece(kind: str, changes: dict, tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "spm", kind, **changes)
    (folder / "tokenizer_config.json").unlink()
    ours, library = Tokenizer(folder), trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in HARD + ONE_BLANK_FIRST:
        ids = library.encode(text)
        assert ours.encode(text) == ids, text
        if library.unk_id() not in ids:
            assert ours.decode(ids) == library.decode(ids)
    absent = {-1: None}
    assert ours.vocab_size == library.get_piece_size() and ours.eod_id == library.eos_id()
    assert ours.bos_id == absent.get(library.bos_id(), library.bos_id())
    assert ours.pad_id == absent.get(library.pad_id(), library.pad_id())


@given(st.text(alphabet=st.sampled_from("aehlotw 12\n▁é漢😀"), max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_text_has_the_ids_of_sentencepiece(made: Callable[..., Path], text: str) -> None:
    folder = made(sentencepiece)
    library = trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert Tokenizer(folder).encode(text) == library.encode(text)


def test_user_defined_pieces_are_tokens_wherever_they_stand(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "spm", user_defined_symbols=["<fim>", "ab", "\n\n"])
    ours, library = Tokenizer(folder), trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("x<fim>cabd", "<fim>ab", "ab <fim> ab", "a\n\nb\n\n\nab", *HARD):
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text  # they are not special
    squeezed = sentencepiece(tmp_path / "squeezed", user_defined_symbols=["ab"], remove_extra_whitespaces=True)
    with pytest.raises(UserError, match="user-defined pieces and without repeated blanks is not supported"):
        Tokenizer(squeezed)


def test_baichuan_is_read_without_its_code(tmp_path: Path) -> None:
    """The published code fails in transformers 5: it needs sp_model before it makes it."""
    folder = sentencepiece(tmp_path / "spm")
    names = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "add_bos_token": False}
    auto_map = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    write(folder, "tokenizer_config.json", tokenizer_class="BaichuanTokenizer", auto_map=auto_map, **names)
    (folder / "tokenization_baichuan.py").write_text("raise SystemExit('ran')")
    library = trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for trusted in (False, True):
        ours = Tokenizer(folder, trust_remote_code=trusted)
        assert [ours.encode(text) for text in HARD] == library.encode(HARD)
        assert (ours.eod_id, ours.bos_id, ours.prefix_ids) == (2, 1, ())
    assert "tokenization_baichuan.py" in copy_tokenizer(folder, tmp_path / "copy")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="a pointer of Git LFS, not the file itself; get it with: git lfs pull"):
        Tokenizer(tmp_path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: list[tuple[Callable[[bytes], bytes], str]] = [
    (cut, "not a SentencePiece model, or damaged"),
    (lambda content: b"\n" + content[3:], "not a SentencePiece model, or damaged"),
    (lambda content: b"\n\x02\n\x00", "no unknown piece is not supported"),
    (lambda content: content + b"\x12\x02\x18\x03", "a model type other than unigram and BPE is not supported"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[f"{n}" for n in range(len(DAMAGE))])
def test_a_damaged_tokenizer_model_is_named(
    damage: Callable[[bytes], bytes], message: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made(sentencepiece), tmp_path / "spm")
    path = tmp_path / "spm" / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        Tokenizer(path.parent)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_a_missing_package_is_named(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers would fall back to another format with a warning."""
    shutil.copytree(made(sentencepiece), tmp_path / "spm")
    write(tmp_path / "spm", "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    monkeypatch.setattr(tokenizer_engine, "_is_there", lambda package: False)
    with pytest.raises(
        UserError, match=r"needs sentencepiece and google.protobuf to read it; pip install 'megapatch\["
    ):
        Tokenizer(tmp_path / "spm")
    (tmp_path / "spm" / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match="needs tiktoken to read it"):
        Tokenizer(tmp_path / "spm")


def test_what_transformers_refuses_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"no tokenizer.json, and transformers [\d.]+ cannot load the rest \(\w+: "):
        Tokenizer(tmp_path)


PREFIXES = [  # tokenizer_config.json of the model, ids before a text
    ({"tokenizer_class": "LlamaTokenizer"}, ()),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, ()),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}, (1,)),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": {"content": "</s>"}}, (2,)),
    ({}, ()),
]


@pytest.mark.parametrize(("config", "prefix"), PREFIXES)
def test_the_ids_before_a_text(
    config: dict[str, Any], prefix: tuple[int, ...], made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made(sentencepiece), tmp_path / "spm")
    write(tmp_path / "spm", "tokenizer_config.json", **config)
    assert Tokenizer(tmp_path / "spm").prefix_ids == prefix


def test_add_bos_token_outdoes_tokenizer_json(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made(bytelevel), tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    for add, prefix in ((True, (1,)), (False, ())):
        write(tmp_path / "tok", "tokenizer_config.json", **config | {"add_bos_token": add, "bos_token": "<|im_start|>"})
        assert Tokenizer(tmp_path / "tok").prefix_ids == prefix


ADDED = [  # file beside the vocabulary, its content, text, ids
    ("added_tokens.json", {"<|new|>": 600, "<|two|>": 601}, "<|new|><|two|>", [600, 601]),
    ("tokenizer_config.json", {"added_tokens_decoder": {"600": {"content": "<x>", "special": True}}}, "<x>", [600]),
]


@pytest.mark.parametrize(("name", "content", "text", "ids"), ADDED, ids=[name for name, *_ in ADDED])
def test_tokens_added_beside_the_vocabulary_are_tokens(
    name: str, content: dict, text: str, ids: list[int], made: Callable[..., Path], tmp_path: Path
) -> None:
    import transformers

    shutil.copytree(made(bytelevel), tmp_path / "tok")
    path = tmp_path / "tok" / name
    write(tmp_path / "tok", name, **(json.loads(path.read_text()) if path.is_file() else {}) | content)
    ours = Tokenizer(tmp_path / "tok")
    assert ours.encode(text) == ids and ours.vocab_size == ids[-1] + 1
    if name == "tokenizer_config.json":  # transformers 5 reads added_tokens.json where there is no tokenizer.json only
        assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tok")).encode(text) == ids


def test_added_tokens_of_another_tokenizer_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made(bytelevel), tmp_path / "tok")
    write(tmp_path / "tok", "added_tokens.json", **{"<|new|>": 700})
    with pytest.raises(UserError, match=r"'<\|new\|>' is token 700 in its configuration, 600 in its vocabulary"):
        Tokenizer(tmp_path / "tok")


def test_the_end_of_a_document_may_be_in_config_json_only(made: Callable[..., Path], tmp_path: Path) -> None:
    """As Galactica has it."""
    shutil.copy(made(bytelevel) / "tokenizer.json", tmp_path)
    for said, first in (([2, 1], 2), (1, 1)):
        write(tmp_path, "config.json", eos_token_id=said)
        assert Tokenizer(tmp_path).eod_id == first


TEMPLATES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({}, {}),
    ({"tokenizer_config.json": {"chat_template": "A"}}, {"default": "A"}),
    (
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
            }
        },
        {"default": "A", "rag": "B"},
    ),
    ({"chat_template.json": {"chat_template": "A"}}, {"default": "A"}),
    (
        {
            "tokenizer_config.json": {"chat_template": "A"},
            "chat_template.jinja": "C",
            "additional_chat_templates/tool.jinja": "D",
        },
        {"default": "C", "tool": "D"},
    ),
]


@pytest.mark.parametrize(("files", "templates"), TEMPLATES)
def test_chat_templates_in_every_spelling(
    files: dict[str, Any], templates: dict[str, str], made: Callable[..., Path], tmp_path: Path
) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    shutil.copy(made(bytelevel) / "tokenizer.json", source)
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content if isinstance(content, str) else json.dumps(content))
    copy_tokenizer(source, copy)
    assert Tokenizer(source).chat_templates == Tokenizer(copy).chat_templates == templates
