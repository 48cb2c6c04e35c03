"""Options of the trainer: which layers keep what they need for the backward pass in host memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from megapatch.models.cli import UserError, opt

PARTS = {  # part: the module of a layer
    "attention": "self_attention",
    "core_attn": "self_attention.core_attention",
    "mlp": "mlp",
}


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """What waits for the backward pass in host memory."""

    offload_activations: Optional[str] = opt(
        "layers whose activations go to host memory and come back for the backward pass: a number N, the first N of "
        "each pipeline stage (with --vpp: of each chunk), or ranges such as 0-7,16-23; the last layer of a stage, "
        "whose backward pass comes first, never does",
        None,
        metavar="LAYERS",
    )
    offload_activation_modules: list[str] = opt(
        f"only what these parts of a layer keep, of {', '.join(PARTS)} (default: all of the layer)",
        [],
        nargs="+",
        metavar="PART",
        choices=list(PARTS),
    )
    offload_activation_min_kib: int = opt("smaller tensors stay, in KiB", 1024)
    offload_link_gb_per_s: Optional[float] = opt(
        "on a CPU: emulate a link of this many GB/s in each direction to host memory (default: as fast as memory)", None
    )

    def refuse_activations(self, recompute: str, recompute_modules: Sequence[str], *, linked: bool) -> None:
        """ValueError where options do not go together; ``linked``: something else goes to host memory too."""
        again = set(self.offload_activation_modules) & set(recompute_modules if recompute == "selective" else [])
        refused = {
            "--offload-activation-modules needs --offload-activations": (
                self.offload_activations is None and self.offload_activation_modules != []
            ),
            "--offload-activation-min-kib needs --offload-activations": (
                self.offload_activations is None and self.offload_activation_min_kib != 1024
            ),
            f"--offload-activation-min-kib {self.offload_activation_min_kib}: must be 0 or more": (
                self.offload_activation_min_kib < 0
            ),
            "--offload-activation-modules: with --recompute full a layer keeps nothing but its input": (
                recompute == "full" and self.offload_activation_modules != []
            ),
            f"--offload-activation-modules {' '.join(sorted(again))}: is computed again, see --recompute-modules": (
                bool(again)
            ),
            "--offload-link-gb-per-s needs --offload-activations or --offload-optimizer": (
                self.offload_link_gb_per_s is not None and self.offload_activations is None and not linked
            ),
            f"--offload-link-gb-per-s {self.offload_link_gb_per_s}: must be above 0": (
                self.offload_link_gb_per_s is not None and not self.offload_link_gb_per_s > 0
            ),
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)
        if self.offload_activations is not None:
            asked_layers(self.offload_activations)

    def offloaded(self, chunk: Sequence[int]) -> list[int]:
        """Which of a chunk's layers, numbered in the whole model, send their activations to host memory."""
        if self.offload_activations is None:
            return []
        first, named = asked_layers(self.offload_activations)
        return [layer for at, layer in enumerate(chunk[:-1]) if at < first or layer in named]

    def refuse_layers(self, chunks: Sequence[Sequence[int]]) -> None:
        """UserError where --offload-activations names layers that the model's chunks do not have, or none of use."""
        if self.offload_activations is None:
            return
        first, named = asked_layers(self.offload_activations)
        most, last = min(map(len, chunks)) - 1, max(map(max, chunks))
        flag = f"--offload-activations {self.offload_activations}"
        if first > most:
            raise UserError(
                f"{flag}: a stage or chunk has {most + 1} layer{'s' * (most > 0)}, of which the last one stays on the "
                f"device; {f'give at most {most}' if most else 'take fewer stages'}, or ranges of layers"
            )
        if named and max(named) > last:
            raise UserError(f"{flag}: the model's layers are 0 to {last}")
        if not any(self.offloaded(chunk) for chunk in chunks):
            raise UserError(f"{flag}: are the last layers of their stages, which stay on the device; name others")


def asked_layers(text: str) -> tuple[int, set[int]]:
    """'4' -> (4, {}): the first four of each chunk; '0-2,8' -> (0, {0, 1, 2, 8}): layers by number (ValueError)."""
    if text.isdecimal():
        if int(text) < 1:
            raise ValueError("--offload-activations 0: must be at least 1; leave it away for none")
        return int(text), set()
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
            raise ValueError(f"--offload-activations {text}: expected a number, or ranges of layers such as 0-7,16-23")
        found |= set(range(int(low), int(high) + 1))
    return 0, found
