"""Families that the hub has as code: published configurations are understood; what their keys mean is not guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make, soften, weights
from safetensors.torch import save_file

from megapatch.models import cli, family
from megapatch.models.shapes import num_parameters
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.verify.verify import main as verify

QWEN = {"model_type": "qwen", "layer_norm_epsilon": 1e-6, "kv_channels": 128, "no_bias": True, "use_dynamic_ntk": True}
BAICHUAN_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
BAICHUAN_7B |= {"model_type": "baichuan", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
BAICHUAN_13B = {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40}
BAICHUAN_13B |= {"model_type": "baichuan", "rms_norm_eps": 1e-6, "model_max_length": 4096}
BAICHUAN_2 = {"vocab_size": 125696, "model_max_length": 4096, "z_loss_weight": 0}
GLM = {"hidden_size": 4096, "num_attention_heads": 32, "padded_vocab_size": 65024, "num_layers": 28, "seq_length": 8192}
GLM |= {"ffn_hidden_size": 13696, "kv_channels": 128, "layernorm_epsilon": 1e-5, "model_type": "chatglm"}
GLM |= {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "quantization_bit": 0}
GLM_HF = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 151552, "num_hidden_layers": 40}
GLM_HF |= {"intermediate_size": 13696, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {  # config.json; parameters on the model's page; longest length
    "Qwen-1.8B": (
        QWEN
        | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"vocab_size": 151936, "seq_length": 8192},
        1_836_828_672,
        8192,
    ),
    "Qwen-7B": (
        QWEN
        | {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"vocab_size": 151936, "seq_length": 8192},
        7_721_324_544,
        8192,
    ),
    "Baichuan-7B": (BAICHUAN_7B | {"vocab_size": 64000}, 7_000_559_616, 4096),
    "Baichuan2-7B": (BAICHUAN_7B | BAICHUAN_2, 7_505_973_248, 4096),
    "Baichuan-13B": (BAICHUAN_13B | {"vocab_size": 64000}, 13_264_901_120, 4096),
    "Baichuan2-13B": (BAICHUAN_13B | BAICHUAN_2, 13_896_668_160, 4096),
    "ChatGLM2-6B": (GLM | {"seq_length": 32768}, 6_243_584_000, 32768),  # 12487168064 bytes with 32 of inv_freq
    "ChatGLM3-6B-32k": (GLM | {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k"}, 6_243_584_000, 8192),
    "glm-4-9b": (GLM | {"num_layers": 40, "padded_vocab_size": 151552, "rope_ratio": 500}, 9_399_951_360, 8192),
    "glm-4-9b-chat-hf": (GLM_HF | {"model_type": "glm", "attention_bias": True}, 9_399_951_360, 131072),
    "GLM-4-9B-0414": (GLM_HF | {"model_type": "glm4", "attention_bias": True}, 9_400_279_040, 131072),
    "deepseek-moe-16b": (
        {"model_type": "deepseek", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "vocab_size": 102400}
        | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}
        | {"first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax"}
        | {"max_position_embeddings": 4096, "rope_scaling": None, "aux_loss_alpha": 0.001, "seq_aux": True},
        16_375_728_128,
        4096,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_gives_the_published_number_of_parameters(name: str) -> None:
    hf, parameters, longest = PUBLISHED[name]
    assert num_parameters(hf) == parameters
    assert family.max_positions(hf) == longest


BAICHUAN_KINDS = {  # positions, whether attention has ALiBi, whether the output layer's rows are normalised
    "Baichuan-7B": ("rope", False, False),
    "Baichuan2-7B": ("rope", False, True),
    "Baichuan-13B": ("none", True, False),
    "Baichuan2-13B": ("none", True, True),
}


@pytest.mark.parametrize("name", BAICHUAN_KINDS)
def test_which_baichuan_it_is_follows_from_the_keys(name: str) -> None:
    hf = PUBLISHED[name][0]
    modules = family.find(hf).modules(hf)
    assert (family.positions(hf), "core_attention" in modules, "adapt" in modules) == BAICHUAN_KINDS[name]


def test_a_baichuan_13b_that_says_it_has_position_embeddings_is_refused() -> None:
    hf = PUBLISHED["Baichuan-13B"][0] | {"max_position_embeddings": 4096}
    with pytest.raises(cli.UserError, match=r"max_position_embeddings with hidden_size 5120.*take"):
        family.positions(hf)


ROTARY = {  # changes of config.json -> theta of the base, what positions are divided by
    "as trained": ({}, 1e4, 1),
    "ratio of one": ({"rope_ratio": 1}, 1e4, 1),
    "ChatGLM2-6B-32k": ({"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"}, 1e4, 16),
    "ChatGLM3-6B-32k": ({"rope_ratio": 50, "_name_or_path": "models/ChatGLM3-6B-32k"}, 5e5, 1),
    "GLM-4": ({"rope_ratio": 500, "padded_vocab_size": 151552}, 5e6, 1),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rope_ratio_is_read_as_the_model_it_comes_from_does(name: str) -> None:
    changes, theta, factor = ROTARY[name]
    expected = [theta ** (-i / 64) / factor for i in range(0, 64, 2)]  # half of a head of 128
    assert family.inverse_frequencies(GLM | changes) == expected


@pytest.mark.parametrize(
    ("origin", "changes"),
    [("THUDM/chatglm2-6b-32k", {"rope_ratio": 4, "positions_divided": True}), ("x/chatglm3-6b", {"rope_ratio": 4})],
)
def test_both_meanings_of_rope_ratio_compute_as_the_reference(
    origin: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = soften(make(tmp_path / "hf", "chatglm", dtype=torch.float32, **changes))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": origin}))
    assert convert(["--source", str(folder), "--target", str(tmp_path / "core")]) == 0
    compared = ["--source", str(folder), "--target", str(tmp_path / "core"), "--tokens", "128", "--atol", "1e-5"]
    assert verify(compared) == 0
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": origin, "rope_ratio": 1}))
    assert verify(compared) == 1, "the ratio made no difference"


BUFFERS = {"chatglm": "transformer.rotary_pos_emb.inv_freq", "baichuan": "model.layers.2.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize("name", BUFFERS)
def test_inverse_frequencies_in_the_files_are_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "hf", name, dtype=torch.float32)
    plain = weights(folder)
    save_file(plain | {BUFFERS[name]: torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    for source, target in (("hf", "core"), ("core", "back")):
        assert convert(["--source", str(tmp_path / source), "--target", str(tmp_path / target)]) == 0
    assert f"{BUFFERS[name]}: left out" in capsys.readouterr().err
    back = weights(tmp_path / "back")
    assert back.keys() == plain.keys() and all(torch.equal(back[key], plain[key]) for key in plain)
    direct = ["--source", str(tmp_path / "core"), "--target", str(folder), "--engine", "core", "--atol", "0"]
    assert verify([*direct, "--tokens", "16"]) == 0


def test_chatglm_1_is_refused_by_name() -> None:
    old = {"model_type": "chatglm", "position_encoding_2d": True, "inner_hidden_size": 16384, "num_layers": 28}
    with pytest.raises(cli.UserError, match="position_encoding_2d is True; chatglm supports None only"):
        family.placed_rules(old)


@pytest.mark.parametrize("name", ["glm", "glm4"])
def test_the_rotated_part_of_a_head_is_read_in_either_spelling(name: str) -> None:
    hf, base = PUBLISHED["glm-4-9b-chat-hf"][0] | {"model_type": name}, {"rope_theta": 1e4}
    for settings, part in {
        (): 0.5,
        (("partial_rotary_factor", 0.25),): 0.25,
        (("rope_theta", 1e4), ("partial_rotary_factor", 1.0)): 1.0,
    }.items():
        expected = [1e4 ** (-i / (128 * part)) for i in range(0, int(128 * part), 2)]
        assert family.inverse_frequencies(hf | dict(settings)) == expected
        assert family.inverse_frequencies(hf | {"rope_parameters": base | dict(settings)}) == expected
