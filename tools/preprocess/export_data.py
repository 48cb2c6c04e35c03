"""mp-export-data: conversations as other projects read them."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from megapatch.models.cli import Common, UserError, opt, run

if TYPE_CHECKING:
    from megapatch.models.packed_rows import Conversations
    from megapatch.tools.preprocess.pairs.foreign_checks import Counts

_LOG = logging.getLogger("megapatch.tools.preprocess")
_TAKES = {"pai": {"seq_length", "seed", "pad_id"}, "bridge": {"seq_length", "seed"}, "jsonl": {"tokenizer"}}
_PARQUET = (".parquet", ".pq")
EXAMPLES = """examples:
  mp-export-data data/chats --format pai --seq-length 4096 --output pai/chats      # pai/chats.bin and .idx
  mp-export-data data/chats --format bridge --seq-length 4096 --output chats.idx.parquet
  mp-export-data data/chats --format jsonl --tokenizer tok --output - | head -n 1 | jq .text

pai: packed rows for SFT with Pai-Megatron-Patch (--dataset MMAP --reset-position-ids, micro-batch 1, no context
  parallelism). Train with the same --seq-length: it does not check. It leaves out the last row of an epoch.
bridge: packed rows for Megatron-Bridge, columns input_ids, loss_mask, seq_start_id. For padding to 2 x CP pack there.
jsonl: a line for each conversation, {"input_ids", "loss_mask"} and, where there are such, "weights"; with --tokenizer
  "text", where the text gives the same ids again. mp-import-data reads all three back.
