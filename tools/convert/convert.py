"""mp-convert: checkpoints of Hugging Face, megatron-core and Megatron-LM into each other, byte for byte."""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from megapatch.models import core_files, hf_files
from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.commit import verify
from megapatch.models.parallel import Parallel
from megapatch.models.splits import ENDS
from megapatch.tools.convert import lora, to_core, to_hf, to_legacy
from megapatch.tools.convert.compare import compare
from megapatch.tools.convert.from_core import CoreSource
from megapatch.tools.convert.from_hf import HfSource
from megapatch.tools.convert.from_legacy import LegacySource
from megapatch.tools.convert.plan import Plan
from megapatch.tools.convert.progress import Progress
from megapatch.tools.convert.ranks import ranks_of
from megapatch.tools.convert.source import Source, kind_of
from megapatch.tools.convert.write import write

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-convert --source Qwen3-0.6B --target qwen3-core        # writes qwen3-core/release, ready for training
  mp-convert --source runs/sft --target Qwen3-0.6B-sft      # the newest checkpoint of a run, as a Hugging Face folder
  mp-convert --source qwen3-core --target qwen3-mp --to legacy --tp 2 --pp 2   # one file for each rank
  mp-convert --source DeepSeek-V3 --target v3-core --chunk tp=8,pp=4,ep=8      # FP8 to bf16, cut for this layout
  mp-convert --source Qwen3-0.6B --target qwen3-core --verify      # it exists by now: compared, tensor by tensor
  mp-convert --source runs/lora --target qwen3-tuned --merge-lora  # adapters, added to the weights they belong to
  mp-convert --source runs/lora --target adapter --to peft         # or by themselves, for peft
  mp-convert --source qwen3-core --target /tmp/x --dry-run | head   # what would be copied from where
"""


def _parallel(name: str) -> Any:
    """An option as the trainer declares it; None when it is not given."""
    return field(default=None, metadata=Parallel.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Convert between Hugging Face folders (safetensors), megatron-core checkpoints (torch_dist) and Megatron-LM's
    checkpoints of one file for each rank (legacy), in every direction.

    What the source is follows from its files. Weights are copied without being loaded; every tensor finds its place
    or the run fails. What is written carries config.json and the tokenizer, so it needs nothing else on the way back.
    """

    source: Path = opt("a Hugging Face folder, a checkpoint, or a folder of checkpoints with a tracker")
    target: Path = opt("folder to write; appears when complete")
    to: Literal["auto", "core", "hf", "legacy", "peft"] = opt(
        "what to write; auto: core of a Hugging Face folder, else hf; peft: the adapters of a run with --lora-rank",
        "auto",
    )
    merge_lora: bool = opt(
        "of a run with --lora-rank: add its adapters to the weights that they belong to, in float32 before the cast",
        False,
    )
    base: Optional[Path] = opt("for --merge-lora: those weights, if they are not where the run found them", None)
    config: Optional[Path] = opt(
        "Hugging Face folder with config.json and tokenizer, for a checkpoint that carries none", None
    )
    dtype: Literal["auto", "keep", "bf16", "fp16", "fp32"] = opt(
        "type of the weights in the target; auto: as they are, but FP8 as bf16", "auto"
    )
    max_shard_size: Optional[str] = opt(
        "largest .safetensors file, such as 500MB or 5GB (default: as the model came, else 5GB)", None
    )
    chunk: Optional[str] = opt(
        "cut the weights of a core target for a layout, such as tp=8,pp=4,ep=2 (also vpp=, etp=): its ranks read each "
        "byte once; any other layout can load it too",
        None,
    )
    tp: Optional[int] = _parallel("tp")
    pp: Optional[int] = _parallel("pp")
    vpp: Optional[int] = _parallel("vpp")
    decoder_first_pipeline_num_layers: Optional[int] = _parallel("decoder_first_pipeline_num_layers")
    decoder_last_pipeline_num_layers: Optional[int] = _parallel("decoder_last_pipeline_num_layers")
    ep: Optional[int] = _parallel("ep")
    etp: Optional[int] = _parallel("etp")
    make_vocab_size_divisible_by: Optional[int] = opt(
        "rows of the embedding on each rank of a layout are a multiple of this (default: 128, as Megatron-LM)", None
    )
    spec: Optional[str] = opt(
        "layers of the model that loads a legacy or chunked target: Transformer Engine's or core's own (default: te)",
        None,
        choices=["te", "local"],
    )
    experts: Optional[str] = opt(
        "experts in a legacy target: as --moe-grouped-gemm has them, or one by one (default: grouped)",
        None,
        choices=["grouped", "sequential"],
    )
    jobs: int = opt("files written at the same time", 4, flags=["--jobs", "-j"])
    skip_digests: bool = opt(
        "do not compare the content of the source with its manifest, where it has one: reads it once less", False
    )
    dry_run: bool = opt(
        "print the plan as JSON lines (bytes of each target file, and where from); write nothing", False
    )
    verify: bool = opt(
        "read source and target again and compare them by the plan, after writing or, where the target exists, "
        "instead: exit status 1 names the first tensor that departs",
        False,
    )
    force: bool = opt("replace the target if it exists", False)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError("--jobs must be 1 or more")
        if self.max_shard_size is not None:
            shard_bytes(self.max_shard_size)
        if self.chunk is not None:
            chunk_layout(self.chunk)
        if self.base is not None and not self.merge_lora:
            raise ValueError("--base needs --merge-lora")
        if self.merge_lora and self.to == "peft":
            raise ValueError("--merge-lora: not with --to peft, which keeps adapters by themselves")
        if self.config is not None and (self.merge_lora or self.to == "peft"):
            raise ValueError("--config: not for adapters, which carry their own")
        if self.verify and self.dry_run:
            raise ValueError("--verify: not with --dry-run, which neither writes nor reads weights")
        self.layout()
        if self.make_vocab_size_divisible_by is not None and self.make_vocab_size_divisible_by < 1:
            raise ValueError("--make-vocab-size-divisible-by must be 1 or more")

    def given(self) -> dict[str, str | int]:
        """What was said of a layout, for the manifest."""
        said = {name: getattr(self, name) for name in (*_SIZES, "chunk", "spec", "experts")}
        return {name: value for name, value in said.items() if value is not None}

    def layout(self) -> Parallel:
        """The layout that --tp and the like give (ValueError)."""
        return _layout({name: getattr(self, name) for name in _SIZES})


