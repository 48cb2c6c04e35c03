"""mp-generate: continue prompts with a Hugging Face model or a core checkpoint."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from megapatch.models import family, parallel
from megapatch.models.cli import UserError, opt, run
from megapatch.models.parallel import Parallel

log = logging.getLogger("megapatch.tools.generate")
EXAMPLES = """examples:
  mp-generate --model Qwen3-0.6B --prompt 'The capital of France is' --max-new-tokens 20
  cut -f2 questions.tsv | mp-generate --model run --input - --format text --temperature 0.7 --top-p 0.9 | jq -r .text
  torchrun --nproc-per-node 2 --no-python mp-generate --tp 2 --model run/iter_0000100 --input a.jsonl --output b.jsonl
input, JSON lines: {"prompt": "..."} or {"prompt_token_ids": [1, 2]}, with optional id, max_new_tokens, temperature,
  top_k, top_p, seed, stop, stop_token_ids; what a line says goes before the options
output, JSON lines: id, index, prompt, text, token_ids, finish_reason (stop or length), logprobs, usage"""


@dataclass(frozen=True, kw_only=True)
class Options(Parallel):
    """Continue prompts, several at a time, and write one JSON object for each, in input order.

    In fp32, what is sampled depends on the model, the prompt, its id and the seed alone: not on the batch size, the
    order of the prompts or the layout. Start as many processes as the layout needs; they share all prompts.
    """

    model: Path = opt("Hugging Face folder, core checkpoint, or root of core checkpoints (its newest)", metavar="DIR")
    tokenizer: Optional[Path] = opt("folder with the tokenizer (default: the model's own)", None, metavar="DIR")
    prompt: list[str] = opt("a prompt; may be repeated", [], nargs=1, repeat=True, metavar="TEXT")
    input: Optional[str] = opt("file of prompts, one a line; - is stdin", None, metavar="FILE")
    format: Literal["auto", "jsonl", "text"] = opt(
        "what a line of --input is; auto: by the file's suffix, else jsonl if the first line starts with {", "auto"
    )
    output: str = opt("file for the results; - is stdout", "-", metavar="FILE")
    force: bool = opt("replace an --output that exists", False)
    max_new_tokens: int = opt("most tokens to add to a prompt; also ends at max_position_embeddings of the model", 128)
    temperature: float = opt("0: always the most probable token; 1: as the model says; between: less random", 0.0)
    top_k: int = opt("draw from so many of the most probable tokens; 0: from all", 0)
    top_p: float = opt("draw from the most probable tokens that reach this probability together", 1.0)
    seed: int = opt("of the random numbers", 0)
    stop: list[str] = opt(
        "a string that ends the text and is cut off it; may be repeated", [], nargs=1, repeat=True, metavar="TEXT"
    )
    stop_token_id: list[int] = opt(
        "a token that ends the text, besides the model's own; may be repeated", [], nargs=1, repeat=True, metavar="ID"
    )
    add_bos: bool = opt("start each text prompt as the tokenizer does: with bos, or [gMASK] sop", False)
    batch_size: int = opt("prompts that are continued at the same time", 8)
    logprobs: bool = opt("also write the natural logarithm of each token's probability, before temperature", False)
    engine: Literal["megapatch", "transformers"] = opt(
        "transformers: the reference, for a Hugging Face folder, greedy, one prompt at a time", "megapatch"
    )
    precision: Literal["fp32", "bf16"] = opt("of weights and arithmetic", "fp32")
    device: Literal["auto", "cpu", "gpu"] = opt("what to compute on", "auto")
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.prompt) == bool(self.input):
            raise ValueError("expected either --prompt TEXT or --input FILE")
        if self.cp > 1:
            raise ValueError("generation runs with --cp 1; use --tp or --pp to cut the model")
        if self.engine == "transformers" and (self.tp > 1 or self.pp > 1 or self.ep > 1 or self.logprobs):
            raise ValueError("--engine transformers runs in one process, without --logprobs")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: must be at least 1")
        self.sampling(())

    def sampling(self, stop_ids: Sequence[int]) -> Any:
        """These options for the engine (ValueError when they contradict each other)."""
        from megapatch.models.request import Sampling

        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=(*stop_ids, *self.stop_token_id),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-generate; returns the exit status."""
    return run(Options, generate, prog="mp-generate", epilog=EXAMPLES, argv=argv)


