"""What a run is expected to hold on each rank: weights, gradients, optimizer, activations. Imports no torch.

Weights, gradients and optimizer state follow from the number of parameters of the rank, for each of which there are

    weight          4 bytes in fp32, 2 in bf16
    gradient        4 (gradients are summed in fp32)
    AdamW           8 for two moments, 4 more for the master weight in bf16; with --use-distributed-optimizer divided
                    by the data-parallel ranks (x --cp; for experts by those that hold the same ones); without the
                    share that --offload-optimizer keeps in host memory

which is "optimizer state partitioning" of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1) beside
mixed-precision Adam (section 3.1). Activations are what autograd keeps of one micro-batch, after Korthikanti et al.
2022 (arXiv 2205.05198, section 4), counted anew for the layers here: RMSNorm, grouped or latent attention that never
keeps the scores, gated feed-forward, experts; and as many micro-batches in flight as a pipeline stage has (section 2.2
of Narayanan et al. 2021, arXiv 2104.04473). Not in it: the libraries' own memory, buffers of communication, and what
an operator holds only while it runs; MARGIN leaves room for them. Measured on a CPU with Qwen3 of 34 M and 132 M
parameters, in fp32 and bf16: the estimate is 0.97 to 0.99 of what tensors take at the peak
(tests/test_memory_estimate.py), and 0.71 to 0.78 of what the process grows by: libraries and the allocator hold more.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megapatch.models.cuts import padded_vocabulary
from megapatch.models.planning.stages import GRADIENT, MASTER, MOMENTS, POOL, UNDER_WAY, WIDTH
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.sizes.shares import Share, stage_layers

MARGIN = 0.9  # of a device's memory that an estimate may fill
MODULE_PARTS = {  # of --offload-activation-modules: parts of a layer
    "core_attn": ("core_attn", "mla_up_proj"),
    "attention": ("attention", "core_attn", "mla_up_proj"),
    "mlp": ("mlp", "moe", "shared_experts"),
}
FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank: of its device, and of host memory for what is offloaded."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of the device's together."""
        return sum(asdict(self).values()) - self.host_bytes


def estimate(
    activations: "Activations",
    shares: Sequence[Share],
    trained: Sequence[Share],
    vocabulary: int,
    world: int,
    count: int,
) -> list[Estimate]:
    """What a rank of each pipeline stage holds.

    ``shares`` of each stage, and ``trained`` of them, or of adapters beside them; ``count`` micro-batches a step.
    """
    options, padded = activations.options, padded_vocabulary(vocabulary, 1, activations.options.tp)
    beside = [Share(0, 0) if held == part else part for held, part in zip(shares, trained, strict=True)]
    return [
        Estimate(
            (held.total + beside[stage].total) * WIDTH[options.precision],
            trained[stage].total * GRADIENT,
            optimizer_bytes(options, trained[stage], world),
            activations.of_stage(stage, count, padded),
            host_bytes(activations, trained[stage], world, stage, count),
        )
        for stage, held in enumerate(shares)
    ]


def optimizer_bytes(options: TrainOptions, part: Share, world: int) -> int:
    """Moments and master weights of a rank on its device."""
    here = (1 - options.least_offloaded) * (MOMENTS + MASTER[options.precision])
    return round(updated(options, part, world) * here) + options.streamed_bytes(part.total)


def updated(options: TrainOptions, part: Share, world: int) -> float:
    """Parameters of a rank whose state is its own."""
    dense, experts = 1, 1  # ranks that share
    if options.use_distributed_optimizer:
        stage = world // options.pp
        dense, experts = stage // options.tp, stage // (options.expert_tp * options.ep)
    return part.dense / dense + part.experts / experts


def host_bytes(activations: "Activations", part: Share, world: int, stage: int, count: int) -> int:
    """Of a rank for its share of the optimizer's state, masters counted, and for activations; not what is staged."""
    options = activations.options
    state = updated(options, part, world) * options.least_offloaded * (MOMENTS + FLOAT)
    return round(state + (1 + POOL) * activations.away(stage) * in_flight(options, stage, count))


