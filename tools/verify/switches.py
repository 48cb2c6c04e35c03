"""Where roundings differ between implementations, each as a switch on a running megatron-core layer.

A source of differences has Hugging Face's way and others. A way is a context that replaces what some submodules of a
unit compute while it lasts; it changes no weight and no class.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapatch.models.layers.norm import RMSNorm
from megapatch.tools.verify.stream import Engine, Switch

Way = Callable[[nn.Module], Callable[[], None] | None]  # switches a module; returns what switches it back


@dataclass(frozen=True)
class Source:
    """A place where implementations round differently: Hugging Face's way, and others by name."""

    name: str
    hf: Way
    others: Mapping[str, Way]


def rms_norm(x: Tensor, weight: Tensor, eps: float, fp32: bool, cast_last: bool, root: str, outside: bool) -> Tensor:
    """[..., h] -> [..., h]; ``fp32``: statistics in fp32; ``cast_last``: after the weight; ``root``: rsqrt or sqrt."""
    wide = x.float() if fp32 else x
    mean = wide.pow(2).mean(-1, keepdim=True)
    if outside:
        normed = wide / (mean.sqrt() + eps)
    else:
        normed = wide * torch.rsqrt(mean + eps) if root == "rsqrt" else wide / (mean + eps).sqrt()
    return (normed * weight.to(normed.dtype)).to(x.dtype) if cast_last else normed.to(x.dtype) * weight


def norm(fp32: bool = True, cast_last: bool = False, root: str = "rsqrt", outside: bool = False) -> Way:
    """RMSNorm by another order of operations."""

    def way(module: nn.Module) -> Callable[[], None] | None:
        if not isinstance(module, RMSNorm):
            return None
        own: Any = module
        own.forward = lambda x: rms_norm(x, module.weight, module.eps, fp32, cast_last, root, outside)
        return lambda: delattr(module, "forward")

    return way


def as_it_is(module: nn.Module) -> Callable[[], None] | None:
    """core's own way."""
    return None


def linear(engine: Engine, name: str = "", *, separate: bool = True, bias_inside: bool = True) -> Way:
    """Linear layers (only the one of this ``name``, if given) by another arrangement of matrix products.

    ``separate``: one product for each of Hugging Face's weights; ``bias_inside``: added before the rounding, not after.
    """
    leaves = {p: w for p, w in engine.leaves.items() if w.module == name or not name}
    places = {engine.model.get_submodule(path): weight for path, weight in leaves.items()}

    def way(module: nn.Module) -> Callable[[], None] | None:
        weight, layer = places.get(module), cast(Any, module)
        if weight is None or not hasattr(module, "skip_bias_add"):
            return None
        split = separate and len(weight.placed.hf) > 1

        def joined(_: nn.Module, args: Any, output: Any) -> Any:
            rows = weight.split(layer.weight.T).values() if split else [layer.weight.T]  # [h, rows of a part]
            shifts: Any = [None] * len(rows)
            if layer.bias is not None and bias_inside:
                shifts = weight.split(layer.bias).values() if split else [layer.bias]
            outs = [F.linear(args[0], part.T.contiguous(), b) for part, b in zip(rows, shifts, strict=True)]
            out = weight.join(outs) if split else outs[0]
            if layer.bias is None or bias_inside:
                return out, None
            return (out, layer.bias) if layer.skip_bias_add else (out + layer.bias, None)

        return module.register_forward_hook(joined).remove

    return way


def then(first: Way, second: Way) -> Way:
    """One way, and then another on what it left."""

    def way(module: nn.Module) -> Callable[[], None] | None:
        backs = [back for switch in (first, second) if (back := switch(module)) is not None]

        def undo() -> None:
            for back in reversed(backs):
                back()

        return undo if backs else None

    return way


def weighted_output(module: nn.Module) -> Callable[[], None] | None:
    """Experts' outputs times the router's weights; core multiplies the activations, before the last linear layer."""
    if not hasattr(module, "local_experts"):
        return None
    experts: Any = module.local_experts

    def forward(expert: Any, x: Tensor, scale: Tensor) -> Any:
        out, bias = type(expert).forward(expert, x)
        return (out * scale[:, None]).to(out.dtype), bias

    for expert in experts:
        expert.forward = partial(forward, expert)

    def back() -> None:
        for expert in experts:
            del expert.forward

    return back


