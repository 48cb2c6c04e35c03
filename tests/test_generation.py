"""The generation engine: equal to transformers token by token, and to itself at every batch, order and layout."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_process import loaded, one_process  # noqa: F401
from tiny_models import FAMILIES, PROMPTS, byte_tokenizer, letter_tokenizer, tiny_model
from transformers import PreTrainedModel

from megapatch.models import device
from megapatch.models.family import known
from megapatch.models.request import Request, Sampling
from megapatch.models.tokenizer import Tokenizer

LOGPROB_TOLERANCE = 1e-5  # fp32, logits of other shapes of matrix product
VOCAB, LENGTH = 96, 64
FALCON_7B = {"new_decoder_architecture": False, "num_kv_heads": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # what the tiny model of a family does not show
    "falcon 7B": ("falcon", FALCON_7B),
    "falcon RW": ("falcon", FALCON_7B | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}),
    "galactica": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """A folder and transformers' model of each family; 'odd' has a vocabulary that two processes cannot halve."""
    root = tmp_path_factory.mktemp("models")
    made = {name: (root / name, tiny_model(root / name, name)) for name in FAMILIES}
    made |= {name: (root / name, tiny_model(root / name, kind, **more)) for name, (kind, more) in VARIANTS.items()}
    return made | {"odd": (root / "odd", tiny_model(root / "odd", "llama", vocab_size=VOCAB - 1))}


@pytest.fixture(scope="module")
def models(theirs: dict[str, tuple[Path, PreTrainedModel]], found: device.Device) -> dict[str, torch.nn.Module]:
    """The same as our models."""
    made = {}
    for name, (folder, _) in theirs.items():
        (made[name],) = loaded(folder, found)
    return made


def engine(model: torch.nn.Module, **settings: Any) -> Any:
    from megapatch.models.generation.engine import Engine

    return Engine(model, **{"vocab_size": VOCAB, "max_length": LENGTH} | settings)


def tokens(model: torch.nn.Module, requests: list[Request], **settings: Any) -> list[list[int]]:
    return [done.token_ids for done in engine(model, **settings).generate(requests)]


def greedy(new: int = 20, **settings: Any) -> list[Request]:
    return [Request(prompt, Sampling(max_new_tokens=new, **settings)) for prompt in PROMPTS]


def sampled(**settings: Any) -> list[Request]:
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 1.0} | settings)
    return [Request(prompt, sampling, key=f"prompt {i}") for i, prompt in enumerate(PROMPTS)]


def test_every_family_is_tried() -> None:
    assert sorted(known()) == sorted(FAMILIES)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_greedy_is_transformers_generate_at_every_batch_size(
    family: str, theirs: dict[str, tuple[Path, PreTrainedModel]], models: dict[str, torch.nn.Module]
) -> None:
    _, reference = theirs[family]
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert all(len(one) == 20 for one in expected)
    for batch_size, executor in ((1, "lean"), (2, "module"), (5, "lean")):
        assert tokens(models[family], greedy(), batch_size=batch_size, executor=executor) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_one_forward_pass(family: str, models: dict[str, torch.nn.Module]) -> None:
    model = models[family].eval()
    for done in engine(model, batch_size=3).generate([*greedy(), *sampled()]):
        ids = torch.tensor([[*done.request.prompt, *done.token_ids]])
        with torch.no_grad():
            logprobs = model(ids, torch.arange(ids.shape[1])[None], None).log_softmax(-1)[0, :-1]
        new = logprobs[-len(done.token_ids) :].gather(-1, ids[0, -len(done.token_ids) :, None])[:, 0]
        assert torch.tensor(done.logprobs) == pytest.approx(new, abs=LOGPROB_TOLERANCE)
        # at temperature 1 and uncut they are the probabilities that tokens were drawn with; greedy is sure
        drawn = new if done.request.sampling.temperature else torch.zeros_like(new)
        assert torch.tensor(done.sampling_logprobs) == pytest.approx(drawn, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9, "temperature": 2}])
