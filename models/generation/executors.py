"""Forward passes of the engine: tokens and positions in, logits out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapatch.models.cli import UserError
from megapatch.models.generation.lean import LeanExecutor
from megapatch.models.layers.kv_cache import Kept, KeyValueCache
from megapatch.models.load import unwrapped

ExecutorKind = Literal["auto", "lean", "module"]


class Executor(Protocol):
    """One way to run a model. Shape letters: t tokens, r of them whose logits are wanted, v vocabulary."""

    name: str
    kept: list[Kept]  # what each layer of this process remembers of a token

    @property
    def copy_bytes(self) -> int:
        """Of weights that are kept a second time, in the order that kernels read."""

    def refresh(self) -> None:
        """Take note of weights that may have changed; called before a run."""

    def forward(self, ids: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor | None:
        """Tokens and positions [1, t] -> logits [r, v or more]; None where the last layers are elsewhere."""


class ModuleExecutor:
    """The model's own forward pass, at any layout: chunks of pipeline stages one after the other."""

    name = "module"
    copy_bytes = 0

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks
        self.kept = [module.kept for chunk in chunks for module in chunk.decoder.modules() if hasattr(module, "kept")]
        self.config = chunks[0].config

    def refresh(self) -> None:
        """Nothing is kept of the weights."""

    def forward(self, ids: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor | None:
        """As Executor.forward; every process of a pipeline must call."""
        for chunk in self.chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._received(positions))
            with _without_prediction(chunk):
                out = chunk(ids, positions, None, inference_context=cache, runtime_gather_output=True)
            if chunk.post_process:
                return out[0]
            dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def _received(self, positions: Tensor) -> Tensor:
        """What the stage before has made of this pass's tokens, [t, 1, h]."""
        config = self.config
        tokens = positions.shape[1] // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
        hidden = torch.empty(tokens, 1, config.hidden_size, dtype=dtype, device=positions.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden


@contextmanager
def _without_prediction(chunk: Any) -> Iterator[None]:
    """Leave out the layers for multi-token prediction, which megatron-core runs on labels only."""
    config, layers, had = chunk.config, chunk.config.mtp_num_layers, chunk.mtp_process
    config.mtp_num_layers, chunk.mtp_process = None, False
    try:
        yield
    finally:
        config.mtp_num_layers, chunk.mtp_process = layers, had


def chunks_of(model: torch.nn.Module | Sequence[torch.nn.Module] | None) -> list[Any]:
    """A model's chunks, as they are wrapped."""
    return list(model) if isinstance(model, Sequence) else [] if model is None else [model]


@contextmanager
def evaluating(given: Sequence[Any]) -> Iterator[None]:
    """Chunks of models in evaluation mode, and whole where training gathers their parameters as it goes."""
    chunks = [unwrapped(chunk) for chunk in given]
    modes = [chunk.training for chunk in chunks]
    gathering = [chunk for chunk in given if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False)]
    for wrapper in gathering:
        wrapper.disable_forward_pre_hook()  # which brings the parameters up to date
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
        for wrapper in gathering:
            wrapper.enable_forward_pre_hook()


def executor_for(chunks: list[Any], kind: ExecutorKind, pack_for: int) -> Executor:
    """The executor of a model that is asked for, or the fastest one that can run it."""
    fits = LeanExecutor.fits(chunks)
    if kind == "lean" and not fits:
        raise UserError("the lean executor runs whole models, without --pp and --sequence-parallel; use the module one")
    return LeanExecutor(chunks[0], pack_for) if fits and kind != "module" else ModuleExecutor(chunks)
