"""A model whose weights come and go as its own forward pass reaches them: one layer is in memory at a time.

The model is built without storage (``empty_parameters``). Hooks fill a layer when the pass enters it and drop it when
the pass leaves, so that what runs is the engine's own forward pass, whole, at any size of model. After each unit (a
layer, the embedding, the final norm, the output layer) the pass waits, so that two models can be compared in step.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

CHAINED, ISOLATED = "chained", "isolated"  # on the model's own hidden states; on those of the reference
OUTER = ("embedding.word_embeddings", "decoder.final_layernorm", "output_layer")  # units that are no layers
Unit = int | str  # number of a layer from 0, or core's name of the embedding, the final norm, the output layer
Switch = Callable[[nn.Module], AbstractContextManager[None]]  # computes a unit another way while the context lasts


class _StayEmpty(TorchFunctionMode):
    """Tensors without storage stay so when they are moved to a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[0].is_meta:
            _, dtype, *_ = torch._C._nn._parse_to(*args[1:], **(kwargs or {}))
            return args[0].type(dtype) if dtype else args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters made inside have no storage; buffers, which nothing loads, are real."""

    def without_storage(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_storage)  # type: ignore[arg-type]
    try:
        with _StayEmpty():
            yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Step:
    """What one unit computed. Tensors are [b, s, ...]; ``points`` are those of the stream on which it was isolated."""

    unit: Unit
    input: Tensor | None  # None: the unit reads token ids
    outputs: Mapping[str, Tensor]  # stream -> output
    points: Mapping[str, Tensor]  # submodule -> what it computed


@dataclass
class Engine:
    """A model without storage, and how to fill and read it."""

    model: nn.Module
    forward: Callable[[], Tensor]  # -> logits [b, s, v]
    units: Mapping[str, Unit]  # module path -> unit
    load: Callable[[Sequence[str]], Mapping[str, Tensor]]  # names of parameters -> their values
    watch: Callable[[str, dict[str, Tensor]], list[Any]]  # (layer's path, where to put values) -> hooks to remove
    outward: Callable[[Tensor, Unit], Tensor]  # a unit's tensor -> [b, s, ...]
    inward: Callable[[Tensor], Tensor]  # hidden [b, s, h] -> as the model's layers take it
    about: str
    leaves: Mapping[str, Any]  # path of a module that applies one weight -> that weight (points.Weight)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [b, s, v], once the pass is over
    streams: dict[str, Switch] = field(default_factory=dict)  # further chains of hidden states: name -> what differs


class _Stopped(Exception):
    """The comparison ended; the forward pass must not go on."""


class Pass:
    """One forward pass, taken unit by unit; a with-block ends its thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._given: Tensor | None = None  # the reference's input of the next unit
        self._states: dict[str, Tensor] = {}
        self._ask: SimpleQueue[tuple[bool, Tensor | None]] = SimpleQueue()
        self._answer: SimpleQueue[Step | BaseException | None] = SimpleQueue()
        self._empty: dict[int, str] = {}
        self._place_hooks()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_: object) -> None:
        self._ask.put((False, None))
        self._thread.join()

    def next(self, isolated: Tensor | None = None) -> Step | None:
        """Run the next unit, and again with the reference's input [b, s, h] if given; None after the last."""
        self._ask.put((True, isolated))
        answer = self._answer.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._wait()
                self.engine.logits = self.engine.forward()
            self._answer.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # told in the main thread
            self._answer.put(error)

    def _wait(self) -> None:
        going, self._given = self._ask.get()
        if not going:
            raise _Stopped

    def _place_hooks(self) -> None:
        inside = tuple(f"{path}." for path, unit in self.engine.units.items() if isinstance(unit, int))
        self._empty = {id(p): n for n, p in self.engine.model.named_parameters()}
        for path, module in self.engine.model.named_modules():
            unit = self.engine.units.get(path)
            if isinstance(unit, int):
                names = [f"{path}.{name}" for name, _ in module.named_parameters()]
            else:
                names = (
                    [] if path.startswith(inside) else [f"{path}.{n}" for n, _ in module.named_parameters("", False)]
                )
            if names or unit is not None:
                _Visit(self, path, module, unit, names)

    def fill(self, names: Sequence[str]) -> None:
        """Give parameters their values."""
        for name, value in self.engine.load(names).items():
            path, _, leaf = name.rpartition(".")
            self.engine.model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, False)

    def filled(self, tensor: Any) -> Any:
        """The value of a parameter that is passed as an argument, such as tied embeddings; all else as it is."""
        if not isinstance(tensor, nn.Parameter) or not tensor.is_meta:
            return tensor
        (value,) = self.engine.load([self._empty[id(tensor)]]).values()
        return value

    def streams(self, module: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """The unit's output for each further chain of hidden states."""
        for name, switch in self.engine.streams.items():
            state = self._states.get(name)
            with switch(module):
                self._states[name] = _first(_again(module, args, kwargs, state))
        return dict(self._states)

    def isolated(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """The unit's output for the reference's input."""
        if self._given is None:
            return None
        return _first(_again(module, args, kwargs, self.engine.inward(self._given)))

    def tell(self, step: Step) -> None:
        """Hand over, and wait to be asked on."""
        self._answer.put(step)
        self._wait()


class _Visit:
    """The hooks of one module."""

    def __init__(self, run: Pass, path: str, module: nn.Module, unit: Unit | None, names: Sequence[str]) -> None:
        self.run, self.path, self.unit, self.names = run, path, unit, names
        self.empty = {name: module.get_parameter(name.removeprefix(f"{path}.")) for name in names}
        self.points: dict[str, Tensor] = {}
        self.watching: list[Any] = []
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, with_kwargs=True)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.run.fill(self.names)
        if isinstance(self.unit, int):
            self.watching = self.run.engine.watch(self.path, self.points)
        kwargs = {key: self.run.filled(value) for key, value in kwargs.items()}
        return tuple(self.run.filled(value) for value in args), kwargs

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        step = None if self.unit is None else self.step(module, args, kwargs, _first(output))
        for name, parameter in self.empty.items():
            path, _, leaf = name.rpartition(".")
            self.run.engine.model.get_submodule(path)._parameters[leaf] = parameter
        if step is not None:
            self.run.tell(step)

    def step(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Step:
        assert self.unit is not None
        outward, hidden = self.run.engine.outward, _hidden(args, kwargs)
        outputs = {CHAINED: output}
        if hidden.is_floating_point():
            if (alone := self.run.isolated(module, args, kwargs)) is not None:
                outputs[ISOLATED] = alone
            for hook in self.watching:
                hook.remove()
            outputs |= self.run.streams(module, args, kwargs)
        points, self.points = dict(self.points), {}
        given = outward(hidden, self.unit) if hidden.is_floating_point() else None
        return Step(self.unit, given, {k: outward(v, self.unit) for k, v in outputs.items()}, points)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _again(module: nn.Module, args: Any, kwargs: Any, hidden: Tensor | None) -> Any:
    """The module's forward pass with its first argument replaced (None: as it was)."""
    if hidden is None:
        return module.forward(*args, **kwargs)
    if args:
        return module.forward(hidden, *args[1:], **kwargs)
    first, *_ = kwargs
    return module.forward(**kwargs | {first: hidden})
