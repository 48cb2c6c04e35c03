"""mp-score: held-out perplexity, and accuracy on questions with known answers."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megapatch.models.cli import UserError, opt, run
from megapatch.tools.generate.options import Templating

EXAMPLES = """examples:
  mp-score --model run --data validation
  mp-score --model Qwen3-0.6B --text book.txt articles.jsonl --window 2048 --stride 512
  mp-score --model run --tasks arc.jsonl gsm.jsonl --extract '#### (-?[0-9]+)' --samples answers.jsonl
--data, --text: every document by itself. A window reads so many tokens; the first one scores them all, each further one
  only the next --stride tokens, which see the --window tokens before the last of them. Before a document stands bos
  of the tokenizer, else eos, so that the first token is scored, too; --no-prefix leaves both out
--tasks, JSON lines, of either kind, with optional id:
  {"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}   the likeliest choice; answer: its number from 0 or text
  {"prompt": "2 + 2 =", "answer": "4"}     generated, greedy; answer may be a list of right ones; optional
                                           max_new_tokens, stop
  {"messages": [{"role": "user", "content": "2 + 2?"}], ...}     through the chat template, instead of prompt
  A choice is appended to the prompt as it stands, blanks included. accuracy_norm: likeliest for its length
output, JSON lines: a row for each file and measure, with counts and standard errors (over documents or questions)"""
_WINDOW = 2048


@dataclass(frozen=True, kw_only=True)
class Options(Templating):
    """Perplexity of held-out data, and accuracy on multiple-choice and exact-match questions.

    Log-likelihoods are those of transformers within 1e-5 in fp32. Start as many processes as the layout needs.
    """

    data: list[str] = opt("prefixes of .bin/.idx data", [], nargs="+", metavar="PREFIX")
    text: list[str] = opt("files of text, one document each; .jsonl: one a line", [], nargs="+", metavar="FILE")
    text_key: str = opt("field of a .jsonl line of --text that holds the text", "text")
    tasks: list[str] = opt("files of questions, JSON lines as below", [], nargs="+", metavar="FILE")
    samples: Optional[str] = opt("file for a row for each document and question", None, metavar="FILE")
    force: bool = opt("replace --samples that exist", False)
    limit: Optional[int] = opt("only so many first documents or questions of each file", None)
    window: Optional[int] = opt(f"tokens that are read at a time (default: the model's, at most {_WINDOW})", None)
    stride: Optional[int] = opt("tokens that are scored in each window but the first (default: --window)", None)
    no_prefix: bool = opt("put no token before a document", False)
    max_new_tokens: int = opt("most tokens to generate for an exact match", 128)
    stop: list[str] = opt(
        "a string that ends a generated answer, besides the end of the model's text; may be repeated",
        [],
        nargs=1,
        repeat=True,
        metavar="TEXT",
    )
    extract: Optional[str] = opt(
        "regular expression; its last match in a generated text, or its first group, is the answer", None
    )
    ignore_case: bool = opt("compare answers without regard to case", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.data or self.text or self.tasks):
            raise ValueError("expected --data, --text or --tasks")
        for flag in ("limit", "window", "stride", "max_new_tokens"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
        if self.stride and self.window and self.stride > self.window:
            raise ValueError(f"--stride {self.stride} is more than --window {self.window}")
        _ = self.pattern

    @property
    def match(self) -> Any:
        """How generated answers are compared."""
        from megapatch.tools.generate.questions import Match

        return Match(self.pattern, self.ignore_case)

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """--extract."""
        try:
            return re.compile(self.extract) if self.extract else None
        except re.error as error:
            raise ValueError(f"--extract {self.extract}: not a regular expression ({error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-score; returns the exit status."""
    return run(Options, score, prog="mp-score", epilog=EXAMPLES, argv=argv)


def score(options: Options) -> None:
    """Read all files, load the model, and write a row for each result."""
    from megapatch.tools.generate import loading
    from megapatch.tools.generate.journal import Journal, refuse_existing
    from megapatch.tools.generate.scoring import Scorer

    first = os.environ.get("RANK", "0") == "0"
    target = options.samples if first else None
    if target is not None:
        refuse_existing(target, force=options.force, resume=False)
    source = loading.find(options)
    reader = _reader(options, source)
    files = [*_documents(options, source), *_questions(options, reader)]
    with ExitStack() as stack:
        samples = stack.enter_context(Journal(target, {}, force=options.force)).write if target is not None else None
        device = stack.enter_context(loading.processes(options))
        chunks = loading.load(options, source, device)
        longest = max(file.longest(reader) for file in files)
        scorer = Scorer(loading.engine(options, source, chunks, longest), reader, options.match, samples, first)
        for file in files:
            for row in scorer.score(file):
                if first:
                    print(json.dumps(row, ensure_ascii=False), flush=True)


def _reader(options: Options, source: Any) -> Any:
    from megapatch.models.request import Sampling
    from megapatch.tools.generate.loading import renderer
    from megapatch.tools.generate.prompts import Reader

    tokenizer = source.tokenizer
    return Reader(
        tokenizer=tokenizer,
        vocab_size=source.vocab_size,
        max_length=source.max_length,
        sampling=Sampling(
            max_new_tokens=options.max_new_tokens,
            stop=tuple(options.stop),
            stop_token_ids=tuple(tokenizer.stop_ids),
        ),
        renderer=renderer(options, tokenizer),
        add_bos=bool(tokenizer.prefix_ids),
    )


def _documents(options: Options, source: Any) -> list[Any]:
    """What --data and --text name."""
    from megapatch.tools.generate import held_out

    if not (options.data or options.text):
        return []
    tokenizer, window = source.tokenizer, options.window or min(source.max_length, _WINDOW)
    if window > source.max_length:
        raise UserError(f"--window {window}: the model takes {source.max_length} tokens")
    stride = options.stride or window
    if stride > window:
        raise UserError(f"--stride {stride} is more than the window, {window} tokens")
    prefix = None if options.no_prefix else tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    cutting = held_out.Cutting(window, stride, prefix)
    texts = [
        (name, held_out.of_text(Path(name), options.text_key, tokenizer.encode, options.limit)) for name in options.text
    ]
    data = [(name, held_out.of_data(Path(name), options.limit)) for name in options.data]
    return [held_out.File(name, documents, cutting, source.vocab_size) for name, documents in [*data, *texts]]


def _questions(options: Options, reader: Any) -> list[Any]:
    """What --tasks names."""
    from megapatch.tools.generate import questions

    return [questions.File(name, questions.read(Path(name), reader, options.limit)) for name in options.tasks]


if __name__ == "__main__":
    raise SystemExit(main())
