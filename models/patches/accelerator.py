"""The accelerator API of torch, answered by the CPU: what lets megatron-core run where there is no GPU.

megatron-core calls ``torch.cuda`` directly (175 places ask for the current device alone). Like Ascend's
``transfer_to_npu``, this redirects the accelerator API and leaves the framework untouched; torch itself keeps saying
that no GPU is available. All of it is torch's public API; what megatron-core needs replaced is in core_on_cpu.py.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

CPU = torch.device("cpu")
_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like randint "
    "randn randn_like randperm tensor zeros zeros_like"
).split()


class Stream:
    """The one stream of a CPU: everything on it has happened already."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """An event that has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any) -> None:
        pass

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream_context(stream: Any = None) -> Iterator[None]:
    yield


def _nothing() -> Callable[..., None]:
    """A function that takes anything and does nothing."""
    return lambda *args, **kwargs: None


def on_cpu(device: Any) -> Any:
    """``device``, or the CPU where it names a GPU ('cuda', 'cuda:0', 0, torch.device('cuda'))."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return redirected


def _to(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.device | str | int):
            args = (on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(self, *args, **kwargs)

    return redirected


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return function(self, *args, **kwargs)
        # optimizer.py and distrib_optimizer.py compare with 'torch.cuda.FloatTensor' and its like
        return function(self).replace("torch.", "torch.cuda.", 1)

    return redirected


def install() -> None:
    """Redirect the accelerator API to the CPU, once; only where torch sees no GPU."""
    assert not torch.cuda.is_available(), "the CPU redirection is for machines without a GPU"
    if torch.cuda.Stream is Stream:
        return
    generator = torch.default_generator
    redirected: dict[str, Any] = {  # one function each: torch.compile's tables refuse a function with two names
        "current_device": lambda: CPU,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": _stream_context,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "manual_seed": generator.manual_seed,
        "is_current_stream_capturing": lambda: False,
    }
    for name, replacement in redirected.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _nothing(), _nothing()
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    torch.Tensor.to = _to(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.type = _type(torch.Tensor.type)  # type: ignore[assignment]
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]


@contextlib.contextmanager
def eager_jit() -> Iterator[None]:
    """While importing megatron-core: its ``jit_fuser`` is torch.compile, which on CPU needs a C++ compiler."""

    def unchanged(function: Any = None, **kwargs: Any) -> Any:
        return function if function is not None else unchanged

    with mock.patch.object(torch, "compile", unchanged):
        yield
