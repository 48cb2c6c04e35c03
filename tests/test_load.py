"""A Hugging Face folder that does not fit its config.json is refused, with the tensor's name, when loaded directly."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import make, weights
from safetensors.torch import save_file

from megapatch.tools.verify.verify import main as verify

UP = "model.layers.1.mlp.up_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    parts = weights(folder)
    change(parts)
    save_file(parts, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(UP)), (UP, "missing")),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)})),
        ("o_proj.bias", "no rule"),
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({UP: t[UP][:, :-1].contiguous()})),
        (UP, "[64, 31]", "[64, 32] by config.json"),
    ),
    "truncated file": (truncate, ("model.safetensors", "cut short")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no .safetensors file", "save_pretrained")),
    "other sizes in config.json": (lambda f: reconfigure(f, intermediate_size=48), ("shape", "config.json")),
    "unsupported setting": (lambda f: reconfigure(f, attention_bias=True), ("attention_bias", "False only")),
    "unknown type": (lambda f: reconfigure(f, model_type="mamba"), ("model_type 'mamba'", "supported: baichuan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "hf", "qwen3", dtype=torch.float32)
    spoil, words = FAULTS[fault]
    spoil(folder)
    capsys.readouterr()
    status = verify(["--source", str(folder), "--target", str(folder), "--engine", "core"])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mp-verify: error:")]
    assert status == 1
    assert len(told) == 1
    assert all(word in told[0] for word in words), told[0]


def test_models_that_differ_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (make(tmp_path / name, "qwen3", dtype=torch.float32) for name in ("a", "ü"))
    rewrite(second, lambda t: t[UP].mul_(1.01))
    capsys.readouterr()
    status = verify(["--source", str(first), "--target", str(second), "--tokens", "32"])
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert status == 1
    assert "ü are equal" in told.out and "Loading" not in told.err  # bars of transformers are for terminals
    assert result["ok"] is False
    assert result["max_abs_diff"] > 1e-4


def test_models_of_different_vocabularies_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (make(tmp_path / str(size), "qwen3", vocab_size=size) for size in (96, 97))
    assert verify(["--source", str(first), "--target", str(second)]) == 1
    assert "vocab_size differs" in capsys.readouterr().err
