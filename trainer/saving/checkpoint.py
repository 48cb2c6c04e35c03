"""Checkpoints of a training run: model, optimizer, schedule, generators, place in the data; either old or new.

Weights and optimizer are saved free of the layout, so TP, PP and DP may change on resume. Generators are per process
and are restored where the layout is the same, which makes the resumed run equal to the bit.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megapatch.models import commit, core_files, splits
from megapatch.models.cli import UserError
from megapatch.models.family import HfConfig
from megapatch.models.load import hf_folder, sharded_state
from megapatch.models.parallel import Parallel
from megapatch.models.tokenizer import copy_tokenizer, find_tokenizer
from megapatch.trainer.data import data_cache
from megapatch.trainer.options import TrainOptions
from megapatch.trainer.ranks import first, together, warn
from megapatch.trainer.saving import changes, locks, optimizer_state
from megapatch.trainer.session import Session
from megapatch.trainer.tuning import adapters

log = logging.getLogger(__name__)
CONTENT = {"singleton_local_shards": False}  # megatron-core adds to what it is given: pass copies
STAGED = ".tmp"  # ends the names of checkpoints that are not complete


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
        shutil.copyfile(self.config, target / "config.json")  # --init-from may name any file
        copy_tokenizer(self.tokenizer, target)


def find_source(model: Path, tokenizer: Path | None) -> Source:
    """The source that --model or --init-from means: a folder, a core checkpoint, or a config.json."""
    config = model if model.is_file() else hf_folder(model) / "config.json"
    return Source(config, find_tokenizer(tokenizer or config.parent))


def source_in(checkpoint: Path) -> Source:
    """The copies that a checkpoint folder of ours carries."""
    folder = checkpoint / core_files.HF_SUBFOLDER
    return Source(folder / "config.json", folder)


def newest(root: Path) -> Path | None:
    """The checkpoint folder to resume from, None in a fresh folder."""
    if core_files.read_tracker(root) is not None:
        return core_files.resolve(root)
    found = list(root.glob(f"iter_{'[0-9]' * 7}"))
    if len(found) == 1 and commit.read_manifest(found[0]) is not None:
        return found[0]  # the first one, complete: of a run that was killed before it named it in the tracker
    if found:
        raise UserError(f"{root}: holds checkpoints but no tracker{core_files.older(root)}, or name another --save")
    return None


def claim(root: Path, resumed: Path | None) -> None:
    """Keep other runs out of --save, and remove what one that was killed while saving left (every rank must call).

    Each rank has looked for what to resume from by itself: UserError where another run has saved meanwhile.
    """
    name = resumed.name if resumed else "nothing"
    agreed = [name]
    torch.distributed.broadcast_object_list(agreed)
    with together():
        if name != agreed[0]:
            told = f"{name} was the newest checkpoint here, {agreed[0]} for rank 0"
            raise UserError(f"{root}: {told}; run again to go on")
        if not first():
            return
        locks.hold(root)
        if newest(root) != resumed:
            raise UserError(f"{root}: another run has saved there since this one started; run again to go on from that")
        if resumed is not None and core_files.read_tracker(root) is None:
            core_files.write_tracker(root, int(resumed.name.removeprefix("iter_")))
        for old in root.glob(f"iter_*{STAGED}"):
            log.info("%s: of a save, or a removal, that was cut off; removed", old)
            shutil.rmtree(old)


def refuse_other_model(given: Path, resumed: Path) -> None:
    """Refuse to resume with another model than the one that is there (UserError); one that is gone is not missed."""
    config = given if given.is_file() else hf_folder(given) / "config.json" if given.is_dir() else given
    if config.is_file() and Source(config, config.parent).hf != source_in(resumed).hf:
        raise UserError(
            f"{config}: differs from the config.json of {resumed}, from which this run would resume; "
            "name the model that it started from, or another --save"
        )


def state(session: Session, *, loading: bool, same_layout: bool = True) -> dict[str, Any]:
    """The run's state as megatron-core shards it."""
    names = ["model"] if len(session.models) == 1 else [f"model{i}" for i in range(len(session.models))]
    state: dict[str, Any] = {
        name: adapters.saved(sharded_state(model, **CONTENT), session.options)
        for name, model in zip(names, session.models, strict=True)
    }
    state["optimizer"] = optimizer_state.sharded(session.optimizer, dict(state), loading=loading)
    if same_layout:
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        state["generators"] = ShardedObject(
            "generators", None if loading else session.device.generator_state(), (world,), (rank,)
        )
    if not loading:
        state["opt_param_scheduler"] = session.schedule.state_dict()
        state |= {"checkpoint_version": 3.0, "iteration": session.step}
        state["megapatch"] = {
            "tool": session.options.tool,
            "consumed_samples": session.consumed_samples,
            "updates": session.updates,
            "layout": layout(session.options),
            "options": changes.remembered(session.options),
            "data": session.data,
            "precision": session.options.precision,
            "predicts": bool(session.options.mtp_loss_weight),
            **adapters.described(session.options, session.base),
        }
    return state


