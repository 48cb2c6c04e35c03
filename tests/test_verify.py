"""mp-verify, layer by layer: the whole model's results, the fault that is there by name, and nothing else."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import FAMILIES, make, soften, weights
from safetensors.torch import load_file, save_file

from megapatch.models import device, hf_files, parallel
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.verify.verify import main as verify

Parts = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A Hugging Face folder in fp32 of a family's tiny model, made once; as many key heads as query heads."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "hf"
            made[name] = soften(make(folder, name, dtype=torch.float32, num_key_value_heads=4))
        return made[name]

    return model


def spoiled(folder: Path, target: Path, change: Callable[[Parts], None]) -> Path:
    """A copy of a folder with other weights, as a core checkpoint."""
    parts = weights(folder)
    change(parts)
    copy = target.with_name(target.name + "-hf")
    hf_files.copy_side_files(folder, copy)
    save_file(parts, copy / "model.safetensors", {"format": "pt"})
    assert convert(["--source", str(copy), "--target", str(target)]) == 0
    return target


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Exit status, the JSON line and stderr of mp-verify."""
    capsys.readouterr()
    status = verify([*map(str, arguments), "--tokens", "96"])
    told = capsys.readouterr()
    return status, json.loads(told.out) if told.out else None, told.err


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_filled_layer_by_layer_computes_what_the_whole_model_does(name: str, models: Any) -> None:
    found = device.start()
    from megapatch.tools.verify.sides import Sides
    from megapatch.tools.verify.stream import Pass

    try:
        parallel.start(parallel.Parallel(), found)
        for engine in ("auto", "core"):
            sides = Sides(models(name), models(name), engine, found)
            ids = sides.tokens(96, 0)  # two rows of 64
            made = sides.engine(0, ids, "fp32")
            with Pass(made) as run:
                steps = iter(run.next, None)
                units = [step.unit for step in steps]
            assert units == ["embedding.word_embeddings", 0, 1, 2, 3, "decoder.final_layernorm", "output_layer"]
            assert torch.equal(made.logits, sides.whole_logits(0, ids))
            assert all(parameter.is_meta for parameter in made.model.parameters())
    finally:
        parallel.stop()


def swap(a: str, b: str) -> Callable[[Parts], None]:
    return lambda parts: parts.update({a: parts[b], b: parts[a]})


def scale(name: str, by: float = 1.01) -> Callable[[Parts], None]:
    return lambda parts: parts.update({name: parts[name] * by})


def roll(name: str, rows: int) -> Callable[[Parts], None]:
    return lambda parts: parts.update({name: parts[name].roll(rows, 0)})


