"""mp-new-model: a folder that transformers loads and mp-convert takes; the same bytes for the same options."""

import json
import logging
import stat
import sys
from pathlib import Path

import pytest
import torch
from model_folders import contents, weights
from tiny_models import letter_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megapatch.models import commit, hf_files, shapes
from megapatch.models.family import known
from megapatch.tools.convert import convert
from megapatch.tools.convert.new_model import main

SMALL = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4"]
SMALL += ["num_key_value_heads=2", "head_dim=8"]
EXPERTS = {
    "mixtral": ["num_local_experts=4", "num_experts_per_tok=2"],
    "qwen3_moe": ["num_experts=4", "num_experts_per_tok=2", "moe_intermediate_size=16"],
    "glm": ["pad_token_id=null"],
    "glm4": ["pad_token_id=null"],
}
LLAMA = ["--model-type", "llama", "--set", *SMALL]


def new(target: Path, *arguments: str) -> Path:
    """Run mp-new-model, which must succeed."""
    assert main([*map(str, arguments), "--target", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return letter_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer")


def test_sizes_and_ids_follow_from_settings_and_tokenizer(tokenizer, tmp_path):
    made = new(tmp_path / "m", *LLAMA, "tie_word_embeddings=true", "rms_norm_eps=1e-5", "--tokenizer", tokenizer)
    config = hf_files.config(made)
    assert config["hidden_size"] == 32 and config["tie_word_embeddings"] is True and config["rms_norm_eps"] == 1e-5
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (
        96,
        95,
        None,
        None,
    )
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == 95
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (tokenizer / name).read_bytes()
    assert commit.verify(made)


@pytest.mark.parametrize("family", ["glm", "glm4", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_loads_it_and_mp_convert_takes_it(family, tmp_path):
    sizes = [s for s in SMALL if (family, s) != ("qwen2", "head_dim=8")] + ["vocab_size=50"]
    made = new(tmp_path / "m", "--model-type", family, "--set", *sizes, *EXPERTS.get(family, ()), "--dtype", "fp32")
    model, loading = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert sum(tensor.numel() for tensor in weights(made).values()) == shapes.num_parameters(hf_files.config(made))
    assert convert.main(["--source", str(made), "--target", str(tmp_path / "core")]) == 0


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt2", "gpt_bigcode", "mistral", "opt", "starcoder2"])
def test_families_with_sizes_of_other_names_are_made_too(family, tmp_path):
    settings = [f"{key}={json.dumps(value)}" for key, value in known()[family].tiny.items()]
    made = new(tmp_path / "m", "--model-type", family, "--set", *settings, "--dtype", "fp32")
    model, loading = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert sum(tensor.numel() for tensor in weights(made).values()) == shapes.num_parameters(hf_files.config(made))
    assert convert.main(["--source", str(made), "--target", str(tmp_path / "core")]) == 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    arguments = [*LLAMA, "vocab_size=50"]
    first = contents(new(tmp_path / "1", *arguments))
    assert contents(new(tmp_path / "2", *arguments)) == first
    other = contents(new(tmp_path / "3", *arguments, "--seed", "2"))
    assert other.keys() == first.keys()
    assert [name for name in first if other[name] != first[name]] == ["model.safetensors"]


def test_a_config_is_taken_and_changed(tmp_path):
    base = new(tmp_path / "base", "--model-type", "qwen3", "--set", *SMALL, "vocab_size=50", "rope_theta=5000")
    assert hf_files.config(base)["rope_parameters"] == {"rope_theta": 5000, "rope_type": "default"}
    for config in (base, base / "config.json"):
        made = hf_files.config(new(tmp_path / "made", "--config", config, "--set", "num_hidden_layers=3", "--force"))
        same = hf_files.config(base) | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        assert made == same


def test_the_vocabulary_is_rounded_up_when_asked(tokenizer, tmp_path):
    made = new(tmp_path / "m", *LLAMA, "--tokenizer", tokenizer, "--vocab-multiple", "64")
    assert hf_files.config(made)["vocab_size"] == 128
    assert weights(made)["model.embed_tokens.weight"].shape == (128, 32)


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_weights_have_the_dtype_asked_for(dtype, kind, tmp_path):
    made = new(tmp_path / "m", *LLAMA, "vocab_size=50", "--dtype", dtype)
    assert {tensor.dtype for tensor in weights(made).values()} == {kind}
    assert hf_files.config(made)["dtype"] == str(kind).removeprefix("torch.")
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o644}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model-type", "gpt9"], "model_type 'gpt9' is not supported; supported: baichuan"),
        (
            ["--model-type", "llama", "--set", "hiden_size=8"],
            "--set hiden_size: no such setting of llama; hidden_size?",
        ),
        (["--model-type", "qwen3", "--set", "hidden_size=many"], "transformers refuses these settings: "),
        (
            ["--model-type", "llama", "--set", "attention_bias=true"],
            "attention_bias is True; llama supports False only",
        ),
        ([*LLAMA, "num_key_value_heads=3"], "4 attention heads do not divide into 3 groups"),
        ([*LLAMA, 'rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}'], "rope type 'yarn'"),
        (
            ["--model-type", "glm4", "--set", *SMALL, "vocab_size=50"],
            "pad_token_id 151329 is not below vocab_size 50; --set pad_token_id=null",
        ),
        (["--config", "absent/config.json"], "absent/config.json: missing"),
        ([*LLAMA, "--tokenizer", "absent"], "absent"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_left(arguments, said, tmp_path, capsys, monkeypatch):
    transformers_logging.get_logger()  # whose handler keeps the stderr of the first import
    for handler in logging.getLogger("transformers").handlers:
        if type(handler) is logging.StreamHandler:  # not those of pytest
            monkeypatch.setattr(handler, "stream", sys.stderr)
    assert main([*arguments, "--target", str(tmp_path / "m")]) == 1
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_model_type_that_transformers_lacks_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "qwen")  # there for other tests only
    assert main(["--model-type", "qwen", "--target", str(tmp_path / "m")]) == 1
    assert "model_type 'qwen': transformers has no such model; start from published" in capsys.readouterr().err


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tokenizer, tmp_path, capsys):
    arguments = [*LLAMA, "vocab_size=95", "--tokenizer", str(tokenizer), "--target", str(tmp_path / "m")]
    assert main(arguments) == 1
    assert "--set vocab_size=95: the tokenizer needs 96" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give one of --config and --model-type"),
        (["--config", "x", "--model-type", "llama"], "give one of --config and --model-type"),
        (["--model-type", "llama", "--set", "hidden_size"], "--set hidden_size: expected KEY=VALUE"),
        (["--model-type", "llama", "--vocab-multiple", "8"], "--vocab-multiple needs --tokenizer"),
    ],
)
def test_wrong_usage_is_told(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--target", str(tmp_path / "m")])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
