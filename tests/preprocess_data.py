"""Small inputs and runs for the tests of mp-preprocess."""

import json
from pathlib import Path

from megapatch.tools.preprocess.preprocess import main
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

DOCUMENTS = ["Hello world", "", "é€😀漢字 \n\n x", "<|endoftext|>", " ", "long " * 3000, 'q"\\/\t\u2028', "last"]
GOOD = b'{"text": "fine"}\n'


def make_tokenizer(root: Path) -> Path:
    """Train a tokenizer of 400 tokens."""
    (root / "text.txt").write_text(Path(__file__).read_text())
    argv = ["--input", str(root / "text.txt"), "--vocab-size", "400", "--output", str(root / "tok")]
    assert train_tokenizer(argv) == 0
    return root / "tok"


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    lines = [json.dumps({"id": i, key: text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(tok: Path, prefix: Path, *inputs: Path | str, more: tuple[str, ...] = ()) -> int:
    argv = ["--input", *map(str, inputs), "--tokenizer", str(tok), "--output-prefix", str(prefix), *more]
    return main(argv if "--workers" in more else [*argv, "--workers", "2"])


def outputs(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def left(folder: Path) -> list[str]:
    """What a failed run left in the output folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
