"""Parallel layout: the options every tool shares, what they demand of a model, and starting the process groups."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Optional

from megapatch.models import splits
from megapatch.models.cli import Common, UserError, opt

if TYPE_CHECKING:
    from megapatch.models.device import Device


@dataclass(frozen=True, kw_only=True)
class Parallel(Common):
    """How a model is cut over processes; data parallelism takes the processes that remain."""

    tp: int = opt(
        "tensor parallelism: processes that share each layer", 1, flags=["--tensor-model-parallel-size", "--tp"]
    )
    pp: int = opt("pipeline parallelism: stages of layers", 1, flags=["--pipeline-model-parallel-size", "--pp"])
    vpp: Optional[int] = opt(
        "interleaved pipeline: model chunks per stage", None, flags=["--virtual-pipeline-model-parallel-size", "--vpp"]
    )
    decoder_first_pipeline_num_layers: Optional[int] = opt(
        "layers of the first pipeline stage; those between it and the last share the rest evenly", None
    )
    decoder_last_pipeline_num_layers: Optional[int] = opt("layers of the last pipeline stage, likewise", None)
    pipeline_model_parallel_layout: Optional[str] = opt(
        "layers of each chunk of the pipeline, such as 'Ett|(ttt|)*6tmL': E embedding, t layer, m layer of multi-token "
        "prediction, L loss; chunks go round the stages",
        None,
    )
    cp: int = opt(
        "context parallelism: processes that share each sequence", 1, flags=["--context-parallel-size", "--cp"]
    )
    ep: int = opt(
        "expert parallelism: processes that share the experts", 1, flags=["--expert-model-parallel-size", "--ep"]
    )
    etp: Optional[int] = opt(
        "tensor parallelism inside experts, if not as --tp", None, flags=["--expert-tensor-parallel-size", "--etp"]
    )
    sequence_parallel: bool = opt("cut norms and dropout along the sequence over the TP processes", False)

    def __post_init__(self) -> None:
        for flag, size in {"tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep}.items():
            if size < 1:
                raise ValueError(f"--{flag} {size}: must be at least 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("--sequence-parallel needs --tp above 1")
        if self.vpp is not None and (self.pp < 2 or self.vpp < 2):
            raise ValueError(f"--vpp {self.vpp}: needs --pp above 1 and at least 2 chunks per stage")
        self._refuse_split()

    def _refuse_split(self) -> None:
        first, last, text = self._split
        for flag, given in {splits.FIRST: first, splits.LAST: last, splits.LAYOUT: text}.items():
            if given is not None and self.pp == 1:
                raise ValueError(f"{flag} needs --pp above 1")
            if isinstance(given, int) and given < 1:
                raise ValueError(f"{flag} {given}: must be at least 1")
        if text is None:
            return
        if first is not None or last is not None:
            raise ValueError(f"{splits.LAYOUT}: not with {splits.FIRST} or {splits.LAST}; it says all")
        chunks = len(splits.chunks_of(text))
        if chunks != self.pp * (self.vpp or 1):
            raise ValueError(
                f"{splits.LAYOUT} {text}: has {chunks} chunks, --pp {self.pp} x --vpp {self.vpp or 1} needs "
                f"{self.pp * (self.vpp or 1)}"
            )

    @property
    def _split(self) -> tuple[Optional[int], Optional[int], Optional[str]]:
        first, last, text = (getattr(self, name) for name in splits.OPTIONS)
        return first, last, text

    @property
    def expert_tp(self) -> int:
        """Tensor parallelism inside experts."""
        return self.etp or self.tp

    def stage_layers(self, num_layers: int) -> splits.Counts:
        """How many layers each chunk of each pipeline stage has, [chunk][stage] (UserError where they do not fit)."""
        first, last, text = self._split
        if text is not None:
            return splits.by_text(text, num_layers, self.pp)
        return splits.by_ends(num_layers, self.pp, self.vpp or 1, first, last)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model on ``world_size`` processes (UserError when they do not divide)."""
        model = self.tp * self.pp * self.cp
        expert = self.expert_tp * self.ep * self.pp
        for product, flags in ((model, "--tp x --pp x --cp"), (expert, "--etp x --ep x --pp")):
            if world_size % product:
                raise UserError(f"{flags} = {product} does not divide the number of processes, {world_size}")
        return world_size // model

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse a layout that cannot cut a model with these TransformerConfig fields (UserError)."""
        heads, groups = config["num_attention_heads"], config["num_query_groups"]
        experts = config.get("num_moe_experts")
        if heads % self.tp:
            raise UserError(f"--tp {self.tp} does not divide the {heads} attention heads of config.json")
        if groups % self.tp and self.tp % groups:
            raise UserError(f"--tp {self.tp} and the {groups} key-value heads of config.json do not divide each other")
        self.stage_layers(config["num_layers"])
        self._check_prediction(config.get("mtp_num_layers") or 0)
        if self.ep > 1 and not experts:
            raise UserError(f"--ep {self.ep}: the model of config.json has no experts")
        if experts and experts % self.ep:
            raise UserError(f"--ep {self.ep} does not divide the {experts} experts of config.json")
        if experts and self.tp > 1 and not self.sequence_parallel:
            raise UserError(f"--tp {self.tp} on a model with experts needs --sequence-parallel")

    def _check_prediction(self, layers: int) -> None:
        text = self.pipeline_model_parallel_layout
        if text is not None and (said := splits.chunks_of(text)[-1].count("m")) not in (0, layers):
            raise UserError(f"{splits.LAYOUT} {text}: {said} layers that predict further (m), config.json {layers}")

    def config(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """TransformerConfig fields of the layout of a model that has these."""
        uneven = any(given is not None for given in self._split)
        counts, further = self.stage_layers(model["num_layers"]), model.get("mtp_num_layers") or 0
        if uneven and further and not counts[-1][-1]:
            # megatron-core 0.16.1 has the final norm with the last layer then (transformer_block.py:390), not with L
            raise UserError(f"--mtp-loss-weight needs a layer (t) in the last chunk of {splits.LAYOUT}")
        return {
            "pipeline_model_parallel_layout": splits.for_core(counts, further) if uneven else None,
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.expert_tp,
            "sequence_parallel": self.sequence_parallel,
            # batched sends between the same two ranks would meet the wrong receives (--pp 2 with --vpp)
            "overlap_p2p_comm": self.vpp is not None,
            "batch_p2p_comm": self.vpp is None,
        }


def world_size() -> int:
    """The number of processes, as torchrun or srun says; 1 when started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(parallel: Parallel, device: "Device", *, timeout_s: float = 1800) -> None:
    """Join the process group (a private one when started by hand) and cut it into megatron-core's groups."""
    import torch.distributed as dist

    parallel.data_parallel_size(world_size())
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        store, rank, size = _meeting_place(timeout)
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=size, timeout=timeout)
    make_groups(parallel)


def make_groups(parallel: Parallel, **more: Any) -> None:
    """Cut the processes that have met into megatron-core's groups; ``more`` goes to its function."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.expert_tp,
        **more,
    )


def _meeting_place(timeout: timedelta) -> tuple[Any, int, int]:
    """The store where processes leave their addresses, this process's rank, and the number of processes."""
    import torch.distributed as dist

    if world_size() == 1:
        return dist.HashStore(), 0, 1
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # torch 2.13: torchrun --max-restarts keeps the store, and with it the addresses of the processes before
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if shared else "0"  # a node counts its own
    return dist.PrefixStore(f"attempt {attempt}", store), rank, size


def stop() -> None:
    """Leave the process groups; harmless when there are none."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
