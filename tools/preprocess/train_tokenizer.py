"""mp-train-tokenizer: a byte-level BPE tokenizer from text, as a Hugging Face folder."""

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from megapatch.models.cli import UserError, opt, run
from megapatch.models.commit import refuse_existing, staged_file, staged_folder
from megapatch.tools.preprocess.reading.bad_lines import BadLines
from megapatch.tools.preprocess.reading.inputs import InputOptions, Source, chunks, find_sources, total_bytes
from megapatch.tools.preprocess.reading.records import Tally, read_records, text_of
from megapatch.tools.preprocess.run.ledger import Ledger
from megapatch.tools.preprocess.run.progress import Progress
from megapatch.tools.preprocess.tokenizer_files import CHATML_TOKENS, read_template, side_files

_LOG = logging.getLogger("megapatch.tools.preprocess")
_CHUNK_BYTES = 1 << 20
_NUM_BYTES = 256  # every byte is a token, so that any text can be encoded
# How text is cut into words before merging: contractions, letters with one character before them, single digits,
# punctuation, line ends, spaces. The pattern of the Qwen2 tokenizer.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXAMPLES = """examples:
  mp-train-tokenizer --input /usr/lib/python3.11 --glob '*.py' --on-bad-line skip --vocab-size 8192 --output tok
  mp-train-tokenizer --input 'wiki/*.jsonl.gz' books.jsonl --vocab-size 32000 --chat-template chatml --output tok"""


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
    chat_template: str = opt(
        "chatml: add <|im_start|> and <|im_end|>, and the template that puts them around messages; FILE: that Jinja "
        "template, whose own markers --special-tokens must name",
        "none",
        metavar="none|chatml|FILE",
    )
    min_frequency: int = opt("how often a pair must occur to be merged", 2, metavar="TIMES")
    output: Path = opt("folder to make", metavar="DIR")
    force: bool = opt("replace the folder if it exists", False)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return [*self.special_tokens, *(CHATML_TOKENS if self.chat_template == "chatml" else ())]


def train_tokenizer(options: Options) -> None:
    """Learn from all inputs, then write the folder; nothing is written if that fails."""
    refuse_existing(options.output, options.force)
    template = read_template(options.chat_template, options.all_special)
    sources = find_sources(options)
    ledger = Ledger(options.on_bad_line)
    with Quarantine(options, sources) as quarantine:
        backend = learn(options, sources, ledger, quarantine)
        found = backend.get_vocab_size()
        if found < options.vocab_size:
            _LOG.warning(
                "%s tokens learned, %s asked: the text has no more pairs that occur %s times",
                f"{found:,}",
                f"{options.vocab_size:,}",
                options.min_frequency,
            )
        about = describe(options, sources, ledger, found)
        with staged_folder(options.output, tool="mp-train-tokenizer", force=options.force, about=about) as folder:
            backend.save(str(folder / "tokenizer.json"))
            for name, content in side_files(options.all_special, template).items():
                text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8")
    _LOG.info("%s tokens -> %s", f"{found:,}", options.output)


class Quarantine:
    """The two files of --on-bad-line quarantine=FILE, which appear when the run succeeds."""

    def __init__(self, options: Options, sources: Sequence[Source]) -> None:
        self._bad_lines, self._stack = BadLines(options.quarantine), ExitStack()
        self._files: list[BinaryIO] = []
        read = {os.path.realpath(source.path) for source in sources}
        for path in self._bad_lines.paths:
            if os.path.realpath(path) in read:
                raise UserError(f"{path}: is an input, and would be written over; name another file")
            if path.exists() and not options.force:
                raise UserError(f"{path}: exists already; name another file, or replace it with --force")

    def __enter__(self) -> "Quarantine":
        self._files = [self._stack.enter_context(TemporaryFile()) for _ in self._bad_lines.paths]  # type: ignore[misc]
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        with self._stack:
            for path, file in zip(self._bad_lines.paths, self._files, strict=True):
                if kind is None:
                    file.seek(0)
                    with staged_file(path) as stage, stage.open("wb") as kept:
                        shutil.copyfileobj(file, kept)

    def put(self, tally: Tally, places: Sequence[tuple[str, int | None]]) -> None:
        """Keep the bad lines of a piece."""
        for file, data in zip(self._files, self._bad_lines.notes([tally], places).values(), strict=True):
            file.write(data)


def learn(options: Options, sources: list[Source], ledger: Ledger, quarantine: Quarantine) -> Any:
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
        backend.train_from_iterator(texts(options, sources, ledger, quarantine), trainer)
    ledger.close()
    if not ledger.documents:
        raise UserError(f"no documents in --input ({ledger.line()}); nothing was written")
    return backend


def texts(options: Options, sources: list[Source], ledger: Ledger, quarantine: Quarantine) -> Iterator[str]:
    """The documents of all inputs, one chunk in memory at a time."""
    take, keep = text_of(options.text_key), options.quarantine is not None
    with Progress(total_bytes(sources)) as progress:
        for chunk in chunks(sources, _CHUNK_BYTES, shard=options.part):
            for piece in chunk:
                records = read_records(piece, take, keep_raw=keep)
                quarantine.put(records.tally, ledger.read(records.tally))
                num_empty = sum(not any(found) for found in records.taken)
                ledger.settle(piece.path, {"documents": len(records.taken) - num_empty, "empty": num_empty})
                for found in records.taken:
                    yield from found
            progress.add(chunk.input_bytes)
        _LOG.info("%s; learning merges", progress.line())


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once: the library's training loop never asks Python for signals."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def describe(options: Options, sources: list[Source], ledger: Ledger, vocab_size: int) -> dict[str, Any]:
    """What the folder's manifest says besides its files."""
    return {
        "vocab_size": vocab_size,
        "special_tokens": options.all_special,
        "counts": {name: getattr(ledger, name) for name in ("lines", "documents", "empty", "bad")},
        "inputs": {"files": len(sources), "bytes": total_bytes(sources)},
    }


def main(argv: list[str] | None = None) -> int:
    """Run mp-train-tokenizer; the exit status."""
    return run(Options, train_tokenizer, prog="mp-train-tokenizer", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
