"""mp-merge-data: several .bin/.idx pairs to one, byte for byte what megatron-core's builder would make of them."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapatch.models.cli import Common, UserError, opt, run

if TYPE_CHECKING:
    from megapatch.tools.preprocess.pairs.append import Appender
    from megapatch.tools.preprocess.pairs.merge_plan import Input

_LOG = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-merge-data --input shards/data_0 shards/data_1 shards/data_2 --output-prefix data/train
  mp-merge-data --input day1 day2 --output-prefix days --dry-run | jq .tokens

Documents come in the order of --input: what --shards N --shard I of preprocessing made, from 0 to N-1, becomes what one
run would have made, byte for byte; shards that are missing or come otherwise (p* of a shell puts p10 before p2) are
told. Chats are merged with their masks, preference data pair by pair.
--dry-run prints an object: output_prefix, format, dtype, documents, tokens, bytes, inputs."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Join pairs of .bin/.idx files, of one dtype and tokenizer, into one. Memory does not grow with the data.

    Each input is compared with the digests of its manifest while it is read. The manifest of the whole adds up the
    counts of the runs that made the inputs, each run once, and keeps what is known of each part. All of the output
    appears at the end, or nothing.
    """

    input: list[str] = opt("paths of pairs, without .bin and .idx, in this order", nargs="+", metavar="PREFIX")
    output_prefix: Path = opt("path of the pair written, without .bin, .idx and .manifest.json", metavar="PREFIX")
    skip_digests: bool = opt(
        "let the kernel copy, without reading: faster only where it shares blocks or a server copies by itself", False
    )
    force: bool = opt("replace files that exist", False)
    dry_run: bool = opt("check the inputs, print what would be written as JSON, and stop", False)

    def __post_init__(self) -> None:
        if any(Path(prefix).resolve() == self.output_prefix.resolve() for prefix in self.input):
            raise ValueError(f"--output-prefix {self.output_prefix}: is also an input; name another one")
        places = [Path(prefix).resolve() for prefix in self.input]
        if twice := [prefix for prefix, place in zip(self.input, places, strict=True) if places.count(place) > 1]:
            raise ValueError(f"--input {twice[-1]}: given twice; give it once (a blend can weigh it higher)")


def merge(options: Options) -> None:
    """Write the pairs and their manifest, or nothing."""
    from megapatch.models.data_formats import PAIRS
    from megapatch.tools.preprocess.pairs.merge_plan import merged, read_inputs
    from megapatch.tools.preprocess.pairs.merge_runs import shard_warnings
    from megapatch.tools.preprocess.pairs.staging import staged
    from megapatch.tools.preprocess.run.progress import Progress

    inputs, prefix = read_inputs(options.input), options.output_prefix
    ends, without = list(inputs[0].pairs), [end for end in PAIRS[inputs[0].form] if end not in inputs[0].pairs]
    _refuse_existing(prefix, [*ends, *without], options.force)
    if unnamed := [one.prefix for one in inputs if not one.tokenizer]:
        _LOG.warning("%s: no tokenizer is named; that of %s will not be known", " ".join(unnamed), prefix)
    for told in shard_warnings([one.manifest or {} for one in inputs]):
        _LOG.warning("--input: %s", told)
    if options.dry_run:
        print(json.dumps(_planned(prefix, inputs)))
        return
    with Progress(sum(one.num_bytes for one in inputs)) as progress, staged(prefix, ends, without) as stages:
        said = {end: _write(inputs, end, stages, progress.add, not options.skip_digests) for end in ends}
        stages[".manifest.json"].write_text(json.dumps(merged(inputs, said), indent=1) + "\n")
        done, documents = progress.line(), sum(one.num_documents for one in inputs)
    _LOG.info("%s documents of %s inputs, %s -> %s.bin", f"{documents:,}", f"{len(inputs):,}", done, prefix)


def _refuse_existing(prefix: Path, ends: Sequence[str], force: bool) -> None:
    from megapatch.models.indexed_data import partial_path
    from megapatch.tools.preprocess.pairs.staging import names

    for path in (Path(f"{prefix}{name}") for name in names(ends)):
        if path.exists() and not force:
            raise UserError(f"{path}: exists already; choose another --output-prefix, or replace it with --force")
    if (partial := partial_path(prefix)).exists():
        raise UserError(
            f"{partial}: a run of mp-preprocess writes {prefix}, or was interrupted; finish or remove it first"
        )


def _planned(prefix: Path, inputs: "Sequence[Input]") -> dict[str, Any]:
    def counts(some: "Sequence[Input]") -> dict[str, Any]:
        names = ("documents", "tokens", "bytes")
        return {name: sum(getattr(one, f"num_{name}") for one in some) for name in names}

    told = {"output_prefix": str(prefix), "format": inputs[0].form}
    told["dtype"] = next(iter(inputs[0].pairs.values())).dtype.name
    return told | counts(inputs) | {"inputs": [{"prefix": one.prefix, **counts([one])} for one in inputs]}


def _write(
    inputs: "Sequence[Input]", end: str, stages: Mapping[str, Path], tell: Callable[[int], Any], digests: bool
) -> dict[str, Any]:
    """Write one pair; what the manifest says of it."""
    from megapatch.models.commit import digest
    from megapatch.models.data_formats import pair_said
    from megapatch.models.indexed_data import bin_path, idx_path, join_indexes
    from megapatch.tools.preprocess.pairs.append import Appender

    binary, index = stages[f"{end}.bin"], stages[f"{end}.idx"]
    with Appender(binary, tell, digests=digests) as target:
        for one in inputs:
            if end in one.implied:
                _imply(target, one, end)
                continue
            prefix, pair = f"{one.prefix}{end}", one.pairs[end]
            found = target.add(bin_path(prefix), pair.num_tokens * pair.dtype.itemsize)
            said = pair_said(one.manifest, end).get("xxh3_128") or {}
            if digests:
                _compare(bin_path(prefix), found, said.get("bin", found))
                _compare(idx_path(prefix), digest(idx_path(prefix)) if "idx" in said else None, said.get("idx"))
    join_indexes(index, [one.pairs[end] for one in inputs])
    about = {"dtype": inputs[0].pairs[end].dtype.name, "bin_bytes": binary.stat().st_size}
    return about | ({"xxh3_128": {"bin": target.digest, "idx": digest(index)}} if digests else {})


def _imply(target: "Appender", one: "Input", end: str) -> None:
    """Write what a pair that is not there would hold: weights are as the mask; answers have nothing."""
    from megapatch.models.indexed_data import bin_path

    if pair := one.pairs[end] if end == "_weight" else None:
        target.add_as(bin_path(f"{one.prefix}_mask"), pair.num_tokens, pair.dtype)


def _compare(path: Path, found: str | None, expected: str | None) -> None:
    if found != expected:
        raise UserError(
            f"{path}: xxh3-128 {found} found, {expected} expected by its manifest; it was changed or is damaged"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-merge-data; the exit status."""
    return run(Options, merge, prog="mp-merge-data", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
