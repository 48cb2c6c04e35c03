"""One process with all of megatron-core's groups, and our models of Hugging Face folders in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megapatch.models import device, parallel


@pytest.fixture(scope="module", name="found")
def one_process() -> Iterator[device.Device]:
    """The device; the groups end with the tests of the file."""
    found = device.start()
    parallel.start(parallel.Parallel(), found)
    yield found
    parallel.stop()


def loaded(folder: Path, found: device.Device) -> list[torch.nn.Module]:
    """Our model with a folder's weights."""
    from megapatch.models.build import ModelOptions, build
    from megapatch.models.load import load_hf

    hf = json.loads((folder / "config.json").read_text())
    device.seed_everything(1, 0)
    chunks = build(hf, ModelOptions(parallel.Parallel(), found))
    load_hf(chunks, folder, hf)
    return chunks
