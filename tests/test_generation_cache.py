"""The cache of keys and values: chunks, shared prefixes, slots, windows, and a budget that is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import loaded, one_process  # noqa: F401
from tiny_models import PROMPTS, tiny_model

from megapatch.models import device
from megapatch.models.request import Request, Sampling

VOCAB, LENGTH = 96, 64
LONG = [(7 * i + i * i) % 95 for i in range(40)]
TOLERANCE = 1e-5  # fp32, of log-probabilities
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "windows": ("mistral", {"sliding_window": 8}),
    "some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "latent": ("deepseek_v3", {}),
    "alibi": ("bloom", {}),
    "experts": ("qwen3_moe", {}),
}
EXECUTORS = ("lean", "module")


@pytest.fixture(scope="module")
def models(found: device.Device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.nn.Module]]:
    """A model of each kind."""
    made = {}
    for name, (family, changes) in KINDS.items():
        folder: Path = tmp_path_factory.mktemp("model")
        tiny_model(folder, family, **changes)
        made[name] = loaded(folder, found)
    return made


def engine(model: Any, **settings: Any) -> Any:
    from megapatch.models.generation.engine import Engine

    return Engine(model, **{"vocab_size": VOCAB, "max_length": LENGTH} | settings)


def alone(model: Any, request: Request, executor: str) -> Any:
    (done,) = engine(model, batch_size=1, executor=executor).generate([request])
    return done


def same(found: Any, expected: Any) -> None:
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)
    assert found.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_prompts_read_in_parts_are_as_read_whole(kind: str, executor: str, models: dict[str, Any]) -> None:
    requests = [Request(prompt, Sampling(max_new_tokens=16, prompt_logprobs=True)) for prompt in [*PROMPTS, LONG]]
    expected = [alone(models[kind], request, "module") for request in requests]
    for size in (3, 16, 33):
        made = engine(models[kind], batch_size=4, prefill_tokens=size, executor=executor)
        for done, wanted in zip(made.generate(requests), expected, strict=True):
            same(done, wanted)
        assert made.statistics.prefill_tokens == sum(len(request.prompt) for request in requests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_prefix_is_read_once(kind: str, executor: str, models: dict[str, Any]) -> None:
    """Of one prompt many samples; of prompts that begin alike, the beginning; of windows, only what is still there."""
    several = Sampling(max_new_tokens=6, temperature=1.0, n=5)
    requests = [
        Request(LONG, several, key="a"),
        *(Request([*LONG[:30], i, i + 1], Sampling(max_new_tokens=9)) for i in range(3)),
        Request(LONG[:20], Sampling(max_new_tokens=9)),
    ]
    expected = [alone(models[kind], one, "module") for request in requests for one in _single(request)]
    for batch_size in (1, 3, 16):
        made = engine(models[kind], batch_size=batch_size, executor=executor)
        for done, wanted in zip(made.generate(requests), expected, strict=True):
            same(done, wanted)
        statistics = made.statistics
        assert statistics.prefill_tokens + statistics.shared_tokens == 5 * 40 + 3 * 32 + 20
        if "windows" not in kind:
            assert statistics.prefill_tokens == 40 + 4 + 3 * 2 + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_context_is_read_once_for_all_that_may_follow(
    kind: str, executor: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets of one token, of several, alike at first; contexts in turns; in few rows of logits at a time."""
    from megapatch.tools.generate.likelihood import Pair, request, score

    contexts = LONG[:30], [*LONG[:20], 5, 6, 7], [1, 2]
    pairs = [Pair(context, target) for context in contexts for target in ([9], [3, 4, 5, 8], [3, 4], [11, 12])]
    expected = []
    for pair in pairs:
        whole = [*pair.context, *pair.target[:-1]]
        asked = Sampling(max_new_tokens=1, prompt_logprobs=True, logit_bias={pair.target[-1]: 1e9})
        done = alone(models[kind], Request(whole, asked), "module")
        expected.append([*done.prompt_logprobs, *done.logprobs][-len(pair.target) :])
    for rows, batch_size in ((1 << 26, 1), (1 << 26, 3), (1 << 26, 16), (2 * VOCAB, 3)):
        monkeypatch.setattr("megapatch.models.generation.engine._LOGITS", rows)
        made = engine(models[kind], batch_size=batch_size, executor=executor)
        found = dict(score(made, pairs))
        for number, logprobs in enumerate(expected):
            assert found[number].logprobs == pytest.approx(logprobs, abs=TOLERANCE)
        statistics = made.statistics
        assert statistics.prefill_tokens + statistics.shared_tokens == sum(len(request(pair).prompt) for pair in pairs)
        if "windows" not in kind:
            beginnings = 29 + 2 + 4 * 1  # of contexts but their last token; two tokens are not worth a copy
            assert statistics.prefill_tokens == beginnings + sum(len(pair.target) for pair in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_engine_that_keeps_goes_on_where_the_last_run_ended(
    kind: str, executor: str, models: dict[str, Any]
) -> None:
    draft = {} if "windows" in kind else {"draft": models["llama"], "draft_tokens": 2}
    for settings in ({}, draft):
        made = engine(models[kind], executor=executor, batch_size=1, keep=True, **settings)
        prompt, read = LONG[:10], []
        for turn in range(4):
            request = Request(prompt, Sampling(max_new_tokens=6))
            before = made.statistics.prefill_tokens
            (done,) = made.generate([request])
            same(done, alone(models[kind], request, "module"))
            read.append(made.statistics.prefill_tokens - before)
            prompt = [*prompt, *done.token_ids, 60 + turn, 70 + turn]
        assert read == [10, 3, 3, 3], "the last token of an answer is never read before the next turn"
        running = made.run([Request(prompt[:-3], Sampling(max_new_tokens=6))])
        running.close()  # as Ctrl-C does
        broken = made.run([Request(prompt, Sampling(max_new_tokens=6)), Request([1], Sampling(max_new_tokens=6))])
        same(next(broken), alone(models[kind], Request(prompt, Sampling(max_new_tokens=6)), "module"))
        broken.close()
        before = made.statistics.prefill_tokens
        (done,) = made.generate([Request(prompt, Sampling(max_new_tokens=6))])
        same(done, alone(models[kind], done.request, "module"))
        assert made.statistics.prefill_tokens - before == len(prompt), "nothing is left of a run that was broken off"


def _single(request: Request) -> list[Request]:
    from dataclasses import replace

    return [replace(one, sampling=replace(one.sampling, n=1)) for one in request.samples()]


def test_samples_of_a_windowed_model_share_their_prompt_before_anyone_goes_on(models: dict[str, Any]) -> None:
    made = engine(models["windows"], batch_size=5)
    made.generate([Request(LONG, Sampling(max_new_tokens=6, temperature=1.0, n=5))])
    assert made.statistics.prefill_tokens == 40 + 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_stays_within_its_budget(kind: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is counted, and slots are refilled until all requests are done."""
    from megapatch.models.generation import engine as module
    from megapatch.models.layers.kv_cache import KeyValueCache

    made: list[KeyValueCache] = []
    monkeypatch.setattr(module, "KeyValueCache", lambda *args: made.append(KeyValueCache(*args)) or made[-1])
    requests = [Request(prompt, Sampling(max_new_tokens=24)) for prompt in [*PROMPTS, LONG]]
    expected = [alone(models[kind], request, "module").token_ids for request in requests]
    one = sum(kept.numbers * kept.positions(LENGTH) for kept in engine(models[kind]).executor.kept) * 4
    for budget, slots in ((3 * one, 3), (2 * one - 1, 1), (100 * one, 6)):
        small = engine(models[kind], batch_size=6, cache_bytes=budget)
        assert small.batch_size == slots
        assert [done.token_ids for done in small.generate(requests)] == expected
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(made[-1])}
        assert sum(storages.values()) == slots * one <= budget, "from the beginning: no buffer is ever there twice"


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    for _, keys, values in cache.layers.values():
        yield from (keys, values)


def packed_parts(made: Any) -> list[Any]:
    return [part for part in made.executor.parts if getattr(part, "packed", None) is not None]


@pytest.mark.parametrize("kind", ["llama", "latent", "experts"])
def test_memory_is_told_with_the_copies_of_weights(kind: str, models: dict[str, Any]) -> None:
    made = engine(models[kind], batch_size=3, executor="lean")
    before = made.memory
    assert before.weights == sum(weight.nbytes for weight in models[kind][0].parameters())
    assert before.cache == 3 * sum(kept.numbers * kept.positions(LENGTH) for kept in made.executor.kept) * 4
    expected = made.generate([Request(LONG, Sampling(max_new_tokens=6))])
    copies = [torch.ops.mkldnn._nbytes(part.packed) for part in packed_parts(made)]
    assert made.memory.copies == sum(copies) and len(copies) >= 4 * 2
    assert before.copies <= sum(copies) < 4 * before.copies, "kernels round the sides of tiny weights up"
    without = engine(models[kind], batch_size=3, executor="lean", packed=False)
    (done,) = without.generate([Request(LONG, Sampling(max_new_tokens=6))])
    same(done, expected[0])
    assert (without.memory.copies, packed_parts(without)) == (0, [])
    assert engine(models[kind], executor="module").memory.copies == 0
    assert "packed" in str(before) and "packed" not in str(without.memory)


def test_copies_of_weights_are_kept_only_where_free_memory_holds_them(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megapatch.models.generation import memory

    needed = engine(models["llama"]).memory
    requests = [Request(prompt, Sampling(max_new_tokens=12)) for prompt in PROMPTS]
    expected = engine(models["llama"]).generate(requests)
    for share, processes, packs in ((1.2, 1, True), (1.0, 1, False), (1.2, 2, False), (2.4, 2, True)):
        caplog.clear()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(memory, "free_bytes", lambda: int((needed.copies + needed.cache) * share))  # noqa: B023
        made = engine(models["llama"])
        for done, wanted in zip(made.generate(requests), expected, strict=True):
            same(done, wanted)
        assert bool(packed_parts(made)) == bool(made.memory.copies) == packs
        assert ("packed copies of weights would take" in caplog.text) == (not packs)
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    made = engine(models["llama"], draft=models["experts"])
    assert made.memory.copies == 0 and made.draft.copy_bytes == 0


def test_a_budget_for_less_than_one_sequence_is_refused(models: dict[str, Any]) -> None:
    from megapatch.models.cli import UserError

    with pytest.raises(UserError, match="cache budget of 1,000 bytes: keys and values of one sequence of 64 tokens"):
        engine(models["llama"], cache_bytes=1000)


def test_a_windowed_layer_keeps_its_window_only(models: dict[str, Any]) -> None:
    kept = engine(models["some windows"], max_length=LENGTH).executor.kept
    assert [one.positions(LENGTH) for one in kept] == [LENGTH, LENGTH, 8, 8]


def test_latent_attention_keeps_one_vector_for_keys_and_values(models: dict[str, Any]) -> None:
    assert {one.numbers for one in engine(models["latent"]).executor.kept} == {16 + 8}


@pytest.mark.parametrize("kind", ["llama", "latent", "alibi", "experts"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_draft_changes_nothing_but_the_number_of_passes(kind: str, executor: str, models: dict[str, Any]) -> None:
    """Greedy and sampled, penalised, of several samples, stopped early; by a draft that is right, wrong, or both."""
    kinds = (
        Sampling(max_new_tokens=17),
        Sampling(max_new_tokens=9, temperature=1.0, top_k=20, n=2),
        Sampling(max_new_tokens=13, repetition_penalty=1.5, frequency_penalty=0.5, top_logprobs=2),
        Sampling(max_new_tokens=30, stop_token_ids=tuple(range(9))),
    )
    requests = [Request(prompt, kinds[i % 4], key=str(i)) for i, prompt in enumerate([*PROMPTS, LONG])]
    plain = engine(models[kind], batch_size=3, executor=executor)
    expected = plain.generate(requests)
    for draft in (kind, "alibi" if kind == "llama" else "llama"):
        made = engine(
            models[kind], draft=models[draft], draft_tokens=3, batch_size=3, prefill_tokens=16, executor=executor
        )
        for done, wanted in zip(made.generate(requests), expected, strict=True):
            same(done, wanted)
            assert (done.finish_reason, done.stop) == (wanted.finish_reason, wanted.stop)
            assert [list(top) for top in done.top_logprobs] == [list(top) for top in wanted.top_logprobs]
        found = made.statistics
        assert found.decode_tokens == plain.statistics.decode_tokens
        assert 0 <= found.accepted_tokens <= found.proposed_tokens
        if draft == kind:  # rejected only where the sequence had ended
            assert found.accepted_tokens > 0.9 * found.proposed_tokens
            assert found.passes < 0.5 * plain.statistics.passes
        else:
            assert found.accepted_tokens < 0.5 * found.proposed_tokens


def test_a_draft_that_cannot_be_undone_is_refused(models: dict[str, Any]) -> None:
    from megapatch.models.cli import UserError

    with pytest.raises(UserError, match="a draft model: with sliding windows of 8 tokens"):
        engine(models["llama"], draft=models["windows"])
    engine(models["llama"], draft=models["windows"], max_length=8)
