"""The job of mp-preprocess: documents to ids, and those that are kept to the outputs of their keys and shares."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.tools.preprocess.corpus import selection
from megapatch.tools.preprocess.corpus.manifest import identity, manifests
from megapatch.tools.preprocess.corpus.options import Options, arguments_path, missing, prefixes, taker
from megapatch.tools.preprocess.encoding.contamination import Contamination, Hit, Spoiled, read_evaluation
from megapatch.tools.preprocess.encoding.encoder import Encoded, Encoder
from megapatch.tools.preprocess.encoding.watch import Report as EngineReport
from megapatch.tools.preprocess.encoding.watch import Watch
from megapatch.tools.preprocess.reading.bad_lines import BadLines
from megapatch.tools.preprocess.reading.inputs import Chunk
from megapatch.tools.preprocess.reading.records import Tally, read_records
from megapatch.tools.preprocess.run.job import Output, Redo, Write, Written
from megapatch.tools.preprocess.run.ledger import Ledger
from megapatch.tools.preprocess.run.seen import SEEN, Seen

_LOG = logging.getLogger("megapatch.tools.preprocess")
_DROPPED = -1


@dataclass(frozen=True)
class Report:
    """What the parent must know of a chunk: per document, its tokens for each key, int64 [keys, documents], what
    becomes of it, uint8, its hash, uint64 [documents, 2] or [0, 2], its share, int8, and its source's position."""

    tallies: list[Tally]
    engine: EngineReport
    lengths: np.ndarray
    fate: np.ndarray
    hashes: np.ndarray
    share: np.ndarray
    sources: list[str]
    source: np.ndarray
    hits: list[Hit]