def fp32_angles(module: nn.Module) -> Callable[[], None] | None:
    """The rotary embedding rotates queries and keys in fp32, and rounds once."""
    names = ("q_layernorm", "k_layernorm", "core_attention")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    attention: Any = module

    def rounded(_: nn.Module, args: Any) -> Any:
        query, key, value, *rest = args
        return query.to(value.dtype), key.to(value.dtype), value, *rest

    widen = [
        m.register_forward_hook(lambda _, __, x: x.float()) for m in (attention.q_layernorm, attention.k_layernorm)
    ]
    hooks = [*widen, attention.core_attention.register_forward_pre_hook(rounded)]

    def back() -> None:
        for hook in hooks:
            hook.remove()

    return back


def bf16_frequencies(module: nn.Module) -> Callable[[], None] | None:
    """The rotary embedding's inverse frequencies rounded to bf16, as by ``model.to(bfloat16)``."""
    if not hasattr(module, "core_attention"):
        return None

    def entered(_: nn.Module, args: Any, kwargs: Any) -> Any:
        angles = kwargs.get("rotary_pos_emb")
        if not isinstance(angles, Tensor) or len(angles) < 2:
            return None
        places = torch.arange(len(angles), device=angles.device).view(-1, *[1] * (angles.dim() - 1))
        return args, kwargs | {"rotary_pos_emb": places * angles[1:2].bfloat16().float()}  # angles[1]: frequencies

    return module.register_forward_pre_hook(entered, with_kwargs=True).remove


def activation(fp32: bool) -> Way:
    """The gated activation unfused: every step rounded, or (``fp32``) once at the end as fused kernels do."""

    def way(module: nn.Module) -> Callable[[], None] | None:
        mlp: Any = module
        if not hasattr(mlp, "linear_fc2") or not mlp.config.gated_linear_unit:
            return None
        config = mlp.config
        own = mlp.config = copy.copy(config)
        own.bias_activation_fusion = own.use_te_activation_func = False  # the latter is what models.layers.fused sets
        if fp32:
            own.activation_func = lambda x: config.activation_func(x.float())
        dtype = mlp.linear_fc2.weight.dtype
        hook = mlp.linear_fc2.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))

        def back() -> None:
            mlp.config = config
            hook.remove()

        return back

    return way


def router(dtype: str) -> Way:
    """The router's logits computed in ``dtype``."""

    def way(module: nn.Module) -> Callable[[], None] | None:
        if not hasattr(module, "gating"):
            return None
        gate: Any = module
        config, gate.config = gate.config, copy.copy(gate.config)
        gate.config.moe_router_dtype = dtype
        return lambda: setattr(gate, "config", config)

    return way


def sources(engine: Engine) -> list[Source]:
    """Every source of differences in rounding that a switch exists for."""
    separate = linear(engine)
    fused = sorted({weight.module for weight in engine.leaves.values() if len(weight.placed.hf) > 1})
    products = {f"{name} fused": then(separate, linear(engine, name, separate=False)) for name in fused}
    if any(getattr(engine.model.get_submodule(path), "bias", None) is not None for path in engine.leaves):
        products["bias after the rounding"] = linear(engine, bias_inside=False)
    norms = {
        "weight before the cast": norm(cast_last=True),
        "statistics in bf16": norm(fp32=False),
        "divided by sqrt": norm(root="sqrt"),
        "eps outside the root": norm(outside=True),
    }
    return [
        Source("RMSNorm", norm(), norms),
        Source("rotary", as_it_is, {"frequencies in bf16": bf16_frequencies, "rotation in fp32": fp32_angles}),
        Source("SwiGLU", activation(fp32=False), {"rounded once (fused)": activation(fp32=True)}),
        Source("linear", separate, products),
        Source("experts", weighted_output, {"weighted before fc2": as_it_is}),
        Source("router", as_it_is, {"logits in fp32": router("fp32")}),
    ]


HF_ORDER = "hf order"


def streams(engine: Engine) -> dict[str, Switch]:
    """Hugging Face's way everywhere, and everywhere but for one source: those that change anything in this model."""
    found = [source for source in sources(engine) if any(map(_changes(engine), (source.hf, *source.others.values())))]
    made = {HF_ORDER: _switch([source.hf for source in found])}
    for source in found:
        rest = [other.hf for other in found if other is not source]
        for name, way in source.others.items():
            if any(map(_changes(engine), (way, source.hf))):
                made[f"{source.name}: {name}"] = _switch([*rest, way])
    return made


def _changes(engine: Engine) -> Callable[[Way], bool]:
    def changes(way: Way) -> bool:
        for module in engine.model.modules():
            back = way(module)
            if back is not None:
                back()
                return True
        return False

    return changes


def _switch(ways: list[Way]) -> Switch:
    @contextmanager
    def switched(unit: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for way in ways:
                for module in unit.modules():
                    back = way(module)
                    if back is not None:
                        stack.callback(back)
            yield

    return switched


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]; scores rounded to the dtype, softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    hidden = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