_FOLDERS = ("hf", "peft")  # targets without a tracker
_SIZES = ("tp", "pp", "vpp", "ep", "etp", *ENDS)
_ONLY = {  # option -> the targets for which it can take effect
    **dict.fromkeys((*_SIZES, "experts"), ("legacy",)),
    "chunk": ("core",),
    "max_shard_size": ("hf",),
    "make_vocab_size_divisible_by": ("legacy", "core"),
    "spec": ("legacy", "core"),
}


def _layout(given: Mapping[str, int | None]) -> Parallel:
    sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name.replace('_', '-')} {size}: must be at least 1")
    return Parallel(**sizes, sequence_parallel=sizes.get("tp", 1) > 1)


def chunk_layout(text: str) -> Parallel:
    """tp=8,pp=4 -> that layout (ValueError)."""
    given = {}
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if name not in _SIZES or not size.isdigit() or name in given:
            raise ValueError(f"--chunk {text}: expected sizes of {', '.join(_SIZES)}, such as tp=8,pp=4")
        given[name] = int(size)
    return _layout(given)


def shard_bytes(text: str) -> int:
    """5GB -> 5000000000; KiB, MiB and GiB are powers of 1024 (ValueError)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)(i?)B", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: expected a number with KB, MB, GB, KiB, MiB or GiB")
    power = " KMG".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def convert(options: Options) -> None:
    """Plan, then copy into a staged folder that takes the target's name when complete."""
    kind, source = kind_of(options.source)
    to = options.to if options.to != "auto" else "core" if kind == "hf" else "hf"
    adapters = options.merge_lora or to == "peft"
    _refuse_options(options, kind, to)
    _refuse_adapters(source, adapters)
    root = options.target
    target = root if to in _FOLDERS else core_files.iteration_folder(root, core_files.RELEASE)
    refuse_overlap(source, target, root)
    if not verify(source, digests=not (options.skip_digests or options.dry_run)) and kind != "hf":
        log.warning("%s: no manifest.json; its content cannot be verified", source)
    plan = _plan_of_adapters(options, to, source) if adapters else _plan_of_weights(options, to, kind, source)
    for note in plan.notes:
        log.info("%s", note)
    if options.dry_run:
        sys.stdout.writelines(json.dumps(line) + "\n" for line in plan.lines())
        return
    if not options.verify or options.force or not any(target.glob("*")):
        about = {"source": str(options.source), "dtype": options.dtype, "to": to} | options.given()
        name_it = (lambda: None) if to in _FOLDERS else lambda: core_files.write_tracker(root, core_files.RELEASE)
        write(plan, target, root=root, force=options.force, jobs=options.jobs, about=about, name_it=name_it)
    if options.verify:
        with Progress(sum(entry.size for entry in plan.entries)) as progress:
            compare(plan, target, options.jobs, progress.add)
    print(target)