def layout(options: Parallel) -> dict[str, Any]:
    sizes = {name: getattr(options, name) for name in ("tp", "pp", "vpp", "cp", "ep", "expert_tp", "sequence_parallel")}
    uneven = {name: value for name in splits.OPTIONS if (value := getattr(options, name)) is not None}
    return sizes | uneven | {"world_size": torch.distributed.get_world_size()}


def resume(session: Session, folder: Path) -> None:
    """Continue from a checkpoint folder (every rank must call)."""
    check(folder)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    with together():
        ours = _training_state(common, folder, session.options)
        adapters.check(ours, folder, session.options, session.base)
    same = ours["layout"] == layout(session.options)
    if not same:
        warn(log, "%s: saved at another layout (%s); dropout draws new random numbers", folder, ours["layout"])
    for changed in changes.told(ours["options"], session.options):
        warn(log, "%s", changed)
    loaded = dist_checkpointing.load(state(session, loading=True, same_layout=same), str(folder))
    for i, model in enumerate(session.models):
        ours_of_model = loaded.get("model" if len(session.models) == 1 else f"model{i}", {})  # a chunk may be empty
        model.load_state_dict(ours_of_model, strict=session.options.lora is None)
    session.updates, session.data = ours["updates"], ours.get("data", "")
    optimizer_state.fill(session.optimizer, loaded["optimizer"], session.updates)
    schedule = common["opt_param_scheduler"]  # counts samples, its options are in steps
    before = ours["options"].get("global_batch_size", session.options.global_batch_size)
    steps = schedule["num_steps"] // before
    session.schedule.load_state_dict(schedule | {"num_steps": steps * session.options.global_batch_size})
    session.step, session.consumed_samples = common["iteration"], ours["consumed_samples"]
    if same:
        session.device.set_generator_state(loaded["generators"])


def reads(session: Session, prefixes: list[str]) -> None:
    """What is trained on lies here; a warning where a resumed run had other content (every rank must call)."""
    found = data_cache.key(prefixes, [])
    if session.data not in ("", found):
        warn(log, "%s: not the data of the run so far: some may be trained on again, some never", " ".join(prefixes))
    session.data = found


def _training_state(common: dict[str, Any], folder: Path, options: TrainOptions) -> dict[str, Any]:
    """What this module saved beside weights and optimizer; UserError where it is not there, or does not fit."""
    if "megapatch" not in common:
        raise UserError(f"{folder}: holds no training state; start from its weights with --model, and another --save")
    ours = common["megapatch"]
    ours.setdefault("options", ours.get("order", {}))  # as it was called while it held fewer
    if (tool := ours.get("tool", options.tool)) != options.tool:
        raise UserError(
            f"{folder}: of a run of {tool}, which {options.tool} cannot continue; start from its weights with "
            f"--model {folder}, and another --save"
        )
    if ours["precision"] != options.precision:
        raise UserError(
            f"--precision was {ours['precision']}, now {options.precision}: such a run cannot be continued; "
            f"start from its weights with --model {folder}, and another --save"
        )
    if ours.get("predicts", False) != bool(options.mtp_loss_weight):
        had = "with" if ours.get("predicts") else "without"
        raise UserError(
            f"--mtp-loss-weight {options.mtp_loss_weight}: the run began {had} layers for multi-token prediction; "
            f"start from its weights with --model {folder}, and another --save"
        )
    return ours


def check(folder: Path) -> None:
    """Refuse a damaged or unsafe checkpoint on every rank alike; each process verifies a share of the files."""
    with together():
        core_files.load_metadata_safely(folder)
        share = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        try:
            verified = commit.verify(folder, share=share)
        except UserError as error:
            raise UserError(f"{error}{core_files.older(folder.parent, folder)}") from error
        if not verified:
            warn(log, "%s: has no manifest, so its content is not verified", folder)
