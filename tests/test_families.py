"""Every family of models/families, each on its tiny model, with no test code of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import contents, make, soften

from megapatch.models import cli, family
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.verify.verify import main as verify

LLAMA3 = {"rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.707, "mscale_all_dim": 1.0}
YARN |= {"original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}
FALCON_RW = {
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "new_decoder_architecture": False,
    "num_kv_heads": None,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # what config.json allows beyond the tiny model of a family
    "llama 2: own output layer, one head per group": (
        "llama",
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1e4}},
    ),
    "llama with linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama3 rope with constants of its own": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 24}},
    ),
    "one key-value head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2 with tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 with its own output layer": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_moe, all layers mixtures, probabilities as they are": (
        "qwen3_moe",
        {"mlp_only_layers": [], "norm_topk_prob": False},
    ),
    "qwen3_moe, every second layer a mixture": ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    "mixtral with three experts a token": ("mixtral", {"num_experts_per_tok": 3}),
    "qwen2_moe, all layers mixtures, probabilities normalised, no bias": (
        "qwen2_moe",
        {"mlp_only_layers": [], "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen 1 with tied embeddings": ("qwen", {"tie_word_embeddings": True}),
    "baichuan 1 7B": ("baichuan", {"z_loss_weight": None}),
    "baichuan 1 13B": ("baichuan", {"z_loss_weight": None, "max_position_embeddings": None}),
    "baichuan 2 13B, heads not a power of two": (
        "baichuan",
        {"max_position_embeddings": None, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2},
    ),
    "chatglm with one group": ("chatglm", {"multi_query_group_num": 1}),
    "glm without biases, a quarter of each head rotated": (
        "glm",
        {"attention_bias": False, "partial_rotary_factor": 0.25, "num_key_value_heads": 1},
    ),
    "glm4 with biases": ("glm4", {"attention_bias": True}),
    "deepseek, every second layer a mixture, probabilities normalised": (
        "deepseek",
        {"norm_topk_prob": True, "first_k_dense_replace": 0, "moe_layer_freq": 2},
    ),
    "deepseek, all layers mixtures, no shared experts": (
        "deepseek",
        {"first_k_dense_replace": 0, "n_shared_experts": None},
    ),
    "deepseek_v2-lite: queries without a latent vector, all groups": (
        "deepseek_v2",
        {"q_lora_rank": None, "topk_method": "greedy", "first_k_dense_replace": 2, "rms_norm_eps": 1e-3},
    ),
    "deepseek_v2 with yarn, all layers mixtures": (
        "deepseek_v2",
        {"rope_parameters": YARN, "first_k_dense_replace": 0, "num_experts_per_tok": 2},
    ),
    "deepseek_v3 with yarn": ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0}}),
    "moonlight: one group, queries without a latent vector": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rms_norm_eps": 1e-3, "num_nextn_predict_layers": 0},
    ),
    "mixtral with windows": ("mixtral", {"sliding_window": 16}),
    "qwen2 with windows in the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "qwen3 with windows in every second layer": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "mistral without windows": ("mistral", {"sliding_window": None, "head_dim": None}),
    "mistral with windows longer than the text": ("mistral", {"sliding_window": 128}),
    "bloom with heads that are no power of two": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "bloom with its own output layer": ("bloom", {"tie_word_embeddings": False}),
    "falcon 7B": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None, "max_position_embeddings": 128}),
    "falcon 11B: one norm, grouped keys": ("falcon", {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}),
    "falcon RW": ("falcon", {**FALCON_RW, "num_attention_heads": 4}),
    "falcon RW with heads that are no power of two": (
        "falcon",
        {**FALCON_RW, "num_attention_heads": 6, "hidden_size": 48},
    ),
    "falcon with biases and parallel layers": ("falcon", {"bias": True, "new_decoder_architecture": False}),
    "galactica": (
        "opt",
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "opt with relu and its own output layer": ("opt", {"activation_function": "relu", "tie_word_embeddings": False}),
    "gpt_bigcode with q, k and v of each head together": ("gpt_bigcode", {"multi_query": False, "n_inner": 48}),
    "gpt2 with another activation and its own output layer": (
        "gpt2",
        {"activation_function": "relu", "tie_word_embeddings": False, "n_inner": 48},
    ),
    "starcoder2 without biases and windows": ("starcoder2", {"use_bias": False, "sliding_window": None}),
    **{name: (name, {}) for name in family.known()},
}
UNSUPPORTED = {  # config.json settings that must be refused by name
    "mistral": {"hidden_act": "gelu", "layer_types": ["full_attention", "sliding_attention"]},
    "bloom": {"apply_residual_connection_post_layernorm": True, "hidden_dropout": 0.1},
    "falcon": {"activation": "relu", "hidden_dropout": 0.1, "attention_dropout": 0.1, "alibi": True},
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "activation_function": "silu", "layerdrop": 0.1},
    "gpt_bigcode": {"add_cross_attention": True, "scale_attn_weights": False, "activation_function": "silu"},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "add_cross_attention": True},
    "starcoder2": {"norm_type": "rms", "mlp_type": "gated", "hidden_act": "silu", "layer_types": ["full_attention"]},
    "llama": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn"}},
    "qwen2": {"hidden_act": "relu", "layer_types": ["full_attention", "sliding_attention"] * 2},
    "qwen3": {
        "attention_bias": True,
        "layer_types": ["chunked_attention"] * 4,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "qwen3_moe": {"attention_bias": True, "hidden_act": "relu"},
    "mixtral": {"layer_types": ["sliding_attention"] * 4, "router_jitter_noise": 0.1},
    "qwen2_moe": {"use_sliding_window": True, "hidden_act": "relu"},
    "deepseek_v2": {
        "attention_bias": True,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_parameters": YARN | {"mscale": None},
    },
    "deepseek_v3": {
        "attention_bias": True,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "rope_interleave": False,
        "moe_layer_freq": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
    "qwen": {"no_bias": False, "rotary_pct": 0.5, "scale_attn_weights": False, "emb_dropout_prob": 0.1, "visual": {}},
    "baichuan": {"hidden_act": "gelu", "z_loss_weight": 0.1},
    "chatglm": {
        "multi_query_attention": False,
        "rmsnorm": False,
        "post_layer_norm": False,
        "original_rope": False,
        "add_qkv_bias": False,
        "add_bias_linear": True,
        "apply_residual_connection_post_layernorm": True,
        "hidden_dropout": 0.1,
        "pre_seq_len": 128,
        "quantization_bit": 4,
        "vision_config": {},
        "position_encoding_2d": True,
        "rope_ratio": 50,
    },
    "glm": {"hidden_act": "gelu"},
    "glm4": {"hidden_act": "gelu"},
    "deepseek": {"attention_bias": True, "hidden_act": "gelu", "scoring_func": "sigmoid"},
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Hugging Face folder in fp32, with weights whose scale keeps the logits of every family of order one."""
    name, changes = VARIANTS[request.param]
    return soften(make(tmp_path / "hf", name, dtype=torch.float32, **changes))


