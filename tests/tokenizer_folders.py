"""Tokenizer folders of every kind that published models have, small, for tests."""

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

TEXT = "Hello world, the quick brown fox jumps; é€😀漢字 the 12 times 345\n" * 80 + Path(__file__).read_text()
HARD = [  # what tokenizers get wrong
    "",
    "Hello  world\n\n\tdef f(x):\n    return 'é€😀'",
    "trail  ",
    "a\u00a0b\u3000漢字かな한글 العربية",
    "\u0301a combining, \u200d joined 👩\u200d👩\u200d👧 🦖",
    "\r\n \x00\x01\x7f\x85 controls \ufeff\ufffd",
    "1234567890 1,000.5 ½ ٣",
    "it's I'LL we've",
    "x" * 50 + "=" * 40 + " " * 30 + "y",
]
SPELLED = ["a<s>b</s> c", "<|endoftext|>x<|im_start|>user\nhi<|im_end|>\n", "<unk><pad>"]  # special tokens in the text
ONE_BLANK_FIRST = [" lead", "  two", " ", "▁mark"]


def bytelevel(folder: Path) -> Path:
    """A byte-level BPE as tokenizer.json: Qwen2 and later, DeepSeek, Bloom, Falcon, Galactica, GLM-4."""
    (folder.parent / "text.txt").write_text(TEXT)
    argv = ["--input", str(folder.parent / "text.txt"), "--vocab-size", "600", "--chat-template", "chatml"]
    assert train_tokenizer([*argv, "--output", str(folder)]) == 0
    return folder


def vocab_and_merges(kind: str, folder: Path) -> Path:
    """vocab.json and merges.txt alone: GPT-2, StarCoder, OPT; Qwen2 has other words and NFC."""
    made = json.loads((bytelevel(folder.parent / "made") / "tokenizer.json").read_text())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(made["vocab"]))
    merges = [one if isinstance(one, str) else " ".join(one) for one in made["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    write(folder, "tokenizer_config.json", tokenizer_class=kind, eos_token="<|endoftext|>")
    return folder


def sentencepiece(folder: Path, kind: str = "bpe", **settings: Any) -> Path:
    """tokenizer.model alone, trained by the library as Llama's was: Llama 1 and 2, Yi, Mistral, Baichuan, ChatGLM."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    (folder.parent / "text.txt").write_text(TEXT)
    llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    llama |= {"split_digits": True, "allow_whitespace_only_pieces": True, "vocab_size": 500}
    SentencePieceTrainer.train(
        input=str(folder.parent / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        num_threads=1,
        minloglevel=2,
        **llama | settings,
    )
    (folder / "tokenizer.vocab").unlink()
    write(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
    return folder


def tiktoken(folder: Path, canary: Path) -> Path:
    """A .tiktoken file and the Python code that reads it, as Qwen 1 has; the code leaves ``canary`` when it runs."""
    folder.mkdir()
    ranks = [bytes([n]) for n in range(256)]
    (folder / "own.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % n for n, t in enumerate(ranks)))
    (folder / "tokenization_own.py").write_text(CODE.replace("CANARY", repr(str(canary))))
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    write(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    return folder


def write(folder: Path, name: str, **content: Any) -> None:
    """A JSON file."""
    (folder / name).write_text(json.dumps(content))


CODE = """
import base64
from pathlib import Path

from transformers import PreTrainedTokenizer


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "own.tiktoken"}

    def __init__(self, vocab_file, **settings):
        Path(CANARY).touch()
        lines = Path(vocab_file).read_bytes().splitlines()
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        super().__init__(eos_token="<|end|>", **settings)

    @property
    def vocab_size(self):
        return len(self.ranks)

    def get_vocab(self):  # without special tokens, as Qwen's
        return {chr(token[0]): rank for token, rank in self.ranks.items()}

    def _pad(self, encoded_inputs):  # without settings that came later, as ChatGLM's
        return encoded_inputs

    def _tokenize(self, text):
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.ranks[bytes([ord(token)])]

    def _convert_id_to_token(self, rank):
        return chr(rank)

    def convert_tokens_to_string(self, tokens):
        return bytes(map(ord, tokens)).decode(errors="replace")

    def build_inputs_with_special_tokens(self, ids, pair=None):
        return [7, 8, *ids]
"""

KINDS = {
    "tokenizer.json": bytelevel,
    "vocab.json and merges.txt, GPT-2": partial(vocab_and_merges, "GPT2Tokenizer"),
    "vocab.json and merges.txt, Qwen2": partial(vocab_and_merges, "Qwen2Tokenizer"),
    "tokenizer.model": sentencepiece,
}
