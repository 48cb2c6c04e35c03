"""Runs training cases one after the other in the same processes; started by tests under torchrun.

    torchrun --nproc-per-node 4 tests/train_worker.py cases.json results.json

cases.json: {name: [mp-pretrain arguments]}; results.json: {name: [log records]}, written by rank 0. One start for many
layouts, because starting processes and importing megatron-core takes longer than training a tiny model.
"""

import json
import sys
import traceback
from pathlib import Path

import torch.distributed as dist
from megapatch.models import cli, device
from megapatch.trainer.options import PretrainOptions
from megapatch.trainer.pretrain import prepare


class Memory:
    """A sink that keeps the records."""

    def __init__(self) -> None:
        self.records: list[dict] = []

    def write(self, record: dict) -> None:
        self.records.append(dict(record))

    def close(self) -> None:
        pass


def run_case(arguments: list[str]) -> list[dict]:
    from megatron.core import parallel_state

    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(arguments)
    try:
        trainer, records = prepare(options, device.start(options.device))
        memory = Memory()
        records.sinks.append(memory)
        if not options.save_interval:
            trainer.saved_step = options.train_iters  # nothing to save: these cases look at the losses only
        trainer.run()
        records.close()
        return memory.records
    finally:
        parallel_state.destroy_model_parallel()


def main(cases: Path, results: Path) -> None:
    found = {}
    for name, arguments in json.loads(cases.read_text()).items():
        try:
            found[name] = run_case(arguments)
        except Exception:
            found[name] = [{"event": "error", "text": traceback.format_exc()}]
            print(name, found[name][0]["text"], file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
