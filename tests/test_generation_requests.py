"""What requests can ask for: as transformers does it where it does, and told exactly."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_process import loaded, one_process  # noqa: F401
from tiny_models import PROMPTS, letter_tokenizer, tiny_model

from megapatch.models import device, parallel
from megapatch.models.request import Request, Sampling
from megapatch.models.tokenizer import Tokenizer

VOCAB, LENGTH = 96, 64
TOLERANCE = 1e-5  # fp32, of log-probabilities


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder and transformers' model."""
    folder = tmp_path_factory.mktemp("model")
    return folder, tiny_model(folder, "qwen3")


@pytest.fixture(scope="module")
def model(theirs: tuple[Path, Any], found: device.Device) -> list[torch.nn.Module]:
    """The same as ours."""
    return loaded(theirs[0], found)


def engine(model: Any, **settings: Any) -> Any:
    from megapatch.models.generation.engine import Engine

    return Engine(model, **{"vocab_size": VOCAB, "max_length": LENGTH, "batch_size": 3} | settings)


def answers(model: Any, sampling: Sampling, **settings: Any) -> list[Any]:
    return engine(model, **settings).generate(Request(prompt, sampling) for prompt in PROMPTS)


AS_TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition penalty": ({"repetition_penalty": 1.8}, {}),
    "less than one": ({"repetition_penalty": 0.7}, {}),
    "a shortest answer": ({"min_new_tokens": 9, "stop_token_ids": tuple(range(40))}, {}),
    "stop tokens": ({"stop_token_ids": tuple(range(20))}, {}),
    "bias": ({"logit_bias": {3: 2.5, 50: -4.0}}, {"sequence_bias": [[[3], 2.5], [[50], -4.0]]}),
}


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_greedy_answers_are_those_of_transformers(name: str, theirs: tuple[Path, Any], model: Any) -> None:
    mine, other = AS_TRANSFORMERS[name]
    found = answers(model, Sampling(max_new_tokens=16, **mine))
    plain = answers(model, Sampling(max_new_tokens=16))
    assert [one.token_ids for one in found] != [one.token_ids for one in plain]
    given = {key: value for key, value in mine.items() if key in ("repetition_penalty", "min_new_tokens")} | other
    for done in found:
        ids = torch.tensor([list(done.request.prompt)])
        stops = list(mine.get("stop_token_ids", []))
        out = theirs[1].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
            **given,
        )
        assert done.token_ids == out[0, ids.shape[1] :].tolist()
        assert done.finish_reason == ("stop" if done.token_ids[-1] in stops else "length")
        assert done.stop == (done.token_ids[-1] if done.finish_reason == "stop" else None)


def test_log_probabilities_are_those_of_the_trainers_forward_pass(model: Any) -> None:
    """Of chosen tokens, of the prompt's, and of the best ones at each place, by both executors."""
    for executor in ("lean", "module"):
        sampling = Sampling(max_new_tokens=10, temperature=1.3, top_logprobs=4, prompt_logprobs=True)
        for done in answers(model, sampling, executor=executor):
            ids = torch.tensor([[*done.request.prompt, *done.token_ids]])
            with torch.no_grad():
                expected = model[0].eval()(ids, torch.arange(ids.shape[1])[None], None).log_softmax(-1)[0, :-1]
            of_tokens = expected.gather(-1, ids[0, 1:, None])[:, 0]
            assert [*done.prompt_logprobs, *done.logprobs] == pytest.approx(of_tokens.tolist(), abs=TOLERANCE)
            best = expected.topk(4, dim=-1)
            tops = [*done.prompt_top_logprobs, *done.top_logprobs]
            assert [list(top) for top in tops] == best.indices.tolist()
            assert [x for top in tops for x in top.values()] == pytest.approx(
                best.values.flatten().tolist(), abs=TOLERANCE
            )


