"""The options of mp-preprocess, and what follows from them: names of outputs, and what is taken of a record."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapatch.models.cli import opt
from megapatch.tools.preprocess.corpus.selection import SelectOptions, shares
from megapatch.tools.preprocess.encoding.contamination import ContaminationOptions
from megapatch.tools.preprocess.encoding.encoder import EncodeOptions, Encoder
from megapatch.tools.preprocess.reading.records import BadRecord, text_of
from megapatch.tools.preprocess.reading.sources import InputOptions
from megapatch.tools.preprocess.run.pipeline import RunOptions

_MAX_NAME = 200  # characters of a source's name


@dataclass(frozen=True, kw_only=True)
class Options(SelectOptions, ContaminationOptions, EncodeOptions, RunOptions, InputOptions):
    """Encode text with a tokenizer into PREFIX.bin and PREFIX.idx, as megatron-core's own builder would, byte for byte.

    PREFIX.manifest.json says which tokenizer, options and inputs made them; `mp-pretrain @PREFIX.args ...` reads them.
    The files do not depend on --workers. All lines are accounted for:
    lines = documents + empty + bad + filtered + duplicate.
    """

    tokenizer: Path = opt("Hugging Face folder with a tokenizer, or a core checkpoint", metavar="DIR")
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)
    source_key: str = opt(
        "count by the value of this key in each object or row (default: by input file)", "", metavar="KEY"
    )
    json: bool = opt("print the manifest on stdout, a list of them where there are several", False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*self.text_key, *([self.source_key] if self.source_key else []))


def prefixes(options: Options) -> list[Path]:
    """The prefix of each output: for each key (named if there are several) each share."""
    keys = [""] if len(options.text_key) == 1 else [f"_{key}" for key in options.text_key]
    return [
        Path(f"{options.output_prefix}{key}{share and f'_{share}'}") for key in keys for share in shares(options.split)
    ]


def arguments_path(options: Options) -> Path:
    """PREFIX.args."""
    return Path(f"{options.output_prefix}.args")


def taker(options: Options, encoder: Encoder) -> Callable[[Any], tuple[str, ...]]:
    """A function from a record to its texts, one a key, and then its source if --source-key is given."""
    texts_of = text_of(options.text_key)
    refuse = encoder.special.refuse if encoder.special.failing else None
    if refuse is None and not options.source_key:
        return texts_of

    def take(value: Any) -> tuple[str, ...]:
        texts = texts_of(value)
        if refuse is not None:
            for text in texts:
                refuse(text)
        return (*texts, _source(value, options.source_key)) if options.source_key else texts

    return take


def missing(key: str) -> str:
    """The source of records that lack the key."""
    return f"(no {key})"


def _source(value: Any, key: str) -> str:
    try:
        return text_of([key])(value)[0][:_MAX_NAME]
    except BadRecord:
        found = value.get(key)
        return missing(key) if found is None else json.dumps(found)[:_MAX_NAME]
