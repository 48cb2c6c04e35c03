"""config.json of published models, with the keys that their hub folders have: accepted, and of the size they have.

Sizes are those of the hub's pages and papers; a tied output layer counts once.
"""

from typing import Any

import pytest

from megapatch.models import cli, family
from megapatch.models.shapes import num_parameters

BLOOM = {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "n_inner": None,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "vocab_size": 250880,
}
FALCON = {
    "model_type": "falcon",
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "bias": False,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "vocab_size": 65024,
}
OPT = {
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "prefix": "</s>",
    "vocab_size": 50272,
}
GALACTICA = OPT | {
    "activation_function": "gelu",
    "attention_dropout": 0.1,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "learned_embeddings": True,
    "scale_embeddings": False,
    "vocab_size": 50000,
}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
STARCODER = {
    "model_type": "gpt_bigcode",
    "activation_function": "gelu",
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "inference_runner": 0,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "multi_query": True,
    "n_inner": 24576,
    "n_positions": 8192,
    "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
STARCODER2 = {
    "model_type": "starcoder2",
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813,
    "sliding_window": 4096,
    "use_bias": True,
    "vocab_size": 49152,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def deep(layers: int, heads: int, width: int) -> dict[str, int]:
    return {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "bloom-560m": (BLOOM | {"hidden_size": 1024, "n_head": 16, "n_layer": 24}, 559_214_592),
    "bloom-7b1": (BLOOM | {"n_embed": 4096, "num_attention_heads": 32, "n_layer": 30}, 7_069_016_064),
    "bloom": (BLOOM | {"n_embed": 14336, "num_attention_heads": 112, "n_layer": 70}, 176_247_271_424),
    "falcon-7b": (FALCON | deep(32, 71, 4544), 6_921_720_704),
    "falcon-40b": (
        FALCON | deep(60, 128, 8192) | {"num_kv_heads": 8, "new_decoder_architecture": True},
        41_303_293_952,
    ),
    "falcon-rw-1b": (
        FALCON
        | deep(24, 32, 2048)
        | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
        | {"vocab_size": 50304},
        1_311_625_216,
    ),
    "opt-125m": (OPT | deep(12, 12, 768) | {"ffn_dim": 3072, "word_embed_proj_dim": 768}, 125_239_296),
    "opt-6.7b": (OPT | deep(32, 32, 4096) | {"ffn_dim": 16384, "word_embed_proj_dim": 4096}, 6_658_473_984),
    "gpt2": (GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808),
    "gpt2-xl": (GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
    "starcoder": (STARCODER | {"n_embd": 6144, "n_head": 48, "n_layer": 40}, 15_517_456_384),
    "starcoder2-3b": (
        STARCODER2 | deep(30, 24, 3072) | {"intermediate_size": 12288, "num_key_value_heads": 2},
        3_030_371_328,
    ),
    "mistral-7b-v0.1": (MISTRAL, 7_241_732_096),
    "mistral-7b-v0.3": (MISTRAL | {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1e6}, 7_248_023_552),
    "mistral-nemo": (
        MISTRAL
        | {"head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 131072}
        | {"sliding_window": None},
        12_247_782_400,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_size(name: str) -> None:
    hf, parameters = PUBLISHED[name]
    family.refuse_rope(hf)
    assert num_parameters(hf) == parameters


def test_galactica_has_the_weights_that_are_not_constant() -> None:
    hf = GALACTICA | deep(24, 32, 2048) | {"ffn_dim": 8192, "word_embed_proj_dim": 2048}
    block = 4 * 2048 * 2048 + 2 * 2048 * 8192
    assert num_parameters(hf) == 24 * block + (50000 + 2050) * 2048


def test_the_one_opt_of_another_kind_is_refused() -> None:
    hf = OPT | deep(24, 16, 1024) | {"ffn_dim": 4096, "word_embed_proj_dim": 512, "do_layer_norm_before": False}
    with pytest.raises(cli.UserError, match="do_layer_norm_before is False; opt supports True only"):
        family.placed_rules(hf)