What a format has no place for is refused: weights outside jsonl, conversations without trained tokens in pai, ..."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Write PREFIX, PREFIX_mask and PREFIX_weight of mp-preprocess-chat as another project reads conversations.

    Packed formats are filled best-fit-decreasing, in an order that depends on --seed alone. No conversation is cut.
    """

    prefix: Path = opt("the conversations, PREFIX.bin and PREFIX.idx", flags=["prefix"], metavar="PREFIX")
    format: Literal["pai", "bridge", "jsonl"] = opt("whose format; see below")
    output: Path = opt("prefix (pai) or file (bridge, jsonl; - is stdout) to write", metavar="PATH")
    seq_length: Optional[int] = opt("tokens of a row (pai, bridge)", None, metavar="TOKENS")
    seed: Optional[int] = opt("of the order of rows, 0 if not given (pai, bridge)", None, metavar="NUMBER")
    pad_id: Optional[int] = opt("id that fills rows up, 0 if not given (pai)", None, metavar="ID")
    tokenizer: Optional[Path] = opt("folder of the tokenizer, to add the text (jsonl)", None, metavar="DIR")
    force: bool = opt("replace files that exist", False)
    json: bool = opt("print counts as one JSON object", False)

    def __post_init__(self) -> None:
        for name in ("seq_length", "seed", "pad_id", "tokenizer"):
            if getattr(self, name) is not None and name not in _TAKES[self.format]:
                raise ValueError(f"--{name.replace('_', '-')}: means nothing to --format {self.format}")
        if "seq_length" in _TAKES[self.format] and (self.seq_length is None or self.seq_length < 2):
            raise ValueError(f"--format {self.format}: needs --seq-length of 2 or more")
        for name in ("seed", "pad_id"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name.replace('_', '-')}: must be 0 or more")
        if str(self.output) == "-" and (self.format != "jsonl" or self.json):
            raise ValueError("--output -: only --format jsonl goes to stdout, and without --json")
        if self.format == "bridge" and self.output.suffix not in _PARQUET:
            raise ValueError(f"--output {self.output}: Megatron-Bridge finds packed data by .idx.parquet at the end")
        if self.format == "pai" and self.output.resolve() == self.prefix.resolve():
            raise ValueError(f"--output {self.output}: is the input; name another prefix")


def export_data(options: Options) -> None:
    """Write the files, whole or not at all; counts go to the log, or with --json to stdout."""
    from megapatch.models.packed_rows import Conversations
    from megapatch.tools.preprocess.run.progress import Progress

    data = Conversations(options.prefix)
    if not len(data):
        raise UserError(f"{options.prefix}: no conversations")
    with Progress(None) as progress:
        counts = _WRITERS[options.format](data, options, progress.add)
        line = progress.line()
    assert counts.conversations == len(data) and counts.tokens == int(data.lengths.sum()), "all of it is written"
    rows = f"{counts.rows:,} rows with {counts.padding:,} tokens of padding, " if options.format != "jsonl" else ""
    said = (
        f"{counts.conversations:,} conversations, {counts.tokens:,} tokens ({counts.trained:,} trained), {rows}{line}"
    )
    _LOG.info("%s -> %s", said, options.output)
    if options.json:
        print(json.dumps({"format": options.format, "output": str(options.output)} | asdict(counts)))


def _pai(data: "Conversations", options: Options, tell: Callable[..., Any]) -> "Counts":
    from megapatch.models.cli import versions
    from megapatch.models.commit import digest, refuse_existing
    from megapatch.models.indexed_data import read_manifest
    from megapatch.tools.preprocess.pairs import foreign_pai
    from megapatch.tools.preprocess.pairs.staging import staged

    assert options.seq_length is not None
    for end in (".idx", ".bin", ".manifest.json"):
        refuse_existing(Path(f"{options.output}{end}"), options.force)
    foreign_pai.refuse(data, options.seq_length)
    words: dict[str, int] = {"seq_length": options.seq_length, "seed": options.seed or 0, "pad_id": options.pad_id or 0}
    with staged(options.output, [""], []) as stages:
        binary, index = stages[".bin"], stages[".idx"]
        counts = foreign_pai.write(data, binary, index, **words, tell=tell)
        said = {
            "tool": "mp-export-data",
            "format": "pai",
            "versions": versions(),
            "tokenizer": (read_manifest(options.prefix) or {}).get("tokenizer", {}),
            "options": words,
            "counts": asdict(counts),
            "dtype": "int32",
            "bin_bytes": binary.stat().st_size,
            "xxh3_128": {"bin": digest(binary), "idx": digest(index)},
        }
        stages[".manifest.json"].write_text(json.dumps(said, indent=1) + "\n")
    return counts


def _bridge(data: "Conversations", options: Options, tell: Callable[..., Any]) -> "Counts":
    from megapatch.models.commit import refuse_existing, staged_file
    from megapatch.tools.preprocess.pairs import foreign_bridge

    assert options.seq_length is not None
    refuse_existing(options.output, options.force)
    foreign_bridge.refuse(data, options.seq_length)
    with staged_file(options.output) as stage:
        return foreign_bridge.write(data, stage, seq_length=options.seq_length, seed=options.seed or 0, tell=tell)


def _jsonl(data: "Conversations", options: Options, tell: Callable[..., Any]) -> "Counts":
    from megapatch.models.commit import refuse_existing, staged_file
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.preprocess.pairs import foreign_jsonl

    tokenizer = Tokenizer(options.tokenizer) if options.tokenizer else None
    if str(options.output) == "-":
        counts, without = foreign_jsonl.write(data, sys.stdout, tokenizer=tokenizer, tell=tell)
    else:
        refuse_existing(options.output, options.force)
        with staged_file(options.output) as stage, stage.open("w", encoding="utf-8") as file:
            counts, without = foreign_jsonl.write(data, file, tokenizer=tokenizer, tell=tell)
    if without:
        _LOG.warning("%s conversations without text: it would give other ids with %s", without, options.tokenizer)
    return counts


_WRITERS = {"pai": _pai, "bridge": _bridge, "jsonl": _jsonl}


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-export-data; the exit status."""
    return run(Options, export_data, prog="mp-export-data", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
