"""mp-new-model: a Hugging Face folder with random weights, to train from scratch or to try things out."""

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.commit import refuse_existing, staged_folder
from megapatch.tools.convert.plan import DTYPES

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-new-model --model-type qwen3 --tokenizer my-tokenizer --target qwen3-tiny \\
      --set hidden_size=256 intermediate_size=768 num_hidden_layers=6 num_attention_heads=8 \\
            num_key_value_heads=4 head_dim=32 max_position_embeddings=1024 tie_word_embeddings=true
  mp-new-model --config Llama-3.2-1B/config.json --tokenizer Llama-3.2-1B --seed 7 --target llama-1b-random
"""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Make a Hugging Face folder with random weights: config.json, safetensors, tokenizer.

    Start from a config.json, or from the defaults that transformers has for a model type (its first release, often
    7B parameters: set the sizes). The same options and seed give the same bytes.
    """

    config: Optional[Path] = opt("config.json, or a folder that has one, to start from", None)
    model_type: Optional[str] = opt("model type to start from, such as llama or qwen3", None)
    set: list[str] = opt(
        "KEY=VALUE settings of config.json, such as hidden_size=128; values are JSON, or else text",
        [],
        nargs="+",
        repeat=True,
    )
    tokenizer: Optional[Path] = opt(
        "folder with a tokenizer: copied, and vocab_size and the ids of bos, eos and pad follow from it", None
    )
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)
    vocab_multiple: int = opt("round vocab_size of the tokenizer up to a multiple of this many tokens", 1)
    seed: int = opt("seed of the random weights", 1234)
    dtype: Literal["bf16", "fp16", "fp32"] = opt("type of the weights", "bf16")
    target: Path = opt("folder to write; appears when complete")
    force: bool = opt("replace the target if it exists", False)

    def __post_init__(self) -> None:
        if (self.config is None) == (self.model_type is None):
            raise ValueError("give one of --config and --model-type")
        if self.vocab_multiple < 1:
            raise ValueError("--vocab-multiple must be 1 or more")
        if self.vocab_multiple > 1 and self.tokenizer is None:
            raise ValueError("--vocab-multiple needs --tokenizer")
        for setting in self.set:
            if "=" not in setting or setting.startswith("="):
                raise ValueError(f"--set {setting}: expected KEY=VALUE")


def new_model(options: Options) -> None:
    """Build the configuration, then the model, in a staged folder."""
    refuse_existing(options.target, options.force)
    settings = {key: _value(text) for key, _, text in (setting.partition("=") for setting in options.set)}
    if options.tokenizer is not None:
        settings = _of_tokenizer(options, options.tokenizer, settings)
    config = _config(options, settings)
    about = {"seed": options.seed, "dtype": options.dtype}
    with staged_folder(options.target, tool="mp-new-model", force=options.force, about=about) as stage:
        _save(config, options, stage)
    print(options.target)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _of_tokenizer(options: Options, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with the vocabulary's size and the special ids; a size that is set must hold the vocabulary."""
    from megapatch.models.tokenizer import Tokenizer

    tokenizer, multiple = Tokenizer(folder, trust_remote_code=options.trust_remote_code), options.vocab_multiple
    size = -(-tokenizer.vocab_size // multiple) * multiple
    if settings.get("vocab_size", size) < size:
        raise UserError(f"--set vocab_size={settings['vocab_size']}: the tokenizer needs {size}")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}
    return {"vocab_size": size, **ids, **settings}


def _config(options: Options, settings: dict[str, Any]) -> Any:
    """The transformers configuration: one that a megapatch family supports, with every setting known to it."""
    from transformers import AutoConfig

    from megapatch.models import family, hf_files
    from megapatch.models.shapes import num_parameters
    from megapatch.models.torch_save import ITEM_BYTES
    from megapatch.models.transformers_types import refuse_unknown

    if options.config is not None:
        path = options.config
        base = hf_files.config(path if path.is_dir() else path.parent, "config.json" if path.is_dir() else path.name)
    else:
        base = {"model_type": options.model_type}
    model_type = family.find(base).model_type
    refuse_unknown(base, "start from published weights")
    defaults = AutoConfig.for_model(model_type)
    known = {*defaults.to_dict(), *base, *family.find(base).tiny, "rope_theta", "rope_scaling"}
    for key in settings:
        if key not in known and not hasattr(defaults, key):
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"--set {key}: no such setting of {model_type}{f'; {near[0]}?' if near else ''}")
    if "num_hidden_layers" in settings and "layer_types" not in settings:
        base.pop("layer_types", None)  # one entry a layer; transformers makes it anew
    with _refused():
        config = AutoConfig.for_model(**base | settings)
    hf = config.to_dict()
    count = num_parameters(hf)
    padding, rows = hf.get("pad_token_id"), family.vocab_size(hf)
    if padding is not None and not 0 <= padding < rows:
        raise UserError(f"config.json: pad_token_id {padding} is not below vocab_size {rows}; --set pad_token_id=null")
    family.rope(hf)
    size = count * ITEM_BYTES[DTYPES[options.dtype]] / 1e9
    log.info("%s parameters, %.3g GB in %s", f"{count:,}", size, options.dtype)
    return config


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Show what transformers says about settings that do not go together as the user's mistake, and that alone."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging as of_transformers

    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()  # it warns of ids outside the vocabulary, which are refused here
    try:
        yield
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        ZeroDivisionError,
    ) as error:
        text = " ".join(str(error).split())
        raise UserError(f"config.json: transformers refuses these settings: {text}") from error
    finally:
        of_transformers.set_verbosity(before)


def _save(config: Any, options: Options, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[options.dtype]))
    model.save_pretrained(folder)
    for path in folder.iterdir():  # safetensors makes files for the owner only
        path.chmod((folder / "config.json").stat().st_mode)
    if options.tokenizer is not None:
        from megapatch.models.tokenizer import copy_tokenizer

        copy_tokenizer(options.tokenizer, folder)


def main(argv: list[str] | None = None) -> int:
    """Exit status of mp-new-model."""
    return run(Options, new_model, prog="mp-new-model", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
