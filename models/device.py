"""The one place that knows what the machine is: CPU with gloo, or GPU with NCCL; Transformer Engine, flash-attn.

Nothing else branches on the kind of device. ``start`` makes megatron-core importable and runnable; call it before
importing anything of megatron-core.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import resource
import warnings
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from megapatch.models.cli import UserError

log = logging.getLogger(__name__)
Kind = Literal["auto", "cpu", "gpu"]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@dataclass(frozen=True)
class Device:
    """What this process computes on, and the libraries that it may use there."""

    kind: Literal["cpu", "cuda"]
    transformer_engine: bool
    flash_attention: bool
    reason: str  # why this kind was chosen, for the log

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """The torch.distributed backend."""
        return "nccl" if self.kind == "cuda" else "gloo"

    @property
    def torch(self) -> torch.device:
        """This process's torch device."""
        return torch.device("cuda", torch.cuda.current_device()) if self.kind == "cuda" else torch.device("cpu")

    @property
    def no_engine(self) -> str:
        """Why there is no Transformer Engine here."""
        if self.kind == "cpu":
            return "this runs on a CPU"
        return (
            "it is not used" if installed("transformer_engine") else "the package transformer_engine is not installed"
        )

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """The most memory this process has held: allocated on the GPU, or resident on a CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def forget_peak(self) -> None:
        """Measure the peak anew from here, which a CPU cannot."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def memory_bytes(self) -> int | None:
        """Memory of the GPU in all; None on a CPU, which shares its own with everything else."""
        return torch.cuda.get_device_properties(self.torch).total_memory if self.kind == "cuda" else None

    def free_cached(self) -> None:
        """Give memory that nothing uses back to the GPU."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def host_memory(self, nbytes: int) -> Tensor:
        """Host memory [nbytes] of exactly this size (torch's own pinned memory is rounded up to a power of two).

        Where there is a GPU it is pinned, so that copies run beside the computation.
        """
        memory = torch.empty(nbytes, dtype=torch.uint8)
        if self.kind == "cuda" and nbytes:
            api, address = torch.cuda.cudart(), memory.data_ptr()
            if code := int(api.cudaHostRegister(address, nbytes, 0)):
                raise UserError(f"{nbytes:,} bytes of host memory could not be pinned (CUDA error {code}); ulimit -l?")
            weakref.finalize(memory.untyped_storage(), api.cudaHostUnregister, address)
        return memory

    def config(self) -> dict[str, Any]:
        """TransformerConfig fields that follow from the device: what needs a GPU kernel is off without it."""
        fused = self.kind == "cuda"
        return {
            "use_cpu_initialization": not fused,
            "bias_activation_fusion": fused,
            "bias_dropout_fusion": fused,
            "masked_softmax_fusion": False,  # our attention never builds the scores
            "apply_rope_fusion": self.transformer_engine,
            "gradient_accumulation_fusion": False,  # needs Apex
            "persist_layer_norm": False,  # needs Apex
            "deallocate_pipeline_outputs": fused,  # gloo still reads what was sent; a GPU's stream keeps the order
        }

    def generator_state(self) -> dict[str, Any]:
        """States of the random number generators that training draws from, to be saved."""
        from megatron.core import tensor_parallel

        state = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
        return state | ({"device": torch.cuda.get_rng_state()} if self.kind == "cuda" else {})

    def set_generator_state(self, state: dict[str, Any]) -> None:
        """Restore what ``generator_state`` gave."""
        from megatron.core import tensor_parallel

        torch.set_rng_state(state["torch"])
        if self.kind == "cuda":
            torch.cuda.set_rng_state(state["device"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def set_connections(count: int) -> str:
    """Have the driver make so many queues to the GPU, which must not be in use yet; what was done, for the log."""
    given = os.environ.setdefault(CONNECTIONS, str(count))
    return f"{CONNECTIONS}={given}" + ("" if given == str(count) else f" as the environment says, not {count}")


def hide_gpus() -> None:
    """Have this process, which has used no GPU yet, see none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def installed(package: str) -> bool:
    """True when ``package`` can be imported."""
    return importlib.util.find_spec(package) is not None


@cache
def start(kind: Kind = "auto") -> Device:
    """Choose the device, select this process's GPU, and make megatron-core ready for it. Idempotent."""
    seen = torch.cuda.is_available()
    if kind == "gpu" and not seen:
        raise UserError("--device gpu: torch sees no GPU; use --device cpu, or install a torch built for your driver")
    if kind == "auto":
        reason = "torch sees a GPU" if seen else "torch sees no GPU"
    else:
        reason = f"--device {kind}"
    device = _gpu(reason) if seen and kind != "cpu" else _cpu(reason)
    from megapatch.models.patches.checkpoint import RESULTS_QUEUE

    RESULTS_QUEUE.apply()
    quiet_upstream()
    return device


def _gpu(reason: str) -> Device:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    engine = installed("transformer_engine")
    import megatron.core  # noqa: F401

    if not engine:
        from megapatch.models.patches import core_on_cpu

        core_on_cpu.tell_missing_engine()
    return Device("cuda", engine, installed("flash_attn"), reason)


def _cpu(reason: str) -> Device:
    if torch.cuda.is_available():
        raise UserError("--device cpu on a machine with a GPU: hide the GPU too, with CUDA_VISIBLE_DEVICES=''")
    from megapatch.models.patches import accelerator

    accelerator.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Apex and Transformer Engine are not there; we know
        import megatron.core.models.gpt
        import megatron.core.optimizer  # noqa: F401

    from megapatch.models.patches import core_on_cpu

    core_on_cpu.install()
    core_on_cpu.tell_missing_engine()
    make_faster()
    return Device("cpu", False, False, reason)


def make_faster() -> None:
    """Have a CPU take less time for what megatron-core computes; nothing else depends on it."""
    from megapatch.models import patches
    from megapatch.models.patches import products, rotary

    patches.apply((rotary.ROTARY, *products.PRODUCTS))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed: else each new one, as for logits, is paid for page by page again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def quiet_upstream() -> None:
    """Silence upstream's advice that the user cannot follow; errors still come through."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    for name in ("megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def seed_everything(seed: int, pipeline_rank: int, data_rank: int = 0) -> None:
    """Seed all generators: different on each pipeline stage, as Megatron-LM does (100 apart), equal over data ranks.

    Needs megatron-core's parallel state; the model-parallel tracker is seeded too.
    """
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * pipeline_rank + 10 * data_rank
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
