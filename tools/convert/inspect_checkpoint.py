"""mp-inspect-checkpoint: what is in a folder of weights, and whether it is complete, undamaged and safe to load."""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from megapatch.models.cli import FAILED, OK, Common, opt, run
from megapatch.tools.convert.folded import WIDTH, Kind, by_dtype, fold, printable, table
from megapatch.tools.convert.found import Contents, Item
from megapatch.tools.convert.judge import Verdict, config_of, judge

EXAMPLES = """examples:
  mp-inspect-checkpoint Qwen3-0.6B                    # a table, and the verdict
  mp-inspect-checkpoint run --json | jq .verdict      # the newest checkpoint of a run, for a program
  mp-inspect-checkpoint iter_0000100 --skip-digests && echo good    # without reading the weights

verdict: complete, all that config.json asks for is there, in its shape, and every file is long enough;
  verified, the content is what manifest.json says (foreign folders have none);
  safe, the pickles name nothing that could run when they are loaded. Exit status 1 when one of them is "no".
--json: one object: path, kind (hf, core, legacy), model, layout, dtypes, state (optimizer and the like), tensors
  (name, count, dtype, shape, parts, bytes, parameters, file; folded unless --all), notes, verdict (true, false, or
  null: nothing to tell it by) and problems ([verdict, what is wrong]).
"""
_ANSWERS = {True: "yes", False: "NO", None: "not known"}


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Tell what is in a folder of weights and whether it is complete, verified and safe. Runs nothing that is in it.

    It may be a Hugging Face folder, a megatron-core checkpoint (torch_dist), Megatron-LM's folder of mp_rank_XX, or a
    folder of checkpoints with a tracker. Weights are not loaded; to compare digests, files are read once.
    """

    path: Path = opt("the folder to look at", flags=["path"], metavar="PATH")
    config: Optional[Path] = opt("folder with the config.json of the model, for a checkpoint that carries none", None)
    all: bool = opt("a line for each tensor, not one for all layers and experts of a kind", False)
    skip_digests: bool = opt("do not compare the content of files with manifest.json: reads no weights", False)
    json: bool = opt("print one JSON object (keys: see below)", False)


def inspect(options: Options) -> int:
    """Print what is there; 1 when a verdict is not good."""
    from tqdm import tqdm

    from megapatch.tools.convert.contents import read

    found = read(options.path)
    with tqdm(unit="B", unit_scale=True, desc="digests", disable=not sys.stderr.isatty()) as bar:
        verdict = judge(found, options.config, not options.skip_digests, bar.update)
    said = summary(options.path, found, verdict, options.config)
    kinds = fold((item for item in found.items if not item.state), options.all)
    if options.json:
        print(json.dumps(said | {"tensors": [_said_of(kind) for kind in kinds]}, ensure_ascii=False))
    else:
        sys.stdout.writelines(f"{line}\n" for line in [*table(kinds, options.all), "", *lines(said)])
    return FAILED if False in verdict.values() else OK


def _said_of(kind: Kind) -> dict[str, Any]:
    said = asdict(kind)
    return said | {"bytes": said.pop("size"), "parameters": kind.parameters}


def summary(source: Path, found: Contents, verdict: Verdict, config: Path | None) -> dict[str, Any]:
    """All but the tensors, as --json has it."""
    weights, state = ([item for item in found.items if item.state is kind] for kind in (False, True))
    if found.foreign:
        names = ", ".join(sorted(found.foreign))
        found.notes.append(f"classes in the run's options that are not known here, and were not imported: {names}")
    return {
        "path": str(source),
        "folder": str(found.folder),
        "kind": found.kind,
        "model": _model(found, config),
        "layout": found.layout,
        "dtypes": by_dtype(weights),
        "state": _sums(state) | {"objects": found.objects},
        "notes": found.notes,
        "verdict": verdict,
        "problems": found.problems,
    }


def _sums(items: Sequence[Item]) -> dict[str, int]:
    return {"tensors": len(items), "bytes": sum(item.size for item in items)}


def _model(found: Contents, config: Path | None) -> dict[str, Any]:
    """What config.json says of the model, as far as it can be read."""
    described = found.attempt("complete", config_of, found, config)
    if described is None:
        return {}
    hf = described[1]
    said = {"model_type": str(hf.get("model_type"))}
    sizes = {
        "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "hidden": ("hidden_size", "n_embd"),
        "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
        "vocabulary": ("vocab_size",),
    }
    return said | {
        name: next(hf[key] for key in keys if hf.get(key)) for name, keys in sizes.items() if any(map(hf.get, keys))
    }


def lines(said: dict[str, Any]) -> list[str]:
    """The summary for people."""
    kinds = {"hf": "Hugging Face folder", "core": "torch_dist checkpoint", "legacy": "checkpoint of ranks (mp_rank_XX)"}
    told = [("path", said["folder"]), ("kind", kinds[said["kind"]])]
    told += [("model", _pairs(said["model"]))] if said["model"] else []
    told += [("layout", _pairs(said["layout"]))] if said["layout"] else []
    for dtype, sums in said["dtypes"].items():
        told.append((dtype, f"{sums['tensors']:,} tensors, {sums['parameters']:,} parameters, {sums['bytes']:,} bytes"))
    state = said["state"]
    if state["tensors"] or state["objects"]:
        told.append(("state", f"{state['tensors']:,} tensors, {state['bytes']:,} bytes, {state['objects']:,} objects"))
    told += [("note", note) for note in said["notes"]]
    for name, answer in said["verdict"].items():
        told.append((name, _ANSWERS[answer]))
        told += [("", problem) for verdict, problem in said["problems"] if verdict == name]
    return [line for name, text in told for line in _wrapped(name, printable(" ".join(str(text).split())))]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{name:<10}",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _pairs(said: dict[str, Any]) -> str:
    flat = {name: value for name, value in said.items() if not isinstance(value, dict)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in flat.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of mp-inspect-checkpoint."""
    return run(Options, inspect, prog="mp-inspect-checkpoint", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
