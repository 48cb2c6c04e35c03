"""What a run does with each chunk: a job, of which the parent and its forked workers each hold a copy.

worker   begin(chunk) -> report, state      read and encode; the report goes to the parent, the state stays
parent   settle(report) -> Write or Redo    in input order: what is kept, and how long each sequence is
worker   obey(order), then begin again      after Redo
worker   finish(state, verdict) -> arrays   after Write: written at the offsets that the parent gives
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from megapatch.tools.preprocess.reading.inputs import Chunk
from megapatch.tools.preprocess.run.ledger import Ledger

R = TypeVar("R")


@dataclass(frozen=True)
class Output:
    """A pair of files: ``prefix``.bin with elements of ``dtype``, and ``prefix``.idx."""

    prefix: Path
    dtype: np.dtype


@dataclass(frozen=True)
class Write:
    """A settled chunk: ``lengths`` has, for each output, the elements of each of its sequences, int32 [sequences].

    ``verdict`` goes to the worker's ``finish``. ``notes``: bytes to append to files of that name in the folder of the
    run, where they are cut back with the rest when a run is gone on with. ``last``: nothing after this chunk is wanted.
    """

    verdict: Any
    lengths: Sequence[np.ndarray]
    notes: Mapping[str, bytes] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class Redo:
    """Begin this chunk again under ``order``, which the worker obeys from now on."""

    order: Any


@dataclass(frozen=True)
class Written:
    """A finished output, as manifests tell it: digests are xxh3-128 of the two files, in hex digits."""

    output: Output
    num_sequences: int
    num_elements: int
    bin_digest: str
    idx_digest: str

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says of the pair."""
        return {
            "dtype": self.output.dtype.name,
            "bin_bytes": self.num_elements * self.output.dtype.itemsize,
            "xxh3_128": {"bin": self.bin_digest, "idx": self.idx_digest},
        }


class Job(Protocol[R]):
    """The work of a run. ``state`` and ``restore`` carry what ``settle`` remembers from one process to the next."""

    ledger: Ledger  # counted by ``settle``

    @property
    def outputs(self) -> Sequence[Output]:
        """The pairs to write."""

    @property
    def also(self) -> Sequence[Path]:
        """Other files that it writes, besides the manifests of the outputs."""

    @property
    def put_aside(self) -> Sequence[Path]:
        """Those of them for bad lines."""

    def identity(self) -> dict[str, Any]:
        """JSON values: all that decides the bytes written besides the inputs and how they are cut."""

    def begin(self, chunk: Chunk) -> tuple[R, Any]:
        """In a worker: read and encode; what the parent must know (small, picklable), and what stays here."""

    def obey(self, order: Any) -> None:
        """In a worker: from now on begin as Redo's ``order`` says."""

    def settle(self, report: R) -> Write | Redo:
        """In the parent, in input order: count, and say what is kept."""

    def finish(self, state: Any, verdict: Any) -> Sequence[np.ndarray]:
        """In a worker: the arrays to write, one per output, as long as ``settle`` said."""

    def state(self) -> dict[str, Any]:
        """JSON values: what ``settle`` remembers besides the ledger and its notes."""

    def restore(self, state: Mapping[str, Any] | None, folder: Path) -> None:
        """In the parent, before the workers are forked: the run's folder with the notes, and what ``state`` said in
        the interrupted run; None at the start of a new one."""

    def kept(self) -> Sequence[bool]:
        """At the end: which of the outputs shall stay."""

    def files(
        self, written: Sequence[Written], inputs: Sequence[Mapping[str, Any]], folder: Path
    ) -> Mapping[Path, bytes | Path]:
        """At the end: the files to appear with the outputs (manifests, arguments): content by path; or a file of
        ``folder`` (a note), which is put there. ``inputs``: path, bytes and xxh3_128 of each."""
