"""Patches are refused when upstream changed; torch is redirected for megatron-core and for nobody else."""

import sys
from types import ModuleType

import pytest
import torch

from megapatch.models import cli, device
from megapatch.models.patches import Patch, source_hash


def upstream(x: int) -> int:
    return x + 1


def ours(x: int) -> int:
    return x + 2


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("somewhere_upstream")
    module.Owner = type("Owner", (), {"method": staticmethod(upstream)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere_upstream", module)
    return "somewhere_upstream:Owner.method"


def test_a_patch_replaces_the_source_it_was_written_for(target: str) -> None:
    patch = Patch(target, ours, source_hash(upstream), "why")
    patch.apply()
    patch.apply()  # again is harmless
    owner, name = patch.upstream.owner()
    assert getattr(owner, name)(1) == 3


def test_a_changed_upstream_is_refused_by_name_and_left_alone(target: str) -> None:
    patch = Patch(target, ours, "0" * 12, "because of this")
    with pytest.raises(cli.UserError, match=r"somewhere_upstream:Owner.method: changed upstream .*because of this"):
        patch.apply()
    owner, name = patch.upstream.owner()
    assert getattr(owner, name)(1) == 2


def test_a_checkpoint_is_not_written_by_an_upstream_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    device.start()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megapatch.trainer.saving import writing

    assert writing.one_file() is FileSystemWriterAsync.write_preloaded_data.__wrapped__
    for name in ("write_preloaded_data", "get_save_function_and_args"):
        with monkeypatch.context() as changed:
            changed.setattr(FileSystemWriterAsync, name, ours)
            writing.one_file.cache_clear()
            with pytest.raises(cli.UserError, match=rf"FileSystemWriterAsync\.{name}: changed upstream"):
                writing.one_file()
    writing.one_file.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirection is for machines without a GPU")
def test_only_megatron_core_sees_a_redirected_torch() -> None:
    device.start()
    import megatron.core.parallel_state as core
    import transformers.modeling_utils as others

    assert core.torch.cuda.current_device() == torch.device("cpu")
    assert core.torch.zeros(2, device="cuda:0").device == torch.device("cpu")
    assert core.torch.nn is torch.nn
    assert others.torch is torch
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirection is for machines without a GPU")
def test_transformers_loads_the_same_model_after_the_redirection(tmp_path: str) -> None:
    """Its rotary buffers are computed while tensors are on the meta device; a redirected torch.arange broke that."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megapatch.models import family

    device.start()
    config = AutoConfig.for_model("qwen3", **dict(family.known()["qwen3"].tiny))
    made = AutoModelForCausalLM.from_config(config).eval()
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, loaded(ids).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(cli.UserError, match="--device gpu: torch sees no GPU"):
        device.start("gpu")
