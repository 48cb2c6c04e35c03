"""Plain JSON lines of tokens: {"input_ids": [...], "loss_mask": [0, 1, ...], "weights": [...], "text": "..."}.

One conversation a line. loss_mask and weights are as long as input_ids, and not shifted: they say of each token whether
it is trained, and how much it counts.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from megapatch.models.cli import UserError
from megapatch.models.packed_rows import Conversation, Conversations
from megapatch.tools.preprocess.pairs.foreign_checks import Counts

if TYPE_CHECKING:
    from megapatch.models.tokenizer import Tokenizer

FORMAT = "jsonl"
KEYS = {"input_ids", "tokens", "loss_mask", "weights", "text"}
_BATCH = 256  # conversations decoded at once


def write(data: Conversations, file: IO[str], *, tokenizer: "Tokenizer | None", tell: Callable) -> tuple[Counts, int]:
    """Write the conversations in order; with a tokenizer their text, where its ids are these ids. Counts those not."""
    counts, without = Counts(), 0
    for start in range(0, len(data), _BATCH):
        parts = [data[number] for number in range(start, min(start + _BATCH, len(data)))]
        texts = _texts(tokenizer, parts) if tokenizer else [None] * len(parts)
        without += texts.count(None) if tokenizer else 0
        for one, text in zip(parts, texts, strict=True):
            said: dict[str, Any] = {"input_ids": one.ids.tolist(), "loss_mask": one.mask.tolist()}
            said |= {} if one.weights is None else {"weights": one.weights.tolist()}
            said |= {} if text is None else {"text": text}
            line = json.dumps(said, ensure_ascii=False, separators=(",", ":")) + "\n"
            file.write(line)
            counts.add(one.ids, one.mask)
            tell(len(line), len(one.ids))
    counts.rows = counts.conversations
    return counts, without


def _texts(tokenizer: "Tokenizer", parts: list[Conversation]) -> list[str | None]:
    """The text of each conversation; None where the text would give other ids."""
    lists = [one.ids.tolist() for one in parts]
    texts = [tokenizer.decode(ids) for ids in lists]
    again = tokenizer.encode_batch(texts)
    return [text if same == ids else None for text, same, ids in zip(texts, again, lists, strict=True)]


def read(name: str, counts: Counts) -> Iterator[tuple[str, Conversation]]:
    """The conversations of a file ('-': stdin), line by line, each after its place."""
    with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{'stdin' if name == '-' else name}:{number}"
                yield place, _conversation(place, line)
                counts.rows += 1


def _conversation(place: str, line: bytes) -> Conversation:
    try:
        said = json.loads(line)
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(said, dict) or not said.keys() <= KEYS or ("input_ids" in said) == ("tokens" in said):
        keys = ", ".join(map(str, said)) if isinstance(said, dict) else type(said).__name__
        raise UserError(f"{place}: {keys} found; expected input_ids (or tokens), loss_mask, and at most weights, text")
    if "loss_mask" not in said:
        raise UserError(f"{place}: no key 'loss_mask'; keys found: {', '.join(map(repr, said))}")
    name = "input_ids" if "input_ids" in said else "tokens"
    ids = _numbers(place, name, said[name], "iu")
    mask = _numbers(place, "loss_mask", said["loss_mask"], "iub")
    weights = _numbers(place, "weights", said["weights"], "iuf") if "weights" in said else None
    for key, values in (("loss_mask", mask), ("weights", weights)):
        if values is not None and len(values) != len(ids):
            raise UserError(f"{place}: {len(values):,} numbers in {key}, {len(ids):,} in {name}")
    if not np.isin(mask, (0, 1)).all():
        raise UserError(f'{place}: loss_mask holds other numbers than 0 and 1; weights go into "weights"')
    if weights is not None and not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError(f"{place}: weights holds a number below 0, or one that is not finite")
    return Conversation(ids, mask.astype(np.uint8), None if weights is None else weights.astype(np.float32))


def _numbers(place: str, key: str, value: Any, kinds: str) -> np.ndarray:
    """A list of numbers of these kinds of numpy dtype, as an array."""
    if isinstance(value, list):
        try:
            found = np.array(value)
        except ValueError:  # lists of different lengths
            found = np.array([[]])
        if found.ndim == 1 and (found.dtype.kind in kinds or not found.size):
            return found if found.size else np.zeros(0, np.int64)
    raise UserError(f"{place}: {key} is no list of {'numbers' if 'f' in kinds else 'whole numbers'}")
