"""How far a long run is: a bar on a terminal, else a line every few seconds, both on stderr."""

import logging
import sys
import time
from contextlib import ExitStack
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_LOG = logging.getLogger("megapatch.tools.preprocess")
EVERY_S = 10.0


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread: worker processes are forked while the bar is there


class Progress:
    """Counts input bytes and tokens, from an interrupted run's on; ``total_bytes`` None where it is not known."""

    def __init__(self, total_bytes: int | None, num_bytes: int = 0, num_tokens: int = 0) -> None:
        self.total_bytes, self.num_bytes, self.num_tokens = total_bytes, num_bytes, num_tokens
        self._before = num_bytes, num_tokens
        self._started = self._told = time.monotonic()
        quiet = not sys.stderr.isatty()
        self._bar = _Bar(
            total=total_bytes,
            initial=num_bytes,
            unit="B",
            unit_scale=True,
            disable=quiet,
            smoothing=0.05,
            leave=False,
        )
        self._stack = ExitStack()

    def __enter__(self) -> "Progress":
        if not self._bar.disable:
            self._stack.enter_context(logging_redirect_tqdm(tqdm_class=_Bar))  # messages above the bar, not in it
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self._stack.close()

    def add(self, num_bytes: int, num_tokens: int = 0) -> None:
        """Show that so much more was read and made."""
        self.num_bytes += num_bytes
        self.num_tokens += num_tokens
        self._bar.update(num_bytes)
        if self.num_tokens:
            self._bar.set_postfix_str(f"{self._per_s[1] / 1e6:.2f} M tokens/s", refresh=False)
        if self._bar.disable and time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            _LOG.info("%s", self.line())

    @property
    def seconds(self) -> float:
        """Seconds since the start, never 0."""
        return max(time.monotonic() - self._started, 1e-6)

    @property
    def _per_s(self) -> tuple[float, float]:
        """Bytes and tokens a second, of this process."""
        return (self.num_bytes - self._before[0]) / self.seconds, (self.num_tokens - self._before[1]) / self.seconds

    def line(self) -> str:
        """Bytes, tokens and rates so far, and how long it may still take."""
        (bytes_per_s, tokens_per_s), left = self._per_s, (self.total_bytes or 0) - self.num_bytes
        of = f" of {self.total_bytes / 1e6:,.1f}" if self.total_bytes else ""
        text = f"{self.num_bytes / 1e6:,.1f}{of} MB in {self.seconds:,.1f} s ({bytes_per_s / 1e6:.2f} MB/s"
        if self.num_tokens:
            text += f", {self.num_tokens:,} tokens, {tokens_per_s / 1e6:.3f} M tokens/s"
        if left > 0 and bytes_per_s > 0:
            text += f", {left / bytes_per_s:,.0f} s left"
        return text + ")"
