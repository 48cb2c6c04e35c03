"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean end; noticed at the next step. Imports no torch."""

import atexit
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked: list[int] = []


def listen() -> None:
    """Install the handlers; call before slow imports, or a signal during them kills the process."""
    for number in SIGNALS:
        signal.signal(number, _note)
    atexit.register(_ignore)


def _ignore() -> None:
    """Python takes its handlers back as it ends: without this a signal could then kill a run that is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(number)


def asked() -> int:
    """The last signal that came, 0 when none did."""
    return _asked[-1] if _asked else 0


def forget() -> None:
    """Act as if no signal had come (for a second run in one process)."""
    _asked.clear()
