"""Options of mp-sft: which conversations, how they lie in rows, and what of them counts."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

from megapatch.models.cli import opt
from megapatch.trainer.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How --data and --valid-data are read; for --data-path, mp-preprocess-chat was told so."""

    chat_format: Literal["auto", "messages", "conversations", "instruction", "completion"] = opt(
        "for --data: keys of a record, as in mp-preprocess-chat", "auto"
    )
    template: Optional[str] = opt(
        "for --data: name of one of the tokenizer's chat templates, or a Jinja file (default: the tokenizer's own)",
        None,
        metavar="NAME|FILE",
    )
    template_arguments: str = opt("for --data: further variables that the template sees, as JSON", "", metavar="JSON")
    on_rewritten_history: Literal["fail", "split", "keep"] = opt(
        "for --data: templates that write earlier turns differently once a conversation goes on: split: several "
        "samples, in each of which the trained turns read as when they were said; keep: what generation tags mark",
        "fail",
    )
    truncate: Literal["drop", "left", "right", "turn", "split"] = opt(
        "for --data: what becomes of conversations longer than --seq-length: left out, cut, kept up to the last turn "
        "that fits, or made several; all are counted in the log",
        "drop",
    )
    message_weights: bool = opt("for --data: allow weights of messages other than 0 and 1", False)
    workers: Optional[int] = opt(
        "for --data: processes that read it (default: the cores this process may use)", None, metavar="NUMBER"
    )


READING = tuple(ChatOptions.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class SftOptions(ChatOptions, TrainOptions):
    """Fine-tune a language model on conversations: the loss is of what the assistant says alone. Run it under torchrun
    for more than one process. It resumes by itself from --save, to the bit where the layout is the same.

    Conversations come from mp-preprocess-chat, or straight from JSON lines, which are then put through the model's own
    chat template once, into SAVE/data-cache. They lie together in rows of --seq-length tokens, none seeing another: a
    sample is a row, and --micro-batch-size of them go through the model as one. With --no-packing a sample is a
    conversation, padded to --seq-length.
    """

    tool: ClassVar[str] = "mp-sft"

    data_path: list[str] = opt(
        "prefixes made by mp-preprocess-chat, or a blend, weighted by samples: WEIGHT PREFIX WEIGHT PREFIX ...",
        [],
        nargs="+",
        metavar="PREFIX",
    )
    valid_data_path: list[str] = opt(
        "prefixes, or a blend, to validate with; needs --eval-interval", [], nargs="+", metavar="PREFIX"
    )
    data: list[str] = opt(
        "instead of --data-path: files of conversations (JSON lines, also compressed), or a blend: WEIGHT FILE ...",
        [],
        nargs="+",
        metavar="FILE",
    )
    valid_data: list[str] = opt("files, or a blend, to validate with", [], nargs="+", metavar="FILE")
    no_packing: bool = opt("one conversation a sample, padded to --seq-length", False)
    loss_normalisation: Literal["token", "sequence"] = opt(
        "token: the mean over the trained tokens of a global batch, by the weights of their messages; sequence: the "
        "mean over its conversations of each one's mean",
        "token",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        validates = bool(self.valid_data or self.valid_data_path)
        untouched = [
            name for name in READING if getattr(self, name) != self.__dataclass_fields__[name].default and not self.read
        ]
        refused = {
            "give one of --data-path (made by mp-preprocess-chat) and --data (JSON lines)": (
                bool(self.data_path) == bool(self.data)
            ),
            "--valid-data-path and --valid-data: give one": bool(self.valid_data_path and self.valid_data),
            "--eval-interval needs --valid-data-path or --valid-data": self.eval_interval > 0 and not validates,
            "--valid-data-path and --valid-data need --eval-interval": validates and not self.eval_interval,
            "--data-cache-path is for --data": self.data_cache_path is not None and not self.read,
            f"--{''.join(untouched[:1]).replace('_', '-')} is for --data; give it to mp-preprocess-chat": bool(
                untouched
            ),
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)

    @property
    def read(self) -> list[str]:
        """Words that name files of conversations."""
        return [*self.data, *self.valid_data]

    @property
    def packing(self) -> bool:
        """Do conversations share rows?"""
        return not self.no_packing

    @property
    def multiple(self) -> int:
        """Tokens to a multiple of which a packed conversation is padded; rows are always full, as SP needs."""
        return 2 * self.cp if self.cp > 1 and self.packing else 1

    @property
    def pass_shape(self) -> tuple[int, int]:
        """Tokens of a sample and samples, as the layers meet them: packed rows are joined into one."""
        joined = self.seq_length * self.micro_batch_size
        return (joined, 1) if self.packing else super().pass_shape
