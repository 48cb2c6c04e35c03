"""Choosing the next token, from random numbers that depend on the request alone.

The random number of a token is a hash of seed, request and step; the distribution is cut by thresholds and drawn from
in vocabulary order. So the choice depends on neither batch, slot nor order. Shape letters: r rows, v vocabulary,
k alternatives.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapatch.models.request import Sampling

_HEAD = 1024  # most probable tokens among which top-p is tried first


@dataclass(frozen=True)
class Row:
    """One token to choose."""

    sampling: Sampling
    draw: float = 0.0  # a random number in [0, 1)
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()  # tokens so far


@dataclass(frozen=True)
class Choice:
    """The tokens chosen for some rows, each [r]."""

    tokens: Tensor  # int64
    logprobs: Tensor  # float32: under the model's own distribution
    sampling_logprobs: Tensor  # float32: under the distribution that it was drawn from (0 when greedy)
    top_tokens: Tensor  # int64 [r, k], the most probable first, k as many as asked for
    top_logprobs: Tensor  # float32 [r, k], of the model's own distribution


def uniform(seed: int, request: str, sample: int, step: int) -> float:
    """A random number in [0, 1), the same one for the same arguments everywhere."""
    name = f"{seed}\n{sample}\n{step}\n{request}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big") / 2**48


def choose(logits: Tensor, rows: Sequence[Row], top: int = 0) -> Choice:
    """The next token of each row of ``logits`` [r, v], any dtype, and the ``top`` most probable ones."""
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    changed = [i for i, row in enumerate(rows) if row.sampling.changes_logits]
    if changed:
        logits = logits.clone()
        for i in changed:
            _change(logits[i], rows[i])
    tokens = logits.argmax(-1)
    drawn_from = torch.zeros(len(rows), device=logits.device)
    sampled = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if sampled:
        at = torch.tensor(sampled, device=logits.device)
        scaled = _cut(logits[at], [rows[i].sampling for i in sampled])
        tokens[at] = _invert(scaled.softmax(-1), [rows[i].draw for i in sampled])
        drawn_from[at] = _take(scaled.log_softmax(-1), tokens[at])
    return Choice(tokens, _take(logprobs, tokens), drawn_from, *_top(logprobs, top))


def known(logits: Tensor, tokens: Sequence[int], top: int = 0) -> Choice:
    """What ``choose`` tells, of tokens that are given, one for each row of ``logits`` [r, v]."""
    logprobs = logits.float().log_softmax(-1)
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    return Choice(chosen, _take(logprobs, chosen), torch.zeros_like(logprobs[:, 0]), *_top(logprobs, top))


def _top(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[r, v] -> tokens and log-probabilities [r, k]; of equals, the lowest token comes first."""
    if not k:
        return torch.empty_like(logprobs[:, :0], dtype=torch.int64), logprobs[:, :0]
    values, tokens = logprobs.topk(k, dim=-1)
    order = tokens.argsort(-1)
    values, tokens = values.gather(-1, order), tokens.gather(-1, order)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return tokens.gather(-1, order), values.gather(-1, order)


def _take(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def _change(logits: Tensor, row: Row) -> None:
    """Penalties, biases and stop tokens that may not come yet, in place, on one row [v]."""
    s, device = row.sampling, logits.device
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.answer}), device=device)
        found = logits[seen]
        logits[seen] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
    if row.answer and (s.presence_penalty or s.frequency_penalty):
        seen, counts = torch.tensor(list(row.answer), device=device).unique(return_counts=True)
        logits[seen] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        tokens = torch.tensor(list(s.logit_bias), device=device)
        logits[tokens] += torch.tensor(list(s.logit_bias.values()), device=device)
    if len(row.answer) < s.min_new_tokens and s.stop_token_ids:
        logits[list(s.stop_token_ids)] = -torch.inf


def _cut(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Logits [r, v] by temperature, and -inf for tokens that are not kept."""
    heat = torch.tensor([row.temperature for row in rows], device=logits.device)
    scaled = logits / heat[:, None]
    keeps: tuple[Callable[[Tensor, Sequence[Sampling]], Tensor], ...] = (_keep_top_k, _keep_top_p, _keep_min_p)
    for keep in keeps:
        scaled = keep(scaled, rows)
    return scaled


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


def _keep_min_p(scaled: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Hide what is less probable than each row's min_p times its most probable token."""
    if all(row.min_p == 0 for row in rows):
        return scaled
    least = torch.tensor([row.min_p for row in rows], device=scaled.device)[:, None].log()
    return scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + least, -torch.inf)


def _invert(probs: Tensor, draws: Sequence[float]) -> Tensor:
    """The token [r] at which the cumulative probability [r, v] passes each row's draw."""
    cumulative = probs.double().cumsum(-1)
    at = torch.tensor(draws, dtype=torch.float64, device=probs.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]
