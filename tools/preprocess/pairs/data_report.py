"""What mp-inspect-data tells of a pair: JSON values, and the same for people."""

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any

from megapatch.models.commit import digest
from megapatch.models.data_formats import Described
from megapatch.models.indexed_data import Index, bin_path, idx_path
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.pairs import colours
from megapatch.tools.preprocess.pairs.data_scan import Scan

CORE_UINT16 = 65_536  # most ids that token_dtype_code of megatron-core 0.16.1 takes for uint16
_NUM_SOURCES = 10  # shown to people

_TOLD = {  # what is shown of a manifest, and under which name
    "tokenizer": "tokenizer",
    "template": "template",
    "options": "options",
    "engine": "engine",
    "special_in_text": "special",
    "counts": "counts",
    "truncation": "cut",
}


@dataclass(frozen=True)
class Reference:
    """What ids are held against: ``eod_id`` and ``vocab_size``, None where neither tokenizer nor manifest says it."""

    vocab_size: int | None
    eod_id: int | None


UNKNOWN = Reference(None, None)


def reference(manifest: Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> Reference:
    """The given tokenizer's numbers, else the manifest's."""
    said = (manifest or {}).get("tokenizer") or {}
    if tokenizer is None:
        return Reference(said.get("vocab_size"), said.get("eod_id"))
    return Reference(tokenizer.vocab_size, said.get("eod_id") if said.get("eod_id") is not None else tokenizer.eod_id)


def report(prefix: str, data: Described, index: Index, found: Scan, known: Reference) -> dict[str, Any]:
    """All that is told of a pair but its manifest and its mask."""
    part = {name: one for name, one in (("part_of", data.whole), ("holds", data.held(""))) if data.end and one}
    with_tokens = index.num_documents - found.empty
    eod = None
    if known.eod_id is not None:
        rate = found.ends / with_tokens if with_tokens else None
        eod = {"id": known.eod_id, "documents": found.ends, "rate": rate, "inside": found.eods - found.ends}
    return {
        "prefix": prefix,
        "format": data.form,
        **part,
        "dtype": index.dtype.name,
        "sequences": index.num_sequences,
        "documents": index.num_documents,
        "empty_documents": found.empty,
        "tokens": index.num_tokens,
        "bytes": {"bin": bin_path(prefix).stat().st_size, "idx": idx_path(prefix).stat().st_size},
        "lengths": found.lengths.summary(),
        "ids": {"smallest": found.smallest, "largest": found.largest, "vocab_size": known.vocab_size},
        "eod": eod,
        "notes": notes(data.form, index, known),
        "problems": problems(prefix, found, known),
    }


def notes(form: str, index: Index, known: Reference) -> list[str]:
    """What is right and yet good to know."""
    found = []
    size, dtype = known.vocab_size, index.dtype.name
    if size is not None and size <= CORE_UINT16 and dtype == "int32":
        found.append(
            f"{dtype} for a vocabulary of {size:,}: megatron-core writes int32 from 65,500 ids on, but with "
            f"--per-dataset-sequences-path reads uint16 up to {CORE_UINT16:,}, whatever the .idx says; mp-pretrain "
            "reads this pair rightly, with that flag it would be read as other ids"
        )
    if known.eod_id is None and form == "corpus":
        found.append("no end-of-document token is known here; with --tokenizer, its eos token is looked for")
    return found


def problems(prefix: str, found: Scan, known: Reference) -> list[str]:
    """Why these ids cannot be trained on."""
    size, wrong = known.vocab_size, []
    if found.smallest is not None and found.smallest < 0:
        wrong.append(f"{bin_path(prefix)}: id {found.smallest} is below 0; expected ids of a vocabulary")
    if size is not None and found.largest is not None and found.largest >= size:
        wrong.append(
            f"{bin_path(prefix)}: id {found.largest:,} found, expected ids below the vocabulary of {size:,}; "
            "another tokenizer made it, or it is damaged"
        )
    return wrong


def digest_problems(prefix: str, said: Mapping[str, Any], found: Scan) -> list[str] | None:
    """Files whose content is not what the manifest's xxh3_128 says; None where it says nothing."""
    expected = said.get("xxh3_128")
    if not isinstance(expected, Mapping) or not {"bin", "idx"} <= expected.keys():
        return None
    files = {"bin": (bin_path(prefix), found.digest), "idx": (idx_path(prefix), digest(idx_path(prefix)))}
    return [
        f"{path}: xxh3-128 {has} found, {expected[name]} expected by the manifest; the file was changed or is damaged"
        for name, (path, has) in files.items()
        if has != expected[name]
    ]


def lines(said: Mapping[str, Any], data: Described) -> Iterator[str]:
    """A pair for people: a name and a value a line, and the lengths as bars."""
    sizes, size = said["bytes"], said["lengths"]
    empty = f", {said['empty_documents']:,} of them empty" if said["empty_documents"] else ""
    yield _line("pair", f"{said['prefix']}.bin and .idx, format {said['format']}, {said['dtype']}")
    if data.end:
        yield _line("part", f"of {data.whole}" + (f": {said['holds']}" if "holds" in said else ""))
    yield _line("documents", f"{said['documents']:,}{empty}, in {said['sequences']:,} sequences")
    yield _line("tokens", f"{said['tokens']:,}")
    yield _line("bytes", f"{sizes['bin']:,} in .bin and {sizes['idx']:,} in .idx, which agree")
    if size["max"] is not None:
        yield _line(
            "lengths",
            f"min {size['min']:,}, median {size['median']:,}, mean {size['mean']:,.1f}, p99 {size['p99']:,}, "
            f"max {size['max']:,} tokens",
        )
        yield from bars(size["histogram"])
    yield from _told_of_ids(said)
    if "trained" in said:
        yield _line("trained", f"{said['trained']:,} tokens, {_share(said['trained'], said['tokens'])}")
    yield from _told_of_manifest(data.path, data.manifest)
    for name in ("notes", "problems"):
        yield from (_line(name[:-1].upper() if name == "problems" else "note", text) for text in said[name])


def _told_of_ids(said: Mapping[str, Any]) -> Iterator[str]:
    ids, eod = said["ids"], said["eod"]
    if ids["largest"] is not None:
        size = ids["vocab_size"]
        below = "; no vocabulary is known here" if size is None else f", of a vocabulary of {size:,}"
        below, name = ("", "values") if "holds" in said else (below, "ids")
        yield _line(name, f"{ids['smallest']:,} to {ids['largest']:,}{below}")
    if eod is not None:
        with_tokens = said["documents"] - said["empty_documents"]
        ends = f"id {eod['id']} ends {eod['documents']:,} documents, {_share(eod['documents'], with_tokens)}"
        yield _line("eod", f"{ends}; {eod['inside']:,} inside documents")


def _told_of_manifest(path: Path, manifest: Mapping[str, Any] | None) -> Iterator[str]:
    if manifest is None:
        yield _line("manifest", "none: another program made the pair, or the manifest was lost")
        return
    yield _line("manifest", f"{path}, by {manifest.get('tool', 'an unnamed tool')}")
    for key, name in _TOLD.items():
        said = manifest.get(key)
        counted = Counter(_pairs(one) for one in (said if isinstance(said, list) else [said]) if one)
        of = _of_runs(manifest) if key == "counts" else ""
        yield from (
            _line(name, f"{of}{times} x: {text}" if times > 1 else f"{of}{text}") for text, times in counted.items()
        )
    sources = manifest.get("sources")
    yield from _told_of_sources(sources if isinstance(sources, Mapping) else {})
    if inputs := manifest.get("inputs"):
        total = sum(one.get("bytes") or 0 for one in inputs)
        yield _line("inputs", f"{len(inputs):,} files, {total:,} bytes")


def _of_runs(manifest: Mapping[str, Any]) -> str:
    """Whose counts they are, where not those of the pair alone."""
    if outputs := manifest.get("outputs"):
        return f"of the whole run, which wrote {len(outputs)} pairs: "
    own = [manifest.get(name) for name in ("documents", "tokens")]
    counts = manifest.get("counts") or {}
    differ = "runs" in manifest and own != [counts.get(name) for name in ("documents", "tokens")]
    return "of the whole runs, of which not all or more than one pair is here: " if differ else ""


def _told_of_sources(sources: Mapping[str, Any]) -> Iterator[str]:
    """Those with the most tokens; all of them are in the manifest."""
    shown = nlargest(_NUM_SOURCES, sources, key=lambda name: (sources[name] or {}).get("tokens", 0))
    for name in shown:
        yield _line("source", f"{name}: {_pairs(sources[name])}")
    if len(shown) < len(sources):
        yield _line("source", f"and {len(sources) - len(shown):,} more with fewer tokens, named in the manifest")


def _pairs(said: Any) -> str:
    """An object as words, without what says nothing."""
    if not isinstance(said, Mapping):
        return f"{said:,}" if type(said) is int else str(said)
    given = {key: one for key, one in said.items() if one not in (None, "", [], {})}
    return ", ".join(f"{key.replace('_', ' ')} {_value(one)}" for key, one in given.items())


def _value(one: Any) -> str:
    if isinstance(one, Mapping):
        return " ".join(f"{one[key]}" for key in one if one[key] not in (None, "", [], {}))
    return " ".join(map(str, one)) if isinstance(one, list) else _pairs(one)


def _line(name: str, text: str) -> str:
    """A name and its text, which goes on below itself where it is long."""
    wide = max(60, min(120, shutil.get_terminal_size((120, 0)).columns)) - 10
    parts = textwrap.wrap(colours.printable(text), wide, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(f"{name if not i else '':<10}{part}" for i, part in enumerate(parts))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "of none"


def bars(histogram: list[list[int]]) -> Iterator[str]:
    """The histogram, a bar a line; green on a terminal."""
    most = max(count for _, _, count in histogram)
    total = sum(count for _, _, count in histogram)
    labels = [f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high, _ in histogram]
    wide, digits = max(map(len, labels)), len(f"{most:,}")
    room = max(10, min(120, shutil.get_terminal_size().columns) - 10 - wide - digits - 14)
    coloured, full = colours.wanted(), "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    for label, (_, _, count) in zip(labels, histogram, strict=True):
        bar = full * max(bool(count), round(room * count / most))
        shown = colours.paint(bar, colours.GREEN) if coloured and bar else bar
        yield f"{'':10}{label:>{wide}}  {count:>{digits},}  {100 * count / total:6.2f} %  {shown}".rstrip()
