"""Pieces of a larger micro-batch from those of two smaller ones: bytes and work grow in a straight line.

Not from one of a single sample, whose tensors need fewer copies to be contiguous.
"""

from dataclasses import replace

from megapatch.models.planning.meter import Sent, Work
from megapatch.models.planning.trace import Traced

GROWING = ("kept", "forward", "backward", "left")


def scaled(one: Traced, two: Traced, steps: float) -> Traced | None:
    """What lies so many times their difference beyond ``one``; None where the traces differ in their operators."""
    pieces = {}
    for name, first in one.pieces.items():
        second = two.pieces[name]
        works = [_scaled(getattr(first, part), getattr(second, part), steps) for part in WORKS]
        if None in works:
            return None
        sizes = {part: _line(getattr(first, part), getattr(second, part), steps) for part in GROWING}
        pieces[name] = replace(first, **sizes, **dict(zip(WORKS, works, strict=True)))  # type: ignore[arg-type]
    return Traced(pieces, _line(one.shared, two.shared, steps), one.tied)


WORKS = ("forward_work", "backward_work")


def _line(one: int, two: int, steps: float) -> int:
    return round(one + (two - one) * steps)


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
