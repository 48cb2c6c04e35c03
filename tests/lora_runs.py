"""Training of adapters by transformers and peft, and the samples of a run, for the tests of LoRA."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from trainer_runs import arguments
from transformers import AutoModelForCausalLM

from megapatch.models import cli, device, parallel
from megapatch.models.lora import first_a
from megapatch.trainer.options import PretrainOptions

Sample = dict[str, torch.Tensor]


@contextmanager
def session_of(folder: Path, kind: str, save: str, extra: str) -> Any:
    """A trainer in this process at the end of its run, the micro-batches it had, and the frozen weights before."""
    found = device.start("cpu")  # before megatron-core is imported
    from megapatch.trainer import step
    from megapatch.trainer.pretrain import make_plan, prepare

    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(arguments(folder, kind, save, extra))
    seen: list[Sample] = []
    forward = step.forward

    def recording(batches: Any, model: Any) -> Any:
        def noted() -> Any:
            for batch in batches:
                seen.append({k: batch[k].clone() for k in ("tokens", "labels", "loss_mask")})
                yield batch

        return forward(noted(), model)

    try:
        trainer, records = prepare(options, found, make_plan(options))
        named = trainer.session.models[0].named_parameters()
        frozen = {name: p.detach().clone() for name, p in named if not p.requires_grad}
        with mock.patch.object(step, "forward", recording):
            trainer.run()
        records.close()
        yield trainer, seen, frozen
    finally:
        parallel.stop()


def by_peft(model: Path, samples: list[Sample], rates: list[float], targets: list[str], **lora: Any) -> list[float]:
    """Losses of training adapters in transformers' model with peft, from the same A: AdamW, clipping at 1."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(whole, LoraConfig(target_modules=targets, **lora))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                parameter.copy_(first_a(module, *parameter.shape, seed=1234))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    per_step, losses = len(samples) // len(rates), []
    for number, rate in enumerate(rates):
        batch = samples[number * per_step : (number + 1) * per_step]
        tokens, labels, mask = (torch.cat([s[key] for s in batch]) for key in ("tokens", "labels", "loss_mask"))
        logits = adapted(tokens).logits.float()
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (each * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses
