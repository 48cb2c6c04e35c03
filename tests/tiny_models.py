"""Tiny Hugging Face folders and tokenizers for tests of generation."""

import json
import random
import string
from pathlib import Path
from typing import Any

import references  # noqa: F401  makes AutoModelForCausalLM know the models that transformers lacks
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megapatch.models.family import known

FAMILIES = (
    "bloom",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "mistral",
    "opt",
    "starcoder2",
    "baichuan",
    "chatglm",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "glm",
    "glm4",
    "llama",
    "mixtral",
    "qwen",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% if m.role == 'oracle' %}!{% endif %}{% endfor %}"
    "{% if tools %}[{{ tools | length }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_random = random.Random(0)
PROMPTS = [[_random.randrange(95) for _ in range(length)] for length in (5, 1, 17, 9, 30)]


def tiny_model(folder: Path, family: str, **changes: Any) -> PreTrainedModel:
    """Fill a Hugging Face folder with random weights, wide enough apart that no two tokens are almost as probable.

    Returns transformers' model.
    """
    config = AutoConfig.for_model(family, **dict(known()[family].tiny) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = parameter.dim() == 1 and "bias" not in name
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ones)
    model.save_pretrained(folder)
    return model.eval()


def chat_model(folder: Path) -> Path:
    """A Hugging Face folder of 64 positions and 260 tokens, of which the tokenizer has 257, with a chat template."""
    tiny_model(folder, "qwen3", vocab_size=260)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return byte_tokenizer(folder)


def letter_tokenizer(folder: Path) -> Path:
    """96 tokens: letters, pairs of letters, and <eos> as the last."""
    pairs = [a + b for a in "aeiou" for b in string.ascii_lowercase][:69]
    pieces = [(piece, -float(len(piece) == 1)) for piece in [*string.ascii_lowercase, *pairs, "<eos>"]]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<eos>"])
    return _saved(made, folder, {"eos_token": "<eos>"})


def byte_tokenizer(folder: Path) -> Path:
    """257 tokens: every byte, those that are no characters by themselves first, and <eos>, which is bos too, last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.ByteLevel()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    return _saved(made, folder, {"eos_token": "<eos>", "bos_token": "<eos>"})


def _saved(made: Tokenizer, folder: Path, config: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