def test_samples_depend_on_neither_batch_nor_order(
    settings: dict[str, Any], models: dict[str, torch.nn.Module]
) -> None:
    requests = [*sampled(**settings), Request(PROMPTS[0], Sampling(max_new_tokens=3), key="greedy")]
    expected = tokens(models["qwen3"], requests, batch_size=1)
    assert tokens(models["qwen3"], requests, batch_size=3) == expected
    assert tokens(models["qwen3"], requests, batch_size=8) == expected
    assert tokens(models["qwen3"], requests[::-1], batch_size=3) == expected[::-1]


def test_samples_differ_by_seed_key_and_sample_number(models: dict[str, torch.nn.Module]) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    base = Request(PROMPTS[0], sampling, key="a")
    others = [
        Request(PROMPTS[0], Sampling(max_new_tokens=12, temperature=1.0, seed=1), key="a"),
        Request(PROMPTS[0], sampling, key="b"),
        Request(PROMPTS[0], sampling, key="a", sample=1),
    ]
    first, again, *rest = tokens(models["llama"], [base, base, *others])
    assert first == again
    assert len({tuple(one) for one in (first, *rest)}) == 4


def test_top_k_of_one_is_greedy(models: dict[str, torch.nn.Module]) -> None:
    assert tokens(models["llama"], sampled(top_k=1)) == tokens(models["llama"], greedy(12))


def test_a_sequence_ends_at_the_longest_length(models: dict[str, torch.nn.Module]) -> None:
    done = engine(models["llama"], max_length=32, batch_size=2).generate(greedy(20))
    assert [len(one.token_ids) for one in done] == [min(20, 32 - len(prompt)) for prompt in PROMPTS]
    assert {one.finish_reason for one in done} == {"length"}


def test_impossible_requests_are_refused(models: dict[str, torch.nn.Module]) -> None:
    from megapatch.models.cli import UserError

    cases = {
        "request 1: the prompt has no tokens": [],
        "token id 96 in the prompt": [1, 96],
        "token id -1": [-1, 5],
        "prompt has 64 tokens and leaves no room; the model takes 64": [1] * 64,
    }
    for message, prompt in cases.items():
        with pytest.raises(UserError, match=message):
            engine(models["llama"]).generate([Request([1]), Request(prompt)])


def test_pieces_of_a_sequence_are_refused() -> None:
    from megapatch.models.cli import UserError

    config = SimpleNamespace(context_parallel_size=2)
    with pytest.raises(UserError, match="--cp 2: generation runs with --cp 1"):
        engine(SimpleNamespace(config=config))  # type: ignore[arg-type]