def generate(options: Options) -> None:
    """Read and check all prompts, load the model, generate."""
    from megapatch.models import core_files, hf_files
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.generate.results import refuse_existing

    core = core_files.resolve(options.model) if core_files.is_core(options.model) else None
    hf = core_files.hf_config(core) if core else hf_files.config(options.model)
    for name, value in (("vocab_size", family.vocab_size(hf)), ("max_positions", family.max_positions(hf) or 0)):
        if not isinstance(value, int):
            raise UserError(f"{options.model}: config.json: {name} is {value!r}; expected an integer")
    tokenizer = Tokenizer(options.tokenizer or core or options.model, trust_remote_code=options.trust_remote_code)
    _check(options, tokenizer, hf, core is not None)
    prompts = None
    if os.environ.get("RANK", "0") == "0":  # only the first process reads stdin and writes
        refuse_existing(options.output, options.force)
        prompts = _read(options, tokenizer, hf)

    from megapatch.models import device

    found = device.start(options.device)
    log.info("device: %s, %s (%s)", found.kind, found.backend, found.reason)
    try:
        parallel.start(options, found)
        _run(options, hf, tokenizer, _shared(prompts), found)
    finally:
        parallel.stop()


def _check(options: Options, tokenizer: Any, hf: Any, is_core: bool) -> None:
    """Refuse what cannot fit before anything is loaded."""
    if is_core and options.engine == "transformers":
        raise UserError(
            f"--engine transformers: {options.model} is a core checkpoint; make a Hugging Face folder of it "
            "with mp-convert, or leave out --engine"
        )
    vocab_size = family.vocab_size(hf)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocab_size is "
            f"{vocab_size}; give the --tokenizer that belongs to the model"
        )
    if options.add_bos and not tokenizer.prefix_ids and tokenizer.bos_id is None:
        raise UserError(f"--add-bos: {tokenizer.folder} names no bos_token in tokenizer_config.json")
    world, needed = parallel.world_size(), options.pp * max(options.tp, options.expert_tp * options.ep)
    if world != needed:
        raise UserError(
            f"{world} processes, but this layout is for {needed}: start as many, or change --tp, --pp, --ep"
        )


def _longest(hf: Any) -> int:
    """Tokens of the longest sequence."""
    return family.max_positions(hf) or sys.maxsize


def _read(options: Options, tokenizer: Any, hf: Any) -> list[Any]:
    from megapatch.tools.generate.prompts import Reader

    reader = Reader(
        tokenizer=tokenizer,
        vocab_size=family.vocab_size(hf),
        max_length=_longest(hf),
        sampling=options.sampling(tokenizer.stop_ids),
        add_bos=options.add_bos,
    )
    return reader.read(options.input, options.format) if options.input else reader.texts(options.prompt)


def _shared(prompts: list[Any] | None) -> list[Any]:
    """The prompts of the first process, on all."""
    import torch.distributed as dist

    box = [prompts]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def _run(options: Options, hf: Any, tokenizer: Any, prompts: list[Any], device: Any) -> None:
    import torch.distributed as dist

    from megapatch.models.build import ModelOptions, build
    from megapatch.models.device import seed_everything
    from megapatch.models.generation.engine import Engine
    from megapatch.models.load import load_weights
    from megapatch.tools.generate.results import Results, closing_line, opened

    seed_everything(options.seed, 0)
    requests = [prompt.request for prompt in prompts]
    if options.engine == "transformers":
        _run_reference(options, tokenizer, prompts, device)
        return
    chunks = build(hf, ModelOptions(options, device, options.precision))
    load_weights(chunks, options.model, hf)
    longest = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    with opened(options.output if dist.get_rank() == 0 else None) as file:
        results = Results(prompts, file, options.logprobs)
        engine = Engine(
            chunks,
            vocab_size=family.vocab_size(hf),
            max_length=min(longest, _longest(hf)),
            batch_size=min(options.batch_size, len(requests)),
            tokenizer=tokenizer,
            group=dist.group.WORLD,
            on_step=results.tell,
        )
        for completion in engine.run(requests):
            results.take(completion)
    log.info("%s", closing_line(engine.statistics))


def _run_reference(options: Options, tokenizer: Any, prompts: list[Any], device: Any) -> None:
    from megapatch.models.build import DTYPES
    from megapatch.tools.generate import reference
    from megapatch.tools.generate.results import Results, opened

    requests = [prompt.request for prompt in prompts]
    with opened(options.output) as file:
        results = Results(prompts, file, logprobs=False)
        for completion in reference.generate(
            options.model, requests, tokenizer, DTYPES[options.precision], device.torch
        ):
            results.take(completion)


if __name__ == "__main__":
    raise SystemExit(main())
