"""The xxh3-128 of every input, taken while it is cut, so that a resumed run can tell whether it changed."""

import os
from typing import Any

import xxhash

from megapatch.models.cli import UserError

_BUFFER_BYTES = 1 << 20


class InputDigests:
    """Takes the bytes of all inputs in order; ``mark`` is a digest of everything taken so far.

    ``expected``: the mark that an interrupted run had where this one goes on; another one there is a UserError.
    """

    def __init__(self, expected: str = "") -> None:
        self.expected = expected
        self._report: list[dict[str, Any]] = []
        self._past = xxhash.xxh3_128()  # of the digests of the inputs before this one
        self._now = xxhash.xxh3_128()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._label, self._start, self._num_bytes = "", 0, 0

    def begin(self, label: str, start: int = 0) -> None:
        """The bytes that follow are of this input, from byte ``start`` on."""
        self._now = xxhash.xxh3_128()
        self._label, self._start, self._num_bytes = label, start, 0

    def take(self, data: bytes | memoryview) -> None:
        """The next bytes of the input."""
        self._now.update(data)
        self._num_bytes += len(data)

    def take_file(self, descriptor: int, end: int) -> None:
        """The bytes of a file up to byte ``end``; where it is shorter now, up to its end."""
        position = self._start + self._num_bytes
        while position < end:
            got = os.preadv(descriptor, [self._buffer[: min(_BUFFER_BYTES, end - position)]], position)
            if not got:
                break
            self.take(self._buffer[:got])
            position += got

    def end(self, whole: bool = True) -> None:
        """The input ends here; ``whole`` False when only a range of it was this shard's."""
        found = self._now.hexdigest()
        entry = {"path": self._label, "bytes": self._num_bytes, "xxh3_128": found}
        if not whole:
            entry["range"] = [self._start, self._start + self._num_bytes]
        self._report.append(entry)
        self._past.update(f"{self._label}\0{found}\n".encode(errors="surrogateescape"))
        self._now = xxhash.xxh3_128()

    @property
    def num_ended(self) -> int:
        """How many inputs were read to their end."""
        return len(self._report)

    def mark(self) -> str:
        """Hex digits that change when any byte taken so far does."""
        mark = self._past.copy()
        mark.update(self._now.digest())
        return mark.hexdigest()

    def check(self) -> None:
        """Refuse to go on when what was passed over is not what the interrupted run read."""
        if self.expected and self.mark() != self.expected:
            place = f"{self._label} (up to byte {self._start + self._num_bytes:,})"
            raise UserError(
                f"{place}: the inputs up to here have changed since the interrupted run read them; "
                "run again without --resume"
            )

    def report(self) -> list[dict[str, Any]]:
        """For each input that was read to its end: path, bytes, xxh3_128, and the range if it was not all."""
        return [dict(entry) for entry in self._report]
