"""mp-pack-data: which conversations lie together in the rows that SFT trains on."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapatch.models.cli import Common, opt, run
from megapatch.models.commit import refuse_existing
from megapatch.models.data_formats import CHATS
from megapatch.models.indexed_data import read_index
from megapatch.models.packing import Plan, check_shape, document_lengths, make_plan, plan_path, refuse_long, write_plan

_LOG = logging.getLogger("megapatch.tools.preprocess")
EXAMPLES = """examples:
  mp-pack-data data/chats --seq-length 4096                  # writes data/chats.pack-4096.npz
  mp-pack-data data/chats --seq-length 32768 --multiple 8    # for --context-parallel-size 4 (2 x 4)

The data stay as they are: a plan is a list of numbers of conversations, made again in a moment for another length.
Conversations are never cut: one that is longer than a row is an error; mp-preprocess-chat cuts or drops such ones."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Plan how conversations share rows of a fixed length, so that (almost) no row holds padding.

    Reads PREFIX.idx of mp-preprocess-chat, writes PREFIX.pack-<seq-length>[-m<multiple>].npz beside it, and prints how
    full the rows are. The same data, options and seed give the same plan.
    """

    prefix: Path = opt("the conversations, PREFIX.bin and PREFIX.idx", flags=["prefix"], metavar="PREFIX")
    seq_length: int = opt("tokens of a row", metavar="TOKENS")
    multiple: int = opt(
        "pad each conversation to a multiple of so many tokens: 2 x --context-parallel-size, or "
        "--tensor-model-parallel-size with --sequence-parallel",
        1,
        metavar="TOKENS",
    )
    seed: int = opt("of the order of rows, and of conversations in a row", 0, metavar="NUMBER")
    force: bool = opt("replace the plan if it exists", False)
    json: bool = opt("print one JSON object instead of lines", False)

    def __post_init__(self) -> None:
        check_shape(self.seq_length, self.multiple)
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")


def pack_data(options: Options) -> None:
    """Make the plan, store it, and print what it is."""
    refuse_existing(plan_path(options.prefix, options.seq_length, options.multiple), options.force)
    started = time.perf_counter()
    lengths = document_lengths(read_index(options.prefix, CHATS))
    refuse_long(options.prefix, lengths, options.seq_length, f"--seq-length {options.seq_length}")
    plan = make_plan(lengths, options.seq_length, multiple=options.multiple, seed=options.seed)
    path = write_plan(options.prefix, plan)
    said = summary(plan, lengths) | {"seconds": round(time.perf_counter() - started, 3)}
    if said["empty"]:
        _LOG.warning("%s: %s conversations without tokens are in no row", options.prefix, f"{said['empty']:,}")
    if options.json:
        print(json.dumps({"plan": str(path)} | said))
    else:
        print("\n".join([str(path), *lines(said)]))


def summary(plan: Plan, lengths: np.ndarray) -> dict[str, Any]:
    """Counts of a plan for conversations of ``lengths`` [n]: tokens + padding = rows x seq_length."""
    each, room = np.diff(plan.bounds), plan.num_rows * plan.seq_length
    tokens = int(lengths.sum())
    return {
        "rows": plan.num_rows,
        "seq_length": plan.seq_length,
        "multiple": plan.multiple,
        "conversations": len(plan.order),
        "empty": len(lengths) - len(plan.order),
        "tokens": tokens,
        "padding": room - tokens,
        "fill_percent": round(100 * tokens / room, 4) if room else 0.0,
        "least_per_row": int(each.min()) if len(each) else 0,
        "most_per_row": int(each.max()) if len(each) else 0,
    }


def lines(said: dict[str, Any]) -> list[str]:
    """The summary for people."""
    mean = said["conversations"] / max(said["rows"], 1)
    return [
        f"  {said['rows']:,} rows of {said['seq_length']:,} tokens, {said['fill_percent']:.3f} % full "
        f"({said['tokens']:,} tokens, {said['padding']:,} padding)",
        f"  {said['conversations']:,} conversations, {mean:.2f} a row ({said['least_per_row']:,} to "
        f"{said['most_per_row']:,})",
        f"  {said['seconds']:.3f} s",
    ]


def main(argv: list[str] | None = None) -> int:
    """Run mp-pack-data; the exit status."""
    return run(Options, pack_data, prog="mp-pack-data", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
