"""mp-import-data: other projects' conversations as ours: ids, what is trained, and weights."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megapatch.models.cli import Common, UserError, opt, run

if TYPE_CHECKING:
    import numpy as np

    from megapatch.models.packed_rows import Conversation
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.preprocess.pairs.foreign_checks import Counts

_LOG = logging.getLogger("megapatch.tools.preprocess")
_ENDS = ("", "_mask", "_weight")
EXAMPLES = """examples:
  mp-import-data --format pai --input pai/chats --tokenizer tok --output-prefix data/chats
  mp-import-data --format bridge --input packed/*.idx.parquet --tokenizer tok --output-prefix data/chats
  jq -c '{input_ids, loss_mask}' my.jsonl | mp-import-data --format jsonl --input - --tokenizer tok --output-prefix my

pai: Pai-Megatron-Patch's packed SFT rows (.bin/.idx; --input without the suffix). bridge: Megatron-Bridge's packed
  parquet. jsonl: lines of {"input_ids" or "tokens", "loss_mask"} and at most "weights" and "text" (which is not read).
Packed rows are taken apart into conversations, in the order of the rows; padding between conversations goes. What
Megatron-Bridge padded inside a conversation (pad_seq_to_mult) cannot be told from its tokens, and stays."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Read tokenized conversations of another project, and write PREFIX, PREFIX_mask and, with weights, PREFIX_weight.

    Everything is checked: ids against the vocabulary, labels against the tokens that follow, lengths of masks. A file
    that contradicts itself is refused with the place; nothing is written then.
    So is a conversation of which nothing is trained.
    """

    format: Literal["pai", "bridge", "jsonl"] = opt("whose format; see below")
    input: list[str] = opt(
        "prefixes (pai) or files (bridge, jsonl; - is stdin), in this order", nargs="+", metavar="FILE"
    )
    tokenizer: Path = opt("folder of the tokenizer that the ids are of", metavar="DIR")
    trust_remote_code: bool = opt("run Python code of the tokenizer's folder", False)
    output_prefix: Path = opt("path of the pairs written, without .bin and .idx", metavar="PREFIX")
    skip_untrained: bool = opt("leave out conversations without a trained token, and count them", False)
    force: bool = opt("replace files that exist", False)
    json: bool = opt("print counts as one JSON object", False)

    def __post_init__(self) -> None:
        if "-" in self.input and (self.format != "jsonl" or len(self.input) > 1):
            raise ValueError("--input -: only --format jsonl comes from stdin, and alone")
        if any(Path(name).resolve() == self.output_prefix.resolve() for name in self.input):
            raise ValueError(f"--output-prefix {self.output_prefix}: is an input; name another one")


def import_data(options: Options) -> None:
    """Write the pairs and their manifest, or nothing."""
    from megapatch.models.commit import refuse_existing
    from megapatch.models.indexed_data import refuse_suffix
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.preprocess.pairs.foreign_checks import Counts
    from megapatch.tools.preprocess.pairs.staging import staged
    from megapatch.tools.preprocess.run.progress import Progress

    for end in [*(f"{end}{kind}" for end in _ENDS for kind in (".bin", ".idx")), ".manifest.json"]:
        refuse_existing(Path(f"{options.output_prefix}{end}"), options.force)
    if missing := [path for path in _files(options) if not path.is_file()]:
        refuse_suffix(missing[0].with_suffix(""))
        raise UserError(f"{missing[0]}: no such file (--format {options.format} --input {' '.join(options.input)})")
    tokenizer = Tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    counts = Counts()
    found = _conversations(options, counts)
    first = next(found, None)
    if first is None:
        raise UserError(
            f"{' '.join(options.input)}: no conversations{' with a trained token' * bool(counts.untrained)}"
        )
    ends = [end for end in _ENDS if end != "_weight" or first[1].weights is not None]
    without = [end for end in _ENDS if end not in ends]
    with Progress(None) as progress, staged(options.output_prefix, ends, without) as stages:
        lengths = _write(chain([first], found), stages, ends, tokenizer.vocab_size, counts, progress.add)
        said = _manifest(options, tokenizer, counts, _indices(stages, ends, lengths, tokenizer.vocab_size))
        stages[".manifest.json"].write_text(json.dumps(said, indent=1) + "\n")
        line = progress.line()
    told = f"{counts.conversations:,} conversations of {counts.rows:,} rows, {counts.tokens:,} tokens"
    if counts.untrained:
        _LOG.warning("%s conversations without a trained token are left out", f"{counts.untrained:,}")
    _LOG.info("%s (%s trained), %s -> %s", told, f"{counts.trained:,}", line, options.output_prefix)
    if options.json:
        print(json.dumps({"format": options.format, "output_prefix": str(options.output_prefix)} | asdict(counts)))


def _files(options: Options) -> list[Path]:
    """The files that --input names, stdin aside."""
    if options.format == "pai":
        return [Path(f"{name}{end}") for name in options.input for end in (".bin", ".idx")]
    return [Path(name) for name in options.input if name != "-"]


def _conversations(options: Options, counts: "Counts") -> "Iterator[tuple[str, Conversation]]":
    """Those of all inputs, in order, each after its place; of which nothing is trained are refused, or counted."""
    from megapatch.tools.preprocess.pairs import foreign_bridge, foreign_jsonl, foreign_pai

    read = {"pai": foreign_pai.read, "bridge": foreign_bridge.read, "jsonl": foreign_jsonl.read}[options.format]
    for name in options.input:
        for place, one in read(name, counts):
            if one.mask.any():
                yield place, one
            elif not options.skip_untrained:
                raise UserError(f"{place}: no token of it is trained; leave it out, by hand or with --skip-untrained")
            else:
                counts.untrained += 1


def _write(
    found: "Iterator[tuple[str, Conversation]]",
    stages: dict[str, Path],
    ends: Sequence[str],
    vocab_size: int,
    counts: "Counts",
    tell: Callable[..., Any],
) -> "np.ndarray":
    """Write the .bin of every pair; tokens of each conversation [n]."""
    import numpy as np

    from megapatch.models.indexed_data import dtype_for

    dtype, lengths = dtype_for(vocab_size), []
    with ExitStack() as stack:
        files = {end: stack.enter_context(stages[f"{end}.bin"].open("wb")) for end in ends}
        for place, one in found:
            _check(place, one, vocab_size, "_weight" in ends)
            files[""].write(one.ids.astype(dtype).tobytes())
            files["_mask"].write(one.mask.tobytes())
            if one.weights is not None:
                files["_weight"].write(one.weights.tobytes())
            counts.add(one.ids, one.mask)
            lengths.append(len(one.ids))
            tell(len(one.ids) * dtype.itemsize, len(one.ids))
    return np.array(lengths, np.int64)


def _check(place: str, one: "Conversation", vocab_size: int, weighted: bool) -> None:
    if one.ids.size and not 0 <= int(one.ids.min()) <= int(one.ids.max()) < vocab_size:
        raise UserError(
            f"{place}: ids {int(one.ids.min())} to {int(one.ids.max())}, the tokenizer has 0 to "
            f"{vocab_size - 1}; is --tokenizer theirs?"
        )
    if weighted != (one.weights is not None):
        raise UserError(f"{place}: {'no ' if weighted else ''}weights, unlike the first; all or none")


def _indices(stages: dict[str, Path], ends: Sequence[str], lengths: "np.ndarray", vocab_size: int) -> dict[str, Any]:
    """Write the .idx of every pair; what the manifest says of each, by what follows PREFIX."""
    import numpy as np

    from megapatch.models.commit import digest
    from megapatch.models.indexed_data import dtype_for, write_index

    dtypes = {"": dtype_for(vocab_size), "_mask": np.dtype(np.uint8), "_weight": np.dtype(np.float32)}
    said = {}
    for end in ends:
        binary, index = stages[f"{end}.bin"], stages[f"{end}.idx"]
        write_index(index, lengths, dtypes[end])
        digests = {"bin": digest(binary), "idx": digest(index)}
        said[end] = {"dtype": dtypes[end].name, "bin_bytes": binary.stat().st_size, "xxh3_128": digests}
    return said


def _manifest(
    options: Options, tokenizer: "Tokenizer", counts: "Counts", pairs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What PREFIX.manifest.json says, as mp-preprocess-chat says it."""
    from megapatch.models.cli import versions
    from megapatch.models.commit import digest

    inputs = [{"path": str(p), "bytes": p.stat().st_size, "xxh3_128": digest(p)} for p in _files(options)]
    about = {"folder": str(options.tokenizer), "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    return {
        "tool": "mp-import-data",
        "format": "chat",
        "versions": versions(),
        "tokenizer": about | {"eod_id": None, "bos_ids": []},
        "options": {"format": options.format},
        "counts": asdict(counts),
        "inputs": inputs,
        **pairs.pop(""),
        "pairs": pairs,
        "documents": counts.conversations,
        "tokens": counts.tokens,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-import-data; the exit status."""
    return run(Options, import_data, prog="mp-import-data", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
