"""How far each family's logits are from the reference's, on its tiny model in fp32: python tests/bench/architectures.py

One JSON line for each family on stdout: what mp-families --measured reads. The reference is transformers, or, for those
that it lacks, the plain PyTorch of tests/references.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model_folders, references

from model_folders import FAMILIES, make, soften

from megapatch.tools.convert.convert import main as convert
from megapatch.tools.verify.verify import main as verify

TOKENS = 128  # as the tests of families, which hold the difference to 1e-5


def quietly(main: Any, *argv: str) -> str:
    """What a tool prints; SystemExit where it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([*argv])
    if status:
        raise SystemExit(f"{main.__module__} {' '.join(argv)}: exit status {status}: {printed.getvalue()}")
    return printed.getvalue()


def measure(name: str) -> dict[str, Any]:
    """Convert a tiny model of a family and compare logits."""
    with tempfile.TemporaryDirectory() as folder:
        hf, core = str(soften(make(Path(folder) / "hf", name, dtype=torch.float32))), f"{folder}/core"
        quietly(convert, "--source", hf, "--target", core)
        said = json.loads(quietly(verify, "--source", hf, "--target", core, "--tokens", str(TOKENS), "--atol", "1"))
    return {"model_type": name, **{key: said[key] for key in ("max_abs_diff", "max_abs_logit")}, "tokens": TOKENS}


if __name__ == "__main__":
    for family_name in FAMILIES:
        print(json.dumps(measure(family_name)), flush=True)
