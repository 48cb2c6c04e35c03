"""What a session that trains adapters has besides: the base that they belong to; and checkpoints of them alone."""

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig
from megapatch.models.layers.lora import attach
from megapatch.models.lora import A, B, Start, base_digest, num_parameters
from megapatch.models.shapes import Layout
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.ranks import first, together

log = logging.getLogger(__name__)
Base = dict[str, str]  # path and digest of the weights beside which adapters are trained


def add(models: list[Any], hf: HfConfig, options: TrainOptions) -> Base | None:
    """Give adapters to a model that has the weights of --model, if the options ask for them (every rank must call)."""
    if options.lora is None:
        return None
    assert options.model is not None, "refused by the options"
    found: list[Base | None] = [None]
    with together():
        layout = Layout(hf)
        start = Start(layout, options.lora, options.seed, options.lora_from)
        attach(models, layout, start, recompute=options.recompute != "none")
        if first():
            found[0] = {"path": str(options.model.resolve()), "xxh3_128": base_digest(options.model)}
    trained = num_trained(hf, options)
    log.info(f"LoRA: {trained:,} parameters in adapters are trained; the weights of {options.model} stay as they are")
    torch.distributed.broadcast_object_list(found)
    return found[0]


def num_trained(hf: HfConfig, options: TrainOptions) -> int | None:
    """Parameters in the adapters of the whole model; None: all of the model is trained."""
    return None if options.lora is None else num_parameters(Layout(hf), options.lora)


def saved(state: dict[str, Any], options: TrainOptions) -> dict[str, Any]:
    """What a checkpoint holds of a model's sharded state: all of it, or the adapters."""
    if options.lora is None:
        return state
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {name: v for name, v in state.items() if isinstance(v, kinds) and name.rpartition(".")[2] in (A, B)}


def described(options: TrainOptions, base: Base | None) -> dict[str, Any]:
    """What a checkpoint of adapters says of them, for the manifest and for the run that resumes."""
    return {} if options.lora is None else {"lora": options.lora.described(), "base": base}


def check(ours: dict[str, Any], folder: Path, options: TrainOptions, base: Base | None) -> None:
    """Refuse to resume with other adapters than those in the checkpoint, or beside other weights (UserError)."""
    had, now = (ours.get("lora") or {}), (options.lora.described() if options.lora else {})
    if now and not had:
        flag = "--lora-from" if options.lora_from else f"--lora-rank {now['rank']}"
        raise UserError(
            f"{flag}: {folder} is of a run without adapters, which cannot go on with them; train them beside its "
            f"weights with --model {folder}, and another --save"
        )
    if had and not now:
        raise UserError(
            f"--lora-rank was {had['rank']} and is not given now: {folder} holds adapters alone; give it again, or "
            "another --save"
        )
    for name in sorted({*had, *now}):
        before, after = had.get(name), now.get(name)
        if before != after:
            flag = {"rank_stabilized": "rslora"}.get(name, name)
            raise UserError(
                f"--lora-{flag} was {before}, now {after}: such a run cannot be continued; "
                "give what it began with, or another --save"
            )
    if base and base["xxh3_128"] != ours["base"]["xxh3_128"]:
        raise UserError(
            f"--model {options.model}: not the weights that {folder} has adapters for ({ours['base']['path']}); "
            "name those, or another --save"
        )