def _refuse_options(options: Options, kind: str, to: str) -> None:
    """Refuse options that cannot take effect (UserError)."""
    for name, targets in _ONLY.items():
        if getattr(options, name) is not None and to not in targets:
            raise UserError(f"--{name.replace('_', '-')}: only for --to {' or '.join(targets)}; this is --to {to}")
    if options.config is not None and kind == "hf":
        raise UserError("--config: only for a checkpoint; a Hugging Face folder has its own config.json")
    for name in ("make_vocab_size_divisible_by", "spec"):
        if to == "core" and getattr(options, name) is not None and options.chunk is None:
            raise UserError(f"--{name.replace('_', '-')}: needs --chunk; weights that are whole fit every model")


def _refuse_adapters(source: Path, asked: bool) -> None:
    """Refuse adapters where weights are expected, and the other way round (UserError)."""
    if bool(lora.said_of(source)) != asked:
        raise UserError(
            f"{source}: holds no adapters; --merge-lora and --to peft are for runs with --lora-rank"
            if asked
            else f"{source}: holds adapters, not weights; give --merge-lora, or --to peft for the adapters alone"
        )


def _plan_of_weights(options: Options, to: str, kind: str, source: Path) -> Plan:
    with opened(kind, source, options.config) as weights:
        return _plan(options, to, weights)


def _plan_of_adapters(options: Options, to: str, source: Path) -> Plan:
    said = lora.said_of(source)
    assert said is not None, "refused before"
    with core_files.Checkpoint(source) as checkpoint:
        adapters = lora.Adapters(checkpoint, said)
        if to == "peft":
            return lora.plan(adapters, options.dtype)
        digests = not (options.skip_digests or options.dry_run)
        with lora.merged(adapters, options.base, opened, digests=digests) as weights:
            return _plan(options, to, weights)


@contextlib.contextmanager
def opened(kind: str, folder: Path, config: Path | None) -> Iterator[Source]:
    """The weights of a folder of this kind."""
    if kind == "hf":
        yield HfSource(folder)
    elif kind == "legacy":
        yield LegacySource(folder, config)
    else:
        with core_files.Checkpoint(folder) as checkpoint:
            yield CoreSource(checkpoint, config)


def _plan(options: Options, to: str, source: Source) -> Plan:
    hf, multiple, spec = source.model.config, options.make_vocab_size_divisible_by or 128, options.spec or "te"
    if to == "hf":
        limit = options.max_shard_size
        return to_hf.plan(source, options.dtype, None if limit is None else shard_bytes(limit))
    if to == "core":
        layout = None if options.chunk is None else chunk_layout(options.chunk)
        return to_core.plan(source, options.dtype, None if layout is None else ranks_of(hf, layout, multiple, spec))
    names = to_legacy.Names(spec, options.experts or "grouped")
    return to_legacy.plan(source, options.dtype, ranks_of(hf, options.layout(), multiple, spec), names)


def refuse_overlap(source: Path, target: Path, root: Path) -> None:
    """Refuse a target whose writing would change or remove the very folder that is read."""
    read, written = source.resolve(), target.resolve()
    beside = written != root.resolve() and read.parent == root.resolve()  # its tracker would name the new one
    if read in (written, root.resolve()) or read.is_relative_to(written) or beside:
        raise UserError(f"--target {root}: is the source {source}, or holds it; choose another folder")
    if not (source / hf_files.CONFIG).is_file() and written.is_relative_to(read):
        raise UserError(f"--target {root}: lies inside the checkpoint {source}; choose a folder beside it")


def main(argv: list[str] | None = None) -> int:
    """Exit status of mp-convert."""
    return run(Options, convert, prog="mp-convert", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
