"""mp-pretrain: train a language model on .bin/.idx data, or straight from text."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapatch.models.cli import UserError, run
from megapatch.trainer.options import PretrainOptions, TrainOptions

if TYPE_CHECKING:
    from megapatch.models.device import Device
    from megapatch.models.family import HfConfig
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.trainer.loop import Trainer
    from megapatch.trainer.saving.checkpoint import Source
    from megapatch.trainer.session import Session
    from megapatch.trainer.sizes.describe import Description
    from megapatch.trainer.watching.metrics import Log

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  # random weights, one process, straight from text
  mp-pretrain --init-from model/config.json --tokenizer tokenizer --data text.jsonl --save run \\
      --train-iters 100 --global-batch-size 8 --seq-length 256
  # from a Hugging Face folder, two-way tensor parallel, options from a file and one override
  torchrun --nproc-per-node 2 --no-python mp-pretrain @train.args --model qwen3 --tp 2 --sequence-parallel --lr 1e-4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-pretrain; returns the exit status."""
    return run(PretrainOptions, pretrain, prog="mp-pretrain", epilog=EXAMPLES, argv=argv)


def pretrain(options: PretrainOptions) -> None:
    """Train as the options say; resumes from the newest checkpoint in --save."""
    train(options, PRETRAINING)


def train(options: TrainOptions, kind: "Kind") -> None:
    """A run of this kind of training, from its options to its last checkpoint."""
    from megapatch.trainer import signals

    signals.listen()
    from megapatch.models import device, parallel
    from megapatch.trainer.layout.overlap import connections
    from megapatch.trainer.ranks import first, naming_lost_peers, told_once_per_node
    from megapatch.trainer.saving import disk, locks
    from megapatch.trainer.watching.watchdog import watching

    queues, why = connections(options)
    with told_once_per_node():
        told = device.set_connections(queues)  # before the GPU is used
        found = device.start("auto" if options.dry_run else options.device)  # a plan may be for another machine
        plan = make_plan(options, kind)
    if options.dry_run:
        if first():
            _show(plan, found)
        return
    log.info("device: %s, %s (%s)", found.kind, found.backend, found.reason)
    if found.backend == "nccl":
        log.info("%s (%s)", told, why)
    try:
        with naming_lost_peers(), disk.naming(options.save):
            prepared = prepare(options, found, plan, kind)
            if prepared is None:
                log.info("%s: all %d steps are done; nothing to do", options.save, options.train_iters)
                return
            trainer, records = prepared
            with watching(options):
                trainer.run()
            records.close()
        locks.release(options.save)  # where the run fails, with the process: a thread of it may still write
    finally:
        parallel.stop()


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one kind of training does otherwise than another."""

    check: "Callable[[Any, Tokenizer, int], None]"  # refuses data that do not fit tokenizer or vocabulary size
    trainer: "Callable[[Session, Log, Plan], Trainer]"  # the loop and its batches; every rank calls


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before its processes meet."""

    source: "Source"
    hf: "HfConfig"
    tokenizer: "Tokenizer"
    resumed: Path | None  # the checkpoint to continue from
    done: bool  # that checkpoint is the last one, and nothing is left to do, as this process sees it
    data_parallel_size: int
    count: int  # micro-batches per step of each data-parallel rank
    described: "Description"  # what the run will be


def make_plan(options: TrainOptions, kind: Kind | None = None) -> Plan:
    """Read what the options name, and refuse what does not fit (UserError); joins no process group."""
    from megapatch.models import core_files, device, family
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.trainer import final_test, session
    from megapatch.trainer.data import gpt_data
    from megapatch.trainer.saving import checkpoint, writing
    from megapatch.trainer.sizes.describe import describe, processes
    from megapatch.trainer.watching import metrics

    kind = kind or PRETRAINING
    resumed = checkpoint.newest(options.save)
    step = core_files.read_tracker(options.save)
    given = options.model or options.init_from
    begin = resumed or given
    assert begin is not None and given is not None
    if resumed is not None:
        checkpoint.refuse_other_model(given, resumed)
    source = checkpoint.find_source(begin, None if resumed else options.tokenizer)
    hf, tokenizer = source.hf, Tokenizer(source.tokenizer, trust_remote_code=options.trust_remote_code)
    options.check_model(family.find(hf).transformer_config(hf))
    family.refuse_length(hf, options.seq_length)
    size = options.data_parallel_size(processes(options))
    count = gpt_data.num_micro_batches(options, size)
    described = describe(options, hf, count)
    described.refuse_too_large()
    if not options.dry_run:  # a plan may be for another machine
        metrics.refuse_missing(options)
        writing.one_file()
        session.refuse(options, device.start(options.device), hf)
    kind.check(options, tokenizer, family.vocab_size(hf))  # last: may read all of --data
    done = isinstance(step, int) and step >= options.train_iters and final_test.done(options)
    return Plan(source, hf, tokenizer, resumed, done, size, count, described)


