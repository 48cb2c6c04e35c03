"""Options of mp-generate and mp-score: which model, how its tokens are chosen, which chat template."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Optional

from megapatch.models.cli import opt
from megapatch.models.parallel import Parallel
from megapatch.models.request import Sampling
from megapatch.models.template_options import TemplateOptions


@dataclass(frozen=True, kw_only=True)
class Loading(Parallel):
    """The model, where it runs, and how much of it at once."""

    model: Path = opt("Hugging Face folder, core checkpoint, or root of core checkpoints (its newest)", metavar="DIR")
    tokenizer: Optional[Path] = opt("folder with the tokenizer (default: the model's own)", None, metavar="DIR")
    batch_size: int = opt("sequences that are computed at the same time", 8)
    cache_mib: Optional[int] = opt(
        "most memory for keys and values on each process, MiB; fewer sequences at a time keep to it "
        "(default: what --batch-size needs)",
        None,
        metavar="MIB",
    )
    pack_weights: Literal["auto", "never"] = opt(
        "auto: on a CPU keep a second copy of the linear layers' weights, which is read faster, where free memory "
        "holds it beside keys and values; never: slower, in less memory",
        "auto",
    )
    precision: Literal["fp32", "bf16"] = opt("of weights and arithmetic", "fp32")
    device: Literal["auto", "cpu", "gpu"] = opt("what to compute on", "auto")
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cp > 1:
            raise ValueError("generation runs with --cp 1; use --tp or --pp to cut the model")
        for flag, value in (("batch-size", self.batch_size), ("cache-mib", self.cache_mib)):
            if value is not None and value < 1:
                raise ValueError(f"--{flag} {value}: must be at least 1")

    @property
    def cache_bytes(self) -> int | None:
        """--cache-mib in bytes."""
        return None if self.cache_mib is None else self.cache_mib << 20


@dataclass(frozen=True, kw_only=True)
class Choosing(Loading):
    """How tokens are chosen and when a text ends; the names of the flags are those of ``Sampling``."""

    max_new_tokens: int = opt("most tokens to add to a prompt; also ends at max_position_embeddings of the model", 128)
    min_new_tokens: int = opt("before so many, no stop token is chosen and no stop string is looked for", 0)
    temperature: float = opt("0: always the most probable token; 1: as the model says; between: less random", 0.0)
    top_k: int = opt("draw from so many of the most probable tokens; 0: from all", 0)
    top_p: float = opt("draw from the most probable tokens that reach this probability together", 1.0)
    min_p: float = opt("draw from tokens of at least this share of the most probable one's probability", 0.0)
    repetition_penalty: float = opt("above 1: makes tokens of prompt and answer less probable", 1.0)
    presence_penalty: float = opt("taken off the logit of each token that is in the answer", 0.0)
    frequency_penalty: float = opt("taken off for each time that a token is in the answer", 0.0)
    logit_bias: list[str] = opt(
        "add a number to the logit of a token; may be repeated", [], nargs=1, repeat=True, metavar="ID=NUMBER"
    )
    seed: int = opt("of the random numbers", 0)
    n: int = opt("texts for each prompt, each with random numbers of its own", 1)
    stop: list[str] = opt(
        "a string that ends the text and is cut off it; may be repeated", [], nargs=1, repeat=True, metavar="TEXT"
    )
    stop_token_id: list[int] = opt(
        "a token that ends the text, besides the model's own; may be repeated", [], nargs=1, repeat=True, metavar="ID"
    )
    ignore_eos: bool = opt("go on where the model ends its text, up to --max-new-tokens", False)
    top_logprobs: int = opt("also write so many of the most probable tokens at each place", 0)
    prompt_logprobs: bool = opt("also write log-probabilities of the prompt's tokens; --max-new-tokens may be 0", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampling(())

    def sampling(self, stop_ids: Sequence[int]) -> Sampling:
        """These options for the engine (ValueError when they contradict each other)."""
        names = {field.name for field in fields(Sampling)} & {field.name for field in fields(self)}
        values = {name: getattr(self, name) for name in names}
        ends = () if self.ignore_eos else stop_ids
        values |= {"stop": tuple(self.stop), "stop_token_ids": (*ends, *self.stop_token_id)}
        return Sampling(**values | {"logit_bias": dict(map(_bias, self.logit_bias))})


@dataclass(frozen=True, kw_only=True)
class Templating(Loading, TemplateOptions):
    """The model, and the chat template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_template()


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        found = int(token), float(number)
    except ValueError:
        found = 0, math.nan
    if math.isnan(found[1]):
        raise ValueError(f"--logit-bias {text}: expected ID=NUMBER, such as 198=-100")
    return found
