"""mp-train-tokenizer: a byte-level BPE tokenizer from text, as a Hugging Face folder."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megapatch.models.cli import UserError, opt, run
from megapatch.models.commit import refuse_existing, staged_folder
from megapatch.tools.preprocess.inputs import InputOptions, LineNumbers, Source, chunks, find_sources, total_bytes
from megapatch.tools.preprocess.progress import Progress
from megapatch.tools.preprocess.records import Tally, place_of, read_records, text_of

_LOG = logging.getLogger("megapatch.tools.preprocess")
_CHUNK_BYTES = 1 << 20
_MAX_WARNINGS = 10
_NUM_BYTES = 256  # every byte is a token, so that any text can be encoded
# How text is cut into words before merging: contractions, letters with one character before them, single digits,
# punctuation, line ends, spaces. The pattern of the Qwen2 tokenizer.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# The generation tags mark what an assistant says, so that a loss mask can be made from them.
_CHATML = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
EXAMPLES = """examples:
  mp-train-tokenizer --input /usr/lib/python3.11 --glob '*.py' --on-bad-line skip --vocab-size 8192 --output tok
  mp-train-tokenizer --input wiki.jsonl books.jsonl --vocab-size 32000 --chat-template chatml --output tok"""


@dataclass(frozen=True, kw_only=True)
class Options(InputOptions):
    """Learn a byte-level BPE tokenizer and write it as a folder that transformers and all mp- tools load.

    Any text can be encoded and comes back unchanged. The same input and options give the same files.
    """

    vocab_size: int = opt("tokens in all: 256 bytes, the special tokens and what is learned", metavar="TOKENS")
    special_tokens: list[str] = opt(
        "tokens that text is never split into; they get the first ids, and the first one ends a document and pads",
        ["<|endoftext|>"],
        nargs="+",
        metavar="TOKEN",
    )
    chat_template: Literal["none", "chatml"] = opt(
        "chatml: add <|im_start|> and <|im_end|>, and the template that puts them around messages", "none"
    )
    min_frequency: int = opt("how often a pair must occur to be merged", 2, metavar="TIMES")
    output: Path = opt("folder to make", metavar="DIR")
    force: bool = opt("replace the folder if it exists", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quarantine:
            raise ValueError(f"--on-bad-line {self.on_bad_line}: a tokenizer keeps no bad lines; expected fail or skip")
        least = _NUM_BYTES + len(self.all_special)
        if self.vocab_size < least:
            raise ValueError(f"--vocab-size {self.vocab_size}: expected {least} or more (256 bytes and special tokens)")
        if len(set(self.all_special)) < len(self.all_special) or not all(self.all_special):
            raise ValueError(f"--special-tokens {' '.join(self.special_tokens)}: one is empty or named twice")
        if self.min_frequency < 1:
            raise ValueError(f"--min-frequency {self.min_frequency}: expected 1 or more")

    @property
    def all_special(self) -> list[str]:
        """The special tokens in the order of their ids."""
        return [*self.special_tokens, *(_CHATML_TOKENS if self.chat_template == "chatml" else ())]


@dataclass
class Counts:
    """lines (or rows, or texts) = documents + empty + bad; bad ones are told with their place."""

    lines: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0
    _numbers: LineNumbers = field(default_factory=LineNumbers)

    def add(self, tally: Tally, on_bad_line: str) -> None:
        """Count a piece; under 'fail' its first bad line is a UserError."""
        for bad in tally.bad if self.bad < _MAX_WARNINGS else ():
            where = f"{place_of(bad, tally.piece, self._numbers)}: {bad.reason}"
            if on_bad_line == "fail":
                raise UserError(f"{where}; mend it, or leave it out with --on-bad-line skip")
            _LOG.warning("%s; skipped", where)
        self.lines += tally.num_lines
        self.empty += tally.num_blank
        self.bad += tally.num_bad

    def close(self) -> None:
        """Check that the counts add up, and say how many bad lines were left out."""
        assert self.lines == self.documents + self.empty + self.bad, f"lines lost: {self}"
        if self.bad:
            _LOG.warning("%s bad lines skipped of %s", f"{self.bad:,}", f"{self.lines:,}")
        if not self.documents:
            raise UserError(f"no documents in --input ({self.empty:,} empty, {self.bad:,} bad); nothing was written")


def train_tokenizer(options: Options) -> None:
    """Learn from all inputs, then write the folder; nothing is written if that fails."""
    refuse_existing(options.output, options.force)
    sources = find_sources(options)
    counts = Counts()
    backend = learn(options, sources, counts)
    found = backend.get_vocab_size()
    if found < options.vocab_size:
        _LOG.warning(
            "%s tokens learned, %s asked: the text has no more pairs that occur %s times",
            f"{found:,}",
            f"{options.vocab_size:,}",
            options.min_frequency,
        )
    about = describe(options, sources, counts, found)
    with staged_folder(options.output, tool="mp-train-tokenizer", force=options.force, about=about) as folder:
        backend.save(str(folder / "tokenizer.json"))
        for name, content in side_files(options).items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    _LOG.info("%s tokens -> %s", f"{found:,}", options.output)


def learn(options: Options, sources: list[Source], counts: Counts) -> Any:
    """A trained tokenizers.Tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=options.all_special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    with interruptible():
        backend.train_from_iterator(texts(options, sources, counts), trainer)
    counts.close()
    return backend


def texts(options: Options, sources: list[Source], counts: Counts) -> Iterator[str]:
    """The documents of all inputs, one chunk in memory at a time."""
    take = text_of(options.text_key)
    with Progress(total_bytes(sources)) as progress:
        for chunk in chunks(sources, _CHUNK_BYTES, shard=options.part):
            for piece in chunk:
                records = read_records(piece, take)
                counts.add(records.tally, options.on_bad_line)
                for found in records.taken:
                    counts.documents += any(found)
                    counts.empty += not any(found)
                    yield from found
            progress.add(chunk.input_bytes)
        _LOG.info("%s documents, %s; learning merges", f"{counts.documents:,}", progress.line())


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once: the library's training loop never asks Python for signals."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def describe(options: Options, sources: list[Source], counts: Counts, vocab_size: int) -> dict[str, Any]:
    """What the folder's manifest says besides its files."""
    return {
        "vocab_size": vocab_size,
        "special_tokens": options.all_special,
        "counts": {name: getattr(counts, name) for name in ("lines", "documents", "empty", "bad")},
        "inputs": {"files": len(sources), "bytes": total_bytes(sources)},
    }


def side_files(options: Options) -> dict[str, Any]:
    """The files beside tokenizer.json, by name: text, or a value to be written as JSON."""
    special = options.all_special
    end = special[0]
    ends = [token for token in (end, "<|im_end|>") if token in special]
    tokens: dict[str, Any] = {"eos_token": end, "pad_token": end}
    if others := [token for token in special if token != end]:
        tokens["additional_special_tokens"] = others
    stop = [special.index(token) for token in ends]
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
        "special_tokens_map.json": tokens,
        "generation_config.json": {
            "eos_token_id": stop if len(stop) > 1 else stop[0],
            "pad_token_id": special.index(end),
        },
    }
    if options.chat_template == "chatml":
        files["chat_template.jinja"] = _CHATML
    return files


def main(argv: list[str] | None = None) -> int:
    """Run mp-train-tokenizer; the exit status."""
    return run(Options, train_tokenizer, prog="mp-train-tokenizer", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
