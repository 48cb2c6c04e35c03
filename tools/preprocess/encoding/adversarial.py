"""Texts on which tokenizer engines are known to part: generated, the same every time, some of them from the
tokenizer's own added tokens."""

import random
import unicodedata
from collections.abc import Iterator

from megapatch.models.tokenizer import Tokenizer

_SPACES = (
    "\x20 \x09 \x0a \x0d \x0b \x0c \x1c \x1f \x85 \xa0 \u1680 \u2000 \u2009 \u2028 \u2029 \u202f \u205f \u3000".split(
        " "
    )
)
_BLANKS = [" ", *[one for one in _SPACES if one], "\r\n", "\u200b", "\u2060", "\ufeff", "\u180e"]
_CONTRACTIONS = (
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'Re",
    "'vE",
    "'LL",
    "'\u017f",
    "\u2019s",
    "''s",
    "'sx",
)
_MARKS = "\u0301\u0327\u0323\u0345\u093c\u05b0\u064b\u3099\u1161\u11a8"
_BASES = "eA\u00c5\u212b\ufb01\u1e9b\u00bd\u2460\uff21\u30ab\uff76\uac00\u1100\u0958\u2126\u0130\u00df\u01c5"
_JOINED = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea",
    "\u2764\ufe0f",
    "1\ufe0f\u20e3",
)
_SCRIPTS = (  # first letters of blocks, letters and digits of many scripts, and the ends of planes
    0x370, 0x400, 0x531, 0x5D0, 0x627, 0x660, 0x905, 0x966, 0xE01, 0xF20, 0x10A0, 0x1200, 0x13A0, 0x1780, 0x1C80,
    0x1E00, 0x2070, 0x2100, 0x2150, 0x2460, 0x3041, 0x30A1, 0x3105, 0x3400, 0x4E00, 0xA000, 0xA722, 0xAB70, 0xABF0,
    0xAC00, 0xD7FB, 0xE000, 0xF900, 0xFB1D, 0xFE20, 0xFF10, 0xFFFD, 0x10000, 0x10400, 0x104A0, 0x1D400, 0x1D7CE,
    0x1F600, 0x20000, 0x2A700, 0x2F800, 0x30000, 0xE0061, 0xFFFFD, 0x10FFFD,
)  # fmt: skip
_RUNS = (
    "a",
    "A",
    " ",
    "\n",
    "=",
    "-",
    "0",
    "1",
    "\u00e9",
    "\u4e2d",
    "\U0001f600",
    "'",
    "\t",
    "\xa0",
    "ab",
    "\r\n",
    "_",
    ".",
)
_LENGTHS = (2, 3, 4, 7, 16, 31, 64, 129, 1000)
_NUM_MIXED = 150


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts, each once; about 100 kB."""
    made = [*_plain(), *_unicode(), *_added(tokenizer), *_mixed()]
    return list(dict.fromkeys(made))


def _plain() -> Iterator[str]:
    """Blanks, runs, digits, contractions, control characters, and every length of UTF-8."""
    yield from ("", "a", "Hello, world", "\x00", "\ufffe\uffff", "\ud7fb\ue000", "\x7f\x80\x9f", "q\u00a0r")
    for blank in _BLANKS:
        yield from (
            blank,
            f"a{blank}b",
            f" {blank} b",
            f"a{blank * 3}",
            f"{blank}\n{blank}1",
            f"x{blank}.{blank}{blank}y",
        )
    for run in _RUNS:
        yield from (run * length for length in _LENGTHS)
        yield f"x{run * 40} y{run * 41}z"
    for word in _CONTRACTIONS:
        yield from (f"it{word} ok", word, f"IT{word}", f" {word}{word}", f"1{word}\n", f"\u00e9{word}")
    yield from (f"{'1234567890' * 3}"[:length] + "a" for length in range(1, 15))
    yield from ("1,234.5e-6", "\u0661\u0662\u0663 \u00b2\u00bd\u2167 \uff11\uff12", "v1.2.3-rc4", "0x1F 1_000")
    yield from ("".join(map(chr, range(start, start + 32))) for start in range(0, 0x180, 32))
    yield "".join(chr(0x7F << shift) + chr(0x80 << shift) for shift in range(0, 13, 4))


def _unicode() -> Iterator[str]:
    """Scripts old and new, normal forms and their orders, joined emoji, right-to-left, case that changes length."""
    for code in _SCRIPTS:
        letters = "".join(chr(code + step) for step in range(3) if code + step < 0x110000)
        yield from (letters, f"a{letters}1", f" {letters} {letters}.", f"\n{letters}'s")
    for base in _BASES:
        for mark in _MARKS:
            yield f"{base}{mark} x{mark}{base}"
    for first in _MARKS:
        yield "".join(f"e{first}{second}" for second in _MARKS)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        yield unicodedata.normalize(form, f"{_BASES} caf\u00e9 \u1e69\u0323 \ud55c\uae00 \uff76\uff9e \u0344")
    for emoji in _JOINED:
        yield from (emoji, f"a{emoji}b", f"{emoji}{emoji} {emoji}\n")
    yield from (
        "\u05e9\u05dc\u05d5\u05dd \u202bab\u202c 12",
        "\u0645\u0631\u062d\u0628\u0627\u060c 1\u066b5",
        "\u0130STANBUL \u017fs \u1e9e",
    )


def _added(tokenizer: Tokenizer) -> Iterator[str]:
    """The added tokens, alone, with neighbours of every kind, in other cases and cut short."""
    fast = tokenizer.fast
    if fast is None:
        return
    added = list(fast.backend.get_added_tokens_decoder().values())
    kinds: dict[tuple[bool, ...], list[str]] = {}
    for token in added:
        kind = (token.special, token.lstrip, token.rstrip, token.single_word, token.normalized)
        kinds.setdefault(kind, []).append(token.content)
    yield " ".join(token.content for token in added[:1000])
    for content in [content for group in kinds.values() for content in (*group[:6], *group[-2:])]:
        yield from (
            content,
            f"a{content}b",
            f"a {content} b",
            f"\n  {content}\t\n x",
            f"{content}{content}",
            f"1{content}.",
        )
        yield from (
            content[:-1],
            content[1:],
            content.upper(),
            content.lower(),
            f"<{content}>",
            f"\u00e9{content}\u4e2d",
        )


def _mixed() -> Iterator[str]:
    """Random joins of all of the above."""
    chance = random.Random(0)
    pools = (
        _BLANKS,
        _CONTRACTIONS,
        _BASES,
        _MARKS,
        _JOINED,
        "abcXYZ",
        "0123456789",
        "!?.,;:()[]{}<|>_-=+*/\\\"'`~@#$%^&",
    )
    for _ in range(_NUM_MIXED):
        pieces = (chance.choice(chance.choice(pools)) * chance.choice((1, 1, 1, 2, 3)) for _ in range(60))
        yield "".join(pieces)
