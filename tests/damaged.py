"""A corpus with damaged lines of many kinds, and what each of its lines shall become.

python tests/damaged.py corpus.jsonl      writes it, and prints the counts as JSON
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

NUM_LINES, NUM_DAMAGED = 6000, 1000


def _good(number: int) -> bytes:
    return json.dumps(
        {"id": number, "text": f"line {number} of the corpus, with é€😀", "of": f"s{number % 3}"}
    ).encode()


DAMAGES: dict[str, Callable[[int], bytes]] = {  # from the number of the line
    "cut short": lambda n: _good(n)[: 5 + n % 20],
    "two objects": lambda n: _good(n) + _good(n),
    "single quotes": lambda n: _good(n).replace(b'"', b"'"),
    "comma at the end": lambda n: _good(n)[:-1] + b",}",
    "no JSON at all": lambda n: b"line %d as it stands" % n,
    "not a number": lambda n: b'{"text": "a", "x": NaN}',
    "nested too deeply": lambda n: b"[" * 5000,
    "control character": lambda n: b'{"text": "a\x01b"}',
    "zero bytes": lambda n: b"\0" * (1 + n % 9),
    "byte-order mark": lambda n: b"\xef\xbb\xbf" + _good(n),
    "Latin-1": lambda n: b'{"text": "caf\xe9 %d"}' % n,
    "UTF-16": lambda n: '{"text": "x"}'.encode("utf-16-le"),
    "half a character": lambda n: b'{"text": "\\ud83d %d"}' % n,
    "overlong": lambda n: b'{"text": "\xc0\xaf"}',
    "no key": lambda n: b'{"id": %d, "body": "x"}' % n,
    "null": lambda n: b'{"text": null}',
    "number": lambda n: b'{"text": %d}' % n,
    "list": lambda n: b'{"text": ["a", "b"]}',
    "array": lambda n: b'["text", "a"]',
    "string": lambda n: b'"text"',
}
BLANKS = (b"", b" ", b"\t \r")
EMPTY = b'{"text": "", "of": "s1"}'


def make(path: Path) -> dict[str, int]:
    """Write the corpus; how many of its lines are documents, empty, bad and duplicate, when duplicates are left out."""
    chance = random.Random(20)
    fates = ["bad"] * NUM_DAMAGED + ["blank"] * 150 + ["empty"] * 100 + ["again"] * 250
    fates += ["good"] * (NUM_LINES - len(fates))
    chance.shuffle(fates)
    kinds = list(DAMAGES)
    lines: list[bytes] = []
    seen: list[bytes] = []
    counts: Counter[str] = Counter()
    for number, fate in enumerate(fates):
        if fate == "again" and seen:
            lines.append(b" " + chance.choice(seen))  # another line, the same text
        elif fate == "bad":
            lines.append(DAMAGES[kinds[counts["bad"] % len(kinds)]](number))
        else:
            lines.append({"blank": chance.choice(BLANKS), "empty": EMPTY}.get(fate, _good(number)))
            seen += [lines[-1]] if fate in ("good", "again") else []
        duplicate = fate == "again" and lines[-1].startswith(b" ")
        kind = {"bad": "bad", "blank": "empty", "empty": "empty"}.get(fate, "duplicate" if duplicate else "documents")
        counts[kind] += 1
    path.write_bytes(b"\n".join(lines) + b"\n")
    return {"lines": len(lines), **counts}


if __name__ == "__main__":
    print(json.dumps(make(Path(sys.argv[1]))))
