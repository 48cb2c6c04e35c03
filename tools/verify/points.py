"""The places inside a layer where two engines can be compared, found from the weight rules.

A rule says which modules of either side hold the same weight: a linear layer of megatron-core, and one or several of
transformers. Their outputs correspond as their weights' rows do. Modules that hold the same set of weights, such as a
whole attention, correspond too. No table of module names is needed, and none of families.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapatch.models.rules import CORE, Placed
from megapatch.models.shapes import Layout
from megapatch.tools.verify.stream import Unit

NORMS = {  # stored names of norms that Transformer Engine fuses with the linear layer after them -> modules
    "self_attention.linear_qkv.layer_norm": "input_layernorm",
    "mlp.linear_fc1.layer_norm": "pre_mlp_layernorm",
}
INPUTS = {  # module -> what its input is the result of
    "self_attention.linear_proj": "self_attention.core_attention",
    "mlp.linear_fc2": "mlp.activation_func",
    "pre_mlp_layernorm": "self_attn_bda",
}
QUERY, KEY = "self_attention.query", "self_attention.key"  # as attention gets them, after the rotary embedding
ROUTER, CHOICE, LOGITS = "mlp.router", "mlp.router (choice)", "mlp.router (logits)"


@dataclass(frozen=True)
class Weight:
    """What a parameter is: a rule's tensor, or one part of it."""

    placed: Placed
    part: int | None  # None: all parts, fused
    layout: Layout

    @property
    def names(self) -> frozenset[str]:
        """The Hugging Face tensors in it."""
        return frozenset(self.placed.hf if self.part is None else [self.placed.hf[self.part]])

    @property
    def module(self) -> str:
        """core's module that holds it, below the layer."""
        name = re.sub("[._](weight|bias)$", "", self.placed.rule.core.removeprefix(CORE))
        return NORMS.get(name, name)

    @property
    def top(self) -> str:
        """The child of core's layer that holds it."""
        return self.module.partition(".")[0]

    def siblings(self) -> frozenset[str]:
        """All Hugging Face tensors in that child."""
        layer = [Weight(p, None, self.layout) for p in self.layout.placed if p.layer == self.placed.layer]
        return frozenset(name for weight in layer if weight.top == self.top for name in weight.names)

    def label(self, part: int) -> str:
        """The name of the point where a part's output is seen."""
        parts = self.placed.hf
        return self.module if len(parts) == 1 else f"{self.module} ({parts[part].split('.')[-2]})"

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The outputs of the parts [..., rows of a part] -> that of the fused module: ``split`` undone."""
        _, blocks = self.layout.packed(self.placed)
        return torch.cat([parts[block.part].narrow(-1, block.start, block.rows) for block in blocks], -1)

    def split(self, output: Tensor) -> dict[str, Tensor]:
        """A module's output [..., rows] -> the output of each part, in the order of its own rows."""
        shape, blocks = self.layout.packed(self.placed)
        if self.part is not None or output.shape[-1] != shape[0] or len(shape) == 1:
            return {self.label(self.part or 0): output}
        places: dict[int, dict[int, Tensor]] = {}
        for block, piece in zip(blocks, output.split([block.rows for block in blocks], -1), strict=True):
            places.setdefault(block.part, {})[block.start] = piece
        return {self.label(p): torch.cat([at[start] for start in sorted(at)], -1) for p, at in places.items()}


def _leaves(meaning: Mapping[str, Sequence[Weight]]) -> dict[str, Weight]:
    """Module path -> its weight, where the module does nothing but apply it; experts see tokens of their own."""
    leaves = {n.removesuffix(".weight"): w[0] for n, w in meaning.items() if n.endswith(".weight") and len(w) == 1}
    return {n: w for n, w in leaves.items() if w.placed.layer is not None and w.placed.expert is None}


