"""Signals that end a run where it can be gone on with: noted at any time, heeded where the parent rests."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (*ENDS, signal.SIGCHLD)


class Stopped(BaseException):
    """The run shall end: ``number`` is the signal that asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stopping:
    """Raises Stopped in ``check`` and inside ``at_rest`` after a signal; a second Ctrl-C is raised at once."""

    def __init__(self) -> None:
        self._asked = 0
        self._resting = False
        self._watch: Callable[[], None] = lambda: None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number
        if self._resting:
            raise Stopped(number)

    def child(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of SIGCHLD: a worker that died is told by ``watch``, which raises."""
        if self._resting:
            self._watch()

    def watch(self, found: Callable[[], None]) -> None:
        """Call ``found`` when a child process has ended while the parent rests."""
        self._watch = found

    def check(self) -> None:
        """Raise Stopped when a signal has come."""
        if self._asked:
            raise Stopped(self._asked)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Around a wait that a signal shall end at once."""
        self._resting = True
        try:
            self.check()
            yield
        finally:
            self._resting = False


@contextmanager
def listening() -> Iterator[Stopping]:
    """Handle SIGINT, SIGTERM and SIGUSR1 (batch systems send them when time is up) inside the block.

    What is ignored stays so: shells start background jobs without Ctrl-C, nohup and others likewise.
    """
    stopping = Stopping()
    handlers = {number: stopping.note for number in ENDS if signal.getsignal(number) != signal.SIG_IGN}
    handlers[signal.SIGCHLD] = stopping.child
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
