"""Matrix products in 8-bit floating point, which only Transformer Engine has."""

from dataclasses import dataclass
from typing import Any, Literal

from megapatch.models.cli import UserError, opt


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """What is multiplied in FP8, and how it is scaled."""

    fp8: Literal["none", "hybrid", "e4m3"] = opt(
        "matrix products in FP8 (needs Transformer Engine): hybrid: e4m3 forward and e5m2 for gradients; e4m3: both",
        "none",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = opt(
        "for --fp8: scales from earlier steps, per tensor, per block (Hopper), or per 32 numbers (Blackwell)", "delayed"
    )

    def refuse_fp8(self, precision: str) -> None:
        """ValueError where options do not go together."""
        if self.fp8 != "none" and precision != "bf16":
            raise ValueError(f"--fp8 {self.fp8} needs --precision bf16, found {precision}")
        if self.fp8 == "none" and self.fp8_recipe != "delayed":
            raise ValueError("--fp8-recipe needs --fp8")

    def fp8_config(self, *, engine: bool, why_not: str) -> dict[str, Any]:
        """TransformerConfig fields; UserError where the layers are not Transformer Engine's, and why they are not."""
        if self.fp8 == "none":
            return {}
        if not engine:
            raise UserError(f"--fp8 {self.fp8}: only Transformer Engine multiplies in FP8, and {why_not}")
        return {"fp8": self.fp8, "fp8_recipe": self.fp8_recipe}