class Watch:
    """Records what the submodules of a layer compute, under names that are the same for every engine."""

    def __init__(
        self,
        model: nn.Module,
        meaning: Mapping[str, Sequence[Weight]],
        units: Mapping[str, Unit],
        batch_first: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.batch_first = model, batch_first
        self.leaves, self.wholes = _leaves(meaning), _wholes(meaning, units)

    def layer(self, path: str, points: dict[str, Tensor]) -> list[Any]:
        """Hooks for the layer at ``path``, which put what they see into ``points``."""
        hooks: list[Any] = []
        for name, module in self.model.get_submodule(path).named_modules(prefix=path):
            if name in self.leaves:
                hooks += self._leaf(module, self.leaves[name], points)
            elif name in self.wholes:
                hooks.append(module.register_forward_hook(self._whole(self.wholes[name], points)))
            if name == f"{path}.self_attention.core_attention":
                hooks.append(module.register_forward_pre_hook(self._rotated(points), with_kwargs=True))
            if hasattr(module, "gating"):
                hooks.append(_Wrapped(module, "gating", lambda logits: self.put(points, LOGITS, logits)))
        return hooks

    def put(self, points: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Record a tensor of the engine's layout."""
        points[name] = self.batch_first(value.detach()).float().clone()

    def _leaf(self, module: nn.Module, weight: Weight, points: dict[str, Tensor]) -> list[Any]:
        before = INPUTS.get(weight.module)

        def entered(_: nn.Module, args: Any) -> None:
            if before and args:
                self.put(points, before, args[0])

        def left(_: nn.Module, args: Any, output: Any) -> None:
            if weight.module == ROUTER:
                return self._router(points, output)
            for name, value in weight.split(_sum(output)).items():
                self.put(points, name, value)

        return [module.register_forward_pre_hook(entered), module.register_forward_hook(left)]

    def _whole(self, name: str, points: dict[str, Tensor]) -> Callable[..., None]:
        return lambda _, args, output: self.put(points, name, _sum(output))

    def _rotated(self, points: dict[str, Tensor]) -> Callable[..., None]:
        def entered(_: nn.Module, args: Any, kwargs: Any) -> None:
            for name, value in zip((QUERY, KEY), [*args, *kwargs.values()], strict=False):
                self.put(points, name, value)

        return entered

    def _router(self, points: dict[str, Tensor], output: Any) -> None:
        """core: weights, choice [tokens, e]; transformers: logits, weights and experts [tokens, k], or only logits."""
        scores, *rest = output if isinstance(output, tuple) else (output,)
        if not rest:
            self.put(points, LOGITS, scores)
        for mask in (t for t in rest if t.dtype == torch.bool):
            self.put(points, CHOICE, mask)
        for experts in (t for t in rest if t.dtype == torch.int64):
            self.put(points, CHOICE, torch.zeros_like(scores).scatter(1, experts, 1.0))


def _wholes(meaning: Mapping[str, Sequence[Weight]], units: Mapping[str, Unit]) -> dict[str, str]:
    """Modules right below a layer -> core's name of that which holds the same weights, and no more or fewer."""
    layers = [path for path, unit in units.items() if isinstance(unit, int)]
    held: dict[str, list[Weight]] = {}
    for name, weights in meaning.items():
        layer = next((path for path in layers if name.startswith(f"{path}.")), None)
        if layer is not None:
            held.setdefault(f"{layer}.{name[len(layer) + 1 :].partition('.')[0]}", []).extend(weights)
    found = {}
    for path, weights in held.items():
        tops = {weight.top for weight in weights}
        if len(tops) == 1 and frozenset.union(*(w.names for w in weights)) == weights[0].siblings():
            found[path] = tops.pop()
    return found


def _sum(output: Any) -> Tensor:
    """A module's output, with the bias that megatron-core's linear layers leave for later."""
    if not isinstance(output, tuple):
        return output
    bias = output[1] if len(output) > 1 and isinstance(output[1], Tensor) and output[1].dim() == 1 else None
    return output[0] if bias is None else output[0] + bias


class _Wrapped:
    """Shows what a method returns, until removed."""

    def __init__(self, module: nn.Module, name: str, see: Callable[[Tensor], None]) -> None:
        self.module, self.name, method = module, name, getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            see(output)
            return output

        setattr(module, name, wrapped)

    def remove(self) -> None:
        """The method is the class's again."""
        delattr(self.module, self.name)
