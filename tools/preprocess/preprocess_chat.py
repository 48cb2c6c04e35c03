"""mp-preprocess-chat: conversations, preference pairs and prompts to ids and masks."""

import logging
from typing import TYPE_CHECKING

from megapatch.models.cli import UserError, run
from megapatch.tools.preprocess.chats.options import Options

if TYPE_CHECKING:
    from megapatch.models.chat import Renderer
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.preprocess.chats.job import ChatJob
    from megapatch.tools.preprocess.chats.work import Worker

_LOG = logging.getLogger("megapatch.tools.preprocess")
EXAMPLES = """examples:
  mp-preprocess-chat --input chats.jsonl --tokenizer Qwen3-0.6B --output-prefix data/sft --on-rewritten-history split
  mp-preprocess-chat --input 'sft/*.parquet' --tokenizer tok --max-length 4096 --truncate turn --output-prefix data/sft
  mp-preprocess-chat --input pairs.jsonl --chat-format preference --tokenizer tok --output-prefix data/dpo
  zcat math.jsonl.gz | mp-preprocess-chat --input - --chat-format prompts --tokenizer tok --output-prefix data/rl"""


def preprocess_chat(options: Options) -> None:
    """Write all outputs and the manifest, or nothing."""
    from megapatch.models.indexed_data import manifest_path
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.preprocess.reading.inputs import find_sources
    from megapatch.tools.preprocess.run.pipeline import run_job
    from megapatch.tools.preprocess.run.workers import quiet_engine

    sources = find_sources(options)
    for source in sources:
        if source.kind in ("text", "lines"):
            raise UserError(
                f"{source.label}: read as plain {source.kind}, but conversations are JSON; give --format jsonl"
            )
    with quiet_engine():
        tokenizer = Tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
        job = make_job(options, tokenizer)
        if run_job(job, sources, options) is not None:
            for line in job.summary():
                _LOG.info("%s", line)
    if options.json:
        print(manifest_path(options.output_prefix).read_text(), end="")


def make_job(options: Options, tokenizer: "Tokenizer") -> "ChatJob":
    """The job for these options."""
    from megapatch.tools.preprocess.chats.job import ChatJob

    renderer = make_renderer(options, tokenizer)
    return ChatJob(options, _worker(options, tokenizer, renderer))


def make_renderer(options: Options, tokenizer: "Tokenizer") -> "Renderer":
    """The template, and how the options want it used."""
    from megapatch.models.chat import Renderer, generation_prompt, untrained_end
    from megapatch.models.chat_load import load_templates, split_markers

    template, with_tools = load_templates(tokenizer, options.template, arguments=options.arguments, date=options.today)
    if options.on_rewritten_history == "keep" and not all(one.tagged for one in (template, with_tools) if one):
        raise UserError(
            "--on-rewritten-history keep: the chat template has no generation tags to keep to; choose fail or split"
        )
    if options.train_generation_prompt and not generation_prompt(template):
        raise UserError("--train-generation-prompt: the chat template has no generation prompt; leave it out")
    if cut := split_markers(tokenizer, template):
        what = f"the chat template writes {' '.join(cut)}, no token of {tokenizer.folder}: split into ordinary pieces"
        if options.template is not None and options.template not in tokenizer.chat_templates:
            raise UserError(
                f"--template {options.template}: {what}; give the template of this tokenizer, or, if that is meant, "
                "put the file there as chat_template.jinja"
            )
        _LOG.warning("%s, as by models that were trained so", what)
    specials = tuple(tokenizer.special_tokens.values())
    if why := untrained_end(template, specials):
        _LOG.warning("%s, so the model may not learn to stop; another template can be given with --template FILE", why)
    return Renderer(
        template,
        with_tools,
        specials,
        options.on_rewritten_history,
        options.train_generation_prompt,
    )


def _worker(options: Options, tokenizer: "Tokenizer", renderer: "Renderer") -> "Worker":
    from megapatch.models.chat_literal import LiteralEncoder
    from megapatch.models.chat_mask import Masker
    from megapatch.models.chat_special import Special
    from megapatch.tools.preprocess.chats.records import taker
    from megapatch.tools.preprocess.chats.texts import Texts
    from megapatch.tools.preprocess.chats.work import Worker
    from megapatch.tools.preprocess.encoding.around import Around
    from megapatch.tools.preprocess.encoding.encoder import EncodeOptions, Encoder

    special = Special(list(tokenizer.special_tokens.values()))
    literal = None
    if options.special_in_text == "literal":
        literal = LiteralEncoder(tokenizer, special, trust_remote_code=options.trust_remote_code)
    masked = options.format_of_output != "prompts"
    return Worker(
        Texts(taker(options.chat_format), renderer, special, options.special_in_text, options.message_weights),
        Encoder(tokenizer, EncodeOptions(engine=options.engine), Around()),  # the template writes bos and eod
        Masker(tokenizer, literal.encode if literal else None) if masked else None,
        literal,
        2 if options.format_of_output == "preference" else 1,
        options.max_length,
        options.truncate,
        options.deduplicate,
        options.quarantine is not None,
    )


def main(argv: list[str] | None = None) -> int:
    """Run mp-preprocess-chat; the exit status."""
    return run(Options, preprocess_chat, prog="mp-preprocess-chat", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
