"""The options of mp-preprocess-chat, and what follows from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megapatch.models.cli import opt
from megapatch.models.data_formats import PAIRS
from megapatch.models.template_options import TemplateOptions
from megapatch.tools.preprocess.run.pipeline import RunOptions

_CUTS = {  # what --truncate may be for each format of output
    "chat": ("drop", "left", "right", "turn", "split"),
    "preference": ("drop", "left", "right"),
    "prompts": ("drop", "left"),
}

_ONLY = {  # options that mean something for these alone
    "message_weights": ("chat",),
    "train_generation_prompt": ("chat", "preference"),
    "on_rewritten_history": ("chat", "preference"),
}


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, TemplateOptions):
    """Turn conversations into ids and masks for fine-tuning, preference pairs and prompts into data for DPO and RL.

    Each conversation is rendered with the model's own chat template and becomes one document of PREFIX.bin/.idx;
    PREFIX_mask.bin/.idx (bytes, 0 or 1) marks the tokens that the assistant says, with the token that ends a turn.
    They come from the template's {% generation %} tags, else from where each turn begins and ends in the rendered
    text, which is checked. mp-inspect-data PREFIX --document 0 --mask shows them.

    Preference pairs become PREFIX_chosen and PREFIX_rejected, each with a mask; prompts become PREFIX, ending with the
    generation prompt, and PREFIX_answer (UTF-8). All lines are accounted for:
    lines = documents + empty + bad + filtered + duplicate.
    """

    tokenizer: Path = opt("Hugging Face folder with a tokenizer and chat template, or a core checkpoint", metavar="DIR")
    chat_format: Literal["auto", "messages", "conversations", "instruction", "completion", "preference", "prompts"] = (
        opt(
            "keys of a record. messages: objects with role and content (also reasoning_content, tool_calls, and weight "
            "or train: 0 leaves a turn out of training), beside them tools; conversations: objects with from, value; "
            "instruction: instruction, input, output (also system, history); completion: prompt and completion; "
            "auto: each record one of these, by its keys; "
            "preference: prompt, chosen, rejected; prompts: prompt (and answer)",
            "auto",
        )
    )
    on_rewritten_history: Literal["fail", "split", "keep"] = opt(
        "for templates that write earlier turns differently once a conversation goes on (Qwen3 drops their reasoning): "
        "fail: a bad line; split: several samples, in each of which the trained turns read as when they were said, "
        "each turn trained once; keep: train what generation tags mark in the whole conversation",
        "fail",
    )
    train_generation_prompt: bool = opt("train also the header that begins the assistant's turn", False)
    message_weights: bool = opt(
        "allow weights other than 0 and 1, and write them to PREFIX_weight (float32) if there are any", False
    )
    max_length: Optional[int] = opt("most tokens of a document (default: no limit)", None, metavar="TOKENS")
    truncate: Literal["drop", "left", "right", "turn", "split"] = opt(
        "what becomes of longer ones. drop: leave out; left: cut off the beginning; right: cut off the end; turn: keep "
        "the turns that fit, up to the last that is trained; split: several documents. What is left without trained "
        "tokens is filtered; counts, lost tokens and examples are in the manifest",
        "drop",
    )
    special_in_text: Literal["allow", "literal", "fail"] = opt(
        "special tokens that a message spells out, such as <|im_end|>: allow: become that token, counted; literal: "
        "stay text; fail: make it a bad line",
        "allow",
    )
    engine: Literal["auto", "tokenizers", "gigatoken"] = opt(
        "tokenizers: the reference; gigatoken: tens of times faster for byte-level BPE, compared with the reference at "
        "the start and on 1 text in 1,000; auto: gigatoken where it is installed and gives the same ids",
        "auto",
    )
    deduplicate: bool = opt("leave out a record whose rendered text came before (21 to 32 bytes of memory each)", False)
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)
    json: bool = opt("print the manifest on stdout", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"--max-length {self.max_length}: expected 1 or more")
        if self.truncate != "drop" and self.max_length is None:
            raise ValueError(f"--truncate {self.truncate} needs --max-length")
        form = self.format_of_output
        if self.truncate not in _CUTS[form]:
            raise ValueError(f"--truncate {self.truncate}: for {form} expected one of {', '.join(_CUTS[form])}")
        for name, forms in _ONLY.items():
            if getattr(self, name) not in (False, "fail") and form not in forms:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --chat-format {self.chat_format}")
        if self.deduplicate and self.shards > 1:
            raise ValueError("--deduplicate needs all records in one process; leave it out, or --shards")
        self.check_template()

    @property
    def format_of_output(self) -> str:
        """The manifest's word for what is written."""
        return self.chat_format if self.chat_format in ("preference", "prompts") else "chat"

    @property
    def ends(self) -> list[str]:
        """What follows PREFIX in the names of the pairs."""
        return [end for end in PAIRS[self.format_of_output] if end != "_weight" or self.message_weights]