def test_stop_tokens_end_a_sequence_and_stay_in_its_ids(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    tokenizer = Tokenizer(letter_tokenizer(tmp_path))
    free = engine(models["llama"], tokenizer=tokenizer).generate(greedy(12))
    stop = free[0].token_ids[5]
    stopped = engine(models["llama"], tokenizer=tokenizer).generate(greedy(12, stop_token_ids=(stop,)))
    for full, done in zip(free, stopped, strict=True):
        end = full.token_ids.index(stop) if stop in full.token_ids else 12
        assert done.token_ids == full.token_ids[: end + 1]
        assert done.text == tokenizer.decode(full.token_ids[:end])
        assert done.finish_reason == ("stop" if end < 12 else "length")
    assert free[0].finish_reason == "length"


def test_stop_strings_are_found_across_tokens_and_cut_off(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    tokenizer = Tokenizer(letter_tokenizer(tmp_path))
    full = engine(models["llama"], tokenizer=tokenizer).generate(greedy(12))[0]
    text, pieces = full.text, [tokenizer.decode([token]) for token in full.token_ids]
    assert text == "".join(pieces)
    straddling = [left[-1] + right[0] for left, right in pairwise(pieces)]
    for stop in [*straddling, text[3:9], text[-1], "absent"]:
        at = text.find(stop)
        (done,) = engine(models["llama"], tokenizer=tokenizer).generate(
            [Request(PROMPTS[0], Sampling(max_new_tokens=12, stop=("absent too", stop)))]
        )
        needed = next((n for n in range(1, 13) if stop in "".join(pieces[:n])), 12)
        assert done.token_ids == full.token_ids[:needed]
        assert done.text == (text[:at] if at >= 0 else text)
        assert done.finish_reason == ("stop" if at >= 0 else "length")


def test_no_part_of_a_character_is_shown(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path))
    held_back = 0
    for new in range(1, 13):
        for done in engine(models["llama"], tokenizer=tokenizer).generate(greedy(new)):
            whole = tokenizer.decode(done.token_ids)
            assert done.text == whole.rstrip("\ufffd")
            held_back += done.text != whole
    assert held_back > 0, "the case never came up"


def test_generation_leaves_no_inference_tensor_where_training_will_find_it(models: dict[str, torch.nn.Module]) -> None:
    assert tokens(models["llama"], [Request(PROMPTS[0], Sampling(max_new_tokens=2))], max_length=13)
    table = models["llama"].rotary_pos_emb  # type: ignore[operator]
    hits = type(table).forward.cache_info().hits
    assert not table(13, packed_seq=False, cp_group=None).is_inference()  # type: ignore[operator]
    assert type(table).forward.cache_info().hits == hits + 1, "the one that generation made"


def test_training_is_as_before_after_generating(models: dict[str, torch.nn.Module]) -> None:
    model = models["qwen3_moe"].train()
    ids = torch.tensor([PROMPTS[3][:8], PROMPTS[4][:8]])
    positions = torch.arange(8).expand(2, -1)

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(ids, positions, None, labels=ids.roll(-1, 1)).mean()
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    loss, grads = step()
    before = tokens(model, greedy(8))
    assert model.training
    again, grads_again = step()
    assert torch.equal(loss, again)
    assert all(map(torch.equal, grads, grads_again))
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter += grad
    assert tokens(model, greedy(8)) != before, "the engine sees the new weights"
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter -= grad


LAYOUTS = {
    "llama tp": ("llama", {"tp": 2}),
    "llama tp, sequence parallel": ("llama", {"tp": 2, "sequence_parallel": True}),
    "one key-value head, learned positions": ("gpt_bigcode", {"tp": 2, "sequence_parallel": True}),
    "alibi": ("bloom", {"tp": 2, "sequence_parallel": True}),
    "windows": ("mistral", {"tp": 2}),
    "latent vectors": ("deepseek_v3", {"tp": 2, "sequence_parallel": True}),
    "stages": ("llama", {"pp": 2}),
    "stages in turns": ("qwen2", {"pp": 2, "vpp": 2}),
    "stages, learned positions": ("gpt2", {"pp": 2}),
    "parallel layers": ("falcon", {"tp": 2, "sequence_parallel": True}),
    "padded vocabulary": ("odd", {"tp": 2}),
    "experts, tp": ("qwen3_moe", {"tp": 2, "sequence_parallel": True}),
    "experts, ep": ("mixtral", {"ep": 2}),
    "experts, tp and ep": ("mixtral", {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1}),
}


def test_two_processes_give_what_one_gives(
    theirs: dict[str, tuple[Path, PreTrainedModel]], models: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    from generate_worker import requests, told

    cases = {name: {"folder": str(theirs[folder][0]), "layout": layout} for name, (folder, layout) in LAYOUTS.items()}
    (tmp_path / "cases.json").write_text(json.dumps({"prompts": PROMPTS, "cases": cases}))
    worker = [
        str(Path(__file__).parent / "generate_worker.py"),
        str(tmp_path / "cases.json"),
        str(tmp_path / "out.json"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *worker]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for name, (folder, _) in LAYOUTS.items():
        done = engine(models[folder], vocab_size=VOCAB - (folder == "odd"), batch_size=2).generate(requests(PROMPTS))
        assert found[name]["token_ids"] == [one.token_ids for one in done], name
        flat = [logprob for one in done for logprob in told(one)]
        assert [x for one in found[name]["logprobs"] for x in one] == pytest.approx(flat, abs=LOGPROB_TOLERANCE), name
