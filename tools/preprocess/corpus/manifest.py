"""What mp-preprocess says beside its outputs: a manifest each, and arguments for the trainer."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megapatch.models.cli import versions
from megapatch.models.commit import digest
from megapatch.models.indexed_data import manifest_path
from megapatch.tools.preprocess.corpus.options import Options, arguments_path, prefixes
from megapatch.tools.preprocess.corpus.selection import shares
from megapatch.tools.preprocess.encoding.contamination import Spoiled
from megapatch.tools.preprocess.encoding.encoder import Encoder
from megapatch.tools.preprocess.encoding.watch import Watch
from megapatch.tools.preprocess.run.job import Written
from megapatch.tools.preprocess.run.ledger import Ledger

# Whatever else there is decides the bytes.
_NO_MATTER = (
    "verbose input glob tokenizer trust_remote_code output_prefix workers resume force json on_bad_line".split()
)
_FLAGS = {"": "--data-path", "train": "--data-path", "valid": "--valid-data-path", "test": "--test-data-path"}


def told(options: Options) -> dict[str, Any]:
    """The options that decide the bytes, as JSON values."""
    values = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in _NO_MATTER}
    return json.loads(json.dumps(values, default=str))  # paths


def identity(options: Options, encoder: Encoder) -> dict[str, Any]:
    """All that decides the bytes besides the inputs."""
    watch = encoder.watch()
    return {
        "tool": "mp-preprocess",
        "tokenizer": encoder.reference.tokenizer.digest,
        "engine": [watch.engine, watch.version, watch.reference],
        **told(options),
        "contamination": [digest(path) for path in options.contamination],
    }


def manifests(
    options: Options,
    encoder: Encoder,
    ledger: Ledger,
    watch: Watch,
    spoiled: Spoiled | None,
    written: Sequence[Written],
    inputs: Sequence[Mapping[str, Any]],
) -> dict[Path, bytes]:
    """The manifest of each output, and PREFIX.args, by path."""
    tokenizer, around = encoder.reference.tokenizer, encoder.around
    common = {
        "tool": "mp-preprocess",
        "format": "corpus",
        "versions": versions(),
        "tokenizer": {
            "folder": str(options.tokenizer),
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": around.after[-1] if around.after else None,
            "bos_ids": list(around.before),
        },
        "options": told(options) | {"on_bad_line": options.on_bad_line},
        "engine": watch.verdict(),
        "special_in_text": watch.special,
        "contamination": spoiled and {"documents": spoiled.documents, "examples": spoiled.examples},
        "counts": ledger.counts(),
        "sources": ledger.sources,
        "inputs": list(inputs),
        **(
            {"outputs": [str(one.output.prefix) for one in written]} if len(written) > 1 else {}
        ),  # all with one's counts
    }
    files = {
        manifest_path(one.output.prefix): _json(
            common | one.about | {"documents": one.num_sequences, "tokens": one.num_elements}
        )
        for one in written
    }
    return files | {arguments_path(options): _arguments(options)}


def _arguments(options: Options) -> bytes:
    """The trainer's options for these data, one a line."""
    lines = []
    names = prefixes(options)
    for number, share in enumerate(shares(options.split)):
        mine = [str(prefix.absolute()) for prefix in names[number :: len(shares(options.split))]]
        lines.append(shlex.join([_FLAGS[share], *mine]))
    return ("\n".join(lines) + "\n").encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
