"""lm-evaluation-harness on a core checkpoint or a Hugging Face folder, with the engine of mp-generate.

lm_eval 0.4.13 has no way to find models of other packages by itself; ``evaluate`` makes this one known and takes the
arguments of lm_eval. In --model_args, pretrained, as of lm_eval's other models, is the folder; the other names are
those of ``Arguments``.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megapatch.models.chat import Chat
from megapatch.models.cli import UserError
from megapatch.models.request import Request, Sampling
from megapatch.tools.generate import loading
from megapatch.tools.generate.likelihood import Pair, score
from megapatch.tools.generate.options import Choosing, Templating
from megapatch.tools.generate.progress import Progress, most_tokens

_MAX_NEW_TOKENS = 256  # as lm_eval's other models, where a task says nothing
_KINDS = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "bf16": "bf16", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Templating):
    """What --model_args may say."""

    max_length: int | None = None  # tokens of the longest sequence; None: the model's
    add_bos_token: bool | None = None  # before each text; None: as the tokenizer does


@register_model("megapatch")
class MegapatchLM(TemplateLM):
    """A model of megapatch for lm_eval; one process, or as many as the layout needs, which all do the same."""

    def __init__(self, pretrained: str = "", **given: Any) -> None:
        super().__init__()
        self.arguments = _arguments(pretrained, given)
        self.source = loading.find(self.arguments)
        self.tokens = self.source.tokenizer
        self.max_length = self.arguments.max_length or self.source.max_length
        self._stack = ExitStack()
        device = self._stack.enter_context(loading.processes(self.arguments))
        self._device = device.torch
        chunks = loading.load(self.arguments, self.source, device)
        self.engine = loading.engine(self.arguments, self.source, chunks, self.max_length + 1)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokens.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The folder of the tokenizer, for the cache of requests."""
        return str(self.tokens.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids, with those that the tokenizer puts first, unless the text spells them out."""
        wanted = self.arguments.add_bos_token if add_special_tokens is None else add_special_tokens
        ids = self.tokens.encode(string)
        first = [*self.tokens.prefix_ids]
        if add_special_tokens is None and ids[:1] == [self.prefix_token_id]:
            first = []
        elif wanted and not first and add_special_tokens is None:
            first = [self.prefix_token_id]
        return ids if wanted is False else [*first, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _name, context, target in requests:
            if len(target) > self.max_length:
                raise UserError(f"a continuation of {len(target)} tokens; the model takes {self.max_length}")
            pairs.append(Pair(context[-(self.max_length + 1 - len(target)) :], target))
        found: list[Any] = [None] * len(pairs)
        sizes = [len(context) + len(target) - 1 for context, target in pairs]
        with self._progress(sizes, "continuations", disable_tqdm) as progress:
            for number, scored in score(self.engine, pairs, progress.done):
                found[number] = scored.total, scored.greedy
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            made = [(None, *make_disjoint_window(window)) for window in cut]
            windows += made
            counts.append(len(made))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to where its task ends it."""
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        texts = [""] * len(asked)
        with self._progress([most_tokens(one) for one in asked], "texts", disable_tqdm) as progress:
            for completion in self.engine.run(asked):
                progress.done(completion)
                texts[completion.number] = completion.text
                self.cache_hook.add_partial("generate_until", requests[completion.number].args, completion.text)
        return texts

    def _request(self, number: int, context: str, said: dict[str, Any]) -> Request:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(said, _MAX_NEW_TOKENS))
        most, until = settings.pop("max_gen_toks"), settings.pop("until")
        stops = handle_stop_sequences(until, self.tokens.decode([self.eot_token_id]))
        if not settings.pop("do_sample"):
            settings = {
                name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")
            }
        fields = {field.name for field in dataclasses.fields(Sampling)} & {f.name for f in dataclasses.fields(Choosing)}
        if unknown := settings.keys() - fields:
            raise UserError(f"generation_kwargs: {min(unknown)} is not known to the megapatch model; leave it out")
        sampling = Sampling(
            max_new_tokens=most,
            stop=tuple(stop for stop in stops if stop),
            stop_token_ids=tuple(self.tokens.stop_ids),
            **settings,
        )
        ids = self.tok_encode(context)[-max(1, self.max_length - most) :]
        return Request(ids, sampling, key=str(number))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        renderer = loading.renderer(self.arguments, self.tokens)
        if isinstance(renderer, UserError):
            raise renderer
        chat = Chat(chat_history)
        if add_generation_prompt:
            return renderer.prompt(chat)
        text = renderer.template_for(chat).render(chat.messages).text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]  # the answer goes on from there

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which lm_eval records."""
        renderer = loading.renderer(self.arguments, self.tokens) if chat_template else None
        return None if renderer is None or isinstance(renderer, UserError) else renderer.template.text

    def _progress(self, most: Sequence[int], what: str, quiet: bool) -> Progress:
        progress = Progress(most, what, quiet)
        self.engine.on_step = progress.following(self.engine.statistics)
        return progress


def _arguments(pretrained: str, given: dict[str, Any]) -> Arguments:
    """--model_args and the like, in our words; what does not apply here is left out, what is unknown refused."""
    said = {
        name: value for name, value in given.items() if name not in ("max_batch_size", "device") and value is not None
    }
    model = pretrained or said.pop("model", "")
    if not model:
        raise UserError("--model_args: expected pretrained=DIR, a core checkpoint or a Hugging Face folder")
    if "dtype" in said:
        dtype = said.pop("dtype")
        if dtype not in _KINDS:
            raise UserError(f"--model_args dtype={dtype}: expected one of {', '.join(_KINDS)}")
        said["precision"] = _KINDS[dtype]
    known = {field.name for field in dataclasses.fields(Arguments)}
    if unknown := said.keys() - known:
        raise UserError(
            f"--model_args: {min(unknown)} is not known; known: pretrained, dtype, {', '.join(sorted(known))}"
        )
    if "batch_size" in said:
        said["batch_size"] = 8 if said["batch_size"] == "auto" else int(said["batch_size"])
    if "tokenizer" in said:
        said["tokenizer"] = Path(said["tokenizer"])
    return Arguments(model=Path(model), **said)
