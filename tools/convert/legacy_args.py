"""The options that Megatron-LM keeps in its checkpoints: it compares them, and --use-checkpoint-args takes them."""

from typing import Any

from megapatch.models.family import HfConfig, find, max_positions, positions, rope, tied_embeddings, vocab_size
from megapatch.models.safe_pickle import Call, Global
from megapatch.tools.convert.ranks import Ranks

_RENAMED = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon"}  # TransformerConfig -> option
_PLAIN = (bool, int, float, str, type(None), list)
_NOT_OPTIONS = ("activation_func",)


def arguments(hf: HfConfig, ranks: Ranks, spec: str, experts: str) -> Call:
    """An argparse.Namespace of what is known of the model and the layout (checkpointing.py of core_v0.16.1)."""
    fields = find(hf).transformer_config(hf)
    plain = {
        _RENAMED.get(name, name): value
        for name, value in fields.items()
        if isinstance(value, _PLAIN) and name not in _NOT_OPTIONS
    }
    return Call(Global("argparse", "Namespace"), (), plain | _model(hf, fields) | _layout(hf, ranks, spec, experts))


def _model(hf: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    kind, length = positions(hf), max_positions(hf)
    gated = fields["gated_linear_unit"] and fields["activation_func"] == "silu"
    said = {
        "group_query_attention": fields["num_query_groups"] != fields["num_attention_heads"],
        "max_position_embeddings": length,
        "seq_length": length,
        "position_embedding_type": kind,
        "add_position_embedding": kind == "learned_absolute",
        "use_rotary_position_embeddings": kind == "rope",
        "swiglu": gated,
        "untie_embeddings_and_output_weights": not tied_embeddings(hf),
        "vocab_size": vocab_size(hf),
    }
    return said | (_rope(hf) if kind == "rope" else {})


def _rope(hf: HfConfig) -> dict[str, Any]:
    found = rope(hf)
    scaled = (
        {"use_rope_scaling": True, "rope_scaling_factor": found["factor"]} if found["rope_type"] == "llama3" else {}
    )
    return {"rotary_base": found["rope_theta"], **scaled}


def _layout(hf: HfConfig, ranks: Ranks, spec: str, experts: str) -> dict[str, Any]:
    stages = ranks.stages
    first, last = stages.ends or (None, None)
    return {
        "decoder_first_pipeline_num_layers": first,
        "decoder_last_pipeline_num_layers": last,
        "tensor_model_parallel_size": ranks.tp,
        "pipeline_model_parallel_size": stages.pp,
        "virtual_pipeline_model_parallel_size": stages.vpp if stages.vpp > 1 else None,
        "expert_model_parallel_size": ranks.ep,
        "expert_tensor_parallel_size": ranks.etp,
        "make_vocab_size_divisible_by": ranks.divisible_by,
        "padded_vocab_size": ranks.vocabulary,
        "tokenizer_type": "HuggingFaceTokenizer",
        "transformer_impl": "transformer_engine" if spec == "te" else "local",
        "moe_grouped_gemm": bool(ranks.num_experts) and experts == "grouped",
        "ckpt_format": "torch",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
