"""mp-train-tokenizer: a byte-level BPE tokenizer from text, as a Hugging Face folder."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megapatch.models.cli import opt, run
from megapatch.models.commit import refuse_existing, staged_folder
from megapatch.tools.preprocess.inputs import InputOptions, Source, chunks, find_sources, total_bytes
from megapatch.tools.preprocess.ledger import Counts, Ledger
from megapatch.tools.preprocess.progress import Progress
from megapatch.tools.preprocess.records import read_documents

_LOG = logging.getLogger("megapatch.tools.preprocess")
_CHUNK_BYTES = 1 << 20
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
  mp-train-tokenizer --input /usr/lib/python3.11 --glob '*.py' --on-bad-input skip --vocab-size 8192 --output tok
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


def train_tokenizer(options: Options) -> None:
    """Learn from all inputs, then write the folder; nothing is written if that fails."""
    refuse_existing(options.output, options.force)
    sources = find_sources(options)
    ledger = Ledger(options.on_bad_input)
    backend = learn(options, sources, ledger)
    found = backend.get_vocab_size()
    if found < options.vocab_size:
        _LOG.warning(
            "%s tokens learned, %s asked: the text has no more pairs that occur %s times",
            f"{found:,}",
            f"{options.vocab_size:,}",
            options.min_frequency,
        )
    about = describe(options, sources, ledger.counts, found)
    with staged_folder(options.output, tool="mp-train-tokenizer", force=options.force, about=about) as folder:
        backend.save(str(folder / "tokenizer.json"))
        for name, content in side_files(options).items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    _LOG.info("%s tokens -> %s", f"{found:,}", options.output)


def learn(options: Options, sources: list[Source], ledger: Ledger) -> Any:
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
        backend.train_from_iterator(texts(options, sources, ledger), trainer)
    ledger.close()
    return backend


def texts(options: Options, sources: list[Source], ledger: Ledger) -> Iterator[str]:
    """The documents of all inputs, one chunk in memory at a time."""
    with Progress(total_bytes(sources)) as progress:
        for chunk in chunks(sources, _CHUNK_BYTES):
            for piece in chunk:
                found, tally = read_documents(piece, options.json_key)
                ledger.add(tally)
                ledger.counts.empty += found.count("")
                ledger.counts.documents += len(found) - found.count("")
                progress.add(piece.size)
                yield from found
        _LOG.info("%s documents, %s; learning merges", f"{ledger.counts.documents:,}", progress.line())


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
    read = {name: count for name, count in asdict(counts).items() if name in ("records", "documents", "empty", "bad")}
    return {
        "vocab_size": vocab_size,
        "special_tokens": options.all_special,
        "counts": read,
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
