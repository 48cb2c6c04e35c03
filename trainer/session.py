"""Everything that a training run holds: model, optimizer, schedule, on this process's part of the layout."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megapatch.models import core_files
from megapatch.models.build import DTYPES, ModelOptions, build, transformer_config
from megapatch.models.cli import UserError
from megapatch.models.device import Device, seed_everything
from megapatch.models.family import HfConfig, find
from megapatch.models.held import plain
from megapatch.models.layers import backends, spec
from megapatch.models.load import load_weights, unwrapped
from megapatch.models.shapes import num_parameters
from megapatch.trainer.layout import experts
from megapatch.trainer.offload import activations, offloading
from megapatch.trainer.offload.held_memory import HeldPeak
from megapatch.trainer.offload.options import AUTO
from megapatch.trainer.offload.parts import without_masters
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.ranks import first, together, warn
from megapatch.trainer.saving import optimizer_state
from megapatch.trainer.tuning import adapters

log = logging.getLogger(__name__)
SCHEDULES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}  # ours: megatron-core's


@dataclass
class Session:
    """One run's state. ``chunks`` are this stage's model chunks, wrapped for data parallelism."""

    options: TrainOptions
    device: Device
    hf: HfConfig
    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: Any
    schedule: OptimizerParamScheduler
    step: int = 0  # optimizer steps done
    consumed_samples: int = 0
    updates: int = 0  # steps that changed the parameters: the others had numbers that are not finite
    data: str = ""  # a name for the content of what is trained on
    base: adapters.Base | None = None  # with --lora-rank: the weights that the adapters are for
    aside: activations.Offload | None = None  # with --offload-activations
    held: HeldPeak | None = None  # on a CPU with something in host memory
    away: offloading.Offloading | None = None  # with --offload-optimizer

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, a tied embedding counted once."""
        return num_parameters(self.hf if self.config.mtp_num_layers else plain(self.hf))

    @property
    def num_samples(self) -> int:
        """Samples from the first step to the last, where earlier steps may have had another --global-batch-size."""
        return self.consumed_samples + (self.options.train_iters - self.step) * self.options.global_batch_size

    @property
    def num_saved(self) -> int:
        """Parameters that are trained, and that checkpoints hold."""
        return adapters.num_trained(self.hf, self.options) or self.num_parameters

    @property
    def models(self) -> list[Any]:
        """The chunks without the wrapper for data parallelism."""
        return [chunk.module for chunk in self.chunks]


def start(options: TrainOptions, device: Device, hf: HfConfig, *, load: bool) -> Session:
    """Build the run in the process groups that are there; with ``load`` or adapters, with the weights of --model."""
    experts.forget()
    seed_everything(options.seed, parallel_state.get_pipeline_model_parallel_rank())
    made = _model_options(options, device, hf)
    if find(hf).transformer_config(hf).get("mtp_num_layers") and not options.mtp_loss_weight:
        warn(
            log, "layers for multi-token prediction are left out, from checkpoints too (--mtp-loss-weight trains them)"
        )
    with together():
        models = build(hf, made)
    if (load or options.lora) and options.model is not None:
        _load(models, options.model, hf)
    base = adapters.add(models, hf, options)
    _tell_attention(backends.choose(models[0].config, models, made.device))
    config: TransformerConfig = models[0].config
    chunks = [_wrap(options, config, model, first=i == 0) for i, model in enumerate(models)]
    settings = optimizer_config(options)
    make = without_masters if options.offload_optimizer else get_megatron_optimizer
    optimizer = make(settings, chunks, get_standard_config_overrides(settings))
    away = offloading.start(options, device, optimizer, chunks) if options.offload_optimizer else None
    optimizer_state.allocate(optimizer)
    _connect(config, chunks, optimizer, options)
    aside = activations.start(options, device, models)  # when the weights are where they stay
    schedule = _schedule(options, optimizer)
    held = _held(models, aside, away) if device.kind == "cpu" and (aside or away) else None
    return Session(
        options, device, hf, config, chunks, optimizer, schedule, base=base, aside=aside, held=held, away=away
    )


def refuse(options: TrainOptions, device: Device, hf: HfConfig) -> None:
    """UserError where the model cannot be built or kept so on this device; needs no process group."""
    if options.offload_optimizer == AUTO and not options.device_memory_gib and device.memory_bytes() is None:
        raise UserError("--offload-optimizer auto: on a CPU it needs --device-memory-gib, the memory to emulate")
    transformer_config(hf, _model_options(options, device, hf))


