"""Which texts hold characters that two engines may see with different eyes, because their Unicode tables differ in age.

Once a character is assigned, its class and its normal forms stay (the stability policy of the Unicode standard); so
engines agree on the characters that the older of their tables has. All others go to the reference without a question.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_END = 0x110000
_PRIVATE = 0xF0000  # planes 15 and 16 are for private use, now and ever
_ASCII = bytes(range(128))


@cache
def risky(normalized: bool) -> np.ndarray:
    """Whether each code point, bool [0x110000], is outside the safe set: not assigned in this Python's Unicode or,
    where texts are ``normalized``, one that normal forms move or change and that Unicode 3.2 did not have."""
    last = 0x33480  # behind it lie planes without characters, tags and private use
    names = "".join(map(unicodedata.category, map(chr, range(last))))
    table = np.ones(_END, bool)
    table[:last] = np.frombuffer(names.encode(), "S2") == b"Cn"
    table[_PRIVATE:] = False
    if normalized:
        old = unicodedata.ucd_3_2_0
        for code in range(0x300, last):
            character = chr(code)
            if not table[code] and (unicodedata.combining(character) or unicodedata.decomposition(character)):
                table[code] = old.category(character) == "Cn"
    return table


def outside(texts: Sequence[str], table: np.ndarray) -> list[int]:
    """The numbers of the texts that hold a character that ``table``, bool [0x110000], marks."""
    return [number for number, text in enumerate(texts) if not text.isascii() and _any(text, table)]


def _any(text: str, table: np.ndarray) -> bool:
    others = text.encode().translate(None, _ASCII).decode()  # looking up characters costs more than leaving most out
    return bool(table.take(np.frombuffer(others.encode("utf-32-le"), np.uint32)).any())
