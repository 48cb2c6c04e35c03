"""mp-generate: continue prompts with a Hugging Face model or a core checkpoint."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from megapatch.models.cli import UserError, opt, run
from megapatch.tools.generate.options import Choosing, Templating

log = logging.getLogger("megapatch.tools.generate")
EXAMPLES = """examples:
  mp-generate --model Qwen3-0.6B --prompt 'The capital of France is' --max-new-tokens 20
  mp-generate --model run --chat --temperature 0.7 --top-p 0.9
  cut -f2 questions.tsv | mp-generate --model run --input - --format text --as-chat --n 4 --temperature 1 | jq -r .text
  mp-generate --model run --input batch.jsonl --output answers.jsonl --resume --on-bad-line skip
  torchrun --nproc-per-node 2 --no-python -- mp-generate --tp 2 --model run --n 2 --temperature 1 --input a.jsonl
input, JSON lines: {"prompt": "..."}, {"prompt_token_ids": [1, 2]} or {"messages": [{"role": "user", "content": "..."}]}
  with optional id, tools, logprobs, stop, stop_token_ids, logit_bias, max_new_tokens, min_new_tokens, temperature,
  top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, n, top_logprobs, prompt_logprobs;
  what a line says goes before the options. Or an OpenAI batch: {"custom_id": "...", "method": "POST", "url":
  "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 20}}, with the output in that format, too
output, JSON lines: id, index, sample (with --n), prompt, text, token_ids, finish_reason (stop or length), stop (what
  ended it), logprobs, top_logprobs, prompt_logprobs, usage, timings; docs/generation.md has all of it
exit status: 0 every good line has its row; 1 an error, told in one line; 2 wrong usage; 130 interrupted"""
_CHAT_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Options(Choosing, Templating):
    """Continue prompts, several at a time, and write one JSON object for each.

    In fp32, what is sampled depends on the model, the prompt, its id and the seed alone: not on the batch size, the
    order of the prompts or the layout. Start as many processes as the layout needs; they share all prompts.
    """

    prompt: list[str] = opt("a prompt; may be repeated", [], nargs=1, repeat=True, metavar="TEXT")
    input: Optional[str] = opt("file of prompts, one a line; - is stdin", None, metavar="FILE")
    chat: bool = opt("talk with the model in this terminal; /help lists the commands", False)
    format: Literal["auto", "jsonl", "text", "openai"] = opt(
        "what a line of --input is; auto: text in .txt files and where the first line does not start with {, else JSON "
        "lines, and an OpenAI batch where the first line has custom_id and body",
        "auto",
    )
    on_bad_line: Literal["fail", "skip"] = opt("skip: name a line that cannot be used, and go on without it", "fail")
    as_chat: bool = opt("put each text prompt through the chat template, as what the user says", False)
    system: Optional[str] = opt("system message for conversations that have none", None, metavar="TEXT")
    add_bos: bool = opt("start each text prompt as the tokenizer does: with bos, or [gMASK] sop", False)
    output: str = opt("file for the results, FILE.partial until it is complete; - is stdout", "-", metavar="FILE")
    order: Literal["input", "finished"] = opt("of the rows: that of the prompts, or each as it is finished", "input")
    resume: bool = opt("go on with an interrupted --output: keep its rows, add those that it lacks", False)
    force: bool = opt("replace an --output that exists", False)
    logprobs: bool = opt("also write the natural logarithm of each token's probability, before temperature", False)
    timings: bool = opt("also write seconds from the start of a prompt to its first token and to its end", False)
    context_length: Optional[int] = opt(
        f"tokens of the longest prompt with its text (default: the model's; in --chat, at most {_CHAT_LENGTH})",
        None,
        metavar="TOKENS",
    )
    draft: Optional[Path] = opt(
        "a smaller model with the same tokenizer that proposes tokens; the texts stay the same", None, metavar="DIR"
    )
    draft_tokens: int = opt("tokens that --draft proposes at a time", 4)
    engine: Literal["megapatch", "transformers"] = opt(
        "transformers: the reference, for a Hugging Face folder, greedy, one prompt at a time", "megapatch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.prompt) + bool(self.input) + self.chat != 1:
            raise ValueError("expected either --prompt TEXT or --input FILE, or --chat")
        if self.engine == "transformers" and (self.tp > 1 or self.pp > 1 or self.ep > 1 or self.logprobs):
            raise ValueError("--engine transformers runs in one process, without --logprobs")
        refused = {
            "--resume needs --output FILE": self.resume and self.output == "-",
            "--resume and --force contradict each other": self.resume and self.force,
            "--chat writes to the terminal: leave out --output": self.chat and self.output != "-",
            "--chat gives one answer a turn: leave out --n": self.chat and self.n > 1,
            "--chat runs on --engine megapatch": self.chat and self.engine != "megapatch",
            "--draft goes with --engine megapatch": self.draft is not None and self.engine != "megapatch",
            f"--draft-tokens {self.draft_tokens}: must be at least 1": self.draft_tokens < 1,
            "--system goes with --chat, --as-chat or messages of --input": (
                self.system is not None and not (self.chat or self.as_chat or self.input)
            ),
            f"--context-length {self.context_length}: must be at least 2": (
                self.context_length is not None and self.context_length < 2
            ),
        }
        for problem, found in refused.items():
            if found:
                raise ValueError(problem)


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-generate; returns the exit status."""
    return run(Options, generate, prog="mp-generate", epilog=EXAMPLES, argv=argv)


def generate(options: Options) -> None:
    """Read and check all prompts, load the model, generate."""
    from megapatch.tools.generate import loading

    source = loading.find(options)
    _check(options, source)
    if options.chat:
        from megapatch.tools.generate.talk import talk

        talk(options, source, _reader(options, source, _CHAT_LENGTH))
        return
    with ExitStack() as stack:
        work, journal = None, None
        if os.environ.get("RANK", "0") == "0":  # only the first process reads stdin and writes
            work, journal = _planned(options, source, stack)
        device = stack.enter_context(loading.processes(options))
        work = loading.shared(work)
        if not work:
            log.info("every prompt has its row already")
            return
        _run(options, source, work, journal, device)


def _check(options: Options, source: Any) -> None:
    """Refuse what cannot work before anything is read."""
    if source.core and options.engine == "transformers":
        raise UserError(
            f"--engine transformers: {options.model} is a core checkpoint; make a Hugging Face folder of it "
            "with mp-convert, or leave out --engine"
        )
    tokenizer = source.tokenizer
    if options.add_bos and not tokenizer.prefix_ids and tokenizer.bos_id is None:
        raise UserError(f"--add-bos: {tokenizer.folder} names no bos_token in tokenizer_config.json")
    if options.context_length and options.context_length > source.max_length:
        raise UserError(f"--context-length {options.context_length}: the model takes {source.max_length} tokens in all")


def _reader(options: Options, source: Any, most: int | None = None) -> Any:
    from megapatch.tools.generate.loading import renderer
    from megapatch.tools.generate.prompts import Reader

    made = renderer(options, source.tokenizer)
    if isinstance(made, UserError) and (options.chat or options.as_chat):
        raise made
    longest = source.max_length if most is None else min(source.max_length, most)
    return Reader(
        tokenizer=source.tokenizer,
        vocab_size=source.vocab_size,
        max_length=options.context_length or longest,
        sampling=options.sampling(source.tokenizer.stop_ids),
        renderer=made,
        add_bos=options.add_bos,
        logprobs=options.logprobs,
        as_chat=options.as_chat,
        system=options.system,
        on_bad_line=options.on_bad_line,
    )


def _planned(options: Options, source: Any, stack: ExitStack) -> tuple[Any, Any]:
    """The rows that are to be written, and the output, which closes with ``stack``."""
    from megapatch.tools.generate import results
    from megapatch.tools.generate.identity import settings
    from megapatch.tools.generate.journal import Journal, refuse_existing

    refuse_existing(options.output, force=options.force, resume=options.resume)
    reader = _reader(options, source)
    prompts = reader.read(options.input, options.format) if options.input else reader.texts(options.prompt)
    said = settings(options, source, prompts)
    journal = stack.enter_context(Journal(options.output, said, force=options.force, resume=options.resume))
    return results.remaining(results.tasks(prompts), journal.rows), journal


def _run(options: Options, source: Any, work: list[Any], journal: Any, device: Any) -> None:
    from megapatch.tools.generate.loading import engine, load, loaded_draft
    from megapatch.tools.generate.progress import Progress, closing_line, most_tokens
    from megapatch.tools.generate.results import Clock, Results

    clock = Clock()
    results = Results(
        work,
        journal.write if journal else lambda row: None,
        source.tokenizer,
        order=options.order,
        model=options.model.name,
        clock=clock if options.timings else None,
    )
    requests = results.requests
    if options.engine == "transformers":
        _run_reference(options, source, results, device)
        return
    longest = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    what = "texts" if any(task.prompt.request.sampling.n > 1 for task in work) else "prompts"
    made = engine(
        options,
        source,
        load(options, source, device),
        min(longest, options.context_length or source.max_length),
        batch_size=min(options.batch_size, len(requests)),
        **loaded_draft(options.draft, options.draft_tokens, options, source, device),
        on_piece=clock.on_piece if options.timings else None,
    )
    with Progress([most_tokens(request) for request in requests], what, quiet=journal is None) as progress:
        made.on_step = progress.on_step  # the bar comes last, so that nothing is told in its line
        for completion in made.run(clock.watched(requests)):
            progress.done(completion)
            results.take(completion)
    log.info("%s", closing_line(made.statistics))


def _run_reference(options: Options, source: Any, results: Any, device: Any) -> None:
    from megapatch.models.build import DTYPES
    from megapatch.tools.generate import reference

    requests, dtype = results.requests, DTYPES[options.precision]
    for completion in reference.generate(options.model, requests, source.tokenizer, dtype, device.torch):
        results.take(completion)


if __name__ == "__main__":
    raise SystemExit(main())
