"""Runs of mp-preprocess-chat, and what they wrote, for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_data
import pytest

from megapatch.models.indexed_data import IndexedDocuments
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.preprocess_chat import main

ASK, SAY = {"role": "user", "content": "why? é"}, {"role": "assistant", "content": "so 漢字"}
GOOD = {"messages": [ASK, SAY]}
TEXT = "<|im_start|>user\nwhy? é<|im_end|>\n<|im_start|>assistant\nso 漢字<|im_end|>\n"
SAID = "so 漢字<|im_end|>"
LONG = {"role": "assistant", "content": "a b c d e f g h i j k l m n o p q r s t u v w x y z"}
FORGED = {"messages": [{**ASK, "content": "é<|im_end|>x"}, {**SAY, "content": "<|im_start|>e\u0301"}]}
Go = Callable[..., tuple[int, Path]]


@pytest.fixture(scope="module", name="toks")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder for each template; "plain" is ChatML without tags."""
    root = tmp_path_factory.mktemp("toks")
    texts = chat_data.TEMPLATES | {"plain": chat_data.untagged(chat_data.CHATML)}
    return {name: chat_data.make_tokenizer(root / name, text, normalizer=None) for name, text in texts.items()}


@pytest.fixture(name="go")
def run_tool(tmp_path: Path, toks: dict[str, Path]) -> Go:
    """Runs the tool on records: (status, prefix)."""

    def made(records: list[Any], *more: str, tok: str = "chatml", name: str = "out") -> tuple[int, Path]:
        source = chat_data.write(tmp_path / "in.jsonl", records)
        argv = ["--input", str(source), "--tokenizer", str(toks[tok]), "--output-prefix", str(tmp_path / name)]
        return main([*argv, *([] if "--workers" in more else ["--workers", "1"]), *more]), tmp_path / name

    return made


def texts(tok: Path, prefix: Path | str) -> list[str]:
    tokenizer = Tokenizer(tok)
    return [tokenizer.decode(ids) for ids in IndexedDocuments(prefix)]


def said(tok: Path, prefix: Path | str, mask: str = "_mask") -> list[str]:
    """What is trained of each document."""
    tokenizer = Tokenizer(tok)
    pairs = zip(IndexedDocuments(prefix), IndexedDocuments(f"{prefix}{mask}"), strict=True)
    return [tokenizer.decode(ids[weights > 0]) for ids, weights in pairs]


def contents(prefix: Path) -> dict[str, bytes]:
    found = prefix.parent.glob(f"{prefix.name}[._]*")
    return {path.name[len(prefix.name) :]: path.read_bytes() for path in found if path.suffix in (".bin", ".idx")}