class Corpus:
    """A Job: every document is one sequence of each key's output, of the share that its hash chooses."""

    def __init__(self, options: Options, encoder: Encoder) -> None:
        self.options, self.encoder = options, encoder
        self._take = taker(options, encoder)
        self.outputs = [Output(prefix, encoder.dtype) for prefix in prefixes(options)]
        self.ledger = Ledger(options.on_bad_line, by_key=bool(options.source_key))
        self.watch = encoder.watch()
        self._bad_lines = BadLines(options.quarantine)
        self.put_aside = self._bad_lines.paths
        self.also = [arguments_path(options), *self.put_aside]
        evaluation = read_evaluation(options.contamination)
        self._find = Contamination(evaluation, options.contamination_ngram) if evaluation else None
        self._spoiled = Spoiled(list(evaluation)) if evaluation else None
        self._num_shares = len(selection.shares(options.split))

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes besides the inputs."""
        return identity(self.options, self.encoder)

    def begin(self, chunk: Chunk) -> tuple[Report, list[Encoded]]:
        """Read, encode, and judge each document by itself."""
        options = self.options
        taken: list[tuple[str, ...]] = []  # the texts, and the source if a key names it
        tallies, names = [], []
        for piece in chunk:
            records = read_records(piece, self._take, keep_raw=options.quarantine is not None)
            taken += records.taken
            tallies.append(records.tally)
            names += [one[-1] if options.source_key else piece.path for one in records.taken]
        texts = [[one[key] for one in taken] for key in range(len(options.text_key))]
        encoded = [self.encoder(one, first=chunk.number == 0) for one in texts]
        lengths = np.stack([one.lengths for one in encoded])
        fate = selection.filtered(lengths, options.min_document_tokens, options.max_document_tokens)
        hits = self._hits(texts, fate)
        if options.on_contamination == "drop":
            fate[[hit.text for hit in hits]] = selection.CONTAMINATED
        hashed = options.deduplicate or self._num_shares > 1
        hashes = selection.hashes(texts) if hashed else np.zeros((0, 2), np.uint64)
        share = selection.share_of(hashes, len(names), options.split, options.split_seed)
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        source = np.fromiter((number[name] for name in names), np.int32, len(names))
        engine = EngineReport(encoded[0].report.fast)
        for one in encoded:
            engine.add(one.report)
        return Report(tallies, engine, lengths, fate, hashes, share, list(number), source, hits), encoded

    def _hits(self, texts: Sequence[Sequence[str]], fate: np.ndarray) -> list[Hit]:
        """Kept documents, by their place, that share words with evaluation files: one Hit for each such file."""
        if self._find is None:
            return []
        found = {(hit.text, hit.file): hit for one in texts for hit in self._find(one)}
        return [hit for (text, _), hit in sorted(found.items()) if fate[text] == selection.KEPT]

    def obey(self, order: Any) -> None:
        """Change the engine."""
        self.encoder.obey(order)

    def settle(self, report: Report) -> Write | Redo:
        """Count, and choose what is kept; int8 [documents] goes back: each document's share, or that it is dropped."""
        order = self.watch.absorb(report.engine)
        if order is not None:
            return Redo(order)
        if self._spoiled is not None:
            self._spoiled.absorb(report.hits)
        places = [place for tally in report.tallies for place in self.ledger.read(tally)]
        notes = self._bad_lines.notes(report.tallies, places)
        fate = report.fate
        if self.options.deduplicate:
            kept = np.flatnonzero(fate == selection.KEPT)
            fresh = self._seen.add(report.hashes[kept])
            fate[kept[~fresh]] = selection.DUPLICATE
            notes[SEEN] = report.hashes[kept[fresh]].tobytes()
        lengths = report.lengths + self.encoder.around.num_tokens
        ended = self._stop(fate, lengths.sum(axis=0))
        if ended:
            place = report.tallies[-1].piece.path
            _LOG.info("--max-tokens are reached in %s; what follows its chunk was not read", place)
        self._count(report, lengths)
        verdict = np.where(fate == selection.KEPT, report.share, np.int8(_DROPPED))
        kept_lengths = [one[verdict == share].astype(np.int32) for one in lengths for share in range(self._num_shares)]
        return Write(verdict, kept_lengths, notes, last=ended)

    def _stop(self, fate: np.ndarray, tokens: np.ndarray) -> bool:
        """Drop what comes after the document with which --max-tokens are there; whether they are."""
        if self.options.max_tokens is None:
            return False
        total = self.ledger.tokens + np.cumsum(np.where(fate == selection.KEPT, tokens, 0))
        reached = int(np.searchsorted(total, self.options.max_tokens))
        rest = fate[reached + 1 :]
        rest[rest == selection.KEPT] = selection.BEYOND
        return reached < len(fate)

    def _count(self, report: Report, lengths: np.ndarray) -> None:
        """Add what became of each document to the ledger, as a whole and by source."""
        ledger, tokens = self.ledger, lengths.sum(axis=0)
        ledger.tokens += int(tokens[report.fate == selection.KEPT].sum())
        for number, name in enumerate(report.sources):
            mine = report.source == number
            fates = np.bincount(report.fate[mine], minlength=len(selection.FATES))
            ledger.settle(name, dict(zip(selection.FATES, fates.tolist(), strict=True)))
            ledger.of_source(name, {"tokens": int(tokens[mine & (report.fate == selection.KEPT)].sum())})

    def finish(self, encoded: list[Encoded], verdict: np.ndarray) -> Sequence[np.ndarray]:
        """The ids of each key's and share's documents, with bos and eod."""
        return [self.encoder.framed(one, verdict == share) for one in encoded for share in range(self._num_shares)]

    def state(self) -> dict[str, Any]:
        """What was counted of engines and evaluation files."""
        return {"watch": asdict(self.watch), "spoiled": self._spoiled and asdict(self._spoiled)}

    def restore(self, state: Mapping[str, Any] | None, folder: Path) -> None:
        """Remember the hashes in the folder, and go on with the engine that was in use."""
        if self.options.deduplicate:
            self._seen = Seen(folder / SEEN)
        if state is not None:
            self.watch = Watch.of(state["watch"])
            self._spoiled = Spoiled(**state["spoiled"]) if state["spoiled"] else None
            if (order := self.watch.order()) is not None:
                self.encoder.obey(order)

    def kept(self) -> Sequence[bool]:
        """All outputs stay."""
        return [True] * len(self.outputs)

    def files(
        self, written: Sequence[Written], inputs: Sequence[Mapping[str, Any]], folder: Path
    ) -> Mapping[Path, bytes | Path]:
        """Manifests, arguments for the trainer, and the bad lines if they were put aside."""
        if self.watch.special:
            found = ", ".join(f"{token} {count:,}" for token, count in sorted(self.watch.special.items()))
            _LOG.warning("special tokens that texts spell out became tokens: %s; see --special-in-text", found)
        key = self.options.source_key
        if key and not set(self.ledger.sources) - {missing(key)}:
            _LOG.warning("--source-key %s: no record has this key", key)
        made = manifests(self.options, self.encoder, self.ledger, self.watch, self._spoiled, written, inputs)
        return {**made, **self._bad_lines.files(folder)}