def test_a_family_converts_bit_exactly_and_computes_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Hugging Face -> core -> Hugging Face is the same bytes, config.json too; fp32 logits are transformers'."""
    core, back = tmp_path / "core", tmp_path / "back"
    assert convert(["--source", str(folder), "--target", str(core)]) == 0
    assert convert(["--source", str(core), "--target", str(back)]) == 0
    assert contents(back) == contents(folder)
    capsys.readouterr()
    assert verify(["--source", str(folder), "--target", str(core), "--tokens", "128", "--atol", "1e-5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["max_abs_logit"] > 1  # not a model of zeros
    direct = ["--target", str(folder), "--engine", "core"]  # the folder read without conversion
    assert verify(["--source", str(core), *direct, "--tokens", "128", "--atol", "0"]) == 0
    with capsys.disabled():
        if request.config.getoption("capture") == "no":
            name = request.node.callspec.id.replace("_", " ")
            print(f"{name:65} {result['max_abs_diff']:.1e} of {result['max_abs_logit']:.1f}")


def test_every_family_has_refused_settings_here() -> None:
    assert set(UNSUPPORTED) == set(family.known())


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in UNSUPPORTED.items() for key in keys])
def test_an_unsupported_setting_is_refused_by_name(name: str, key: str) -> None:
    hf = {"model_type": name, "rms_norm_eps": 1e-6, "norm_topk_prob": True, **family.known()[name].tiny}
    family.placed_rules(hf)
    family.rope(hf)
    with pytest.raises(cli.UserError, match=r"config\.json: .*" + ("rope" if "rope" in key else "sliding|" + key)):
        changed = hf | {key: UNSUPPORTED[name][key]}
        changed = {k: v for k, v in changed.items() if not (key == "rope_scaling" and k == "rope_parameters")}
        family.find(changed).transformer_config(changed)
        family.rope(changed)


