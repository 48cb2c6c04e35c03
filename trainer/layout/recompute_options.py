"""Activations to compute again in the backward pass: all of a layer, of the first layers, or of parts of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

from megapatch.models.cli import UserError, opt

NEEDS = {  # part: what a model must have for it
    "core_attn": "attention",
    "layernorm": "layer norms that megatron-core's own layer calls",
    "mlp": "dense layers that megatron-core's own layer calls",
    "moe": "experts",
    "shared_experts": "shared experts",
    "mla_up_proj": "multi-head latent attention",
    "moe_act": "grouped experts, which need Transformer Engine",
}


@dataclass(frozen=True, kw_only=True)
class RecomputeOptions:
    """What is not kept between forward and backward pass."""

    recompute: Literal["none", "selective", "full"] = opt(
        "activations to compute again in the backward pass: selective: --recompute-modules; full: whole layers", "none"
    )
    recompute_modules: list[str] = opt(
        f"for --recompute selective: parts of each layer, of {', '.join(NEEDS)}",
        ["core_attn"],
        nargs="+",
        metavar="PART",
        choices=list(NEEDS),
    )
    recompute_layers: Optional[int] = opt(
        "for --recompute full: only the first layers of each pipeline stage (with --vpp: of each chunk), if not all",
        None,
    )
    recompute_unit: int = opt(
        "for --recompute full of all layers: layers between two kept activations; more keep less and hold more at once",
        1,
    )

    def refuse_recompute(self) -> None:
        """ValueError where options do not go together."""
        refused = {
            "--recompute-modules needs --recompute selective": (
                self.recompute != "selective" and self.recompute_modules != ["core_attn"]
            ),
            "--recompute-layers needs --recompute full": (
                self.recompute != "full" and self.recompute_layers is not None
            ),
            "--recompute-unit needs --recompute full": self.recompute != "full" and self.recompute_unit != 1,
            "--recompute-layers and --recompute-unit: give one": (
                self.recompute_layers is not None and self.recompute_unit != 1
            ),
            f"--recompute-layers {self.recompute_layers}: must be at least 1": (
                self.recompute_layers is not None and self.recompute_layers < 1
            ),
            f"--recompute-unit {self.recompute_unit}: must be at least 1": self.recompute_unit < 1,
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)

    def refuse_recompute_layers(self, chunks: Sequence[Sequence[int]]) -> None:
        """UserError where --recompute-layers is more than the layers of every chunk of every stage."""
        most = max(map(len, chunks))
        if self.recompute_layers is not None and self.recompute_layers > most:
            raise UserError(
                f"--recompute-layers {self.recompute_layers}: a stage or chunk has {most} layer{'s' * (most > 1)}; "
                f"give at most {most}, or leave it away for all"
            )

    def recompute_config(self, model: Mapping[str, Any], *, own_layer: bool, engine: bool) -> dict[str, Any]:
        """TransformerConfig fields; UserError where the model with these fields has no such part.

        ``own_layer``: the family's layer is not megatron-core's; ``engine``: its layers are Transformer Engine's.
        """
        if self.recompute == "none":
            return {}
        if self.recompute == "full":
            method = "uniform" if self.recompute_layers is None else "block"
            count = self.recompute_layers or self.recompute_unit
            return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
        there = parts_of(model, own_layer=own_layer, engine=engine)
        for part in self.recompute_modules:
            if not there[part]:
                raise UserError(f"--recompute-modules {part}: the model of config.json has no {NEEDS[part]}")
        return {"recompute_granularity": "selective", "recompute_modules": list(self.recompute_modules)}


def parts_of(model: Mapping[str, Any], *, own_layer: bool, engine: bool) -> dict[str, bool]:
    """For each part, whether a model with these TransformerConfig fields can compute it again."""
    experts = bool(model.get("num_moe_experts"))
    pattern = model.get("moe_layer_freq", 1)
    dense = not experts or (isinstance(pattern, list) and 0 in pattern)
    return {
        "core_attn": True,
        "layernorm": not own_layer,
        "mlp": dense and not own_layer,
        "moe": experts,
        "shared_experts": bool(model.get("moe_shared_expert_intermediate_size")),
        "mla_up_proj": bool(model.get("multi_latent_attention")),
        "moe_act": experts and engine,
    }
