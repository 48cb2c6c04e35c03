"""lm_eval with the model `megapatch`: python -m megapatch.tools.generate.evaluate run --model megapatch ..."""

import os
import runpy
import sys

from megapatch.models.cli import log_to_stderr

_WRITES = ("--output_path", "-o")  # with a value
_SAMPLES = ("--log_samples", "-s")  # need the former


def main() -> None:
    """Make the model known, then do as lm_eval does."""
    try:
        import megapatch.tools.generate.lm_eval_model  # noqa: F401  registers it
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit("lm_eval is not installed: pip install 'megapatch[eval]'")
    log_to_stderr("megapatch")
    if os.environ.get("RANK", "0") != "0":  # all processes of a layout do the same; the first one tells
        sys.argv = silent(sys.argv)
        sys.stdout = open(os.devnull, "w")
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)


def silent(arguments: list[str]) -> list[str]:
    """Arguments of lm_eval without those that write files."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if not skip and word not in (*_WRITES, *_SAMPLES) and not word.startswith("--output_path="):
            kept.append(word)
        skip = not skip and word in _WRITES
    return kept


if __name__ == "__main__":
    main()