@dataclass(frozen=True)
class Activations:
    """What autograd keeps. ``sizes`` from flops.sizes_of."""

    options: TrainOptions
    sizes: Any

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one rank, inside layers that tensor parallelism cuts."""
        return self.options.seq_length // self.options.cp * self.options.micro_batch_size

    @property
    def own(self) -> float:
        """Tokens between those layers."""
        return self.tokens / (self.options.tp if self.options.sequence_parallel else 1)

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return WIDTH[self.options.precision]

    def parts(self, layer: int) -> dict[str, float]:
        """Bytes kept of one layer and micro-batch, by the part that recomputation may drop."""
        sizes, tp = self.sizes, self.options.tp
        stream = 2 * self.own * sizes.hidden_size * self.width  # both residual sums; both norms' outputs
        parts = {"input": stream, "layernorm": stream} | self._attention()
        inner = 3 if sizes.gated_linear_unit else 2  # what enters the activation, and what comes out
        if not self._mixture(layer):
            return parts | {"mlp": self.tokens * inner * sizes.ffn_hidden_size / tp * self.width}
        chosen = self.own * sizes.moe_router_topk * self.options.expert_tp  # tokens x experts that this rank computes
        hidden = inner * sizes.moe_ffn_hidden_size / self.options.expert_tp
        routing = 3 * self.own * sizes.num_moe_experts * FLOAT
        shared = inner * (sizes.moe_shared_expert_intermediate_size or 0) / tp
        parts["moe"] = chosen * (2 * sizes.hidden_size + hidden) * self.width + routing
        return parts | {"shared_experts": self.tokens * shared * self.width}

    def _attention(self) -> dict[str, float]:
        sizes, tp = self.sizes, self.options.tp
        heads = sizes.num_attention_heads
        if not sizes.multi_latent_attention:
            q, k = heads * sizes.kv_channels, sizes.num_query_groups * sizes.kv_channels
            normed = q + k if sizes.qk_layernorm else 0
            # q, k and v; q and k rotated; the output
            core = 2 * (q + k)  # what enters the product, and the output
            return {
                "attention": self.tokens * (3 * (q + k) + normed - core) / tp * self.width,
                "core_attn": self.tokens * core / tp * self.width,
            }
        value, key = sizes.v_head_dim, sizes.qk_head_dim
        whole = key + sizes.qk_pos_emb_head_dim
        vectors = 2 * (sizes.q_lora_rank or 0) + 2 * sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
        made = heads * (2 * whole + key + value)  # q and k put together; what keys and values are cut from
        return {
            "attention": self.tokens * vectors * self.width,
            "core_attn": self.tokens * heads * value / tp * self.width,
            "mla_up_proj": self.tokens * made / tp * self.width,
        }

    def _mixture(self, layer: int) -> bool:
        pattern = self.sizes.moe_layer_freq
        return bool(self.sizes.num_moe_experts) and (not isinstance(pattern, list) or bool(pattern[layer]))

    def of_layer(self, layer: int, position: int) -> float:
        """Bytes kept of the layer at this position of its chunk, after recomputation dropped what it may."""
        options, parts = self.options, self.parts(layer)
        if options.recompute == "full" and (options.recompute_layers is None or position < options.recompute_layers):
            return parts["input"] / 2 if position % options.recompute_unit == 0 else 0.0
        dropped = set(options.recompute_modules if options.recompute == "selective" else [])
        if "moe" in dropped:
            dropped.add("shared_experts")  # they are part of it
        dropped.discard("core_attn")  # its inputs and output are kept; the scores never are
        return sum(size for name, size in parts.items() if name not in dropped)

    def moved(self, layer: int, position: int, chunk: Sequence[int]) -> float:
        """Of these, the bytes that --offload-activations moves to host memory."""
        if layer not in self.options.offloaded(chunk):
            return 0.0
        parts = {part for name in self.options.offload_activation_modules for part in MODULE_PARTS[name]}
        kept = self.parts(layer)
        whole, moved = sum(kept.values()), sum(size for name, size in kept.items() if not parts or name in parts)
        return self.of_layer(layer, position) * moved / whole

    def away(self, stage: int) -> float:
        """Bytes of one micro-batch that the layers of a stage's chunk have moved, on average over its chunks."""
        chunks = stage_layers(self.options, self.sizes.num_layers, stage)
        return sum(self.moved(layer, at, chunk) for chunk in chunks for at, layer in enumerate(chunk)) / len(chunks)

    def of_stage(self, stage: int, count: int, vocabulary: int) -> int:
        """Bytes kept on a rank of a pipeline stage at most; ``vocabulary`` is padded."""
        options = self.options
        chunks = stage_layers(options, self.sizes.num_layers, stage)
        kept = [sum(self.of_layer(layer, at) for at, layer in enumerate(chunk)) for chunk in chunks]
        moved = [self.moved(layer, at, chunk) for chunk in chunks for at, layer in enumerate(chunk)]
        total = (sum(kept) - sum(moved)) / len(kept) * in_flight(options, stage, count)
        total += min(UNDER_WAY + 1, sum(size > 0 for size in moved)) * max(moved, default=0)
        if options.recompute == "full":  # one unit is there whole while its backward pass runs
            whole = (sum(self.parts(layer).values()) for chunk in chunks for layer in chunk)
            total += options.recompute_unit * max(whole, default=0.0)
        return round(total + (self.of_head(vocabulary) if stage == options.pp - 1 else 0.0))

    def of_head(self, vocabulary: int) -> float:
        """Bytes of the last norm, and of the logits that the loss keeps."""
        outputs = 1 + (self.sizes.mtp_num_layers or 0)
        norm = 2 * self.own * self.sizes.hidden_size * self.width
        return outputs * (norm + self.tokens * vocabulary / self.options.tp * self.width)


def in_flight(options: TrainOptions, stage: int, count: int) -> int:
    """Micro-batches, times chunks, whose activations a stage holds at once: those of the warm-up, and one more."""
    later, chunks = options.pp - stage - 1, options.vpp or 1
    if chunks == 1:
        return min(later + 1, count)
    return min(2 * later + (chunks - 1) * options.pp + 1, count * chunks)
