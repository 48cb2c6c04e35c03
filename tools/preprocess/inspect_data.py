"""mp-inspect-data: what is in .bin/.idx pairs, whether it is whole, how two differ, what a document says."""

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megapatch.models.cli import FAILED, OK, Common, UserError, opt, run

if TYPE_CHECKING:
    from megapatch.models.data_formats import Described
    from megapatch.models.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-inspect-data data/train                                  # counts, lengths as bars, ends of documents, manifest
  mp-inspect-data data/train --verify && echo good            # every byte against the manifest, every id
  mp-inspect-data data/train --document 0 -1                  # the first and the last document, decoded
  mp-inspect-data data/chats --mask --document 3              # trained tokens green, or in «» without colours
  mp-inspect-data old/train --diff new/train                  # the first difference; exit status 1 when there is one
  mp-inspect-data wiki code --blend --temperature 2 >blend.args   # then: mp-pretrain @blend.args ...

Special tokens are shown in reverse video, or in ⟦⟧ where stdout is no terminal or NO_COLOR is set.
--json prints one JSON value for all prefixes: a list of reports; with --document or --mask a list of {prefix, document,
tokens, spans}; with --diff and --blend an object."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Tell what is in pairs PREFIX.bin and PREFIX.idx. Files are read once, from start to end, and never loaded whole.

    Exit status 1 when a pair is damaged, has ids outside its vocabulary, or differs from what it is compared with.
    """

    prefix: list[str] = opt("paths of pairs, without .bin and .idx", flags=["prefix"], nargs="+", metavar="PREFIX")
    tokenizer: Optional[Path] = opt(
        "folder of the tokenizer, for decoding and for its vocabulary and end of documents, if not the manifest's",
        None,
        metavar="DIR",
    )
    verify: bool = opt("compare the content of the files with the digests in the manifest, too", False)
    document: list[int] = opt(
        "show these documents as text, counted from 0; -1 is the last", [], nargs="+", metavar="N", type=int
    )
    mask: bool = opt("show which tokens are trained, from PREFIX_mask (in document 0 without --document)", False)
    diff: Optional[str] = opt("compare with this pair", None, metavar="OTHER")
    blend: bool = opt("print --data-path for mp-pretrain with weights by tokens, in the form of an @file", False)
    temperature: Optional[float] = opt(
        "for --blend: weights are tokens to the power 1/T; above 1, small pairs count for more", None, metavar="T"
    )
    json: bool = opt("print JSON", False)
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)

    def __post_init__(self) -> None:
        ways = {"--verify": self.verify, "--document or --mask": bool(self.document) or self.mask}
        ways |= {"--diff": self.diff is not None, "--blend": self.blend}
        if len(given := [name for name, there in ways.items() if there]) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        if self.diff is not None and len(self.prefix) != 1:
            raise ValueError(f"--diff compares one prefix with another; {len(self.prefix)} were given")
        if self.temperature is not None and not self.blend:
            raise ValueError("--temperature needs --blend")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: expected a number above 0")


def inspect(options: Options) -> int:
    """Print what is asked for; 1 when something is wrong or differs."""
    if options.blend:
        return _blend(options)
    if options.diff is not None:
        return _diff(options, options.prefix[0], options.diff)
    if options.document or options.mask:
        return _documents(options)
    return _reports(options)


def _print(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


def _reports(options: Options) -> int:
    from megapatch.models.data_formats import described
    from megapatch.tools.preprocess.pairs.data_report import lines

    said: list[dict[str, Any]] = []
    status = OK
    for prefix in options.prefix:
        known = described(prefix)
        for one in _told(known, options):
            if not options.json:
                _print([*([""] if said else []), *lines(one, known)])
            said.append(one | {"manifest": known.manifest})
            status = FAILED if one["problems"] else status
    if options.json:
        print(json.dumps(said, ensure_ascii=False))
    return status


def _told(known: "Described", options: Options) -> list[dict[str, Any]]:
    """A report for each pair of texts under the prefix; a mask is told with its texts, or alone where it is given."""
    from megapatch.models.indexed_data import read_index
    from megapatch.tools.preprocess.pairs.data_report import UNKNOWN, digest_problems, reference, report
    from megapatch.tools.preprocess.pairs.data_scan import scan
    from megapatch.tools.preprocess.run.progress import Progress

    tokenizer, reports = _tokenizer(options, options.tokenizer) if options.tokenizer else None, {}
    ids = reference(known.manifest, tokenizer)
    indexes = {end: read_index(f"{known.prefix}{end}", known.tool) for end in known.ends}
    with Progress(sum(index.num_tokens * index.dtype.itemsize for index in indexes.values())) as progress:
        for end, index in indexes.items():
            name, side = f"{known.prefix}{end}", known.held(end) is not None
            found = scan(name, index, 0 if side else ids.eod_id, progress.add)
            if not side or not end:
                reports[end] = report(name, known, index, found, UNKNOWN if side else ids)
            text = reports[end if end in reports else end.rpartition("_")[0]]
            if name.endswith("_mask") and side:
                text["trained"] = index.num_tokens - found.eods
            if options.verify:
                wrong = digest_problems(name, known.said(end), found)
                text["problems"] += wrong or []
                text["notes"] += [f"{name}: no digests in a manifest to compare with"] if wrong is None else []
    said = (known.manifest or {}).get("tokenizer") or {}
    if tokenizer and known.manifest and said.get("digest") != tokenizer.digest:
        other = f"digest {tokenizer.digest}, expected {said.get('digest')} of the manifest; another tokenizer"
        next(iter(reports.values()))["problems"].append(f"{tokenizer.folder}: {other}")
    return list(reports.values())


def _tokenizer(options: Options, folder: Path) -> "Tokenizer":
    from megapatch.models.tokenizer import Tokenizer

    return Tokenizer(folder, trust_remote_code=options.trust_remote_code)


def _tokenizer_of(known: "Described", options: Options) -> "Tokenizer":
    """The given tokenizer, or that of the manifest."""
    said = ((known.manifest or {}).get("tokenizer") or {}) if options.tokenizer is None else {}
    folder = options.tokenizer or said.get("folder")
    if folder is None:
        found = "no such file, so no tokenizer is named" if known.manifest is None else "names no tokenizer"
        raise UserError(f"{known.path}: {found}; say which with --tokenizer")
    if options.tokenizer is None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder, but {known.path} names it; give --tokenizer")
    tokenizer = _tokenizer(options, Path(folder))
    if said.get("digest", tokenizer.digest) != tokenizer.digest:
        raise UserError(f"{folder}: is no longer the tokenizer that made {known.prefix}; say which is with --tokenizer")
    return tokenizer


def _documents(options: Options) -> int:
    from megapatch.models.data_formats import described, parallel
    from megapatch.models.indexed_data import IndexedDocuments
    from megapatch.tools.preprocess.pairs import colours
    from megapatch.tools.preprocess.pairs.show_document import Decoder, as_json, rendered

    said = []
    for known in map(described, options.prefix):
        if held := known.held(""):
            raise UserError(f"{known.prefix}: holds no text, but {held}; give {known.whole}")
        texts = [end for end in known.ends if known.held(end) is None]
        pairs = {f"{known.prefix}{end}": IndexedDocuments(f"{known.prefix}{end}", known.tool) for end in texts}
        decoder = Decoder(_tokenizer_of(known, options))
        for name, data in pairs.items():
            mask = parallel(data, name, "_mask") if options.mask else None
            answers = IndexedDocuments(f"{name}_answer") if "_answer" in known.ends else None
            for number in options.document or [0]:
                if not -len(data) <= number < len(data):
                    raise UserError(f"--document {number}: {name} has {len(data):,} documents, counted from 0")
                spans = decoder.spans(data[number], None if mask is None else mask[number])
                one = {"prefix": name, "document": number % len(data), "tokens": len(data[number])}
                if answers is not None:
                    one["answer"] = bytes(answers[number]).decode(errors="replace")
                if not options.json:
                    _print(_shown(one, rendered(spans, colours.wanted())))
                said.append(one | {"spans": as_json(spans)})
    if options.json:
        print(json.dumps(said, ensure_ascii=False))
    return OK


def _shown(one: dict[str, Any], text: str) -> list[str]:
    from megapatch.tools.preprocess.pairs.colours import printable

    title = f"{one['prefix']} document {one['document']}: {one['tokens']:,} tokens"
    return [title, text, *([f"answer: {printable(one['answer'])}"] if "answer" in one else []), ""]


def _diff(options: Options, prefix: str, other: str) -> int:
    from megapatch.models.data_formats import described
    from megapatch.models.indexed_data import IndexedDocuments
    from megapatch.tools.preprocess.pairs.data_diff import compare, lines, told
    from megapatch.tools.preprocess.pairs.show_document import Decoder

    known = described(prefix)
    named = options.tokenizer or (known.manifest or {}).get("tokenizer")
    said = []
    for end in known.ends:
        names = (f"{prefix}{end}", f"{other}{end}")
        pair = IndexedDocuments(names[0], known.tool), IndexedDocuments(names[1], known.tool)
        found = compare(*pair)
        text = known.held(end) is None
        decoder = Decoder(_tokenizer_of(known, options)) if found.first and named and text else None
        said.append(told(names, pair, found, decoder))
        if not options.json:
            _print(lines(said[-1]))
    if options.json:
        print(json.dumps(said[0] if len(said) == 1 else said, ensure_ascii=False))
    return OK if all(one["same"] for one in said) else FAILED


def _blend(options: Options) -> int:
    import shlex

    from megapatch.tools.preprocess.pairs.data_blend import weights

    found = weights(options.prefix, options.temperature or 1.0)
    if options.json:
        print(json.dumps({"data_path": [word for prefix, weight in found.items() for word in (weight, prefix)]}))
    else:
        words = [word for prefix, weight in found.items() for word in (f"{weight:.6g}", shlex.quote(prefix))]
        print("--data-path", *words)
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-inspect-data; the exit status."""
    return run(Options, inspect, prog="mp-inspect-data", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
