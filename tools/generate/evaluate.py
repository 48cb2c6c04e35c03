"""lm_eval with the model `megapatch`: python -m megapatch.tools.generate.evaluate run --model megapatch ..."""

import runpy
import sys

from megapatch.models.cli import log_to_stderr


def main() -> None:
    """Make the model known, then do as lm_eval does."""
    try:
        import megapatch.tools.generate.lm_eval_model  # noqa: F401  registers it
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit("lm_eval is not installed: pip install 'megapatch[eval]'")
    log_to_stderr("megapatch")
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
