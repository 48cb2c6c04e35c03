"""How a mixture of experts is kept in balance; what is not given is as config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from megapatch.models.cli import UserError, opt

RATE = 1e-3  # megatron-core's default; DeepSeek-V3 was trained so (arXiv:2412.19437, section 4.2), files do not say


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """Losses and biases that balance experts."""

    moe_aux_loss: Literal["config", "aux_loss", "seq_aux_loss", "none"] = opt(
        "balancing loss, if not as config.json says: aux_loss: over a micro-batch; seq_aux_loss: over a sequence",
        "config",
    )
    moe_aux_loss_coeff: Optional[float] = opt(
        "weight of the balancing loss, if not as config.json says (router_aux_loss_coef, aux_loss_alpha)", None
    )
    moe_z_loss_coeff: Optional[float] = opt(
        "weight of the square of the router's log-sum-exp, which keeps logits small (a common value is 1e-3)", None
    )
    moe_bias_update_rate: Optional[float] = opt(
        f"for routers with a bias (DeepSeek-V3): its change per step and expert, if not {RATE}; 0 leaves it as it is",
        None,
    )
    moe_capacity_factor: Optional[float] = opt(
        "most tokens an expert takes, as a multiple of an even share of each rank's tokens; more are dropped and "
        "counted in the log (if not given, none are)",
        None,
    )
    moe_grouped_gemm: bool = opt("all experts of a rank in one matrix product (needs Transformer Engine)", False)

    def refuse_moe(self) -> None:
        """ValueError where a number cannot be."""
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_bias_update_rate", "moe_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be 0 or more")
        if self.moe_aux_loss == "none" and self.moe_aux_loss_coeff:
            raise ValueError("--moe-aux-loss none and --moe-aux-loss-coeff: give one")

    def moe_config(self, model: Mapping[str, Any], *, engine: bool) -> dict[str, Any]:
        """TransformerConfig fields over those of config.json; UserError where the model has no place for them.

        ``engine``: the layers are Transformer Engine's.
        """
        given = {
            "moe_router_load_balancing_type": None if self.moe_aux_loss == "config" else self.moe_aux_loss,
            "moe_aux_loss_coeff": 0.0 if self.moe_aux_loss == "none" else self.moe_aux_loss_coeff,
            "moe_z_loss_coeff": self.moe_z_loss_coeff,
            "moe_router_bias_update_rate": self.moe_bias_update_rate,
            "moe_expert_capacity_factor": self.moe_capacity_factor,
            "moe_grouped_gemm": self.moe_grouped_gemm or None,
        }
        fields = {name: value for name, value in given.items() if value is not None}
        if fields and not model.get("num_moe_experts"):
            flag = next(flag for flag in FLAGS if getattr(self, flag) not in (None, False, "config"))
            raise UserError(f"--{flag.replace('_', '-')}: the model of config.json has no experts")
        if self.moe_bias_update_rate is not None and not model.get("moe_router_enable_expert_bias"):
            raise UserError("--moe-bias-update-rate: the router of config.json has no bias")
        if self.moe_grouped_gemm and not engine:
            raise UserError(
                "--moe-grouped-gemm needs Transformer Engine on a GPU, and a family that has its layers; leave it out"
            )
        return fields


FLAGS = tuple(MoeOptions.__dataclass_fields__)
