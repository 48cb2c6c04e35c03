"""Choosing tokens: which are kept, how often each is drawn, and that neighbours in the batch change nothing."""

import math
from dataclasses import replace

import pytest
import torch

from megapatch.models.request import Sampling
from megapatch.models.sampling import Row, choose, uniform

PROBABILITIES = [0.05, 0.4, 0.25, 0.2, 0.1]
DRAWS = [i / 200 for i in range(200)]


def drawn(**settings: float) -> dict[int, int]:
    """How often each token is chosen over 200 evenly spaced random numbers."""
    logits = torch.tensor(PROBABILITIES).log().expand(len(DRAWS), -1)
    sampling = Sampling(**{"temperature": 1.0} | settings)  # type: ignore[arg-type]
    tokens = choose(logits, [Row(sampling, draw) for draw in DRAWS]).tokens.tolist()
    return {token: tokens.count(token) for token in sorted(set(tokens))}


CASES = [  # settings, expected share of each token
    ({}, {0: 0.05, 1: 0.4, 2: 0.25, 3: 0.2, 4: 0.1}),
    ({"top_k": 1}, {1: 1.0}),
    ({"top_k": 2}, {1: 0.4 / 0.65, 2: 0.25 / 0.65}),
    ({"top_k": 99}, {0: 0.05, 1: 0.4, 2: 0.25, 3: 0.2, 4: 0.1}),
    ({"top_p": 0.3}, {1: 1.0}),
    ({"top_p": 0.41}, {1: 0.4 / 0.65, 2: 0.25 / 0.65}),
    ({"top_p": 0.84}, {1: 0.4 / 0.85, 2: 0.25 / 0.85, 3: 0.2 / 0.85}),
    ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),  # 0.4 of the 0.65 that top-k keeps is 0.62
    ({"min_p": 0.5}, {1: 0.4 / 0.85, 2: 0.25 / 0.85, 3: 0.2 / 0.85}),
    ({"min_p": 1.0}, {1: 1.0}),
    ({"top_k": 4, "min_p": 0.3}, {1: 0.4 / 0.85, 2: 0.25 / 0.85, 3: 0.2 / 0.85}),
    ({"temperature": 2.0, "min_p": 0.6}, {t: PROBABILITIES[t] ** 0.5 / 1.57967 for t in (1, 2, 3)}),
    ({"logit_bias": {0: 100.0}}, {0: 1.0}),
    ({"temperature": 0}, {1: 1.0}),
    ({"temperature": 0.5}, {t: p * p / 0.275 for t, p in enumerate(PROBABILITIES)}),
]


@pytest.mark.parametrize(("settings", "shares"), CASES)
def test_tokens_are_drawn_as_often_as_they_are_probable(settings: dict[str, float], shares: dict[int, float]) -> None:
    found = drawn(**settings)
    assert set(found) == set(shares)
    assert all(abs(found[token] - share * len(DRAWS)) <= 1 for token, share in shares.items())


def test_logprobs_are_of_the_model_and_of_the_distribution_drawn_from() -> None:
    logits = torch.tensor([PROBABILITIES] * 2).log()
    choice = choose(logits, [Row(Sampling(temperature=1, top_k=2), 0.9), Row(Sampling(), 0.9)])
    assert choice.tokens.tolist() == [2, 1]
    assert choice.logprobs.tolist() == pytest.approx([math.log(0.25), math.log(0.4)], abs=1e-6)
    assert choice.sampling_logprobs.tolist() == pytest.approx([math.log(0.25 / 0.65), 0], abs=1e-6)


def test_penalties_change_logits_as_they_are_defined() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.5]])
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125)
    row = Row(replace(sampling, temperature=1.0), 0.0, prompt=[0, 1], answer=[2, 2, 0])
    changed = torch.tensor([2.0 / 2 - 0.375, -2.0 * 2, 1.0 / 2 - 0.5, 1.5])
    choice = choose(logits, [row], 4)
    assert choice.tokens.tolist() == [0]
    assert choice.sampling_logprobs[0] == pytest.approx(float(changed.log_softmax(-1)[0]), abs=1e-6)
    assert choice.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, 0]), abs=1e-6), "the model's own"
    assert choice.top_tokens.tolist() == [[0, 3, 2, 1]]
    assert choose(logits, [replace(row, sampling=sampling)]).tokens.tolist() == [3]


def test_the_best_of_equals_is_the_lowest_token() -> None:
    logits = torch.zeros(1, 50)
    logits[0, [7, 30]] = 1.0
    assert choose(logits, [Row(Sampling())], 2).top_tokens.tolist() == [[7, 30]]


def test_neighbours_in_the_batch_change_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 3000)
    logits[::2] *= 0.01  # flat: top-p needs more than the most probable 1024 tokens
    kinds = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1, top_k=50),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(temperature=1, top_k=2000, top_p=0.8),
    ]
    rows = [Row(kinds[i // 2 % 5], uniform(0, "x", 0, i)) for i in range(40)]
    together = choose(logits, rows)
    for i in range(40):
        alone = choose(logits[i : i + 1], rows[i : i + 1])
        assert together.tokens[i] == alone.tokens[0]
        assert together.sampling_logprobs[i] == alone.sampling_logprobs[0]
    assert len(set(together.tokens.tolist())) > 20


def test_top_p_of_a_flat_distribution_keeps_its_share() -> None:
    logits = -torch.arange(3000) * 1e-6  # so that the order is known
    rows = [Row(Sampling(temperature=1, top_p=0.8), draw) for draw in DRAWS]
    tokens = choose(logits.expand(len(DRAWS), -1), rows).tokens
    assert int(tokens.max()) < 2400
    assert int(tokens.max()) > 2370


def test_random_numbers_are_fixed_for_ever() -> None:
    assert uniform(0, "a", 0, 0) == 0.5049388858807262
    assert uniform(1, "a", 0, 0) != uniform(0, "a", 1, 0) != uniform(0, "a", 0, 1) != uniform(0, "b", 0, 0)


def test_random_numbers_are_even() -> None:
    numbers = [uniform(seed, "key", 0, step) for seed in range(10) for step in range(1000)]
    assert 0 <= min(numbers) < 0.001
    assert 0.999 < max(numbers) < 1
    assert abs(sum(numbers) / 10000 - 0.5) < 0.01