WINDOWS: dict[tuple[str, str], tuple[tuple[int, int] | None, list[int] | None]] = {  # said -> (before, after), layers
    ("mixtral", '{"sliding_window": 8}'): ((7, 0), None),
    ("mixtral", '{"sliding_window": 8, "use_sliding_window": false}'): ((7, 0), None),  # not read by transformers
    ("mistral", '{"sliding_window": null}'): (None, None),
    ("starcoder2", '{"sliding_window": null}'): (None, None),
    ("qwen2", '{"sliding_window": 8}'): (None, None),
    ("qwen2", '{"sliding_window": null, "use_sliding_window": true}'): (None, None),
    ("qwen2", '{"sliding_window": 8, "use_sliding_window": true}'): (None, None),  # max_window_layers is 28
    ("qwen2", '{"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1}'): ((7, 0), [0, 1, 1, 1]),
    ("qwen3", '{"use_sliding_window": true, "max_window_layers": 0}'): ((4095, 0), [1, 1, 1, 1]),
}


@pytest.mark.parametrize(("name", "said"), WINDOWS)
def test_windows_are_those_that_config_json_says(name: str, said: str) -> None:
    hf = {"model_type": name, "rms_norm_eps": 1e-6, **family.known()[name].tiny, **json.loads(said)}
    fields = family.find(hf).transformer_config(hf)
    assert (fields["window_size"], fields.get("window_attn_skip_freq")) == WINDOWS[name, said]


def test_a_mistral_that_does_not_say_has_the_windows_of_its_first_version() -> None:
    hf = {"model_type": "mistral", "rms_norm_eps": 1e-6, **family.known()["mistral"].tiny}
    del hf["sliding_window"]
    assert family.find(hf).transformer_config(hf)["window_size"] == (4095, 0)


OLD_SPELLING = {  # transformers 4: config.json of published models
    "llama": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_moe": {"num_experts": 4},
}


@pytest.mark.parametrize("name", OLD_SPELLING)
def test_both_spellings_of_config_json_mean_the_same(name: str) -> None:
    new = {"model_type": name, "rms_norm_eps": 1e-6, **family.known()[name].tiny}
    dropped = {"rope_parameters", "num_local_experts"}
    old = {k: v for k, v in new.items() if k not in dropped} | OLD_SPELLING[name]
    assert old != new
    assert family.find(old).transformer_config(old) == family.find(new).transformer_config(new)
    assert family.inverse_frequencies(old) == family.inverse_frequencies(new)


def test_inverse_frequencies_are_those_of_transformers() -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", **dict(family.known()["llama"].tiny))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = torch.tensor(family.inverse_frequencies({"model_type": "llama", **config.to_dict()}))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
