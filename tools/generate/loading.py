"""A model to generate or score with: its description first, without torch; then its weights, on all processes."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapatch.models import core_files, family, hf_files, parallel
from megapatch.models.chat import Renderer
from megapatch.models.cli import UserError
from megapatch.models.parallel import Parallel
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.generate.options import Loading, Templating

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model that was found, and its tokenizer."""

    folder: Path
    hf: Any
    core: Path | None  # the checkpoint that is read, None for a Hugging Face folder
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return family.vocab_size(self.hf)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return family.max_positions(self.hf) or sys.maxsize


def find(options: Loading) -> Source:
    """The model and tokenizer that the options name, and whether they and the layout fit (UserError)."""
    core = core_files.resolve(options.model) if core_files.is_core(options.model) else None
    hf = core_files.hf_config(core) if core else hf_files.config(options.model)
    for name, value in (("vocab_size", family.vocab_size(hf)), ("max_positions", family.max_positions(hf) or 0)):
        if not isinstance(value, int):
            raise UserError(f"{options.model}: config.json: {name} is {value!r}; expected an integer")
    tokenizer = Tokenizer(options.tokenizer or core or options.model, trust_remote_code=options.trust_remote_code)
    found = Source(options.model, hf, core, tokenizer)
    if tokenizer.vocab_size > found.vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocab_size is "
            f"{found.vocab_size}; give the --tokenizer that belongs to the model"
        )
    check_processes(options)
    return found


def check_processes(options: Parallel) -> None:
    """Refuse another number of processes than the layout is for (UserError)."""
    world, needed = parallel.world_size(), options.pp * max(options.tp, options.expert_tp * options.ep)
    if world != needed:
        raise UserError(
            f"{world} processes, but this layout is for {needed}: start as many, or change --tp, --pp, --ep"
        )


def renderer(options: Templating, tokenizer: Tokenizer) -> Renderer | UserError:
    """The chat template, or why there is none; that matters only where there are messages."""
    from megapatch.models.chat_load import load_templates

    try:
        made = load_templates(tokenizer, options.template, arguments=options.arguments, date=options.today)
    except UserError as error:
        if options.template is not None or options.template_arguments:
            raise
        return error
    return Renderer(*made)


@contextmanager
def processes(options: Loading) -> Iterator[Any]:
    """The process groups of the layout; yields the device."""
    from megapatch.models import device

    found = device.start(options.device)
    log.info("device: %s, %s (%s)", found.kind, found.backend, found.reason)
    try:
        parallel.start(options, found)
        yield found
    finally:
        parallel.stop()


def load(options: Loading, source: Source, device: Any) -> list[Any]:
    """This process's part of the model, with its weights."""
    from megapatch.models.build import ModelOptions, build
    from megapatch.models.device import seed_everything
    from megapatch.models.load import load_weights

    seed_everything(0, 0)
    chunks = build(source.hf, ModelOptions(options, device, options.precision))
    load_weights(chunks, source.folder, source.hf)
    return chunks


def loaded_draft(folder: Path | None, tokens: int, options: Loading, source: Source, device: Any) -> dict[str, Any]:
    """The settings of an Engine whose tokens a smaller model proposes; none without a folder."""
    if folder is None:
        return {}
    draft = find(replace(options, model=folder, tokenizer=None))
    if draft.tokenizer.digest != source.tokenizer.digest:
        raise UserError(
            f"--draft {folder}: its tokenizer is another one than that of {options.model}; expected the same"
        )
    return {"draft": load(replace(options, model=folder), draft, device), "draft_tokens": tokens}


def engine(options: Loading, source: Source, chunks: list[Any], max_length: int, **settings: Any) -> Any:
    """The Engine for sequences of up to ``max_length`` tokens; every process of the layout must call.

    The last token of a sequence is not read, so it may lie one place beyond the positions that the model has.
    """
    import torch.distributed as dist

    from megapatch.models.generation.engine import Engine

    made = Engine(
        chunks,
        vocab_size=source.vocab_size,
        max_length=max_length,
        cache_bytes=options.cache_bytes,
        packed=options.pack_weights == "auto",
        tokenizer=source.tokenizer,
        group=dist.group.WORLD,
        **{"batch_size": options.batch_size} | settings,
    )
    log.info("memory: %s", made.memory)
    return made


def shared(value: Any) -> Any:
    """The first process's value, on all; the others' is not looked at."""
    import torch.distributed as dist

    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]