LAYER = "model.layers.2."
QKV = "self_attention.linear_qkv"
FAULTS: dict[str, tuple[str, Callable[[Parts], None], int | None, str]] = {
    "q and k exchanged": (
        "llama",
        swap(LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight"),
        2,
        f"{QKV} (q_proj)",
    ),
    "heads of q in another order": ("qwen3", roll(LAYER + "self_attn.q_proj.weight", 16), 2, f"{QKV} (q_proj)"),
    "k": ("llama", scale("model.layers.0.self_attn.k_proj.weight"), 0, f"{QKV} (k_proj)"),
    "bias of v": ("qwen2", scale(LAYER + "self_attn.v_proj.bias"), 2, f"{QKV} (v_proj)"),
    "norm of q": ("qwen3", scale(LAYER + "self_attn.q_norm.weight"), 2, "self_attention.q_layernorm"),
    "input norm": ("qwen2", scale(LAYER + "input_layernorm.weight"), 2, "input_layernorm"),
    "projection": ("llama", scale("model.layers.3.self_attn.o_proj.weight"), 3, "self_attention.linear_proj"),
    "second norm": ("llama", scale(LAYER + "post_attention_layernorm.weight"), 2, "pre_mlp_layernorm"),
    "gate and up exchanged": (
        "llama",
        swap(LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        2,
        "mlp.linear_fc1 (gate_proj)",
    ),
    "up": ("qwen3", scale(LAYER + "mlp.up_proj.weight"), 2, "mlp.linear_fc1 (up_proj)"),
    "down": ("llama", scale("model.layers.1.mlp.down_proj.weight"), 1, "mlp.linear_fc2"),
    "experts in another order": (
        "mixtral",
        roll(LAYER + "block_sparse_moe.gate.weight", 1),
        2,
        "mlp.router (choice)",
    ),
    "one expert": ("qwen3_moe", scale(LAYER + "mlp.experts.3.down_proj.weight"), 2, "mlp"),
    "embedding": ("qwen2", scale("model.embed_tokens.weight"), None, "embedding.word_embeddings"),
    "positions": ("gpt2", scale("transformer.wpe.weight"), None, "embedding"),
    "final norm": ("qwen2", scale("model.norm.weight"), None, "decoder.final_layernorm"),
    "a layer that keeps its residual inside": (
        "bloom",
        scale("transformer.h.2.mlp.dense_4h_to_h.weight"),
        2,
        "mlp.linear_fc2",
    ),
    "fused weights of q, k and v": ("gpt2", scale("transformer.h.1.mlp.c_proj.weight"), 1, "mlp.linear_fc2"),
    "fused q": ("gpt2", scale("transformer.h.3.attn.c_attn.weight"), 3, QKV),
    "output layer": ("qwen2", scale("lm_head.weight"), None, "output_layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_departure_is_the_fault(
    fault: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, layer, submodule = FAULTS[fault]
    target = spoiled(models(name), tmp_path / "core", change)
    status, result, told = run(capsys, "--source", models(name), "--target", target, "--atol", "1e-5")
    first = result["first_departure"]
    assert (status, result["ok"], result["compared"]) == (1, False, "layers")
    assert (first["layer"], first["submodule"]) == (layer, submodule)
    assert first["max_abs_diff"] > 1e-5
    assert f"first departure: {'' if layer is None else f'layer {layer}, '}{submodule}" in told
    assert first.get("experts") == ([3] if fault == "one expert" else None)  # found by the tokens that went there


def test_a_faithful_conversion_departs_nowhere(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = spoiled(models("qwen3_moe"), tmp_path / "core", lambda parts: None)
    for sides in (("--source", models("qwen3_moe"), "--target", target), ("--source", target, "--target", target)):
        status, result, _ = run(capsys, *sides, "--atol", "1e-5", "--details", tmp_path / "rows.jsonl")
        assert (status, result["first_departure"]) == (0, None)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["chained"]["max_abs_diff"] for row in rows] == [0.0] * 7  # a checkpoint against itself
    assert {"mlp", "mlp.router (choice)", f"{QKV} (v_proj)", "self_attention.query"} <= rows[1]["points"].keys()


@pytest.mark.parametrize("engine", ["auto", "core"])
def test_two_hugging_face_folders_are_compared_on_either_engine(
    engine: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(models("llama"), tmp_path / "core", scale(LAYER + "mlp.gate_proj.weight"))
    both = ("--source", models("llama"), "--target", tmp_path / "core-hf", "--engine", engine)
    _, result, _ = run(capsys, *both)
    first = result["first_departure"]
    assert (first["layer"], first["submodule"]) == (2, "mlp.linear_fc1 (gate_proj)")


def test_differences_that_only_add_up_are_said_to(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, rows = spoiled(models("mixtral"), tmp_path / "core", lambda parts: None), tmp_path / "rows.jsonl"
    sides = ("--source", models("mixtral"), "--target", target)
    _, result, _ = run(capsys, *sides, "--details", rows)
    units = [json.loads(line) for line in rows.read_text().splitlines()]
    found = {kind: [row[kind] for row in units] for kind in ("isolated", "chained")}
    alone, chained = (max(f["max_abs_diff"] / max(1, f["max_abs"]) for f in kind) for kind in found.values())
    assert alone < chained
    atol = (alone + min(chained, result["max_abs_diff"])) / 2
    status, result, told = run(capsys, *sides, "--atol", atol)
    assert status == 1
    assert result["first_departure"]["how"] == "differences of earlier layers add up"
    assert "add up" in told


SETTINGS = {
    "another number of layers": ({"num_hidden_layers": 3}, "num_layers differs from"),
    "another head size": ({"head_dim": 8}, "kv_channels differs from"),
}


@pytest.mark.parametrize("changed", SETTINGS)
def test_models_of_other_sizes_are_not_compared(
    changed: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = SETTINGS[changed]
    other = make(tmp_path / "other", "qwen3", num_key_value_heads=4, **changes)
    status, result, told = run(capsys, "--source", models("qwen3"), "--target", other)
    assert (status, result) == (1, None)
    assert message in told and "not the same model" in told


def test_models_of_other_families_are_not_compared(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, told = run(capsys, "--source", models("llama"), "--target", models("qwen2"))
    assert status == 1
    assert "model_type differs from" in told


def test_a_checkpoint_that_does_not_fit_its_config_is_named(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = spoiled(models("llama"), tmp_path / "core", lambda parts: None)
    path = target / "release" / "hf" / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    status, _, told = run(capsys, "--source", target, "--target", target)
    assert status == 1
    assert "mlp.linear_fc1.weight: shape" in told


def test_where_layers_cannot_be_told_apart_only_logits_are_compared_and_it_is_said(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megapatch.tools.verify import by_transformers

    def unlike(*_: object) -> None:
        raise by_transformers.Unlike("no list of layers")

    monkeypatch.setattr(by_transformers, "HfNames", unlike)
    both = ("--source", models("llama"), "--target", models("llama"))
    status, result, told = run(capsys, *both)
    assert (status, result["compared"], result["max_abs_diff"]) == (0, "logits", 0.0)
    assert "ONLY THE LOGITS ARE COMPARED, not layer by layer: no list of layers" in told
    for more in (("--plot", tmp_path / "a.svg"), ("--precision", "bf16")):
        status, result, told = run(capsys, *both, *more)
        assert (status, result) == (1, None)
        assert "mp-verify: error: " in told and "no list of layers" in told


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_hugging_face_order_of_rounding_gives_its_bf16(
    name: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, rows, plot = spoiled(models(name), tmp_path / "core", lambda p: None), tmp_path / "r", tmp_path / "p.svg"
    study = ("--precision", "bf16", "--align", "hf", "--details", rows, "--plot", plot)
    status, result, told = run(capsys, "--source", models(name), "--target", target, *study)
    assert status == 0
    assert 0 < result["error_target"] < 0.1 and result["worst_ratio"] < 1.25 and result["noise_floor"] > 0
    found: dict[str, list[float]] = {}
    for row in map(json.loads, rows.read_text().splitlines()):
        if "stream" in row:
            found.setdefault(row["stream"], []).append(row["from_reference"])
    aligned = found.pop("hf order")
    assert aligned == [0.0] * 6  # four layers, the norm, the logits: bit for bit
    norms = {f"RMSNorm: {way}" for way in ("weight before the cast", "statistics in bf16", "eps outside the root")}
    rotary = {"rotary: rotation in fp32", "rotary: frequencies in bf16"}
    bias = {"linear: bias after the rounding", "chained"} if name == "qwen2" else set()
    changed = norms | rotary | bias | {"SwiGLU: rounded once (fused)"}
    assert {stream for stream, values in found.items() if min(values) > 1e-3} == changed
    assert all(f"mp-verify: {stream} " in told for stream in found if stream != "chained")
    drawing = ET.fromstring(plot.read_text())
    lines = [e for e in drawing.iter() if e.tag.endswith("path") and e.get("class", "").startswith("line")]
    assert len(lines) == 2 * (len(found) + 3)  # curve and legend: the ways, hf order, the reference, its noise
    assert "http" not in plot.read_text().replace("http://www.w3.org/2000/svg", "")


def test_an_error_beyond_the_references_own_fails_in_bf16(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = spoiled(models("llama"), tmp_path / "core", scale(LAYER + "mlp.down_proj.weight", 1.1))
    status, result, _ = run(capsys, "--source", models("llama"), "--target", target, "--precision", "bf16")
    assert (status, result["ok"]) == (1, False)
    assert result["worst_ratio"] > 1.25 and result["worst_unit"] not in (0, 1)


def test_sources_of_rounding_need_both_engines_and_bf16(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--source", str(models("llama")), "--target", str(models("llama")))
    with pytest.raises(SystemExit) as stopped:
        verify([*both, "--align", "hf"])
    assert stopped.value.code == 2
    status, _, told = run(capsys, *both, "--align", "hf", "--precision", "bf16")
    assert status == 1
    assert "compares megatron-core with transformers" in told


PEAK = """
import sys
from megapatch.tools.verify.verify import main
status = main(["--source", sys.argv[1], "--target", sys.argv[2], "--tokens", "16"])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # of this program: rusage counts
print(1024 * int(peak.split()[1]))                                                   # what its parent had held, too
raise SystemExit(status)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    layer_bytes = 4 * (4 * 1024**2 + 3 * 1024 * 4096)  # in fp32
    peaks = {}
    for layers in (8, 16):
        folder, core = tmp_path / f"hf{layers}", tmp_path / f"core{layers}"
        make(folder, "llama", shards="100MB", num_hidden_layers=layers, **sizes)
        parts = {path: load_file(path) for path in folder.glob("*.safetensors")}
        for path, tensors in parts.items():
            softer = {n: t * 0.03 + ("norm" in n) for n, t in tensors.items()}
            save_file(softer, path, {"format": "pt"})
        assert convert(["--source", str(folder), "--target", str(core)]) == 0
        for source, target in ((folder, core), (core, core)):
            command = [sys.executable, "-c", PEAK, str(source), str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            peaks[layers, source == core] = int(done.stdout.splitlines()[-1])
    if request.config.getoption("capture") == "no":
        print({key: f"{peak / 1e6:.0f} MB" for key, peak in peaks.items()}, f"a layer: {layer_bytes / 1e6:.0f} MB")
    for on_core in (False, True):
        assert abs(peaks[16, on_core] - peaks[8, on_core]) < layer_bytes  # eight more layers
