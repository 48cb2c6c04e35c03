"""Is a folder of weights complete, is it what its manifest says, and is it safe to load?"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megapatch.models import commit, core_files, family, hf_files
from megapatch.models.cli import UserError
from megapatch.tools.convert import lora
from megapatch.tools.convert.convert import opened
from megapatch.tools.convert.found import Contents

_THREADS = 4
Verdict = dict[str, bool | None]  # complete, verified, safe; None: nothing to tell it by


def judge(found: Contents, config: Path | None, digests: bool, tell: Callable[[int], Any]) -> Verdict:
    """The three verdicts; why one is not good is added to ``found.problems``. ``tell`` hears of bytes digested."""
    placed = found.attempt("complete", _place_all, found, config)
    sealed = found.attempt("verified", _verify, found.folder, digests, tell)
    wrong = {verdict for verdict, _ in found.problems}
    return {
        "complete": False if "complete" in wrong else placed,
        "verified": False if "verified" in wrong else sealed,
        "safe": "safe" not in wrong,
    }


def config_of(found: Contents, config: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the config.json that goes with the weights, and its content; None: there is none."""
    inside = found.folder if found.kind == "hf" else found.folder / core_files.HF_SUBFOLDER
    folder = config or (inside if (inside / hf_files.CONFIG).exists() else None)
    return None if folder is None else (folder, hf_files.config(folder))


def _place_all(found: Contents, config: Path | None) -> bool | None:
    """True when every weight that config.json asks for is there, in its shape, and nothing else; else a UserError."""
    described = config_of(found, config)
    if described is None:
        found.notes.append("no config.json: whether all weights are there is not known; give it with --config")
        return None
    if described[1].get("model_type") not in family.known():
        kind = described[1].get("model_type")
        found.notes.append(f"model_type {kind!r} is not known here, so whether all weights are there is not known")
        return None
    if any(item.file.endswith(".bin") for item in found.items):
        return None
    if _place_adapters(found):
        return True
    with opened(found.kind, found.folder, config) as source:
        for placed in source.model.layout.placed:
            weight = source.weight(placed)
            deque(weight.copies(weight.origin, "", 0, "float32"), maxlen=0)  # refuses gaps and overlaps
        found.notes += source.notes
    return True


def _place_adapters(found: Contents) -> bool:
    """True where all adapters of a run with --lora-rank are there; False where these are weights; else a UserError."""
    try:
        said = lora.said_of(found.folder) if found.kind == "core" else None
    except UserError:  # a damaged manifest, which _verify tells
        said = None
    if said is None:
        return False
    with core_files.Checkpoint(found.folder) as checkpoint:
        found.notes += lora.plan(lora.Adapters(checkpoint, said), "auto").notes  # refuses gaps and overlaps
    return True


def _verify(folder: Path, digests: bool, tell: Callable[[int], Any]) -> bool | None:
    """True when the folder is what its manifest says, None when it has none; a difference is a UserError."""
    manifest = commit.read_manifest(folder)
    if manifest is None:
        return None
    commit.verify(folder, digests=False)
    if not digests:
        return None
    files = {folder / name: said for name, said in manifest["files"].items()}
    with ThreadPoolExecutor(_THREADS) as pool:
        for (path, said), content in zip(files.items(), pool.map(commit.digest, files), strict=True):
            if content != said["xxh3_128"]:
                raise UserError(f"{path}: content differs from {commit.MANIFEST}; it is damaged")
            tell(said["bytes"])
    return True
