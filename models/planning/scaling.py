"""Pieces of a larger micro-batch from those of two smaller ones: bytes and work grow in a straight line.

Not from one of a single sample, whose tensors need fewer copies to be contiguous.
"""

from dataclasses import astuple, replace

from megapatch.models.planning.meter import Sent, Work
from megapatch.models.planning.saved import Saved
from megapatch.models.planning.trace import Traced

GROWING = ("kept", "forward", "backward", "left")


def scaled(one: Traced, two: Traced, steps: float) -> Traced | None:
    """What lies so many times their difference beyond ``one``; None where the traces differ in their operators."""
    pieces = {}
    for name, first in one.pieces.items():
        second = two.pieces[name]
        works = [_scaled(getattr(first, part), getattr(second, part), steps) for part in WORKS]
        if None in works or len(first.saved) != len(second.saved):
            return None
        sizes = {part: _line(getattr(first, part), getattr(second, part), steps) for part in GROWING}
        saved = tuple(_saved(a, b, steps) for a, b in zip(first.saved, second.saved, strict=True))
        pieces[name] = replace(first, **sizes, **dict(zip(WORKS, works, strict=True)), saved=saved)  # type: ignore[arg-type]
    return Traced(pieces, _line(one.shared, two.shared, steps), one.tied)


WORKS = ("forward_work", "backward_work")


def _line(one: int, two: int, steps: float) -> int:
    return round(one + (two - one) * steps)


def _saved(one: Saved, two: Saved, steps: float) -> Saved:
    return Saved(*(_line(a, b, steps) for a, b in zip(astuple(one), astuple(two), strict=True)))


def _scaled(one: Work, two: Work, steps: float) -> Work | None:
    same = len(one.operators) == len(two.operators) and len(one.sent) == len(two.sent)
    if not same:
        return None
    operators = [
        (f + (g - f) * steps, m + (n - m) * steps) for (f, m), (g, n) in zip(one.operators, two.operators, strict=True)
    ]
    sent = [
        Sent(a.size, a.span, a.moved + (b.moved - a.moved) * steps) for a, b in zip(one.sent, two.sent, strict=True)
    ]
    return Work(operators, sent)
