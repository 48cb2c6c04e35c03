"""What texts to ids cost: both engines alone, and what Encoder does around the fast one, on JSON lines of real text.

    python tests/bench/encode.py TOKENIZER FILE.jsonl

Prints MB of UTF-8 a CPU second, the median of five rounds in turns. Shares are of the fast engine's time: of the texts
that the reference encodes, too, and of scans, dtype, bos and eod.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.encoding.encoder import EncodeOptions, Encoder
from megapatch.tools.preprocess.encoding.engine import Reference

CHUNK_CHARACTERS = 4 << 20
ROUNDS = 5
REFERENCE_CHUNKS = 2  # it is slow, and its speed does not depend on what came before


def chunks(path: Path) -> Iterator[list[str]]:
    """The texts of a file, about 4 MB at a time."""
    group: list[str] = []
    for line in path.open(encoding="utf-8"):
        group.append(json.loads(line)["text"])
        if sum(map(len, group)) >= CHUNK_CHARACTERS:
            yield group
            group = []
    if group:
        yield group


def cpu(work: Callable[[list[str]], object], groups: list[list[str]]) -> float:
    """CPU seconds of ``work`` on all groups."""
    start = time.process_time()
    for group in groups:
        work(group)
    return time.process_time() - start


def made(tokenizer: Tokenizer) -> Encoder:
    """A new one: engines remember words."""
    return Encoder(tokenizer, EncodeOptions(bos="no", engine="gigatoken"))


class Recorder(Reference):
    """The reference, which keeps what it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.taken: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        self.taken.append(list(texts))
        return super().encode(texts)


def rounds(tokenizer: Tokenizer, groups: list[list[str]]) -> Iterator[dict[str, float]]:
    """CPU seconds of each part, round by round."""
    for _ in range(ROUNDS):
        encoder, fast = made(tokenizer), made(tokenizer).fast
        assert fast is not None
        gigatoken = cpu(fast.encode, groups)
        reference, compared = Reference(tokenizer), Recorder(tokenizer)
        encoder.reference = compared
        whole = cpu(partial(_both, encoder), groups)
        yield {
            "tokenizers": cpu(reference.encode, groups[:REFERENCE_CHUNKS]),
            "gigatoken": gigatoken,
            "whole": whole,
            "compared": cpu(reference.encode, compared.taken),
        }


def _both(encoder: Encoder, texts: list[str]) -> None:
    encoder.framed(encoder(texts))


def measure(tokenizer: Tokenizer, path: Path) -> dict[str, float]:
    """The figures, by name."""
    groups = list(chunks(path))
    size = [sum(len(text.encode()) for text in group) / 1e6 for group in groups]
    found = list(rounds(tokenizer, groups))
    median = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {
        "text_mb": sum(size),
        "tokenizers_mb_per_cpu_s": sum(size[:REFERENCE_CHUNKS]) / median["tokenizers"],
        "gigatoken_mb_per_cpu_s": sum(size) / median["gigatoken"],
        "encoder_mb_per_cpu_s": sum(size) / median["whole"],
        "share_of_reference": median["compared"] / median["gigatoken"],
        "share_of_all_else": (median["whole"] - median["compared"]) / median["gigatoken"] - 1,
    }


if __name__ == "__main__":
    for name, value in measure(Tokenizer(sys.argv[1]), Path(sys.argv[2])).items():
        print(f"{name:24} {value:8.3f}")
