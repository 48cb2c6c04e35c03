"""Losses and gradient norms of trl's SFTTrainer; a process of its own, because trl's imports are heavy.

    python tests/trl_worker.py MODEL CHATS.jsonl cases.json results.json

cases.json: {name: arguments of SFTConfig}; results.json: {name: [[loss, gradient norm] of each step]}.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

STEPS = 4


def losses(model: Path, chats: Path, words: dict[str, Any]) -> list[list[float]]:
    """One run over all conversations a step, on the assistant's tokens only."""
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            max_length=None,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=1e-8,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_drop_last=False,
            **words,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
            args=config,
            train_dataset=Dataset.from_list([{"messages": record["messages"]} for record in records]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
        return [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log]


def main(model: str, chats: str, cases: str, results: str) -> None:
    """Run every case."""
    disable_progress_bars()
    found = {
        name: losses(Path(model), Path(chats), words) for name, words in json.loads(Path(cases).read_text()).items()
    }
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
