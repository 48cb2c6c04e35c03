"""mp-preprocess: text to ids, in megatron-core's indexed format."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from megapatch.models.cli import UserError, opt, run, versions
from megapatch.models.commit import staged_file
from megapatch.models.indexed_data import bin_path, dtype_for, idx_path, manifest_path, write_index
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.inputs import Chunk, InputOptions, Source, chunks, find_sources, total_bytes
from megapatch.tools.preprocess.ledger import Counts, Ledger
from megapatch.tools.preprocess.progress import Progress
from megapatch.tools.preprocess.records import Tally, read_records, text_of
from megapatch.tools.preprocess.workers import ended_by_sigterm, in_order, quiet_engine

_LOG = logging.getLogger("megapatch.tools.preprocess")
EXAMPLES = """examples:
  mp-preprocess --input wiki.jsonl books.jsonl --tokenizer Qwen3-0.6B --output-prefix data/train --append-eod
  mp-preprocess --input /usr/lib/python3.11 --glob '*.py' --on-bad-line skip --tokenizer tok --output-prefix data/code
  zcat big.jsonl.gz | mp-preprocess --input - --tokenizer tok --output-prefix data/big --append-eod --workers 8"""


@dataclass(frozen=True, kw_only=True)
class Options(InputOptions):
    """Encode text with a tokenizer into PREFIX.bin and PREFIX.idx, as megatron-core's own builder would, byte for byte.

    PREFIX.manifest.json says which tokenizer, options and inputs made them. The files do not depend on --workers.
    """

    tokenizer: Path = opt("Hugging Face folder with a tokenizer, or a core checkpoint", metavar="DIR")
    output_prefix: Path = opt(
        "path of the three files written, without .bin, .idx and .manifest.json", metavar="PREFIX"
    )
    append_eod: bool = opt("end each document with the tokenizer's eos token (do this for pretraining)", False)
    workers: Optional[int] = opt("worker processes (default: the cores this process may use)", None)
    chunk_bytes: int = opt("bytes of input that a worker takes at a time; memory grows with it", 1 << 20)
    force: bool = opt("replace files that exist", False)
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: expected 1 or more")
        if self.chunk_bytes < 1:
            raise ValueError(f"--chunk-bytes {self.chunk_bytes}: expected 1 or more")


@dataclass(frozen=True)
class Report:
    """What a worker tells about a chunk: tokens of each document, int32 [documents], and counts."""

    tallies: list[Tally]
    lengths: np.ndarray
    num_empty: int
    num_eod_inside: int


def preprocess(options: Options) -> None:
    """Write PREFIX.bin, .idx and .manifest.json, or nothing."""
    refuse_existing(options.output_prefix, options.force)
    sources = find_sources(options)
    tokenizer = Tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    eod_id = tokenizer.eod_id if options.append_eod else None
    dtype = dtype_for(tokenizer.vocab_size)
    with ended_by_sigterm(), staged_data(options.output_prefix) as (binary, index, manifest):
        with binary.open("wb") as file, quiet_engine():
            encoder = Encoder(tokenizer, eod_id, dtype, options.text_key[0])
            counts, lengths = write_ids(options, sources, encoder, file.fileno())
        write_index(index, lengths, dtype)
        about = describe(options, sources, tokenizer, counts, dtype)
        manifest.write_text(json.dumps(about, indent=1) + "\n")


def write_ids(
    options: Options, sources: list[Source], encoder: "Encoder", descriptor: int
) -> tuple[Counts, np.ndarray]:
    """Encode all inputs into an open file; counts, and the tokens of each document, int32 [documents]."""
    ledger = Ledger(options.on_bad_line)
    lengths = [np.zeros(0, np.int32)]
    tasks = chunks(sources, options.chunk_bytes, shard=options.part)
    num_workers = options.workers or num_cores()
    with (
        Progress(total_bytes(sources)) as progress,
        closing(in_order(tasks, encoder.encode, descriptor, num_workers)) as results,
    ):
        for done in results:
            report = done.report
            for tally in report.tallies:
                ledger.add(tally)
            num_tokens = int(report.lengths.sum(dtype=np.int64))
            lengths.append(report.lengths)
            ledger.counts.documents += len(report.lengths)
            ledger.counts.empty += report.num_empty
            ledger.counts.eod_inside_documents += report.num_eod_inside
            ledger.counts.tokens += num_tokens
            progress.add(done.input_bytes, num_tokens)
        ledger.close()
        _LOG.info(
            "%s documents, %s -> %s", f"{ledger.counts.documents:,}", progress.line(), bin_path(options.output_prefix)
        )
    return ledger.counts, np.concatenate(lengths)


@dataclass(frozen=True)
class Encoder:
    """From a chunk to the ids of its documents; documents without a token are left out."""

    tokenizer: Tokenizer
    eod_id: int | None
    dtype: np.dtype
    text_key: str

    def encode(self, chunk: Chunk) -> tuple[np.ndarray, Report]:
        """ids [tokens], and what to tell the parent."""
        texts: list[str] = []
        tallies = []
        for piece in chunk:
            records = read_records(piece, text_of([self.text_key]))
            texts += [text for (text,) in records.taken]
            tallies.append(records.tally)
        ids, lengths = self.tokenizer.encode_flat(texts)
        kept = lengths[lengths > 0]
        num_inside = 0
        if self.eod_id is not None:
            num_inside = int((ids == self.eod_id).sum())
            ids = np.insert(ids, np.cumsum(kept), self.eod_id)
            kept = kept + 1
        report = Report(tallies, kept.astype(np.int32), len(lengths) - len(kept), num_inside)
        return ids.astype(self.dtype), report


def describe(
    options: Options, sources: list[Source], tokenizer: Tokenizer, counts: Counts, dtype: np.dtype
) -> dict[str, object]:
    """The manifest: all that is needed to make the files again, and to check that a trainer uses them rightly."""
    return {
        "tool": "mp-preprocess",
        "format": "megatron-core indexed data, one sequence a document",
        "versions": versions(),
        "tokenizer": {
            "folder": str(options.tokenizer),
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id if options.append_eod else None,
        },
        "options": {
            "append_eod": options.append_eod,
            "format": options.format,
            "text_key": options.text_key,
            "on_bad_line": options.on_bad_line,
        },
        "dtype": dtype.name,
        "bin_bytes": counts.tokens * dtype.itemsize,
        "counts": asdict(counts),
        "inputs": [{"path": source.label, "bytes": source.size} for source in sources],
    }


def refuse_existing(prefix: Path, force: bool) -> None:
    """Refuse to write over any of the three files, unless ``force``."""
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        if path.exists() and not force:
            raise UserError(f"{path}: exists already; choose another --output-prefix, or replace it with --force")


@contextmanager
def staged_data(prefix: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Yield paths to write .bin, .idx and manifest to; all three appear under their names, .idx last, or none."""
    targets = bin_path(prefix), idx_path(prefix), manifest_path(prefix)
    began = False
    try:
        with staged_file(targets[1]) as index, staged_file(targets[2]) as manifest, staged_file(targets[0]) as binary:
            yield binary, index, manifest
            began = True
            targets[1].unlink(missing_ok=True)  # an old index must never stand beside a new .bin
    except BaseException:
        if began:  # interrupted between the renames
            for target in targets:
                target.unlink(missing_ok=True)
        raise


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Run mp-preprocess; the exit status."""
    return run(Options, preprocess, prog="mp-preprocess", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
