"""Checkpoints of a training run: model, optimizer, schedule, generators, place in the data; either old or new.

Weights and optimizer are saved free of the layout, so TP, PP and DP may change on resume. Generators are per process
and are restored where the layout is the same, which makes the resumed run equal to the bit.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megapatch.models import commit, core_files
from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig
from megapatch.models.load import hf_folder
from megapatch.models.parallel import Parallel
from megapatch.models.tokenizer import copy_tokenizer, find_tokenizer
from megapatch.trainer.session import Session

log = logging.getLogger(__name__)
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}  # megatron-core adds to what it is given: pass copies
REMEMBERED = ("seed", "seq_length", "global_batch_size", "train_iters", "data_path", "split")  # decide the data order


@dataclass(frozen=True)
class Source:
    """Where a run's config.json and tokenizer come from; every checkpoint gets a copy."""

    config: Path
    tokenizer: Path  # folder

    @property
    def hf(self) -> HfConfig:
        """config.json, read."""
        try:
            return json.loads(self.config.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{self.config}: no such file; a model folder or a config.json is needed") from error
        except ValueError as error:
            raise UserError(f"{self.config}: not JSON ({error})") from error

    def copy(self, target: Path) -> None:
        """Put config.json, the tokenizer and what else describes the model into the folder ``target``."""
        target.mkdir()
        shutil.copyfile(self.config, target / self.config.name)
        copy_tokenizer(self.tokenizer, target)


def find_source(model: Path, tokenizer: Path | None) -> Source:
    """The source that --model or --init-from means: a folder, a core checkpoint, or a config.json."""
    config = model if model.is_file() else hf_folder(model) / "config.json"
    return Source(config, find_tokenizer(tokenizer or config.parent))


def newest(root: Path) -> Path | None:
    """The checkpoint folder to resume from, None in a fresh folder."""
    return core_files.resolve(root) if core_files.read_tracker(root) is not None else None


def save(session: Session, source: Source) -> Path:
    """Write SAVE/iter_N and make it the newest (every rank must call)."""
    root = session.options.save
    target = core_files.iteration_folder(root, session.step)
    stage = target.with_name(target.name + ".tmp")
    if _first():
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    _barrier()
    for chunk in session.chunks if session.options.overlap_param_gather else ():
        chunk.disable_forward_pre_hook()
    with commit.naming_full_disks(target):
        dist_checkpointing.save(_state(session, loading=False), str(stage), content_metadata=dict(CONTENT))
        for chunk in session.chunks if session.options.overlap_param_gather else ():
            chunk.enable_forward_pre_hook()
        if _first():
            _finish(session, stage, target, source)
    _barrier()
    return target


def _finish(session: Session, stage: Path, target: Path, source: Source) -> None:
    """Seal the staged folder, move it into place, name it in the tracker, and remove what --keep does not keep."""
    source.copy(stage / core_files.HF_SUBFOLDER)
    commit.seal(stage, tool="mp-pretrain", about={"step": session.step, "layout": _layout(session.options)})
    if target.exists():
        shutil.rmtree(target)
    os.rename(stage, target)
    commit.fsync(target.parent)
    core_files.write_tracker(target.parent, session.step)
    if session.options.keep:
        for old in sorted(target.parent.glob("iter_???????"))[: -session.options.keep]:
            shutil.rmtree(old)


def _state(session: Session, *, loading: bool, same_layout: bool = True) -> dict[str, Any]:
    """The run's state as megatron-core shards it."""
    names = ["model"] if len(session.models) == 1 else [f"model{i}" for i in range(len(session.models))]
    state: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=dict(CONTENT))
        for name, model in zip(names, session.models, strict=True)
    }
    state["optimizer"] = session.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(CONTENT))
    if same_layout:
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        state["generators"] = ShardedObject(
            "generators", None if loading else session.device.generator_state(), (world,), (rank,)
        )
    if not loading:
        state["opt_param_scheduler"] = session.schedule.state_dict()
        state |= {"checkpoint_version": 3.0, "iteration": session.step}
        state["megapatch"] = {
            "consumed_samples": session.consumed_samples,
            "layout": _layout(session.options),
            "order": _order(session.options),
        }
    return state


def _layout(options: Parallel) -> dict[str, Any]:
    sizes = {name: getattr(options, name) for name in ("tp", "pp", "vpp", "cp", "ep", "expert_tp", "sequence_parallel")}
    return sizes | {"world_size": torch.distributed.get_world_size()}


def _order(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in REMEMBERED if hasattr(options, name)}


def resume(session: Session, folder: Path) -> None:
    """Continue from a checkpoint folder (every rank must call)."""
    check(folder)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if "megapatch" not in common:
        raise UserError(f"{folder}: holds no training state; start from its weights with --model, and another --save")
    ours = common["megapatch"]
    same = ours["layout"] == _layout(session.options)
    if not same:
        log.warning("%s: saved at another layout (%s); dropout draws new random numbers", folder, ours["layout"])
    for name, value in _order(session.options).items():
        if ours["order"].get(name, value) != value:
            log.warning(
                "--%s was %s, now %s: the order of data changes", name.replace("_", "-"), ours["order"][name], value
            )
    state = dist_checkpointing.load(_state(session, loading=True, same_layout=same), str(folder))
    for i, model in enumerate(session.models):
        model.load_state_dict(state["model" if len(session.models) == 1 else f"model{i}"])
    session.optimizer.load_state_dict(state["optimizer"])
    session.schedule.load_state_dict(common["opt_param_scheduler"])
    session.step, session.consumed_samples = common["iteration"], ours["consumed_samples"]
    if same:
        session.device.set_generator_state(state["generators"])


def check(folder: Path) -> None:
    """Refuse a damaged or unsafe checkpoint on every rank alike; each process verifies a share of the files."""
    problem: list[str | None] = [None]
    try:
        core_files.load_metadata_safely(folder)
        share = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if not commit.verify(folder, share=share):
            log.warning("%s: has no manifest, so its content is not verified", folder)
    except UserError as error:
        problem = [str(error)]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, problem[0])
    if any(found):
        raise UserError(next(text for text in found if text))


def _first() -> bool:
    return torch.distributed.get_rank() == 0


def _barrier() -> None:
    torch.distributed.barrier()
