"""mp-plan: which layout a training run should have, what it needs of each GPU, and how fast it can be at best."""

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from megapatch.models import core_files
from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.commit import refuse_unwritable, staged_file
from megapatch.tools.plan import machines, tell

if TYPE_CHECKING:
    from megapatch.tools.plan.search import Found, Plan
    from megapatch.tools.plan.ways import Asked

log = logging.getLogger(__name__)
GIB = 2**30
EXAMPLES = """examples:
  mp-plan --model scripts/configs/models/llama-3.1-8b.json --gpu H100 --gpus 8 --seq-length 8192 --global-batch-size 128
  mp-plan --model qwen3-30b-a3b --gpu A100-80GB --gpus 64 --seq-length 4096 --global-batch-size 512 \\
      --bench bench.jsonl --output train.args > plans.jsonl
  mp-pretrain @train.args --tokenizer tokenizer --data-path data --save run --train-iters 1000 --dry-run

Bytes are those of the real modules, run once for each kind of layer without a GPU and without content. Layers are
ours with a fused attention, not those of Transformer Engine; experts get equal shares of tokens, or --expert-load. The
step time is a bound that no run reaches: use it to compare plans.

exit status: 0 planned; 1 failed; 2 wrong usage; 3 nothing fits."""


class DoesNotFit(UserError):
    """No layout fits."""

    status = 3


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Plan a training run before it starts: enumerate layouts, drop what does not fit, rank the rest by a roofline."""

    model: Path = opt(
        "config.json, the folder that holds it, a core checkpoint, or, in a checkout, the name of one in "
        "scripts/configs/models; where "
        "there are weights, --output begins with them"
    )
    gpu: str = opt(f"kind of GPU: {', '.join(machines.KNOWN)}", "H100")
    gpus: int = opt("GPUs in all")
    gpus_per_node: int = opt("GPUs that are joined within a node", 8)
    memory_gib: Optional[float] = opt("memory of a GPU in GiB, if not all of it", None)
    reserve_gib: float = opt("of it, left for the driver, its libraries and NCCL's buffers", 2.0)
    slack: float = opt("share of activations that the allocator loses to fragments", 0.05)
    host_memory_gib: Optional[float] = opt("host memory of a node in GiB for what is offloaded, if limited", None)
    network_gbit_per_s: float = opt("network of a GPU to other nodes", 400.0)
    bench: Optional[Path] = opt("JSON lines of mp-offload-bench, for the rates to and of host memory", None)
    seq_length: int = opt("tokens per sample", 4096)
    global_batch_size: int = opt("samples per optimizer step", 256)
    precision: Literal["bf16"] = opt("of weights and activations", "bf16")
    expert_load: float = opt("tokens of the busiest rank of experts, as a multiple of an even share", 1.0)
    no_offload: bool = opt("only plans that keep optimizer state and activations on the GPU", False)
    top: int = opt("plans to print, one for each layout", 5)
    workers: Optional[int] = opt("processes that plan, if not one for each CPU", None)
    output: Optional[Path] = opt("write the best plan as an @file for mp-pretrain", None)

    def __post_init__(self) -> None:
        least = {"gpus": 1, "gpus_per_node": 1, "seq_length": 1, "global_batch_size": 1, "top": 1, "expert_load": 1}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {value}")
        for name in ("reserve_gib", "slack"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1")
        if not self.network_gbit_per_s > 0:
            raise ValueError(f"--network-gbit-per-s {self.network_gbit_per_s}: must be above 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-plan; returns the exit status."""
    return run(Options, work, prog="mp-plan", epilog=EXAMPLES, argv=argv)


def work(options: Options) -> None:
    """Search, print, write."""
    path = model_file(options.model)
    if options.output is not None:
        refuse_unwritable(options.output)
    hf, machine, budget = read(path), machine_of(options), budget_bytes(options)
    asked = ask(options, hf, machine, budget)
    from megapatch.tools.plan.search import best

    parts = progressing(asked, options.workers or len(os.sched_getaffinity(0)))
    found = best((plan for part in parts for plan in part.plans), options.top)
    if not found:
        raise DoesNotFit(least(min((p.least for p in parts), key=lambda p: p.total_bytes), asked, options))
    rows = [tell.as_json(plan, asked, number) for number, plan in enumerate(found, 1)]
    for row in rows:
        print(json.dumps(row))
    seen, traces = (sum(getattr(part, name) for part in parts) for name in ("seen", "traces"))
    log.info("%s ways tried, from %s traces; the best:\n%s", f"{seen:,}", traces, tell.as_table(rows))
    log.info("what binds: %s on rank %s", rows[0]["binding"]["what"], rows[0]["binding"]["rank"])
    if options.output is not None:
        write(options.output, tell.as_file(found[0], asked, begins(options.model, path)))


