"""mp-convert: Hugging Face folder to megatron-core checkpoint and back, byte for byte."""

import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megapatch.models import core_files
from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.commit import verify
from megapatch.tools.convert import to_core, to_hf
from megapatch.tools.convert.plan import Plan
from megapatch.tools.convert.write import write

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-convert --source Qwen3-0.6B --target qwen3-core        # writes qwen3-core/release, ready for training
  mp-convert --source runs/sft --target Qwen3-0.6B-sft      # the newest checkpoint of a run, as a Hugging Face folder
  mp-convert --source qwen3-core --target /tmp/x --dry-run | head   # what would be copied from where
"""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Convert a Hugging Face folder (safetensors) to a megatron-core checkpoint (torch_dist), or back.

    The direction follows from the source. Weights are copied without being loaded; every tensor finds its place or
    the run fails. A core checkpoint carries config.json and the tokenizer, so it needs nothing else on the way back.
    """

    source: Path = opt("a Hugging Face folder, a core checkpoint, or a folder of core checkpoints with a tracker")
    target: Path = opt("folder to write; appears when complete")
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = opt("type of the weights in the target", "keep")
    max_shard_size: Optional[str] = opt(
        "largest .safetensors file, such as 500MB or 5GB (default: as the model came, else 5GB)", None
    )
    jobs: int = opt("files written at the same time", 4, flags=["--jobs", "-j"])
    skip_digests: bool = opt(
        "do not compare the content of a core checkpoint with its manifest: reads it once less", False
    )
    dry_run: bool = opt(
        "print the plan as JSON lines (bytes of each target file, and where from); write nothing", False
    )
    force: bool = opt("replace the target if it exists", False)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError("--jobs must be 1 or more")
        if self.max_shard_size is not None:
            shard_bytes(self.max_shard_size)


def shard_bytes(text: str) -> int:
    """5GB -> 5000000000; KiB, MiB and GiB are powers of 1024 (ValueError)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)(i?)B", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: expected a number with KB, MB, GB, KiB, MiB or GiB")
    power = " KMG".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def convert(options: Options) -> None:
    """Plan, then copy into a staged folder that takes the target's name when complete."""
    source, root = options.source, options.target
    back = core_files.is_core(source)
    target = root if back else core_files.iteration_folder(root, core_files.RELEASE)
    refuse_overlap(core_files.resolve(source) if back else source, target, root)
    plan = _to_hf(options) if back else to_core.plan(source, options.dtype)
    if not back and options.max_shard_size is not None:
        raise UserError("--max-shard-size: only for a Hugging Face target; core checkpoints have no such files")
    for note in plan.notes:
        log.info("%s", note)
    if options.dry_run:
        sys.stdout.writelines(json.dumps(line) + "\n" for line in plan.lines())
        return
    about = {"source": str(options.source), "dtype": options.dtype}
    name_it = (lambda: None) if back else lambda: core_files.write_tracker(root, core_files.RELEASE)
    write(plan, target, root=root, force=options.force, jobs=options.jobs, about=about, name_it=name_it)
    print(target)


def refuse_overlap(source: Path, target: Path, root: Path) -> None:
    """Refuse a target whose writing would change or remove the very folder that is read."""
    read, written = source.resolve(), target.resolve()
    if read in (written, root.resolve()) or read.is_relative_to(written):
        raise UserError(f"--target {root}: is the source {source}, or holds it; choose another folder")
    if core_files.is_core(source) and written.is_relative_to(read):
        raise UserError(f"--target {root}: lies inside the checkpoint {source}; choose a folder beside it")


def _to_hf(options: Options) -> Plan:
    checkpoint = core_files.resolve(options.source)
    if not verify(checkpoint, digests=not (options.skip_digests or options.dry_run)):
        log.warning("%s: no manifest.json; its content cannot be verified", checkpoint)
    limit = options.max_shard_size
    return to_hf.plan(checkpoint, options.dtype, None if limit is None else shard_bytes(limit))


def main(argv: list[str] | None = None) -> int:
    """Exit status of mp-convert."""
    return run(Options, convert, prog="mp-convert", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
