"""How far a conversion is, on stderr: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType

log = logging.getLogger(__name__)
EVERY_S = 30


class Progress:
    """Counts bytes up to ``total``; called from one thread at a time. A with-block ends the bar."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self._first = total, done, done
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """More bytes are written."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= EVERY_S:
            self._last = time.monotonic()
            rate = (self.done - self._first) / (self._last - self._start)
            left = (self.total - self.done) / rate
            log.info("%.1f of %.1f GB, %.2f GB/s, %.0f s left", self.done / 1e9, self.total / 1e9, rate / 1e9, left)
