"""One optimizer step: forward and backward over the micro-batches, gradients checked, parameters updated."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megapatch.trainer.layout import experts
from megapatch.trainer.session import Session

Batches = Callable[[], Iterator[dict[str, Any]]]  # a fresh iterator over this rank's micro-batches


@dataclass(frozen=True)
class StepResult:
    """What came of a step, the same on every rank. ``grad_norm`` is before clipping; None: parameters not updated."""

    loss: float
    grad_norm: float | None
    tokens: int
    extra: dict[str, float]


def _loss(
    loss_mask: Tensor,
    output: Tensor,
    *,
    scale: float = 1.0,
    count: Tensor | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [b, s] and their mask -> sum of losses, number of tokens (int32), both for the log [2].

    megatron-core divides gradients by the number of tokens of the global batch, an integer. Where tokens have weights,
    ``count`` is the number instead, and ``scale`` is counts / weights of the global batch. ``watch`` sees both too.
    """
    if watch is not None:
        watch(output.detach(), loss_mask)
    total = (output.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    said = torch.stack([total.detach(), tokens])
    return total * scale, (tokens if count is None else count).to(torch.int), said


def forward(batches: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """megatron-core's forward step: the model's token losses, and the function that reduces them."""
    batch = next(batches)
    more = {"packed_seq_params": batch["packed"]} if "packed" in batch else {}
    mask, weighing = batch["loss_mask"], batch.get("weighing", {})
    further = mask * weighing.get("scale", 1.0)  # megatron-core adds losses of multi-token prediction, so weighed
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=further, **more)
    return output, partial(_loss, mask, **weighing)


def run_batches(session: Session, batches: Batches, count: int, *, train: bool) -> tuple[float, float]:
    """Run ``count`` micro-batches, with gradients if ``train``; mean loss per token and tokens of the global batch.

    Where tokens have weights: the weighted mean, and the sum of weights.
    """
    seq_length, samples = session.options.pass_shape
    parts = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[batches() for _ in session.chunks] if len(session.chunks) > 1 else batches(),
        model=session.chunks,
        num_microbatches=count,
        seq_length=seq_length,
        micro_batch_size=samples,
        forward_only=not train,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=session.device.torch)
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        sums += torch.stack(parts).double().sum(0)
    torch.distributed.all_reduce(sums)
    total, tokens = sums.tolist()
    return total / tokens if tokens else 0.0, tokens


def train_step(session: Session, batches: Batches, count: int) -> StepResult:
    """One optimizer step; where the loss or a gradient is not finite, parameters stay and ``grad_norm`` is None."""
    for chunk in session.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    session.optimizer.zero_grad()
    loss, tokens = run_batches(session, batches, count, train=True)
    norm = update(session) if math.isfinite(loss) else None
    if norm is None:
        experts.undo_bias(session.models)
    extra = experts.losses(session.config, session.step, count)
    extra |= experts.load(session.config, session.models, session.device.torch)
    if session.aside:
        extra |= session.aside.most(session.device.torch)
    if session.held:
        extra |= session.held.measures()
    if session.away:
        extra |= session.away.measures()
    return StepResult(loss, norm, round(tokens), extra | _prediction_losses(session, count))


def update(session: Session) -> float | None:
    """Clip and step; the gradient norm before clipping, or None where it is not finite and nothing was changed."""
    optimizer, limit = session.optimizer, session.options.clip_grad
    if optimizer.prepare_grads():
        return None
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return None
    for part in optimizer.chained_optimizers if limit else ():
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, limit, norm)
    optimizer.step_with_ready_grads()
    session.updates += 1
    session.schedule.step(increment=session.options.global_batch_size)
    return norm


def _prediction_losses(session: Session, count: int) -> dict[str, float]:
    """Loss of each layer that predicts later tokens, averaged over micro-batches and ranks; empty without them.

    Left out where a rank's micro-batch has no such token: megatron-core divides by their number.
    """
    layers = session.config.mtp_num_layers or 0
    if not layers:
        return {}
    tracker = MTPLossLoggingHelper.tracker  # filled on ranks of the last stage only
    sums = tracker.pop("values", torch.zeros(layers, device=session.device.torch))
    torch.distributed.all_reduce(sums)
    ranks = torch.distributed.get_world_size() // session.options.pp
    means = {f"mtp_{n}_loss": float(total) / ranks / count for n, total in enumerate(sums, 1)}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


@torch.no_grad()
def evaluate(session: Session, batches: Callable[[int], Batches | None], steps: int, count: int) -> float | None:
    """Mean loss per token over ``steps`` global batches, without dropout; parameters and gradients stay.

    None where ``batches``, which all ranks agree on, gives none: the evaluation is cut short.
    """
    gathering = session.options.overlap_param_gather
    for chunk in session.chunks:
        if gathering:
            chunk.disable_forward_pre_hook()
        chunk.eval()
    total, tokens = 0.0, 0.0
    given: Batches | None = None
    for step in range(steps):
        if (given := batches(step)) is None:
            break
        loss, n = run_batches(session, given, count, train=False)
        total, tokens = total + loss * n, tokens + n
    for chunk in session.chunks:
        chunk.train()
        if gathering:
            chunk.enable_forward_pre_hook()
    if given is None:
        return None
    return total / tokens if tokens else 0.0
