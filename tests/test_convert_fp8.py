"""mp-convert: FP8 sources with block scales, as DeepSeek-V3 has them, against torch's own arithmetic."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import make, weights
from safetensors.torch import save_file

from megapatch.tools.convert.convert import main

BLOCK = 128
SIZES = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2}  # no multiples of a block
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(source: Path, target: Path, *more: str) -> Path:
    """Run mp-convert, which must succeed."""
    assert main(["--source", str(source), "--target", str(target), *more]) == 0
    return target


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks [rows, columns] -> one for each item of ``shape``."""
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def quantised(folder: Path, family: str = "qwen2") -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder whose linear weights are FP8 with scales, and what they stand for in fp32."""
    make(folder, family, **SIZES)
    meant, stored = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights(folder).items():
        if tensor.dim() == 2 and "layers" in name:
            grid = [-(-size // BLOCK) for size in tensor.shape]
            scales = torch.rand(grid, generator=generator) + 0.01
            stored[name] = (tensor.float() / spread(scales, tensor.shape)).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scales
            meant[name] = stored[name].float() * spread(scales, tensor.shape)
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder, meant


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    return quantised(tmp_path_factory.mktemp("fp8") / "hf")


def same(folder: Path, meant: dict[str, torch.Tensor], kind: torch.dtype) -> None:
    found = weights(folder)
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert found[name].dtype == kind and torch.equal(found[name], tensor.to(kind)), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [[], ["core"], ["legacy", "--tp", "2"], ["legacy", "--tp", "2", "--spec", "local"]])
def test_what_the_values_stand_for_arrives_by_every_way(way, dtype, source, tmp_path):
    folder, meant = source
    if not way:
        same(convert(folder, tmp_path / "hf", "--to", "hf", "--dtype", dtype), meant, DTYPES[dtype])
        return
    between = convert(folder, tmp_path / "between", "--to", *way, "--dtype", dtype)
    same(convert(between, tmp_path / "hf"), meant, DTYPES[dtype])


def test_without_dtype_only_what_is_fp8_becomes_bf16(tmp_path):
    folder, meant = quantised(tmp_path / "hf")
    parts = weights(folder)
    norms = {name: tensor.float() for name, tensor in parts.items() if "norm" in name}
    save_file(parts | norms, folder / "model.safetensors")
    found = weights(convert(convert(folder, tmp_path / "core"), tmp_path / "back"))
    for name, tensor in meant.items():
        kind = torch.float32 if name in norms else torch.bfloat16
        assert found[name].dtype == kind and torch.equal(found[name], tensor.to(kind))


def changed(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, name: str) -> None:
    save_file({key: tensor for key, tensor in weights(folder).items() if key != name}, folder / "model.safetensors")


def replaced(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(weights(folder) | {name: tensor}, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scale": (lambda f: without(f, Q + "_scale_inv"), f"{Q}: float8_e4m3fn, but no {Q}_scale_inv"),
    "wrong grid": (
        lambda f: replaced(f, Q + "_scale_inv", torch.ones(1, 2)),
        f"{Q}_scale_inv: float32 [1, 2] in model.safetensors; expected float32 [2, 2]",
    ),
    "scale of another type": (lambda f: replaced(f, Q + "_scale_inv", torch.ones(2, 2).half()), "expected float32 [2,"),
    "scale of a plain weight": (
        lambda f: replaced(f, Q, torch.ones(160, 160).bfloat16()),
        f"{Q}_scale_inv: scales of {Q}, which is bfloat16; expected float8_e4m3fn",
    ),
    "a scale of nothing": (lambda f: replaced(f, "model.x.weight_scale_inv", torch.ones(1, 1)), "model.x.weight_scale"),
    "another method": (
        lambda f: changed(f, quantization_config={"quant_method": "awq"}),
        "quantization_config 'awq' with weight_block_size None; supported: fp8 (e4m3) in blocks",
    ),
    "no blocks": (
        lambda f: changed(f, quantization_config={"quant_method": "fp8"}),
        "quantization_config 'fp8' with weight_block_size None",
    ),
    "not said": (lambda f: changed(f, quantization_config=None), "but no quantization_config in config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_contradicts_itself_is_told_in_one_line(case, tmp_path, capsys):
    damage, said = BAD[case]
    folder, _ = quantised(tmp_path / "hf")
    damage(folder)
    capsys.readouterr()
    assert main(["--source", str(folder), "--target", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_fp8_is_not_kept(source, tmp_path, capsys):
    assert main(["--source", str(source[0]), "--target", str(tmp_path / "out"), "--dtype", "keep"]) == 1
    assert "FP8 with block scales, which no target stores; choose --dtype bf16" in capsys.readouterr().err
