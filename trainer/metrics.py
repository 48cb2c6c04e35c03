"""How much work a step is, and where the numbers go: JSON lines always, TensorBoard and W&B when asked."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megapatch.models import commit
from megapatch.models.cli import UserError


def flops_per_token(config: TransformerConfig, vocab_size: int, seq_length: int, moe_layers: int) -> float:
    """Model FLOPs per trained token: forward and backward (3x), matrix products only, causal attention counted half.

    Counts what the model needs, not what is recomputed. A multiply-add is 2 FLOPs.
    """
    h = config.hidden_size
    matrices = 3 if config.gated_linear_unit else 2
    dense = matrices * h * config.ffn_hidden_size
    active = (config.moe_ffn_hidden_size or 0) * config.moe_router_topk  # feed-forward width that a token meets
    active += config.moe_shared_expert_intermediate_size or 0
    gates = (config.num_moe_experts or 0) + int(config.moe_shared_expert_gate)
    experts = h * gates + matrices * h * active
    attention = _attention(config, seq_length)
    layers = config.num_layers * attention + (config.num_layers - moe_layers) * dense + moe_layers * experts
    further = 2 * h * h + attention + (experts if moe_layers else dense) + h * vocab_size  # predicts a later token
    return 3 * 2 * (layers + h * vocab_size + (config.mtp_num_layers or 0) * further)


def _attention(config: TransformerConfig, seq_length: int) -> float:
    """Multiply-adds of one attention layer for a token, which sees half of the sequence on average."""
    h, heads, groups, size = config.hidden_size, config.num_attention_heads, config.num_query_groups, config.kv_channels
    if not isinstance(config, MLATransformerConfig):
        return 2 * h * size * (heads + groups) + heads * size * seq_length  # q k^T and scores v
    value, latent, rank = config.v_head_dim, config.kv_lora_rank, config.q_lora_rank
    query = h * heads * size if rank is None else rank * (h + heads * size)
    keys = h * (latent + config.qk_pos_emb_head_dim) + latent * heads * (config.qk_head_dim + value)
    return query + keys + h * heads * value + heads * (size + value) * seq_length / 2


class Sink(Protocol):
    """Somewhere that log records go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """No more records."""


class JsonLines:
    """Appends one JSON object per record, whole lines only; NaN is written as null."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self.path, self.file = path, path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with commit.naming_full_disks(self.path):
            self.file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        self.file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed run left of its last line."""
    if path.exists():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with path.open("r+b") as file:
                file.truncate(end)


class TensorBoard:
    """Scalars for TensorBoard, by step."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs TensorBoard: pip install 'megapatch[tb]'") from error
        self.writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(f"{record['event']}/{name}", value, record["step"])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


class WeightsAndBiases:
    """Scalars for Weights & Biases, by step."""

    def __init__(self, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs Weights & Biases: pip install 'megapatch[wandb]'") from error
        self.run = wandb.init(project=project, config=dict(config))

    def write(self, record: Mapping[str, Any]) -> None:
        scalars = {f"{record['event']}/{name}": value for name, value in _scalars(record).items()}
        if scalars:
            self.run.log(scalars, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    if record.get("event") not in ("train", "eval"):
        return {}
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "ts")}


class Log:
    """Sends records to every sink, with the time added; on ranks that do not log there are no sinks."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def write(self, event: str, **fields: Any) -> None:
        """Record one event: start, train, eval, save, resume or end."""
        for sink in self.sinks:
            sink.write({"event": event, "ts": time.time(), **fields})

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()
