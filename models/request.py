"""What is asked of the generation engine. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

_COLDEST = 1e-3  # below it, logits divided by the temperature leave the range of fp32


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # keep so many of the most probable tokens; 0: all
    top_p: float = 1.0  # of these, keep the most probable ones that reach this probability together
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end the text
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens {self.max_new_tokens}: must be at least 1")
        if self.temperature != 0 and not _COLDEST <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: must be 0 or at least {_COLDEST}")
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k}: must be at least 1, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k > 1 or self.top_p < 1):
            raise ValueError("top-k and top-p choose nothing at temperature 0: give a temperature above 0")
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every text at once")


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; ``key`` and ``sample`` name its random numbers."""

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    key: str = ""
    sample: int = 0

    def problem(self, vocab_size: int, max_length: int) -> str:
        """Why a model of this vocabulary and length (in tokens) cannot do it; empty when it can."""
        low, high = min(self.prompt, default=0), max(self.prompt, default=0)
        if not self.prompt:
            return "the prompt has no tokens; expected at least 1"
        if low < 0 or high >= vocab_size:
            return f"token id {low if low < 0 else high} in the prompt; the model has 0 to {vocab_size - 1}"
        if len(self.prompt) >= max_length:
            return f"the prompt has {len(self.prompt)} tokens and leaves no room; the model takes {max_length} in all"
        return ""
