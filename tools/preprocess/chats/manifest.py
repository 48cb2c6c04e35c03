"""What mp-preprocess-chat says beside its outputs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import xxhash

from megapatch.models.chat import Renderer
from megapatch.models.cli import versions
from megapatch.models.indexed_data import manifest_path
from megapatch.tools.preprocess.chats.options import Options
from megapatch.tools.preprocess.chats.work import Worker
from megapatch.tools.preprocess.run.job import Written

if TYPE_CHECKING:
    from megapatch.tools.preprocess.chats.job import ChatJob

# Whatever else there is decides the bytes.
_NO_MATTER = (
    "verbose input glob tokenizer trust_remote_code output_prefix workers resume force json on_bad_line".split()
)


def told(options: Options) -> dict[str, Any]:
    """The options that decide the bytes, as JSON values."""
    return {one.name: getattr(options, one.name) for one in fields(options) if one.name not in _NO_MATTER}


def identity(options: Options, worker: Worker) -> dict[str, Any]:
    """All that decides the bytes besides the inputs."""
    watch = worker.encoder.watch()
    return {
        "tool": "mp-preprocess-chat",
        "tokenizer": worker.encoder.reference.tokenizer.digest,
        "engine": [watch.engine, watch.version, watch.reference],
        "jinja2": jinja2.__version__,
        **told(options),
        "template": template_digest(worker.texts.renderer),
    }


def template_digest(renderer: Renderer) -> str:
    """xxh3-128 of the text of the template, and of that for tools."""
    texts = [one.text for one in (renderer.template, renderer.with_tools) if one is not None]
    return str(xxhash.xxh3_128_hexdigest("\0".join(texts).encode()))


def manifest(
    job: "ChatJob", worker: Worker, written: Sequence[Written], inputs: Sequence[Mapping[str, Any]]
) -> dict[Path, bytes]:
    """PREFIX.manifest.json: the pair PREFIX is told of at the top, others under ``pairs`` by what follows PREFIX."""
    options, tokenizer = job.options, worker.encoder.reference.tokenizer
    renderer = worker.texts.renderer
    pairs = {str(one.output.prefix).removeprefix(str(options.output_prefix)): one.about for one in written}
    main = pairs.pop("", {})
    empty = {f"empty_{name}": count for name, count in sorted(job.empty.items())}
    unshown = {f"unshown_{name}": count for name, count in sorted(job.unshown["fields"].items())}
    said = {
        "tool": "mp-preprocess-chat",
        "format": options.format_of_output,
        "versions": versions() | {"jinja2": jinja2.__version__},
        "tokenizer": {
            "folder": str(options.tokenizer),
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": None,  # the template ends turns, and nothing is put after a conversation
            "bos_ids": [],
        },
        "template": {
            "name": options.template or "default",
            "xxh3_128": template_digest(renderer),
            "mask": "generation tags" if renderer.template.tagged else "text prefixes",
        },
        "options": told(options) | {"on_bad_line": options.on_bad_line},
        "engine": job.watch.verdict(),
        "special_in_text": job.spelled,
        "counts": job.ledger.counts() | job.counts | empty | unshown | {"trained_share": job.trained_share},
        "unshown": job.unshown,
        "truncation": job.truncation,
        "sources": job.ledger.sources,
        "inputs": list(inputs),
        **main,
        "pairs": pairs,
        "documents": written[0].num_sequences,
        "tokens": job.ledger.tokens,
    }
    return {manifest_path(options.output_prefix): (json.dumps(said, indent=1) + "\n").encode()}
