"""Tokenizer, chat template and generation files of published models come along in conversion, both ways, bit by bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import contents, make

from megapatch.models.tokenizer import copy_tokenizer
from megapatch.tools.convert.convert import main as convert

CHAT = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"
FAST = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
GPT2 = "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"
SPM = "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
PUBLISHED: dict[str, tuple[str, ...]] = {  # the files beside weights and config.json, as their pages list them
    "Llama-2-7b": (*SPM, "tokenizer.json", "LICENSE.txt", "USE_POLICY.md"),
    "Llama-3.2-1B": (*FAST, "special_tokens_map.json"),
    "Mistral-7B-v0.3": (*SPM, "tokenizer.json", "tokenizer.model.v3", "params.json"),
    "Mixtral-8x7B": (*SPM, "tokenizer.json"),
    "Yi-6B": (*SPM, "tokenizer.json"),
    "Qwen-7B": (
        "qwen.tiktoken",
        "tokenization_qwen.py",
        "modeling_qwen.py",
        "configuration_qwen.py",
        "qwen_generation_utils.py",
        "cpp_kernels.py",
        "cache_autogptq_cuda_256.cpp",
        "cache_autogptq_cuda_kernel_256.cu",
        "tokenizer_config.json",
        "generation_config.json",
    ),
    "Qwen2.5-7B": (*FAST, "vocab.json", "merges.txt"),
    "Qwen2.5-7B-Instruct, as transformers 5 saves it": (*FAST, *CHAT),
    "Qwen3-30B-A3B": (*FAST, "vocab.json", "merges.txt"),
    "Baichuan2-13B": (
        *SPM,
        "tokenization_baichuan.py",
        "modeling_baichuan.py",
        "configuration_baichuan.py",
        "generation_utils.py",
        "quantizer.py",
    ),
    "chatglm3-6b": (
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenization_chatglm.py",
        "modeling_chatglm.py",
        "configuration_chatglm.py",
        "quantization.py",
        "MODEL_LICENSE",
    ),
    "chatglm-6b": ("ice_text.model", "tokenizer_config.json", "tokenization_chatglm.py"),
    "glm-4-9b": ("tokenizer.model", "tokenizer_config.json", "tokenization_chatglm.py", "generation_config.json"),
    "DeepSeek-V2-Lite": (*FAST, "modeling_deepseek.py", "configuration_deepseek.py", "tokenization_deepseek_fast.py"),
    "DeepSeek-V3": (*FAST, "modeling_deepseek.py", "configuration_deepseek.py"),
    "Moonlight-16B-A3B": (*FAST[1:], "tiktoken.model", "tokenization_moonshot.py", "modeling_deepseek.py"),
    "bloom-7b1": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "falcon-40b": (*FAST, "special_tokens_map.json", "handler.py"),
    "galactica-6.7b": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "starcoder": (*GPT2, "tokenizer.json", "generation_config.json"),
    "gpt2": ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    "Qwen2-VL-7B": (*FAST, "vocab.json", "merges.txt", "chat_template.json", "preprocessor_config.json"),
    "a fine-tuned Llama": (*SPM, "added_tokens.json", "tokenizer.json", "chat_template.jinja"),
}
WEIGHTS = ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "tf_model.h5", "training_args.bin", "rust.ot")


def fill(folder: Path, names: tuple[str, ...]) -> None:
    """Files that no code here could make up, and that would fail where something ran or parsed them."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        code = "raise SystemExit('ran')\n" if name.endswith(".py") else "{ not JSON \n"
        (folder / name).write_bytes(code.encode() + name.encode() + bytes([number, 0, 255, 10, 13]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """A tiny model with the given files and no others beside config.json and weights."""
    weights = make(tmp_path_factory.mktemp("model") / "hf", "llama", num_hidden_layers=1)
    kept = {
        name: content for name, content in contents(weights).items() if name in ("config.json", "model.safetensors")
    }

    def with_files(names: tuple[str, ...]) -> Path:
        made = tmp_path_factory.mktemp("published")
        for name, content in kept.items():
            (made / name).write_bytes(content)
        fill(made, names)
        return made

    return with_files


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_files_of_a_published_model_come_along(
    model: str, folder: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    source, core, back = folder(PUBLISHED[model]), tmp_path / "core", tmp_path / "back"
    assert convert(["--source", str(source), "--target", str(core)]) == 0
    assert convert(["--source", str(core), "--target", str(back)]) == 0
    assert contents(back) == contents(source)
    carried = contents(core / "release" / "hf")
    assert {name: carried.get(name) for name in PUBLISHED[model]} == {
        name: content for name, content in contents(source).items() if name in PUBLISHED[model]
    }


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_training_run_carries_them_on(model: str, tmp_path: Path) -> None:
    """Every checkpoint gets the tokenizer of the model, and its code where it has some."""
    kinds = (".json", ".model", ".tiktoken", "merges.txt", ".jinja")
    names = {name for name in PUBLISHED[model] if name.endswith(kinds)} - {"params.json"}
    code = (
        {name for name in PUBLISHED[model] if name.endswith(".py")}
        if "tokenization_" in str(PUBLISHED[model])
        else set()
    )
    for name in {*names, *code, "model.safetensors"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if code:
        (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.Own", null]}}')
    assert set(copy_tokenizer(tmp_path, tmp_path / "copy")) == names | code
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in names | code} == {
        name: (tmp_path / name).read_bytes() for name in names | code
    }


def test_weights_in_other_formats_stay_behind(folder: Callable[[tuple[str, ...]], Path], tmp_path: Path) -> None:
    source, core = folder((*FAST, *WEIGHTS)), tmp_path / "core"
    assert convert(["--source", str(source), "--target", str(core)]) == 0
    assert set(contents(core / "release" / "hf")) & {*FAST, *WEIGHTS} == set(FAST)


def test_conversion_needs_neither_transformers_nor_tokenizers(
    folder: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    code = (
        "import sys; from megapatch.tools.convert.convert import main; status = main(sys.argv[1:]);"
        "print(sorted({'transformers', 'tokenizers', 'sentencepiece'} & set(sys.modules)), status)"
    )
    argv = ["--source", str(folder(PUBLISHED["Qwen-7B"])), "--target", str(tmp_path / "core")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