def _model_options(options: TrainOptions, device: Device, hf: HfConfig) -> ModelOptions:
    layers = replace(device, transformer_engine=False) if options.lora else device  # adapters go beside core's own
    return ModelOptions(options, layers, options.precision, options.seq_length, _overrides(options, layers, hf))


def _held(
    models: list[torch.nn.Module], aside: activations.Offload | None, away: offloading.Offloading | None
) -> HeldPeak:
    """Have the layers tell how much the device, of which a CPU does the work, would hold."""
    arenas = [aside.link.pool] if aside else []
    found = HeldPeak(lambda: sum(pool.held_bytes for pool in arenas) + (away.host_bytes if away else 0))
    found.watch([layer for model in models for layer in unwrapped(model).decoder.layers])
    if aside:
        aside.fetched = found.note
    return found


def _tell_attention(choice: backends.Choice) -> None:
    """Log the attention backend and why it is that; without a fused kernel a warning."""
    if not choice.fused:
        warn(log, "attention: %s: it builds all scores, [s, s] per head (%s)", choice.name, choice.reason)
    elif first():
        log.info("attention: %s (%s)", choice.name, choice.reason)


def _load(models: list[torch.nn.Module], source: Path, hf: HfConfig) -> None:
    """Fill the model with the weights of --model."""
    if core_files.is_core(source):
        with together():
            core_files.load_metadata_safely(core_files.resolve(source))
        load_weights(models, source, hf)  # collective
    else:
        with together():
            load_weights(models, source, hf)


def _overrides(options: TrainOptions, device: Device, hf: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields that training sets."""
    fields: dict[str, Any] = {"calculate_per_token_loss": True}  # the loss does not depend on how a batch is cut
    count = find(hf).transformer_config(hf).get("mtp_num_layers")
    if options.mtp_loss_weight and not count:
        raise UserError("--mtp-loss-weight: the model of config.json has no layers for multi-token prediction")
    if options.mtp_loss_weight:
        fields |= {"mtp_num_layers": count, "mtp_loss_scaling_factor": options.mtp_loss_weight}
    if options.lora and find(hf).transformer_config(hf).get("moe_router_enable_expert_bias"):
        fields["moe_router_bias_update_rate"] = 0.0  # what is not trained stays as it is
    model = find(hf).transformer_config(hf)
    special = spec.resolve(find(hf).modules(hf))
    engine = device.transformer_engine and not special.special
    reason = "the layers of this run are not its" if device.transformer_engine else device.no_engine
    own_layer = special.layer is not TransformerLayer
    fields |= options.recompute_config(model, own_layer=own_layer, engine=engine and options.moe_grouped_gemm)
    fields |= options.moe_config(model, engine=engine)
    fields |= options.fp8_config(engine=engine, why_not=reason)
    fields |= options.overlap_config(engine=engine, why_not=reason)
    return fields


def optimizer_config(options: TrainOptions) -> OptimizerConfig:
    """megatron-core's optimizer settings."""
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=options.precision == "bf16",
        params_dtype=DTYPES[options.precision],
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
    )


def _wrap(
    options: TrainOptions, config: TransformerConfig, model: torch.nn.Module, first: bool
) -> DistributedDataParallel:
    on_gloo = torch.distributed.get_backend() == "gloo"  # whose reduce-scatter sends all to everyone
    by_exchange = on_gloo and options.use_distributed_optimizer and options.overlap_grad_reduce
    by_exchange = by_exchange and not options.vpp  # megatron-core joins buckets of interleaved chunks; it takes one
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=options.use_distributed_optimizer,
        bucket_size=options.ddp_bucket_size,
        reduce_scatter_with_fp32_accumulation=by_exchange,
    )
    if not by_exchange:  # megatron-core keeps this choice for the whole process; an earlier run in it may have made it
        param_and_grad_buffer.dist_reduce_scatter_func = torch.distributed.reduce_scatter_tensor
    return DistributedDataParallel(config, ddp, model, disable_bucketing=not first)


def _connect(config: TransformerConfig, chunks: list[Any], optimizer: Any, options: TrainOptions) -> None:
    """Tell megatron-core's schedules how gradients are scaled and reduced."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = experts.finalize
    if options.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]


def _schedule(options: TrainOptions, optimizer: Any) -> OptimizerParamScheduler:
    """Learning rate by samples seen, so that it does not depend on the layout."""
    batch = options.global_batch_size
    decay = options.lr_decay_iters or options.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters * batch,
        lr_decay_steps=decay * batch,
        lr_decay_style=SCHEDULES[options.lr_schedule],
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=options.train_iters * batch,
        wd_incr_style="constant",
        wsd_decay_steps=(options.lr_wsd_decay_iters or 0) * batch,
        lr_wsd_decay_style="cosine",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
