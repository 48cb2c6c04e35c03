"""Plans as a table for people, as JSON lines for machines, and the best as an @file for mp-pretrain. No torch."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megapatch.models.cli import versions

if TYPE_CHECKING:
    from megapatch.tools.plan.search import Plan
    from megapatch.tools.plan.ways import Asked

GIB = 2**30
INIT = "--init-from"
PARTS = ("weights", "gradients", "optimizer", "activations")


def words(plan: "Plan") -> list[str]:
    """The layout as mp-pretrain's options, one option and its values each."""
    choice, cut = plan.choice, plan.choice.layout
    sizes = {"tp": cut.tp, "pp": cut.pp, "vpp": cut.vpp, "cp": cut.cp, "ep": cut.ep}
    found = [f"--{name} {size}" for name, size in sizes.items() if size > 1]
    if cut.etp != cut.tp:
        found.append(f"--etp {cut.etp}")
    found += ["--sequence-parallel"] * (cut.tp > 1)
    found += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    found.append(f"--micro-batch-size {choice.samples}")
    if choice.again.full:
        found.append("--recompute full")
        found += [f"--recompute-layers {choice.first}"] * (choice.first is not None)
    elif choice.again.parts:
        found += ["--recompute selective", f"--recompute-modules {' '.join(choice.again.parts)}"]
    found += [f"--offload-activations {choice.hosted}"] * (choice.hosted > 0)
    found += [f"--offload-optimizer {choice.offloaded:g}"] * (choice.offloaded > 0)
    return found


def as_json(plan: "Plan", asked: "Asked", number: int) -> dict[str, Any]:
    """A plan for machines; the ``binding`` rank is the one that needs most."""
    cut, choice, speed = plan.choice.layout, plan.choice, plan.speed
    tokens = asked.batch * asked.seq_length
    layout = {name: getattr(cut, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    return {
        "plan": number,
        **layout,
        "data_parallel_size": cut.copies,
        "micro_batch_size": choice.samples,
        "micro_batches": asked.batch // cut.copies // choice.samples,
        "recompute": "full" if choice.again.full else "selective" if choice.again.parts else "none",
        "recompute_modules": list(choice.again.parts),
        "recompute_layers": choice.first,
        "offload_activations": choice.hosted,
        "offload_activations_bytes": plan.copied,
        "offload_optimizer": choice.offloaded,
        "total_bytes": plan.total_bytes,
        "budget_bytes": round(asked.budget_bytes),
        "binding": {"stage": plan.stage, "rank": plan.stage * (asked.gpus // cut.pp), "what": binding(plan)},
        "stages": [
            {f"{name}_bytes": value for name, value in asdict(need).items()} | {"total_bytes": need.total}
            for need in plan.needs
        ],
        "step_s": speed.step,
        "seconds": asdict(speed),
        "tokens_per_s_per_gpu": tokens / speed.step / asked.gpus,
        "arguments": words(plan),
    }


def binding(plan: "Plan") -> str:
    """The largest part of what the binding rank needs."""
    need = plan.needs[plan.stage]
    parts = {name: getattr(need, name) for name in PARTS} | {"the optimizer's step": need.step}
    del parts["activations" if need.step > need.activations else "the optimizer's step"]
    return max(parts, key=lambda name: parts[name])


HEAD = "    GiB of which: weights  grads  optim.  activ.  binds   step s   tokens/s/GPU  arguments"


def as_table(rows: list[dict[str, Any]]) -> str:
    """A line for each plan."""
    lines = [HEAD]
    for row in rows:
        need = row["stages"][row["binding"]["stage"]]
        parts = "".join(f"{need[f'{name}_bytes'] / GIB:>7.1f} " for name in PARTS)
        lines.append(
            f"{row['plan']:>2} {row['total_bytes'] / GIB:>4.1f}{'':>11}{parts} rank {row['binding']['rank']:<4} "
            f"{row['step_s']:>7.3g} {row['tokens_per_s_per_gpu']:>14,.0f}  {short(row)}"
        )
    return "\n".join(lines)


def short(row: dict[str, Any]) -> str:
    """What distinguishes a plan."""
    text = " ".join(f"{name} {row[name]}" for name in ("tp", "pp", "vpp", "cp", "ep") if row[name] > 1)
    text += f" etp {row['etp']}" * (row["etp"] != row["tp"])
    text += f" dp {row['data_parallel_size']} micro-batch {row['micro_batch_size']}"
    text += {"none": "", "full": " recompute full"}.get(
        row["recompute"], f" recompute {' '.join(row['recompute_modules'])}"
    )
    text += f" ({row['recompute_layers']} layers)" * (row["recompute_layers"] is not None)
    text += f" offload activations {row['offload_activations']}" * (row["offload_activations"] > 0)
    return (text + f" offload optimizer {row['offload_optimizer']:g}" * (row["offload_optimizer"] > 0)).strip()


def as_file(plan: "Plan", asked: "Asked", model: Sequence[str]) -> str:
    """The plan as an @file of mp-pretrain, without paths of data and what does not follow from it.

    ``model`` is mp-pretrain's option that says where a run begins.
    """
    about = [f"# {name} {version}" for name, version in versions().items()]
    gib = plan.total_bytes / GIB
    head = [
        f"# mp-plan: {asked.gpus} x {asked.machine.name} ({asked.machine.source}); {gib:.1f} GiB on rank "
        f"{plan.stage * (asked.gpus // plan.choice.layout.pp)}, which needs most",
        "#   torchrun ... mp-pretrain @FILE --tokenizer TOKENIZER --data-path PREFIX --save RUN --train-iters N",
        *about,
        *(
            ["# --init-from: with random weights; --model DIR in its place: with those of a folder"]
            * (model[0] == INIT)
        ),
        shlex.join(model),
        f"--world-size {asked.gpus}",
        f"--precision {asked.precision}",
        f"--seq-length {asked.seq_length}",
        f"--global-batch-size {asked.batch}",
    ]
    return "\n".join([*head, *words(plan)]) + "\n"
