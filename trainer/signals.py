"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean end; noticed at the next step. Imports no torch."""

import signal
from types import FrameType

_asked: list[int] = []


def listen() -> None:
    """Install the handlers; call before slow imports, or a signal during them kills the process."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(number)


def asked() -> int:
    """The last signal that came, 0 when none did."""
    return _asked[-1] if _asked else 0


def forget() -> None:
    """Act as if no signal had come (for a second run in one process)."""
    _asked.clear()