def test_each_request_is_told_as_many_alternatives_as_it_asked_for(model: Any) -> None:
    asked = [3, 0, 1, 5, 2]
    requests = [
        Request(prompt, Sampling(max_new_tokens=4, top_logprobs=top, prompt_logprobs=True))
        for prompt, top in zip(PROMPTS, asked, strict=True)
    ]
    for done, top in zip(engine(model, batch_size=5).generate(requests), asked, strict=True):
        expected = [top] * 4 if top else []
        assert [len(one) for one in done.top_logprobs] == expected
        assert {len(one) for one in done.prompt_top_logprobs} <= {top}
        assert len(done.prompt_logprobs) == len(done.request.prompt) - 1


def test_a_prompt_can_be_scored_without_an_answer(model: Any) -> None:
    scored = answers(model, Sampling(max_new_tokens=0, prompt_logprobs=True))
    asked = answers(model, Sampling(max_new_tokens=3, prompt_logprobs=True))
    for one, other in zip(scored, asked, strict=True):
        assert (one.token_ids, one.finish_reason) == ([], "length")
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=TOLERANCE)
    whole = [(7 * i) % 95 for i in range(LENGTH)]
    (full,) = engine(model).generate([Request(whole, Sampling(max_new_tokens=0, prompt_logprobs=True))])
    assert len(full.prompt_logprobs) == LENGTH - 1


def test_a_penalty_counts_the_answer_alone(model: Any) -> None:
    """Presence by once, frequency by every time; a huge one lets no token come twice."""
    for penalty in ("presence_penalty", "frequency_penalty"):
        for done in answers(model, Sampling(max_new_tokens=20, **{penalty: 1000.0})):
            assert len(set(done.token_ids)) == 20
            first = answers(model, Sampling(max_new_tokens=1))[done.number]
            assert done.token_ids[0] == first.token_ids[0], "the prompt does not count"


def test_samples_of_a_request_are_those_asked_for_one_by_one(model: Any) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.0, n=3, seed=5)
    together = engine(model).generate([Request(prompt, sampling, key="k") for prompt in PROMPTS])
    assert [(one.number, one.request.sample) for one in together] == [(i, k) for i in range(5) for k in range(3)]
    single = replace(sampling, n=1)
    apart = engine(model).generate([Request(p, single, "k", sample) for p in PROMPTS for sample in range(3)])
    assert [one.token_ids for one in together] == [one.token_ids for one in apart]
    assert len({tuple(one.token_ids) for one in together}) > 10


def test_complete_is_prompts_to_completions(model: Any) -> None:
    from megapatch.models.generation.engine import complete

    found = complete(model, PROMPTS, Sampling(max_new_tokens=4, temperature=1.0, n=2), vocab_size=VOCAB, max_length=40)
    assert [[len(one.token_ids) for one in row] for row in found] == [[4, 4]] * 5
    again = complete(
        model, PROMPTS[:2], Sampling(max_new_tokens=4, temperature=1.0, n=2), vocab_size=VOCAB, max_length=LENGTH
    )
    assert [[one.token_ids for one in row] for row in again] == [[one.token_ids for one in row] for row in found[:2]]


