"""What families put around their embedding: dropout of its own, and rows of positions that come back whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import contents, make, weights
from safetensors.torch import save_file

from megapatch.models import device, hf_files, parallel
from megapatch.tools.convert.convert import main as convert


@pytest.fixture(scope="module", autouse=True)
def found() -> Iterator[device.Device]:
    """One process, all process groups."""
    found = device.start()
    parallel.start(parallel.Parallel(), found)
    yield found
    parallel.stop()


def built(folder: Path, found: device.Device) -> Any:
    from megapatch.models.build import ModelOptions, build
    from megapatch.models.load import load_weights, unwrapped

    hf = hf_files.config(folder)
    device.seed_everything(1, 0)
    chunks = build(hf, ModelOptions(parallel.Parallel(), found))
    load_weights(chunks, folder, hf)
    return unwrapped(chunks[0])


DROPOUT: dict[str, tuple[str, dict[str, Any], tuple[float, float, float]]] = {  # embedding, layers, attention
    "gpt2": ("gpt2", {"embd_pdrop": 0.3, "resid_pdrop": 0.2, "attn_pdrop": 0.1}, (0.3, 0.2, 0.1)),
    "starcoder2": (
        "starcoder2",
        {"embedding_dropout": 0.3, "residual_dropout": 0.2, "attention_dropout": 0.1},
        (0.3, 0.2, 0.1),
    ),
    "opt": ("opt", {"dropout": 0.2, "attention_dropout": 0.1}, (0.0, 0.2, 0.1)),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_where_transformers_has_it(name: str, tmp_path: Path, found: device.Device) -> None:
    family, changes, expected = DROPOUT[name]
    model = built(make(tmp_path / "hf", family, dtype=torch.float32, **changes), found)
    layer = model.decoder.layers[0]
    core_attention = layer.self_attention.core_attention
    assert (model.embedding.embedding_dropout.p, layer.hidden_dropout, core_attention.dropout) == expected


def test_config_json_that_does_not_say_has_the_dropout_of_transformers(tmp_path: Path, found: device.Device) -> None:
    folder = make(tmp_path / "hf", "gpt2", dtype=torch.float32)
    said = json.loads((folder / "config.json").read_text())
    left = {key: value for key, value in said.items() if not key.endswith("pdrop")}
    (folder / "config.json").write_text(json.dumps(left))
    model = built(folder, found)
    assert model.embedding.embedding_dropout.p == model.decoder.layers[0].hidden_dropout == 0.1


def test_positions_of_opt_start_at_the_third_row(tmp_path: Path, found: device.Device) -> None:
    folder = make(tmp_path / "hf", "opt", dtype=torch.float32)
    rows = weights(folder)["model.decoder.embed_positions.weight"]
    table = built(folder, found).embedding.position_embeddings
    assert table.weight.shape == rows.shape == (64 + 2, 32)
    assert torch.equal(table(torch.tensor([[0, 1, 63]])), rows[None, [2, 3, 65]])


BARE = {"gpt2": "transformer.", "bloom": "transformer.", "falcon": "transformer.", "opt": "model."}


@pytest.mark.parametrize("name", BARE)
def test_files_of_the_bare_model_with_their_buffers_are_those_of_the_whole_one(name: str, tmp_path: Path) -> None:
    """As the hub has GPT-2: no prefix, and the causal masks of each layer as tensors."""
    whole = make(tmp_path / "whole", name, dtype=torch.float32)
    bare = make(tmp_path / "bare", name, dtype=torch.float32)
    parts = {key.removeprefix(BARE[name]): value for key, value in weights(bare).items()}
    assert set(parts).isdisjoint(weights(whole))
    masks = {f"h.{n}.attn.{kind}": torch.ones(1, 1, 8, 8) for n in range(4) for kind in ("bias", "masked_bias")}
    save_file(parts | (masks if name == "gpt2" else {}), bare / "model.safetensors", {"format": "pt"})
    for folder in (whole, bare):
        assert convert(["--source", str(folder), "--target", f"{folder}-core"]) == 0
    cores = [contents(Path(f"{folder}-core")) for folder in (whole, bare)]
    assert {k: v for k, v in cores[0].items() if k.endswith(".distcp")} == {
        k: v for k, v in cores[1].items() if k.endswith(".distcp")
    }
