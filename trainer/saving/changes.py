"""Options that may change while a run is resumed, and what a change does to the training. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

ORDER, RATE, STEP, LOSS = (
    "the order of data changes",
    "the learning rate goes on along another curve",
    "steps from here on change the weights otherwise",
    "steps from here on lower another loss",
)
EFFECTS = {
    **dict.fromkeys(("seed", "seq_length", "global_batch_size"), ORDER),
    **dict.fromkeys(("data_path", "data", "split", "no_packing"), ORDER),
    "train_iters": f"{ORDER}, and with it the decay of the learning rate, unless --lr-decay-iters says where it ends",
    "micro_batch_size": "sums are rounded otherwise, and experts are balanced over other tokens",
    **dict.fromkeys(("lr", "min_lr", "lr_schedule", "lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters"), RATE),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "fp8", "fp8_recipe"), STEP),
    **dict.fromkeys(("moe_bias_update_rate", "moe_capacity_factor"), STEP),
    **dict.fromkeys(("mtp_loss_weight", "moe_aux_loss", "moe_aux_loss_coeff", "moe_z_loss_coeff"), LOSS),
    **dict.fromkeys(("eod_mask_loss", "reset_position_ids", "loss_normalisation"), LOSS),
}


def remembered(options: Any) -> dict[str, Any]:
    """Those of EFFECTS that the run has, for its checkpoints."""
    return {name: getattr(options, name) for name in EFFECTS if hasattr(options, name)}


def told(before: Mapping[str, Any], options: Any) -> Iterator[str]:
    """A line for each of them that is not as it was."""
    for name, now in remembered(options).items():
        if (was := before.get(name, now)) != now:
            yield f"--{name.replace('_', '-')} was {_shown(was)}, now {_shown(now)}: {EFFECTS[name]}"


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
