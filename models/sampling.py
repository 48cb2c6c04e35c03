"""Choosing the next token: greedy, temperature, top-k, top-p, from random numbers that depend on the request alone.

The random number of a token is a hash of seed, request and step; the distribution is cut by thresholds and drawn from
in vocabulary order. So the choice depends on neither batch, slot nor order. Shape letters: r rows, v vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapatch.models.request import Sampling

_HEAD = 1024  # most probable tokens among which top-p is tried first


@dataclass(frozen=True)
class Choice:
    """The tokens chosen for some rows, each [r]."""

    tokens: Tensor  # int64
    logprobs: Tensor  # float32: under the model's own distribution
    sampling_logprobs: Tensor  # float32: under the distribution that it was drawn from (0 when greedy)


def uniform(seed: int, request: str, sample: int, step: int) -> float:
    """A random number in [0, 1), the same one for the same arguments everywhere."""
    name = f"{seed}\n{sample}\n{step}\n{request}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big") / 2**48


def choose(logits: Tensor, rows: Sequence[Sampling], draws: Sequence[float]) -> Choice:
    """The next token of each row of ``logits`` [r, v], any dtype; ``draws``: a random number in [0, 1) for each row."""
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    tokens = logits.argmax(-1)
    drawn_from = torch.zeros(len(rows), device=logits.device)
    sampled = [i for i, row in enumerate(rows) if row.temperature > 0]
    if sampled:
        at = torch.tensor(sampled, device=logits.device)
        params = [rows[i] for i in sampled]
        heat = torch.tensor([row.temperature for row in params], device=logits.device)
        scaled = _keep_top_p(_keep_top_k(logits[at] / heat[:, None], params), params)
        tokens[at] = _invert(scaled.softmax(-1), [draws[i] for i in sampled])
        drawn_from[at] = _take(scaled.log_softmax(-1), tokens[at])
    return Choice(tokens, _take(logprobs, tokens), drawn_from)


def _take(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def _keep_top_k(scaled: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Hide what is less probable than each row's k-th token (tokens as probable as it stay)."""
    vocab = scaled.shape[-1]
    counts = torch.tensor([min(row.top_k or vocab, vocab) for row in rows], device=scaled.device)
    if all(row.top_k == 0 for row in rows):
        return scaled
    best = scaled.topk(int(max(min(row.top_k, vocab) for row in rows)), dim=-1).values
    bound = best.gather(-1, counts.clamp(max=best.shape[-1])[:, None] - 1)
    return scaled.masked_fill((scaled < bound) & (counts < vocab)[:, None], -torch.inf)


def _keep_top_p(scaled: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Hide what is less probable than the last token needed to reach each row's top_p."""
    if all(row.top_p == 1 for row in rows):
        return scaled
    target = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=scaled.device)[:, None]
    probs = scaled.softmax(-1)
    ordered = probs.topk(min(_HEAD, probs.shape[-1]), dim=-1).values
    if (ordered.sum(-1, dtype=torch.float64)[:, None] < target).any():
        ordered = probs.sort(dim=-1, descending=True).values  # 10 times slower, and seldom needed
    before = ordered.double().cumsum(-1) - ordered  # the probability of all that come first
    needed = (before < target).sum(-1, keepdim=True)  # at least 1: nothing comes before the first
    bound = ordered.gather(-1, needed - 1)
    return scaled.masked_fill((probs < bound) & (target < 1), -torch.inf)


def _invert(probs: Tensor, draws: Sequence[float]) -> Tensor:
    """The token [r] at which the cumulative probability [r, v] passes each row's draw."""
    cumulative = probs.double().cumsum(-1)
    at = torch.tensor(draws, dtype=torch.float64, device=probs.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]