def test_pieces_come_as_tokens_do_and_never_take_text_back(model: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(letter_tokenizer(tmp_path))
    full = engine(model, tokenizer=tokenizer).generate([Request(PROMPTS[0], Sampling(max_new_tokens=12))])[0]
    pieces = [tokenizer.decode([token]) for token in full.token_ids]
    straddling = [left[-1] + right[0] for left, right in pairwise(pieces)]
    for stops in ((), (straddling[2],), (straddling[5], "absent"), (full.text[4:7] + "~",)):
        told: list[Any] = []
        made = engine(model, tokenizer=tokenizer, on_piece=told.append)
        (done,) = made.generate([Request(PROMPTS[0], Sampling(max_new_tokens=12, stop=stops))])
        assert [piece.token for piece in told] == done.token_ids
        assert "".join(piece.text for piece in told) == done.text
        assert [piece.finish_reason for piece in told] == [None] * (len(told) - 1) + [done.finish_reason]
        assert done.stop == next((stop for stop in stops if stop in full.text), None)


def test_no_stop_string_is_looked_for_in_the_shortest_answer(model: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(letter_tokenizer(tmp_path))
    plain = engine(model, tokenizer=tokenizer).generate([Request(PROMPTS[0], Sampling(max_new_tokens=12))])[0]
    stop = tokenizer.decode(plain.token_ids[:1])
    for least in (0, 5):
        sampling = Sampling(max_new_tokens=12, min_new_tokens=least, stop=(stop,))
        (done,) = engine(model, tokenizer=tokenizer).generate([Request(PROMPTS[0], sampling)])
        assert len(done.token_ids) >= max(1, least)
        assert done.token_ids == plain.token_ids[: len(done.token_ids)]
        assert (len(done.token_ids) == 1) == (least == 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_sees_new_weights_however_they_came(precision: str, theirs: Any, found: device.Device) -> None:
    """Packed copies are made again: after an update in place, through .data, and of one weight only."""
    from megapatch.models.build import ModelOptions, build
    from megapatch.models.load import load_hf, unwrapped

    hf = json.loads((theirs[0] / "config.json").read_text())
    chunks = build(hf, ModelOptions(parallel.Parallel(), found, precision))
    load_hf(chunks, theirs[0], hf)
    kept = engine(chunks, executor="lean")
    layer = unwrapped(chunks[0]).decoder.layers[2]
    requests = [Request(prompt, Sampling(max_new_tokens=8)) for prompt in PROMPTS]
    seen = [[one.token_ids for one in kept.generate(requests)]]
    with torch.no_grad():
        for change in (
            lambda: layer.mlp.linear_fc2.weight.mul_(-1),
            lambda: layer.self_attention.linear_qkv.weight.data.copy_(layer.self_attention.linear_qkv.weight.flip(0)),
            lambda: layer.mlp.linear_fc1.weight.data[3:9].neg_(),
        ):
            change()
            mine = [one.token_ids for one in kept.generate(requests)]
            assert mine == [one.token_ids for one in engine(chunks, executor="lean", packed=False).generate(requests)]
            assert mine not in seen
            seen.append(mine)


BAD: dict[str, dict[str, Any]] = {
    "min-new-tokens 9: must be from 0 to max-new-tokens, 8": {"min_new_tokens": 9, "max_new_tokens": 8},
    "max-new-tokens 0: must be at least 1, or 0 with prompt-logprobs": {"max_new_tokens": 0},
    "min-p 1.5: must be from 0 to 1": {"min_p": 1.5, "temperature": 1},
    "top-k, top-p and min-p choose nothing at temperature 0": {"min_p": 0.5},
    "repetition-penalty 0: must be above 0": {"repetition_penalty": 0},
    "n 2 at temperature 0: all completions would be the same": {"n": 2},
    "frequency-penalty nan": {"frequency_penalty": float("nan")},
}


@pytest.mark.parametrize("message", BAD)
def test_a_request_that_makes_no_sense_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**BAD[message])


def test_tokens_that_the_model_lacks_are_refused(model: Any) -> None:
    from megapatch.models.cli import UserError

    for sampling in (Sampling(logit_bias={96: 1.0}), Sampling(stop_token_ids=(-1,))):
        with pytest.raises(UserError, match=r"token id (96|-1) in logit-bias or stop-token-ids; the model has 0 to 95"):
            engine(model).generate([Request([1], sampling)])


def test_parameters_that_training_gathers_as_it_goes_are_whole_before_they_are_read(model: Any) -> None:
    """A wrapper as megatron-core's for data parallelism, whose forward pass would gather them."""

    class Gathering(torch.nn.Module):
        ddp_config = SimpleNamespace(overlap_param_gather=True)

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, []

        def disable_forward_pre_hook(self) -> None:
            self.calls.append("gathered")

        def enable_forward_pre_hook(self) -> None:
            self.calls.append("as before")

    wrapper = Gathering(model[0])
    running = engine(wrapper).run([Request(PROMPTS[0], Sampling(max_new_tokens=2))])
    assert wrapper.calls == []
    (done,) = running
    assert wrapper.calls == ["gathered", "as before"]
    assert done.token_ids == answers(model, Sampling(max_new_tokens=2))[0].token_ids
