"""What decides the rows of an output, besides their prompts: two runs that agree in it may write one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapatch.models.commit import MANIFEST, digest
from megapatch.tools.generate.loading import Source
from megapatch.tools.generate.options import Choosing
from megapatch.tools.generate.prompts import Prompt

_WEIGHTS = ("*.safetensors", "*.distcp", "*.bin")
_ALSO = ("precision", "add_bos", "as_chat", "system", "template", "template_arguments", "date", "logprobs", "order")


def settings(options: Choosing, source: Source, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """JSON values by names that a message can show; nothing of batch size or layout, which decide nothing in fp32."""
    return {
        "model": weights(source.core or source.folder),
        "tokenizer": source.tokenizer.digest,
        "sampling": vars(options.sampling(source.tokenizer.stop_ids)),
        "context_length": getattr(options, "context_length", None),
        "format": "openai" if any(prompt.url for prompt in prompts) else "jsonl",
        **{name: getattr(options, name) for name in _ALSO if hasattr(options, name)},
    }


def weights(folder: Path) -> dict[str, Any]:
    """What is cheap to know of a model's files: a manifest's digest, or names, sizes and times of change."""
    if (folder / MANIFEST).is_file():
        return {"manifest": digest(folder / MANIFEST)}
    found = [path.stat() for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]
    return {"files": [[one.st_size, one.st_mtime_ns] for one in found]}
