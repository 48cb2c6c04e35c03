"""A mixture of experts in training: how tokens were shared among experts, for the log, and the router's bias."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    track_moe_metrics,
)
from torch import Tensor

from megapatch.models.layers.router import Router
from megapatch.models.layers.spec import mixture_layers

BALANCING = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}  # upstream's names


def forget() -> None:
    """Drop what megatron-core keeps from earlier uses in this process: a scale, and sums for so many layers."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    get_moe_layer_wise_logging_tracker().clear()


def routers(models: list[Any]) -> Iterator[Router]:
    """Of all mixtures of this stage, in order."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, Router))


def finalize(models: list[Any], *args: Any, **kwargs: Any) -> None:
    """megatron-core's last work on gradients, which updates routers' biases; the old ones are remembered."""
    for router in routers(models):
        if router.expert_bias is not None:
            router.last_bias = router.expert_bias.clone()
    finalize_model_grads(models, *args, **kwargs)


def undo_bias(models: list[Any]) -> None:
    """Take back the last update of biases, for a step that is skipped."""
    for router in routers(models):
        if router.expert_bias is not None:
            router.expert_bias.copy_(router.last_bias)


def losses(config: TransformerConfig, step: int, count: int) -> dict[str, float]:
    """Load-balancing loss of a mixture, averaged over layers and ``count`` micro-batches; every rank must call."""
    name = BALANCING.get(str(config.moe_router_load_balancing_type))
    if config.num_moe_experts is None or name is None:
        return {}
    totals: dict[str, Tensor] = {}
    further = config.mtp_num_layers or 0
    track_moe_metrics(
        1 / count,
        step,
        total_loss_dict=totals,
        force_initialize=True,
        track_names=[name],
        num_layers=config.num_layers + further,
        moe_layer_freq=[int(mixture) for mixture in mixture_layers(config)],
        mtp_num_layers=further,
    )
    clear_aux_losses_tracker()
    return {name: float(value) for name, value in totals.items()}


def load(config: TransformerConfig, models: list[Any], device: torch.device) -> dict[str, float]:
    """Tokens of the global batch per expert and layer: mean and largest; how many were dropped; every rank must call.

    With ``moe_z_loss_coeff`` also the mean square of the log-sum-exp of routers' logits, per token and layer.
    """
    experts = config.num_moe_experts
    if experts is None:
        return {}
    found = [taken for router in routers(models) if (taken := router.take_load()) is not None]
    tokens = torch.zeros(len(found), experts, dtype=torch.int64, device=device)  # [layers of this stage, e]
    for row, part in zip(tokens, found, strict=True):
        row.copy_(part.tokens)
    torch.distributed.all_reduce(
        tokens, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    )
    most = tokens.max() if found else tokens.new_zeros(())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part in found:
        sums += torch.stack([torch.as_tensor(x, device=device).double() for x in _sums(part)])
    torch.distributed.all_reduce(sums)
    taken, routed, squares = sums.tolist()
    layers = sum(mixture_layers(config)) + (config.mtp_num_layers or 0) * mixture_layers(config)[-1]
    shown = {"expert_tokens_mean": taken / (layers * experts), "expert_tokens_max": float(most)}
    shown["tokens_dropped"] = (routed - taken) / config.moe_router_topk
    return shown | ({"router_z_loss": squares / routed * config.moe_router_topk} if config.moe_z_loss_coeff else {})


def _sums(part: Any) -> tuple[Tensor, int, Any]:
    return part.tokens.sum(), part.routed, part.z_loss