def prepare(
    options: TrainOptions, device: "Device", plan: Plan, kind: Kind | None = None
) -> "tuple[Trainer, Log] | None":
    """Build everything up to the first step (every rank must call); None where the first one finds all steps done."""
    from megapatch.models import parallel
    from megapatch.trainer import session
    from megapatch.trainer.ranks import as_the_first
    from megapatch.trainer.saving import checkpoint

    parallel.start(options, device, timeout_s=options.timeout_s)
    if as_the_first(plan.done):  # a rank that left by itself would keep the others waiting
        return None
    checkpoint.claim(options.save, plan.resumed)
    run_state = session.start(options, device, plan.hf, load=plan.resumed is None)
    if plan.resumed is not None:
        checkpoint.resume(run_state, plan.resumed)
        log.info("resuming from %s", plan.resumed)
    records = _open_log(options, run_state.step)
    _record_start(run_state, records, plan)
    return (kind or PRETRAINING).trainer(run_state, records, plan), records


def _check(options: PretrainOptions, tokenizer: "Tokenizer", vocab_size: int) -> None:
    from megapatch.trainer.data import gpt_data

    gpt_data.check_data(options, tokenizer, vocab_size)


def _trainer(session: "Session", records: "Log", plan: Plan) -> "Trainer":
    from functools import partial

    from megapatch.models import family
    from megapatch.models.layers.spec import mixture_layers
    from megapatch.trainer.data import gpt_data
    from megapatch.trainer.data.sample_places import Samples, in_corpus, sources
    from megapatch.trainer.data.sources import BySource
    from megapatch.trainer.loop import Trainer
    from megapatch.trainer.saving import checkpoint
    from megapatch.trainer.sizes.flops import flops_per_token
    from megapatch.trainer.tuning.adapters import num_trained

    options, vocab_size = session.options, family.vocab_size(session.hf)
    assert isinstance(options, PretrainOptions)
    dataset, valid, test = gpt_data.build_datasets(options, plan.tokenizer, session.num_samples)
    checkpoint.reads(session, sources(dataset))
    train = Samples(dataset, in_corpus, remember=options.log_sample_ids)
    batches = partial(gpt_data.micro_batches, options=options, vocab_size=vocab_size, device=session.device.torch)
    trained = BySource(sources(dataset), session.device.torch)
    validated, tested = (
        BySource(sources(dataset if held is None else held), session.device.torch) for held in (valid, test)
    )
    sizes = (options.seq_length, sum(mixture_layers(session.config)), num_trained(session.hf, options))
    trainer = Trainer(
        session,
        records=records,
        source=plan.source,
        num_micro_batches=plan.count,
        flops_per_token=flops_per_token(session.config, vocab_size, *sizes),
        train=lambda start: partial(batches, train, first=start, losses=trained),
        valid=lambda step: partial(batches, valid, first=step * options.global_batch_size, losses=validated),
        eval_steps=options.eval_iters if valid is not None else 0,
    )
    trainer.samples, trainer.trained, trainer.validated = train, trained, validated
    if test is not None:
        trainer.tested = tested
        trainer.test = lambda step: partial(batches, test, first=step * options.global_batch_size, losses=tested)
    return trainer


PRETRAINING = Kind(_check, _trainer)


def _show(plan: Plan, device: "Device") -> None:
    """--dry-run: JSON to stdout, a table to stderr."""
    from megapatch.trainer.sizes.describe import as_json, as_table

    found = as_json(plan.described, plan.resumed)
    if plan.described.options.dry_run_rank is not None:
        found["built"] = _built(plan.described, device)
    print(json.dumps(found, indent=1))
    log.info("\n%s", as_table(found))


def _built(described: "Description", device: "Device") -> dict[str, int]:
    """The part of --dry-run-rank, built without memory."""
    from megapatch.models.build import ModelOptions
    from megapatch.trainer.sizes.without_memory import parameters

    options, rank = described.options, described.options.dry_run_rank
    assert rank is not None
    if rank >= described.world:
        raise UserError(f"--dry-run-rank {rank}: ranks are 0 to {described.world - 1}")
    further = {"mtp_num_layers": described.sizes.mtp_num_layers}
    made = ModelOptions(options, device, options.precision, options.seq_length, further)
    return {"rank": rank, "parameters": parameters(described.hf, made, described.world, rank)}


def _open_log(options: TrainOptions, step: int) -> "Log":
    """The log of this process, which goes on after ``step``: rank 0 writes, the others are silent."""
    import torch.distributed as dist

    from megapatch.trainer.ranks import together
    from megapatch.trainer.sizes.describe import resolved
    from megapatch.trainer.watching.metrics import JsonLines, Log, Sink, TensorBoard, WeightsAndBiases

    sinks: list[Sink] = []
    with together():
        if dist.get_rank() == 0:
            sinks.append(JsonLines(options.log_path))
            if options.tensorboard:
                sinks.append(TensorBoard(options.tensorboard, step))
            if options.wandb:
                sinks.append(WeightsAndBiases(options.wandb, resolved(options)))
    return Log(sinks)


def _record_start(session: "Session", records: "Log", plan: Plan) -> None:
    import torch.distributed as dist

    from megapatch.trainer.sizes.describe import resolved

    world = dist.get_world_size()
    log.info("%s parameters on %d process%s", f"{session.num_parameters:,}", world, "es" * (world > 1))
    if plan.resumed:
        records.write("resume", step=session.step, consumed_samples=session.consumed_samples)
    records.write(
        "start",
        config=resolved(session.options),
        world_size=dist.get_world_size(),
        parameters=session.num_parameters,
        trained_parameters=session.num_saved,
        resumed_from=session.step if plan.resumed else None,
    )


if __name__ == "__main__":
    raise SystemExit(main())
