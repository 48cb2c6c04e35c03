"""What a run will be before it starts: resolved options, who owns what, sizes, memory, FLOPs. Imports no torch."""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megapatch.models import lora
from megapatch.models.cli import UserError, versions
from megapatch.models.family import HfConfig, vocab_size
from megapatch.models.held import plain
from megapatch.models.parallel import world_size
from megapatch.models.shapes import Layout, num_parameters
from megapatch.models.space import DoesNotFit
from megapatch.trainer.offload.options import AUTO
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.sizes.flops import flops_per_token, mixtures, sizes_of
from megapatch.trainer.sizes.memory import MARGIN, Activations, Estimate, estimate
from megapatch.trainer.sizes.shares import Share, active_parameters, place, share, stage_layers

GIB = 2**30


def processes(options: TrainOptions) -> int:
    """How many processes the run has, or is planned for (UserError where --world-size is another number)."""
    here, wanted = world_size(), options.world_size
    if wanted and not options.dry_run and here != wanted:
        raise UserError(
            f"--world-size {wanted}: this run has {here} process{'es' * (here > 1)}; start {wanted}, or change "
            "--world-size and look at --dry-run again"
        )
    return wanted or here


def resolved(options: TrainOptions) -> dict[str, Any]:
    """Every option and its value, for JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}


def as_file(options: TrainOptions) -> str:
    """The same as an @file: given to the same tool it makes the same options."""
    about = [f"# {name} {version}" for name, version in versions().items()]
    lines = [f"# {options.tool}, {world_size()} processes", *about]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None or value is False or value == []:
            continue
        flag = (field.metadata.get("args") or [f"--{field.name.replace('_', '-')}"])[0]
        words = [] if value is True else value if isinstance(value, list) else [value]
        lines.append(" ".join([flag, *(shlex.quote(str(word)) for word in words)]))
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Description:
    """A run, worked out. ``shares`` and ``memory`` are of a rank of each pipeline stage."""

    options: TrainOptions
    hf: HfConfig
    world: int
    shares: Sequence[Share]
    memory: Sequence[Estimate]
    count: int  # micro-batches per step of each data-parallel rank

    @property
    def sizes(self) -> Any:
        """Fields of the model's TransformerConfig."""
        return sizes_of(self.hf, bool(self.options.mtp_loss_weight))

    @property
    def parameters(self) -> int:
        """Of the whole model, a tied embedding counted once."""
        return num_parameters(self.hf if self.options.mtp_loss_weight else plain(self.hf))

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs, forward and backward."""
        sizes, trained = self.sizes, _in_adapters(self.options, self.hf)
        return flops_per_token(sizes, vocab_size(self.hf), self.options.seq_length, mixtures(sizes), trained)

    def rank(self, rank: int) -> dict[str, Any]:
        """What a rank owns: layers, heads and experts counted from 0, parameters."""
        at, options, sizes = place(self.options, self.world, rank), self.options, self.sizes
        layers = [layer for chunk in stage_layers(options, sizes.num_layers, at.pp) for layer in chunk]
        experts = {"experts": spans(_part(sizes.num_moe_experts, options.ep, at.ep))} if sizes.num_moe_experts else {}
        return {
            **dataclasses.asdict(at),
            "layers": spans(layers),
            "heads": spans(_part(sizes.num_attention_heads, options.tp, at.tp)),
            **experts,
            "parameters": self.shares[at.pp].total,
        }

    def refuse_too_large(self) -> None:
        """DoesNotFit where the estimate is above what --device-memory-gib leaves room for."""
        given = self.options.device_memory_gib
        largest = max(each.total_bytes for each in self.memory) / GIB
        if given and largest > MARGIN * given:
            raise DoesNotFit(
                f"--device-memory-gib {given:g}: the estimate is {largest:.1f} GiB, and a tenth is left free; use more "
                "processes, larger --tp, --pp or --ep, --use-distributed-optimizer, --offload-optimizer, --recompute "
                "full, or less --micro-batch-size or --seq-length"
            )


def describe(options: TrainOptions, hf: HfConfig, count: int) -> Description:
    """Work a run out; ``count`` micro-batches a step."""
    world, predicting = processes(options), bool(options.mtp_loss_weight)
    layers = sizes_of(hf, predicting).num_layers
    chunks = [chunk for stage in range(options.pp) for chunk in stage_layers(options, layers, stage)]
    options.refuse_layers(chunks)
    options.refuse_recompute_layers(chunks)
    held = [share(hf, options, stage, predicting=predicting) for stage in range(options.pp)]
    activations = Activations(options, sizes_of(hf, predicting))
    trained = _adapters(options, hf) or held
    memory = estimate(activations, held, trained, vocab_size(hf), world, count)
    return Description(options, hf, world, held, memory, count)


def _adapters(options: TrainOptions, hf: HfConfig) -> list[Share] | None:
    """With --lora-rank, what is trained of each stage: an even part of the adapters, at most."""
    trained = _in_adapters(options, hf)
    return None if trained is None else [Share(-(-trained // options.pp), 0)] * options.pp


def _in_adapters(options: TrainOptions, hf: HfConfig) -> int | None:
    """Numbers in the adapters of the whole model, None without --lora-rank."""
    return None if options.lora is None else lora.num_parameters(Layout(hf), options.lora)


def _part(number: int, size: int, rank: int) -> Iterable[int]:
    """The share of ``number`` heads or experts."""
    return range(number * rank // size, number * (rank + 1) // size)


def spans(numbers: Iterable[int]) -> str:
    """Numbers in ascending order, as '0-3,8-11'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def as_json(made: Description, resumed: Path | None) -> dict[str, Any]:
    """The description for machines."""
    options, tokens = made.options, made.options.global_batch_size * made.options.seq_length
    layout = {name: getattr(options, name) for name in ("tp", "pp", "vpp", "cp", "ep", "expert_tp")}
    copies = options.data_parallel_size(made.world)
    return {
        "options": resolved(options),
        "layout": layout | {"data_parallel_size": copies, "world_size": made.world},
        "micro_batches_per_step": made.count,
        "tokens_per_step": tokens,
        "parameters": made.parameters,
        "active_parameters": active_parameters(made.hf, made.sizes, made.parameters),
        "flops_per_token": made.flops_per_token,
        "flops_per_step": made.flops_per_token * tokens,
        "memory": [
            dataclasses.asdict(each) | {"stage": stage, "total_bytes": each.total_bytes}
            for stage, each in enumerate(made.memory)
        ],
        "ranks": [made.rank(rank) for rank in range(made.world)],
        "resumes_from": resumed and str(resumed),
        "model": dict(made.hf),
        "versions": versions(),
    }


