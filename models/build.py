"""Family + Device + Parallel -> megatron-core GPTModel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.device import Device
from megapatch.models.family import (
    HfConfig,
    find,
    inverse_frequencies,
    max_positions,
    positions,
    refuse_length,
    tied_embeddings,
    vocab_size,
)
from megapatch.models.layers import prediction, spec
from megapatch.models.layers.cross_entropy import Model
from megapatch.models.layers.fused import fuse_activations
from megapatch.models.parallel import Parallel

Precision = Literal["fp32", "bf16"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """What a model is besides its config.json."""

    parallel: Parallel
    device: Device
    precision: Precision = "fp32"
    seq_length: int | None = None  # None: config.json's max_position_embeddings
    overrides: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields


def transformer_config(hf: HfConfig, options: ModelOptions) -> TransformerConfig:
    """megatron-core's configuration of a config.json on a device at a layout (UserError when they do not fit)."""
    fields = find(hf).transformer_config(hf)
    options.parallel.check_model(fields)
    fields["mtp_num_layers"] = None  # only training asks for them, in overrides
    fields["activation_func"] = ACTIVATIONS[fields["activation_func"]]
    dtype = DTYPES[options.precision]
    moe = {"moe_token_dispatcher_type": "alltoall"} if fields.get("num_moe_experts") else {}
    types = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": options.precision == "bf16"}
    layout, machine = options.parallel.config(fields | options.overrides), options.device.config()
    try:
        return config_class(fields)(**machine | layout | moe | types | fields | options.overrides)
    except ValueError as error:
        raise UserError(f"megatron-core refuses this config.json at this layout: {error}") from error


def config_class(fields: Mapping[str, Any]) -> type[TransformerConfig]:
    """The class that takes these fields."""
    return MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig


def build(hf: HfConfig, options: ModelOptions) -> list[torch.nn.Module]:
    """This process's part of the model with random weights: one GPTModel per virtual pipeline chunk.

    The process groups must be there (``parallel.start``), and the generators seeded. In bf16 each is wrapped in
    megatron-core's Float16Module. On a GPU the model is moved there.
    """
    config = transformer_config(hf, options)
    chunks: list[torch.nn.Module] = []
    for stage in range(options.parallel.vpp) if options.parallel.vpp else [None]:
        model = _chunk(hf, config, options, stage).to(options.device.torch)
        chunks.append(Float16Module(config, model) if options.precision == "bf16" else model)
    return chunks


def _chunk(hf: HfConfig, config: TransformerConfig, options: ModelOptions, stage: int | None) -> GPTModel:
    refuse_length(hf, options.seq_length)
    vocab, kind, modules = vocab_size(hf), positions(hf), spec.resolve(find(hf).modules(hf))
    model = Model(
        config,
        spec.block_spec(config, modules, options.device.transformer_engine, stage),
        vocab_size=padded_vocabulary(vocab, options.parallel.tp),
        max_sequence_length=max_positions(hf) or 0,  # rows of learned positions; nothing else reads it
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=tied_embeddings(hf),
        position_embedding_type=kind,
        mtp_block_spec=prediction.block_spec(config, modules, stage) if config.mtp_num_layers else None,
        vp_stage=stage,
    )
    if kind == "rope" and not config.multi_latent_attention:
        frequencies = torch.tensor(inverse_frequencies(hf), dtype=torch.float64)
        model.rotary_pos_emb.inv_freq = frequencies.to(torch.float32).to(options.device.torch)
    fuse_activations(model)
    _mark_experts(model)
    for adapt in modules.adapt:
        adapt(model, hf)
    if model.post_process:
        hide_padding(model, vocab)
    return model


def _mark_experts(model: GPTModel) -> None:
    """Experts' weights meet ever other numbers of rows; their gradients are added up over ranks with the same part.

    megatron-core 0.16.1 does the latter only where --ep is above 1 (tensor_parallel/layers.py:886, :1209), and else
    adds them up as those of dense layers: with --etp below --tp over too few ranks, above it over different parts.
    """
    apart = model.config.expert_tensor_parallel_size != model.config.tensor_model_parallel_size
    for module in model.modules():
        for parameter in module.experts.parameters() if isinstance(module, MoELayer) else ():
            parameter.rows_vary = True
            if apart:  # else the ranks are the same
                parameter.allreduce = False


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to what tensor parallelism can cut."""
    return -(-vocab_size // tp) * tp


def hide_padding(model: GPTModel, vocab_size: int) -> None:
    """Give logits beyond the vocabulary no probability, so that the loss does not depend on the layout."""
    tp, rank = model.config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    padded = padded_vocabulary(vocab_size, tp)
    local = padded // tp
    first = max(vocab_size - rank * local, 0)  # of this rank's columns, the first that is padding
    if padded == vocab_size:
        return

    def mask(module: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output  # [s, b, v/tp], or [s, b, v] when gathered
        start = first if logits.shape[-1] == local else vocab_size
        hidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        hidden[start:] = True
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(mask)
