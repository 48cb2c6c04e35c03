"""Baichuan 1 and 2, 7B and 13B: Llama with a fused [q; k; v]; 13B has ALiBi, version 2 an output layer of unit rows.

All four say ``model_type: baichuan``; which model it is follows from what the hub's configuration classes write:
``max_position_embeddings`` is a key of the 7B classes only (rotary embedding; 13B has ``model_max_length`` alone), and
``z_loss_weight`` one of the version 2 classes only (vocabulary 125696). Both sizes of version 2 and 13B of version 1
name the same class in ``architectures``, so that says nothing.
"""

from megapatch.models.cli import UserError
from megapatch.models.family import TINY, Family, HfConfig
from megapatch.models.rules import CORE, HF, Rule, attention, dense_mlp, embeddings, fused_by_group

WIDTH_13B, VOCABULARY_2 = 5120, 125696


def positions(hf: HfConfig) -> str:
    """RoPE for the 7B models, no embedding (ALiBi) for the 13B models."""
    rotary = hf.get("max_position_embeddings") is not None
    if rotary and hf["hidden_size"] == WIDTH_13B:
        raise UserError(
            f"config.json: max_position_embeddings with hidden_size {WIDTH_13B}; the 13B models have ALiBi and "
            "model_max_length alone: take max_position_embeddings out"
        )
    return "rope" if rotary else "none"


def modules(hf: HfConfig) -> dict[str, str]:
    """ALiBi attention, and an output layer that normalises its rows."""
    alibi = {"core_attention": "alibi:AlibiAttention"} if positions(hf) == "none" else {}
    normed = hf.get("z_loss_weight") is not None or hf["vocab_size"] == VOCABULARY_2
    return alibi | ({"adapt": "norm_head:normalise_rows"} if normed else {})


def rules(hf: HfConfig) -> tuple[Rule, ...]:
    """Llama's, with q, k and v in one tensor."""
    packed = Rule(
        CORE + "self_attention.linear_qkv.weight",
        (HF + "self_attn.W_pack.weight",),
        fused_by_group,
        shapes=("q+k+k h",),
    )
    apart = (*embeddings(), *attention(), *dense_mlp())
    return tuple(packed if rule.core == packed.core else rule for rule in apart)


FAMILY = Family(
    model_type="baichuan",
    reads={"num_query_groups": "num_attention_heads"},
    only={"hidden_act": "silu", "z_loss_weight": (0, None)},
    max_positions="max_position_embeddings|model_max_length",
    positions=positions,
    modules=modules,
    rules=rules,
    tiny={key: size for key, size in TINY.items() if key != "num_key_value_heads"}
    | {"model_max_length": 64, "z_loss_weight": 0},
)
