"""The accelerator API of torch, answered by the CPU, as megatron-core sees it where there is no GPU.

megatron-core calls ``torch.cuda`` directly (175 places ask for the current device alone). Like Ascend's
``transfer_to_npu`` this redirects the accelerator API and leaves the framework untouched. Only megatron-core's modules
get the redirected torch: transformers and the rest of the process see torch as it is. Four methods of tensors and
modules, which mean nothing without a GPU, are redirected for all. What megatron-core itself needs replaced is in
core_on_cpu.py.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")
_PACKAGE = "megatron.core"
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


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


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


class _View(ModuleType):
    """A module with some names replaced; the module itself stays as it is."""

    def __init__(self, module: ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update({**vars(module), **replaced})
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:  # what the module gained since, or makes on demand
        return getattr(self.__dict__["_module"], name)


def cpu_torch() -> ModuleType:
    """torch with its accelerator API answered by the CPU."""
    generator = torch.default_generator
    nvtx = _View(torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing})
    cuda = {
        "current_device": lambda: CPU,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": _stream_context,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "manual_seed": generator.manual_seed,
        "is_current_stream_capturing": lambda: False,
        "nvtx": nvtx,
    }
    factories = {name: _factory(getattr(torch, name)) for name in _FACTORIES}
    return _View(torch, {**factories, "cuda": _View(torch.cuda, cuda)})


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron-core's modules and gives them the redirected torch."""

    def __init__(self, view: ModuleType) -> None:
        self.view = view

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE and not name.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader, self.view)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module, then puts the view in the place of torch."""

    def __init__(self, loader: importlib.machinery.SourceFileLoader, view: ModuleType) -> None:
        self.loader, self.view = loader, view

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _redirect(module, self.view)


def _redirect(module: ModuleType, view: ModuleType) -> None:
    if vars(module).get("torch") is torch:
        vars(module)["torch"] = view
    if module.__name__ == f"{_PACKAGE}.jit":
        module.disable_jit_fuser()  # torch.compile needs a C++ compiler on a CPU, and pays late


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return function(self, *args, **kwargs)
        # optimizer.py and distrib_optimizer.py compare with 'torch.cuda.FloatTensor' and its like
        return function(self).replace("torch.", "torch.cuda.", 1)

    return redirected


def install() -> None:
    """Redirect the accelerator API for megatron-core, imported already or not; only where torch sees no GPU."""
    assert not torch.cuda.is_available(), "the CPU redirection is for machines without a GPU"
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    view = cpu_torch()
    sys.meta_path.insert(0, _Finder(view))
    for module in [m for name, m in sys.modules.items() if name == _PACKAGE or name.startswith(_PACKAGE + ".")]:
        _redirect(module, view)
    torch.Tensor.type = _type(torch.Tensor.type)  # type: ignore[assignment]
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]
