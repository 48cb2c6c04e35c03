"""The job of mp-preprocess-chat: records to ids and masks, each text one document of its output."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.data_formats import PAIRS
from megapatch.models.indexed_data import bin_path, idx_path, manifest_path
from megapatch.tools.preprocess.chats.manifest import identity, manifest
from megapatch.tools.preprocess.chats.options import Options
from megapatch.tools.preprocess.chats.work import Report, Side, State, Worker
from megapatch.tools.preprocess.encoding.watch import Watch
from megapatch.tools.preprocess.reading.bad_lines import BadLines
from megapatch.tools.preprocess.reading.inputs import Chunk
from megapatch.tools.preprocess.run.job import Output, Redo, Write, Written
from megapatch.tools.preprocess.run.ledger import Ledger
from megapatch.tools.preprocess.run.seen import SEEN, Seen

_EXAMPLES = 10  # of records that were too long, in the manifest
_DUPLICATE = "duplicate"


class ChatJob:
    """A Job for conversations, preference pairs and prompts: for each side ids, a mask if there is one, and weights if
    they are wanted; last the answers of prompts."""

    def __init__(self, options: Options, worker: Worker) -> None:
        self.options, self._worker = options, worker
        self.outputs = _outputs(options, worker.encoder.dtype)
        self.ledger = Ledger(options.on_bad_line)
        self.watch = worker.encoder.watch()
        self.counts = {"sequences": 0, "trained_tokens": 0, "answers": 0, "masked_by_offsets": 0}
        self._weighted = False
        self.truncation: dict[str, Any] = {"records": 0, "lost_tokens": 0, "examples": []}
        self.spelled: dict[str, int] = {}
        self.empty: dict[str, int] = {}
        self.unshown: dict[str, Any] = {"fields": {}, "examples": []}
        self._bad_lines = BadLines(options.quarantine)
        self.put_aside = self._bad_lines.paths

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes besides the inputs."""
        return identity(self.options, self._worker)

    @property
    def also(self) -> list[Path]:
        """Further files that are written, and those of earlier runs that must not stand beside the new ones."""
        ends = [end for end in PAIRS[self.options.format_of_output] if end not in self.options.ends]
        prefixes = [f"{self.options.output_prefix}{end}" for end in ends]
        stale = [path for prefix in prefixes for path in (idx_path(prefix), bin_path(prefix))]
        return [manifest_path(self.options.output_prefix), *stale, *self._bad_lines.paths]

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens, 0 to 1; of prompts, which are not trained, 0."""
        return round(self.counts["trained_tokens"] / max(1, self.ledger.tokens), 6)

    def begin(self, chunk: Chunk) -> tuple[Report, State]:
        """Read, render, encode, mask and cut."""
        return self._worker.begin(chunk)

    def obey(self, order: Any) -> None:
        """Change the engine."""
        self._worker.encoder.obey(order)

    def settle(self, report: Report) -> Write | Redo:
        """Count, and choose the records that are kept, bool [records]."""
        order = self.watch.absorb(report.engine)
        if order is not None:
            return Redo(order)
        places = [place for tally in report.tallies for place in self.ledger.read(tally)]
        notes = self._bad_lines.notes(report.tallies, places)
        if self.options.deduplicate:
            kept = np.array([number for number, fate in enumerate(report.fate) if not fate], np.int64)
            fresh = self._seen.add(report.hashes[kept])
            for number in kept[~fresh].tolist():
                report.fate[number] = _DUPLICATE
            notes[SEEN] = report.hashes[kept[fresh]].tobytes()
        kept_records = np.array([not fate for fate in report.fate], bool)
        lengths = [
            one[kept_records[record]].astype(np.int32)
            for one, record in zip(report.lengths, report.record, strict=True)
        ]
        self._count(report, kept_records, lengths)
        return Write(kept_records, self._lengths(lengths, report.answers[kept_records]), notes)

    def _lengths(self, lengths: Sequence[np.ndarray], answers: np.ndarray) -> list[np.ndarray]:
        """Of each output's sequences, from those of the sides."""
        form = self.options.format_of_output
        each = 1 + (form != "prompts") + (form == "chat" and self.options.message_weights)
        return [one for one in lengths for _ in range(each)] + ([answers] if form == "prompts" else [])

    def _count(self, report: Report, kept: np.ndarray, lengths: Sequence[np.ndarray]) -> None:
        for path in dict.fromkeys(report.paths):
            mine = [fate for fate, where in zip(report.fate, report.paths, strict=True) if where == path]
            self.ledger.settle(path, {fate or "documents": count for fate, count in Counter(mine).items()})
        tokens = sum(int(one.sum(dtype=np.int64)) for one in lengths)
        self.ledger.tokens += tokens
        counts = self.counts
        counts["sequences"] += len(lengths[0])
        counts["trained_tokens"] += sum(
            int(one[kept[record]].sum()) for one, record in zip(report.trained, report.record, strict=True)
        )
        self._weighted |= report.weighted
        counts["answers"] += int((report.answers[kept] > 0).sum())
        counts["masked_by_offsets"] += report.by_offsets
        self.spelled = dict(Counter(self.spelled) + Counter(report.spelled))
        self._count_cuts(report)
        self._count_unshown(report)

    def _count_unshown(self, report: Report) -> None:
        self.empty = dict(
            Counter(self.empty) + Counter(name for record, name in report.empty if not report.fate[record])
        )
        fields, examples = self.unshown["fields"], self.unshown["examples"]
        for record, begins, names in report.unshown:
            if report.fate[record]:
                continue
            for name in names:
                fields[name] = fields.get(name, 0) + 1
            if len(examples) < _EXAMPLES:
                examples.append({"path": report.paths[record], "begins": begins, "fields": sorted({*names})})

    def _count_cuts(self, report: Report) -> None:
        said = self.truncation
        for cut in report.cuts:
            kept = 0 if report.fate[cut.record] else cut.kept
            said["records"] += 1
            said["lost_tokens"] += cut.tokens - kept
            if len(said["examples"]) < _EXAMPLES:
                example = {"path": cut.path, "begins": cut.begins, "tokens": cut.tokens, "kept": kept}
                said["examples"].append(example)

    def finish(self, state: State, verdict: np.ndarray) -> Sequence[np.ndarray]:
        """The arrays of the records that are kept."""
        arrays = [array for side in state.sides for array in self._arrays(side.of(verdict))]
        if self.options.format_of_output == "prompts":
            answers = b"".join(answer for answer, keep in zip(state.answers, verdict, strict=True) if keep)
            arrays.append(np.frombuffer(answers, np.uint8))
        return arrays

    def _arrays(self, side: Side) -> list[np.ndarray]:
        if side.weights is None:
            return [side.ids]
        weights = [side.weights] if self.options.format_of_output == "chat" and self.options.message_weights else []
        return [side.ids, (side.weights > 0).astype(np.uint8), *weights]

    def state(self) -> dict[str, Any]:
        """What was counted."""
        return {
            "watch": asdict(self.watch),
            "counts": self.counts,
            "truncation": self.truncation,
            "spelled": self.spelled,
            "empty": self.empty,
            "unshown": self.unshown,
            "weighted": self._weighted,
        }

    def restore(self, state: Mapping[str, Any] | None, folder: Path) -> None:
        """Remember the hashes in the folder, and go on with the counts and the engine that was in use."""
        if self.options.deduplicate:
            self._seen = Seen(folder / SEEN)
        if state is not None:
            self.watch = Watch.of(state["watch"])
            self.counts, self.truncation = dict(state["counts"]), dict(state["truncation"])
            self.spelled, self._weighted = dict(state["spelled"]), state["weighted"]
            self.empty, self.unshown = dict(state["empty"]), dict(state["unshown"])
            if (order := self.watch.order()) is not None:
                self.obey(order)

    def kept(self) -> Sequence[bool]:
        """Weights stay where one is neither 0 nor 1, answers where there is one."""
        needed = {"_weight": self._weighted, "_answer": self.counts["answers"]}
        prefix = str(self.options.output_prefix)
        return [bool(needed.get(str(one.prefix).removeprefix(prefix), True)) for one in self.outputs]

    def summary(self) -> list[str]:
        """What to say at the end."""
        sequences, records = self.counts["sequences"], self.ledger.counts()["documents"]
        became = f"{records:,} records became " if records != sequences else ""
        said = [f"{became}{sequences:,} documents, {self.ledger.tokens:,} tokens"]
        if self.options.format_of_output != "prompts":
            said[0] += f", {self.trained_share:.1%} of them trained"
        if self.truncation["records"]:
            most, how = self.options.max_length, self.options.truncate
            said.append(
                f"{self.truncation['records']:,} longer than {most:,} tokens (--truncate {how}): "
                f"{self.truncation['lost_tokens']:,} tokens lost; examples are in the manifest"
            )
        said += [
            f"NOTE: {count:,} records with an empty {name!r}, which teach little; leave them out if that is not meant"
            for name, count in sorted(self.empty.items())
        ]
        if self.options.format_of_output == "prompts" and 0 < self.counts["answers"] < records:
            said.append(f"NOTE: {records - self.counts['answers']:,} of {records:,} prompts have no answer")
        if fields := self.unshown["fields"]:
            counted = ", ".join(f"{name} {count:,}" for name, count in sorted(fields.items()))
            first = self.unshown["examples"][0]
            said.append(
                f"NOTE: the template leaves out what the data have: {counted}; as in the conversation of "
                f"{first['path']} that begins {first['begins']!r}; --template FILE gives another template"
            )
        if self.spelled:
            tokens = ", ".join(f"{token} {count:,}" for token, count in sorted(self.spelled.items()))
            said.append(f"special tokens in messages (--special-in-text {self.options.special_in_text}): {tokens}")
        return said

    def files(
        self, written: Sequence[Written], inputs: Sequence[Mapping[str, Any]], folder: Path
    ) -> dict[Path, bytes | Path]:
        """The manifest, and the bad lines if they were put aside."""
        return {**manifest(self, self._worker, written, inputs), **self._bad_lines.files(folder)}


def _outputs(options: Options, dtype: np.dtype) -> list[Output]:
    kinds: dict[str, np.dtype] = {
        "_mask": np.dtype(np.uint8),
        "_weight": np.dtype(np.float32),
        "_answer": np.dtype(np.uint8),
    }
    return [
        Output(Path(f"{options.output_prefix}{end}"), next((kinds[one] for one in kinds if end.endswith(one)), dtype))
        for end in options.ends
    ]
