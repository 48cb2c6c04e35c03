"""A checkpoint trained at any layout is read by one process: its texts are those of transformers on the export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import arguments, corpus, error, launch, model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megapatch.tools.convert.convert import main as convert
from megapatch.tools.generate.generate import main

STEPS = "--train-iters 2 --global-batch-size 4 --save-interval 2"
LAYOUTS = {  # family, how it is trained on two processes
    "context": ("qwen3", "--cp 2"),
    "context-experts": ("qwen3_moe", "--cp 2 --ep 2"),
    "tensors": ("qwen3", "--tp 2 --sequence-parallel"),
    "stages": ("qwen3", "--pp 2"),
}
TEXTS = ["the", "a longer text than the one before", "x y"]
TOLERANCE = 1e-5  # fp32, of log-probabilities


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two steps, each with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    corpus(folder)
    for family in {family for family, _ in LAYOUTS.values()}:
        model(folder, family, family)
    cases = {name: arguments(folder, family, name, f"{STEPS} {how}") for name, (family, how) in LAYOUTS.items()}
    for name, records in launch(2, cases, folder).items():
        assert not error(records), (name, error(records))
    return folder


def rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    given = [word for text in TEXTS for word in ("--prompt", text)]
    assert main(["--model", str(folder), *given, "--max-new-tokens", "8", "--logprobs", "--ignore-eos"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_texts_are_those_of_the_export_in_transformers(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(trained / name, capsys)
    assert convert(["--source", str(trained / name), "--target", str(tmp_path / "exported")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for row, text in zip(found, TEXTS, strict=True):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
        new = out[ids.shape[1] :]
        assert row["token_ids"] == new.tolist()
        with torch.no_grad():
            logprobs = theirs(out[None]).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        assert row["logprobs"] == pytest.approx(logprobs.gather(-1, new[:, None])[:, 0].tolist(), abs=TOLERANCE)
