"""mp-pretrain: train a language model on .bin/.idx data."""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapatch.models.cli import run, versions
from megapatch.trainer.options import PretrainOptions

if TYPE_CHECKING:
    from megapatch.models.family import HfConfig
    from megapatch.trainer.loop import Trainer
    from megapatch.trainer.metrics import Log
    from megapatch.trainer.session import Session

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  # random weights, one process
  mp-pretrain --init-from model/config.json --tokenizer tokenizer --data-path data/corpus --save run \\
      --train-iters 100 --global-batch-size 8 --seq-length 256
  # from a Hugging Face folder, two-way tensor parallel, options from a file and one override
  torchrun --nproc-per-node 2 --no-python mp-pretrain @train.args --model qwen3 --tp 2 --sequence-parallel --lr 1e-4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-pretrain; returns the exit status."""
    return run(PretrainOptions, pretrain, prog="mp-pretrain", epilog=EXAMPLES, argv=argv)


def pretrain(options: PretrainOptions) -> None:
    """Train as the options say; resumes from the newest checkpoint in --save."""
    from megapatch.trainer import signals

    signals.listen()
    from megapatch.models import device, parallel

    found = device.start(options.device)
    log.info("device: %s, %s (%s)", found.kind, found.backend, found.reason)
    try:
        trainer, records = prepare(options, found)
        if trainer is not None:
            trainer.run()
        records.close()
    finally:
        parallel.stop()


def prepare(options: PretrainOptions, device: Any) -> "tuple[Trainer | None, Log]":
    """Build everything up to the first step; no trainer with --dry-run."""
    from megapatch.models.parallel import world_size
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.trainer import checkpoint, data, session
    from megapatch.trainer.metrics import Log

    resumed = checkpoint.newest(options.save)
    begin = resumed or options.model or options.init_from
    assert begin is not None
    source = checkpoint.find_source(begin, None if resumed else options.tokenizer)
    hf, tokenizer = source.hf, Tokenizer(source.tokenizer)
    prefixes, _ = data.parse_blend(options.data_path)
    data.check_data(prefixes, tokenizer, hf["vocab_size"])
    count = data.num_micro_batches(options, options.data_parallel_size(world_size()))
    if options.dry_run:
        print(json.dumps(_described(options, hf, count), indent=1))
        return None, Log([])
    run_state = session.start(options, device, hf, load=resumed is None)
    if resumed is not None:
        checkpoint.resume(run_state, resumed)
        log.info("resuming from %s", resumed)
    records = _open_log(options)
    _record_start(run_state, records, resumed is not None)
    return _trainer(run_state, records, tokenizer, source, count), records


def _trainer(session: "Session", records: "Log", tokenizer: Any, source: Any, count: int) -> "Trainer":
    from functools import partial

    from megapatch.models.layers.spec import mixture_layers
    from megapatch.trainer import data
    from megapatch.trainer.loop import Trainer
    from megapatch.trainer.metrics import flops_per_token

    options = session.options
    assert isinstance(options, PretrainOptions)
    train, valid = data.build_datasets(options, tokenizer)
    batches = partial(data.micro_batches, options=options, device=session.device.torch)
    mixtures = sum(mixture_layers(session.config))
    return Trainer(
        session,
        records=records,
        source=source,
        num_micro_batches=count,
        flops_per_token=flops_per_token(session.config, session.hf["vocab_size"], options.seq_length, mixtures),
        train=lambda first: partial(batches, train, first=first),
        valid=lambda step: partial(batches, valid, first=step * options.global_batch_size),
        eval_steps=data.eval_steps(valid, options) if valid is not None else 0,
    )


def _described(options: PretrainOptions, hf: "HfConfig", count: int) -> dict[str, Any]:
    """The resolved configuration, for --dry-run and the log."""
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
    return {"options": fields, "micro_batches_per_step": count, "model": dict(hf), "versions": versions()}


def _open_log(options: PretrainOptions) -> "Log":
    """The log of this process: rank 0 writes, the others are silent."""
    import torch.distributed as dist

    from megapatch.trainer.metrics import JsonLines, Log, Sink, TensorBoard, WeightsAndBiases

    if dist.get_rank() != 0:
        return Log([])
    sinks: list[Sink] = [JsonLines(options.log_path)]
    if options.tensorboard:
        sinks.append(TensorBoard(options.tensorboard))
    if options.wandb:
        sinks.append(WeightsAndBiases(options.wandb, dataclasses.asdict(options)))
    return Log(sinks)


def _record_start(session: "Session", records: "Log", resumed: bool) -> None:
    import torch.distributed as dist

    parameters = session.parameter_count()
    log.info(f"{parameters:,} parameters on {dist.get_world_size()} processes")
    if resumed:
        records.write("resume", step=session.step, consumed_samples=session.consumed_samples)
    records.write(
        "start",
        config=_described(session.options, session.hf, 0)["options"],  # type: ignore[arg-type]
        world_size=dist.get_world_size(),
        parameters=parameters,
        resumed_from=session.step if resumed else None,
    )


if __name__ == "__main__":
    sys.exit(main())
