"""mp-sft with adapters: rows of several conversations train them as single conversations do; peft loads the result."""

from pathlib import Path

import pytest
import sft_runs
import torch
from model_folders import weights
from peft import PeftModel
from trainer_runs import log_of, steps
from transformers import AutoModelForCausalLM

from megapatch.models.packed_rows import Conversations
from megapatch.tools.convert.convert import main as convert
from megapatch.trainer.sft import main

LORA = "--lora-rank 4 --lora-targets attention down_proj --recompute full"
SOME = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def train(folder: Path, save: str, extra: str) -> list[tuple[int, float, float, float]]:
    """The steps of a run of mp-sft that is saved in FOLDER/SAVE."""
    where = ["--model", str(folder / "dense"), "--data-path", str(folder / "chats"), "--save", str(folder / save)]
    assert main([*where, *sft_runs.WORDS.split(), *LORA.split(), *extra.split()]) == 0
    return steps(log_of(folder / save))


def test_conversations_train_adapters_alike_packed_and_alone(tmp_path: Path) -> None:
    sft_runs.tokenizer(tmp_path)
    sft_runs.filling(tmp_path, "chats")
    base = sft_runs.model(tmp_path, "dense")
    packed = train(tmp_path, "packed", f"--global-batch-size {sft_runs.ROWS}")
    alone = train(tmp_path, "alone", f"--no-packing --global-batch-size {len(Conversations(tmp_path / 'chats'))}")
    for a, b in zip(packed, alone, strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-5)
        assert a[2] == pytest.approx(b[2], rel=1e-4)
    assert packed[-1][1] < packed[0][1]

    source = ["--source", str(tmp_path / "packed"), "--target"]
    assert convert([*source, str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert convert([*source, str(tmp_path / "merged"), "--merge-lora"]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "peft"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(40)[None]
    with torch.no_grad():  # merged weights are rounded once more
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=2e-5, rtol=0)
    before, after = weights(base), weights(tmp_path / "merged")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.split(".")[-2] in SOME}