def model_file(given: Path) -> Path:
    """config.json itself (UserError where there is none)."""
    if core_files.is_core(given):
        return core_files.resolve(given) / core_files.HF_SUBFOLDER / "config.json"
    shipped = Path(__file__).resolve().parent.parent.parent / "scripts" / "configs" / "models"
    tried = [given, given / "config.json", shipped / f"{given}.json"]
    for path in tried:
        if path.is_file():
            return path
    names = sorted(p.stem for p in shipped.glob("*.json"))  # none where only the wheel is installed
    known = f", and no name of: {', '.join(names)}" if names else ""
    raise UserError(f"--model {given}: no such file, no folder with config.json, no core checkpoint{known}")


def begins(given: Path, config: Path) -> list[str]:
    """mp-pretrain's option: the weights of the folder that was given, or random ones where it has none."""
    weights = core_files.is_core(given) or (given.is_dir() and any(given.glob("*.safetensors")))
    return ["--model", str(given)] if weights else [tell.INIT, str(config)]


def read(path: Path) -> dict[str, Any]:
    """config.json (UserError where it is none)."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object with model_type, as in a config.json")
    return found


def machine_of(options: Options) -> machines.Machine:
    """The GPU's rates, as measured where they were."""
    from dataclasses import replace

    found = replace(machines.find(options.gpu), network=options.network_gbit_per_s / 8 * 1e9)
    return found if options.bench is None else machines.measured(found, options.bench, options.gpus_per_node)


def budget_bytes(options: Options) -> float:
    """What tensors may take of a GPU."""
    whole = machines.find(options.gpu).memory_bytes / GIB
    given = whole if options.memory_gib is None else options.memory_gib
    if given > whole:
        raise UserError(f"--memory-gib {given:g}: {options.gpu} has {whole:.1f} GiB; give less, or another --gpu")
    if given <= options.reserve_gib:
        raise UserError(f"--reserve-gib {options.reserve_gib:g}: nothing is left of {given:.3g} GiB")
    return (given - options.reserve_gib) * GIB


def ask(options: Options, hf: dict[str, Any], machine: machines.Machine, budget: float) -> "Asked":
    """What is to be planned; makes megatron-core ready."""
    import math

    from megapatch.models import device, family
    from megapatch.models.held import plain

    family.find(hf)
    family.refuse_length(hf, options.seq_length)
    device.hide_gpus()
    found = device.start("cpu")
    from megapatch.models.planning.stand_ins import Pretended
    from megapatch.tools.plan.ways import Asked

    share = options.host_memory_gib
    return Asked(
        plain(hf),
        Pretended(found.kind, False, False, found.reason),
        machine,
        options.gpus,
        min(options.gpus_per_node, options.gpus),
        budget,
        options.seq_length,
        options.global_batch_size,
        options.precision,
        options.expert_load,
        options.slack,
        not options.no_offload,
        math.inf if share is None else share * GIB / min(options.gpus_per_node, options.gpus),
    )


def progressing(asked: "Asked", workers: int) -> "list[Found]":
    """All plans that fit, found by so many processes, with a bar."""
    from tqdm import tqdm

    from megapatch.tools.plan.search import search
    from megapatch.tools.plan.ways import groups, layouts, least_bytes

    every = list(layouts(asked))
    if not every:
        raise UserError(
            f"--gpus {asked.gpus}, --global-batch-size {asked.batch}: the model of config.json cannot be cut so; take "
            "a batch that the number of GPUs divides"
        )
    worth = [layout for layout in every if least_bytes(asked, layout) <= asked.budget_bytes]
    parts = groups(worth or [min(every, key=lambda layout: least_bytes(asked, layout))])
    every_s = 1 if sys.stderr.isatty() else 10
    shown = partial(tqdm, total=len(parts), desc="mp-plan: layouts", mininterval=every_s, maxinterval=every_s)
    if min(workers, len(parts)) == 1:
        return [search(asked, part) for part in shown(parts)]
    with ProcessPoolExecutor(min(workers, len(parts)), multiprocessing.get_context("fork")) as pool:
        waiting = [pool.submit(search, asked, part) for part in parts]
        for _ in shown(as_completed(waiting)):
            pass
        return [done.result() for done in waiting]  # in an order that does not depend on their speed


def least(plan: "Plan", asked: "Asked", options: Options) -> str:
    """What would be needed, in one line."""
    row = tell.as_json(plan, asked, 0)
    gib = plan.total_bytes / GIB
    return (
        f"{asked.gpus} x {asked.machine.name}: nothing fits the {asked.budget_bytes / GIB:.1f} GiB that --reserve-gib "
        f"{options.reserve_gib:g} leaves; the least is {gib:.2f} GiB on a GPU, with {tell.short(row)}, mostly "
        f"{row['binding']['what']}; use more GPUs, larger ones, or a smaller --seq-length"
    )


def write(path: Path, text: str) -> None:
    """The file, whole or not at all."""
    with staged_file(path) as stage:
        stage.write_text(text)
    log.info("best plan: %s", path)


if __name__ == "__main__":
    raise SystemExit(main())
