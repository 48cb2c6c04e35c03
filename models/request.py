"""What is asked of the generation engine. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

_COLDEST = 1e-3  # below it, logits divided by the temperature leave the range of fp32


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends.

    In this order: penalties and biases change the logits, the temperature divides them, top-k, top-p and min-p cut.
    """

    max_new_tokens: int = 128  # 0: the prompt is only read, for its log-probabilities
    min_new_tokens: int = 0  # before so many, no stop token is chosen and no stop string is looked for
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # keep so many of the most probable tokens; 0: all
    top_p: float = 1.0  # of these, keep the most probable ones that reach this probability together
    min_p: float = 0.0  # of these, keep those of at least this share of the most probable one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or answer, multiplies negative ones
    presence_penalty: float = 0.0  # taken off the logits of tokens in the answer
    frequency_penalty: float = 0.0  # taken off for each time that a token is in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    seed: int = 0
    n: int = 1  # completions, each with random numbers of its own
    stop: tuple[str, ...] = ()  # strings that end the text
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0  # most probable tokens to tell at each place, with their log-probabilities
    prompt_logprobs: bool = False  # tell those of the prompt's tokens too

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(problem)

    @property
    def changes_logits(self) -> bool:
        """True when the model's own logits are not what tokens are chosen from."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias or self.min_new_tokens)


def _problems(s: Sampling) -> list[str]:
    """What a user should change."""
    checks = {
        f"max-new-tokens {s.max_new_tokens}: must be at least 1, or 0 with prompt-logprobs": (
            s.max_new_tokens >= (0 if s.prompt_logprobs else 1)
        ),
        f"min-new-tokens {s.min_new_tokens}: must be from 0 to max-new-tokens, {s.max_new_tokens}": (
            0 <= s.min_new_tokens <= s.max_new_tokens
        ),
        f"temperature {s.temperature}: must be 0 or at least {_COLDEST}": (
            s.temperature == 0 or _COLDEST <= s.temperature < math.inf
        ),
        f"top-k {s.top_k}: must be at least 1, or 0 to keep all tokens": s.top_k >= 0,
        f"top-p {s.top_p}: must be above 0 and at most 1": 0 < s.top_p <= 1,
        f"min-p {s.min_p}: must be from 0 to 1": 0 <= s.min_p <= 1,
        "top-k, top-p and min-p choose nothing at temperature 0: give a temperature above 0": (
            s.temperature > 0 or not (s.top_k > 1 or s.top_p < 1 or s.min_p > 0)
        ),
        f"repetition-penalty {s.repetition_penalty}: must be above 0": 0 < s.repetition_penalty < math.inf,
        f"presence-penalty {s.presence_penalty}: must be a number": math.isfinite(s.presence_penalty),
        f"frequency-penalty {s.frequency_penalty}: must be a number": math.isfinite(s.frequency_penalty),
        "logit-bias: must be numbers": all(math.isfinite(bias) for bias in s.logit_bias.values()),
        f"n {s.n}: must be at least 1": s.n >= 1,
        f"n {s.n} at temperature 0: all completions would be the same; give a temperature above 0": (
            s.n <= 1 or s.temperature > 0
        ),
        "stop: an empty string would end every text at once": "" not in s.stop,
        f"top-logprobs {s.top_logprobs}: must be at least 0": s.top_logprobs >= 0,
    }
    return [message for message, fine in checks.items() if not fine]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; ``key`` and ``sample`` name its random numbers."""

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    key: str = ""
    sample: int = 0  # of ``sampling.n``, the number of the first
    scored_from: int = 1  # with ``sampling.prompt_logprobs``: place in the prompt of the first token that is scored

    def samples(self) -> "list[Request]":
        """A request for each of the ``n`` completions."""
        return [replace(self, sample=self.sample + i) for i in range(self.sampling.n)]

    def problem(self, vocab_size: int, max_length: int) -> str:
        """Why a model of this vocabulary and length (in tokens) cannot do it; empty when it can."""
        low, high = min(self.prompt, default=0), max(self.prompt, default=0)
        assert self.scored_from >= 1, "nothing comes before the first token"
        if not self.prompt:
            return "the prompt has no tokens; expected at least 1"
        if low < 0 or high >= vocab_size:
            return f"token id {low if low < 0 else high} in the prompt; the model has 0 to {vocab_size - 1}"
        if len(self.prompt) + bool(self.sampling.max_new_tokens) > max_length:
            return f"the prompt has {len(self.prompt)} tokens and leaves no room; the model takes {max_length} in all"
        for token in (*self.sampling.logit_bias, *self.sampling.stop_token_ids):
            if not 0 <= token < vocab_size:
                return f"token id {token} in logit-bias or stop-token-ids; the model has 0 to {vocab_size - 1}"
        if self.sampling.top_logprobs > vocab_size:
            return f"top-logprobs {self.sampling.top_logprobs}: the model has only {vocab_size} tokens"
        return ""
