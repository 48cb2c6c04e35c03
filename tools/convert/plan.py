"""A conversion as a list: every byte of every target file, and where it comes from. Nothing is read or written here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megapatch.models.torch_save import ITEM_BYTES

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # --dtype


class Literal(NamedTuple):
    """Bytes known beforehand: headers, indices."""

    file: str
    offset: int
    data: bytes

    def line(self) -> dict[str, Any]:
        return {"file": self.file, "offset": self.offset, "bytes": len(self.data), "from": "header"}


class Copy(NamedTuple):
    """``rows`` runs of ``items`` items each, from a source file to a target file.

    Items are of dtype ``read`` in the source and ``write`` in the target; offsets and steps (from the start of one
    run to the next) are in bytes.
    """

    name: str  # of the Hugging Face tensor, or of a file copied whole
    source: Path
    source_offset: int
    file: str
    offset: int
    items: int
    rows: int = 1
    source_step: int = 0
    step: int = 0
    read: str = "uint8"
    write: str = "uint8"

    @property
    def run_bytes(self) -> int:
        """Bytes of one run in the target."""
        return self.items * ITEM_BYTES[self.write]

    @property
    def size(self) -> int:
        """Bytes in the target."""
        return self.rows * self.run_bytes

    @property
    def plain(self) -> bool:
        """True when this is one range of bytes, copied as it is."""
        return self.rows == 1 and self.read == self.write

    def line(self) -> dict[str, Any]:
        origin = {"file": str(self.source), "offset": self.source_offset}
        said = {"file": self.file, "offset": self.offset, "bytes": self.run_bytes, "tensor": self.name, "from": origin}
        if self.rows > 1:
            said |= {"runs": self.rows, "step": self.step}
            origin["step"] = self.source_step
        return said | ({"cast": [self.read, self.write]} if self.read != self.write else {})


@dataclass
class Plan:
    """The files to write, their sizes in bytes, and what goes where; ``notes`` are for the user."""

    files: dict[str, int] = field(default_factory=dict)
    literals: list[Literal] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_file(self, path: Path, name: str) -> None:
        """A file copied whole."""
        self.files[name] = path.stat().st_size
        self.copies.append(Copy(path.name, path, 0, name, 0, self.files[name]))

    def lines(self) -> Iterator[dict[str, Any]]:
        """The plan as JSON objects, one for each range."""
        yield from (literal.line() for literal in self.literals)
        yield from (copy.line() for copy in self.copies)

    def finish(self) -> "Plan":
        """This plan, with its entries in the order of the files; sizes that do not add up are a broken invariant."""
        named = dict.fromkeys(self.files, 0)
        for literal in self.literals:
            named[literal.file] += len(literal.data)
        for copy in self.copies:
            named[copy.file] += copy.size
        assert named == self.files, "the plan does not name every byte once"
        self.copies.sort(key=lambda c: (c.file, c.offset))
        return self
