"""The attention backend and its reason; what only Transformer Engine has is refused where it is not."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megapatch.models import device

FOUND = device.start("cpu")  # before megatron-core is imported

from megatron.core.transformer import TransformerConfig  # noqa: E402

from megapatch.models.cli import UserError, parser  # noqa: E402
from megapatch.models.layers import backends  # noqa: E402
from megapatch.models.layers.attention import SdpaAttention  # noqa: E402
from megapatch.trainer import session  # noqa: E402
from megapatch.trainer.layout import overlap  # noqa: E402
from megapatch.trainer.options import PretrainOptions  # noqa: E402


class Layer(SdpaAttention):
    """An attention layer without its groups."""

    def __init__(self, flash: object = None) -> None:
        torch.nn.Module.__init__(self)
        self.flash = flash


def config(**fields: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, attention_dropout=0.0, **fields)


ENGINE = dataclasses.replace(FOUND, transformer_engine=True)


@pytest.mark.parametrize(
    ("found", "layers", "fields", "name", "reason", "fused"),
    [
        (ENGINE, [], {}, "Transformer Engine", "its package is installed", True),
        (ENGINE, [Layer()], {}, "PyTorch SDPA, flash kernel", "layers of this run are not Transformer Engine's", True),
        (FOUND, [Layer(print)], {}, "flash-attn", "no Transformer Engine (this runs on a CPU)", True),
        (FOUND, [Layer()], {}, "PyTorch SDPA, flash kernel", "no Transformer Engine (this runs on a CPU)", True),
        (FOUND, [Layer()], {"num_query_groups": 2}, "PyTorch SDPA, flash kernel", "", True),
    ],
)
def test_the_first_backend_that_serves_is_chosen_with_its_reason(
    found: device.Device, layers: list, fields: dict, name: str, reason: str, fused: bool
) -> None:
    choice = backends.choose(config(**fields), [torch.nn.ModuleList(layers)], found)
    assert (choice.name, choice.fused) == (name, fused)
    assert reason in choice.reason


def test_an_unfused_kernel_is_named_with_its_cause() -> None:
    given = config()
    given.attention_dropout = 0.1
    choice = backends.choose(given, [torch.nn.ModuleList([Layer()])], FOUND)
    assert not choice.fused
    assert choice.name == "PyTorch SDPA, unfused (math)"
    assert choice.reason.endswith("PyTorch has no fused kernel here with attention dropout")


@pytest.mark.parametrize(
    ("fused", "level", "said"), [(True, "INFO", "attention: NAME (WHY)"), (False, "WARNING", "scores")]
)
def test_the_backend_is_told_once_and_an_unfused_one_is_warned_of(
    fused: bool, level: str, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        session._tell_attention(backends.Choice("NAME", "WHY", fused))
    (record,) = caplog.records
    assert record.levelname == level and said in record.getMessage()


def options(words: str) -> PretrainOptions:
    given = f"--init-from c --save s --data-path d --train-iters 1 {words}".split()
    return parser(PretrainOptions, prog="mp-pretrain").parse_args(given)


@pytest.mark.parametrize(
    ("words", "method", "text"),
    [
        ("--precision bf16 --fp8 hybrid", "fp8_config", "--fp8 hybrid: only Transformer Engine multiplies in FP8, and"),
        ("--tp 2 --sequence-parallel --tp-comm-overlap", "overlap_config", "--tp-comm-overlap: only Transformer"),
    ],
)
def test_what_only_transformer_engine_has_is_refused_without_it(words: str, method: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        getattr(options(words), method)(engine=False, why_not=FOUND.no_engine)
    assert str(error.value).startswith(text) and str(error.value).endswith("this runs on a CPU")


def test_fp8_is_what_megatron_core_calls_it() -> None:
    given = options("--precision bf16 --fp8 e4m3 --fp8-recipe blockwise")
    assert given.fp8_config(engine=True, why_not="") == {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    assert options("").fp8_config(engine=False, why_not="") == {}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--fp8 hybrid", "--fp8 hybrid needs --precision bf16"),
        ("--fp8-recipe mxfp8", "--fp8-recipe needs --fp8"),
        ("--ddp-bucket-size 1000", "--ddp-bucket-size needs --overlap-grad-reduce"),
        ("--overlap-grad-reduce --ddp-bucket-size 0", "must be at least 1"),
        ("--tp 2 --tp-comm-overlap", "--tp-comm-overlap needs --tp above 1 and --sequence-parallel"),
        ("--overlap-param-gather", "needs --use-distributed-optimizer"),
    ],
)
def test_options_without_effect_are_refused(words: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        options(words)


@pytest.mark.parametrize(
    ("layout", "count"), [({}, 8), ({"tp": 2}, 1), ({"cp": 2}, 1), ({"ep": 2}, 32), ({"tp": 2, "ep": 2}, 1)]
)
def test_queues_to_the_device_follow_from_the_layout(monkeypatch: pytest.MonkeyPatch, layout: dict, count: int) -> None:
    found, why = overlap.connections(SimpleNamespace(**{"tp": 1, "cp": 1, "ep": 1} | layout))
    assert found == count and why
    monkeypatch.delenv(device.CONNECTIONS, raising=False)
    assert device.set_connections(found) == f"{device.CONNECTIONS}={count}"
    assert device.set_connections(99) == f"{device.CONNECTIONS}={count} as the environment says, not 99"
    monkeypatch.delenv(device.CONNECTIONS)