def as_table(found: dict[str, Any]) -> str:
    """The same for people: a few lines, and one line for each pipeline stage."""
    layout, world = found["layout"], found["layout"]["world_size"]
    sizes = " ".join(f"{name} {layout[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "expert_tp") if layout[name])
    lines = [
        f"{found['parameters']:,} parameters, {found['active_parameters']:,} of them for each token",
        f"{world:,} processes: {sizes}, {layout['data_parallel_size']} data-parallel",
        f"{found['tokens_per_step']:,} tokens a step in {found['micro_batches_per_step']} micro-batches of a rank, "
        f"{found['flops_per_token'] / 1e9:,.4g} GFLOP a token, {found['flops_per_step'] / 1e15:,.4g} PFLOP a step",
        "",
        f"{'stage':>5} {'ranks':>13} {'layers':>16} {'parameters':>15}   GiB on a rank: weights gradients optimizer "
        "activations  total",
    ]
    for stage, each in enumerate(found["memory"]):
        first, last = world // layout["pp"] * stage, world // layout["pp"] * (stage + 1) - 1
        kinds = ("weights", "gradients", "optimizer", "activations", "total")
        numbers = "".join(f"{each[f'{kind}_bytes'] / GIB:>10.2f}" for kind in kinds)
        owner = found["ranks"][first]
        layers = owner["layers"] if len(owner["layers"]) <= 16 else owner["layers"][:14] + ".."
        lines.append(f"{stage:>5} {f'{first}-{last}':>13} {layers:>16} {owner['parameters']:>15,}{'':>14}{numbers}")
    if most := max(each["host_bytes"] for each in found["memory"]):
        share = " with all of the optimizer's state; auto takes less" * (found["options"]["offload_optimizer"] == AUTO)
        lines += ["", f"host memory of a rank for what is offloaded: {most / GIB:.2f} GiB at most{share}"]
    stage_ranks = found["ranks"][: world // layout["pp"]]
    owned = [(name, {rank[axis]: rank[name] for rank in stage_ranks}, axis) for name, axis in OWNED if name in owner]
    lines += ["", *(f"{name} by {axis} rank: {_listed(parts)}" for name, parts, axis in owned)]
    return "\n".join(lines)


OWNED = (("heads", "tp"), ("experts", "ep"))


def _listed(parts: dict[int, str], most: int = 8) -> str:
    shown = [f"{rank}: {part}" for rank, part in sorted(parts.items())]
    return "; ".join(shown if len(shown) <= most else [*shown[: most - 1], "...", shown[-1]])
