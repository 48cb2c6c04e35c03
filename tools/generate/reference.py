"""The same prompts through transformers: the answers that megapatch's engine is held against."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megapatch.models import hf_files
from megapatch.models.cli import UserError
from megapatch.models.generation.sequences import Completion
from megapatch.models.request import Request
from megapatch.models.transformers_types import refuse_unknown


def generate(model: Path, requests: Sequence[Request], tokenizer: Any, dtype: Any, device: Any) -> Iterator[Completion]:
    """Greedy completions, one prompt at a time; what transformers would do another way is refused (UserError)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    asked = [request.sampling for request in requests]
    if any(s.temperature or s.stop or s.changes_logits or s.top_logprobs or s.prompt_logprobs for s in asked):
        raise UserError(
            "--engine transformers: greedy, without stop strings, penalties, biases and log-probabilities only; drop "
            "--temperature, --stop and the like"
        )
    refuse_unknown(hf_files.config(model), "use --engine megapatch")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).to(device).eval()
    for number, request in enumerate(requests):
        prompt = torch.tensor([request.prompt], device=device)
        with torch.no_grad():
            whole = reference.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=list(request.sampling.stop_token_ids) or None,
                pad_token_id=0,
            )
        ids = whole[0, len(request.prompt) :].tolist()
        stopped = bool(ids) and ids[-1] in request.sampling.stop_token_ids
        text = tokenizer.decode(ids[:-1] if stopped else ids)
        yield Completion(
            number, request, ids, text, "stop" if stopped else "length", [], [], ids[-1] if stopped else None
        )
