"""Bytes out of .gz, .zst, .xz and .bz2, member after member; what is cut short or damaged is named with its byte."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

from megapatch.models.cli import UserError

BLOCK_BYTES = 1 << 20
LEAST_BLOCK_BYTES = 4096
_FEED_BYTES = 16 << 10  # at a time, so that what comes out of one feed stays small
_MAX_WINDOW_BYTES = 1 << 31  # as `zstd --long=31` writes
_MAGIC = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),  # and skippable frames
    "xz": (b"\xfd7zXZ\x00",),
    "bzip2": tuple(b"BZh%d" % level + end for level in range(1, 10) for end in (b"1AY&SY", b"\x17rE8P\x90")),
}


class Readable(Protocol):
    """A binary file."""

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, fewer only at the end."""


def _new_zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError("zstandard is not installed, which .zst needs; pip install 'megapatch[data]'") from None
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()


_NEW: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zstd": _new_zstd,
    "xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
    "bzip2": bz2.BZ2Decompressor,
}


def packing_of(head: bytes) -> str:
    """How a stream with these first bytes is compressed; '' if it is not."""
    return next((packing for packing, magics in _MAGIC.items() if head.startswith(magics)), "")


def unpacked(
    file: Readable, packing: str, label: str, *, sniff: bool = False, block_bytes: int = BLOCK_BYTES
) -> Generator[bytes, None, None]:
    """The content of an input in blocks; ``sniff``: its first bytes say whether it is compressed.

    ``block_bytes`` are read at a time; a pipe is waited for until it gave as many.
    """
    block = file.read(block_bytes)
    if sniff and not packing:
        packing = packing_of(block)
    if packing:
        yield from _Members(file, packing, label, block_bytes).content(block)
        return
    while block:
        yield block
        block = file.read(block_bytes)


class _Members:
    """One compressed stream after another, as `cat a.gz b.gz` makes them."""

    def __init__(self, file: Readable, packing: str, label: str, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._file, self._packing, self._label = file, packing, label
        self._new = _NEW[packing]
        self._position = 0  # bytes fed so far

    def content(self, block: bytes) -> Iterator[bytes]:
        """What the members hold; ``block`` is what was read already."""
        member, rest = self._new(), b""
        while block:
            for feed in (block[i : i + _FEED_BYTES] for i in range(0, len(block), _FEED_BYTES)):
                rest += feed
                self._position += len(feed)
                while rest:
                    if member is None:
                        rest = self._start(rest)
                        if not rest:
                            break
                        member = self._new()
                    data, member, rest = self._unpack(member, rest)
                    if data:
                        yield data
            block = self._file.read(self._block_bytes)
        if member is not None:
            raise UserError(
                f"{self._label}: {self._packing} data cut short: it ends at byte {self._position:,} inside a stream; "
                "get the complete file again"
            )

    def _start(self, rest: bytes) -> bytes:
        """What is left after zeros that pad the file: gzip's on tapes, xz's in fours."""
        return rest.lstrip(b"\0") if self._packing in ("gzip", "xz") else rest

    def _unpack(self, member: Any, data: bytes) -> tuple[bytes, Any, bytes]:
        """Content, the member unless it ended here, and what follows it."""
        try:
            out = member.decompress(data)
        except (zlib.error, lzma.LZMAError, OSError, _zstd_error()) as error:
            begin = self._position - len(data)
            kind = "is not" if begin == 0 and packing_of(data) != self._packing else "damaged"
            raise UserError(
                f"{self._label}: {kind} {self._packing} data, at byte {begin:,} or up to {len(data):,} bytes "
                f"after it ({error}); get the file again"
            ) from None
        return (out, None, member.unused_data) if member.eof else (out, member, b"")


def _zstd_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return zlib.error
    return ZstdError
