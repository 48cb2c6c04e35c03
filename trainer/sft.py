"""mp-sft: fine-tune a language model on conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megapatch.models.cli import run
from megapatch.trainer.pretrain import Kind, Plan, train
from megapatch.trainer.tuning.sft_options import SftOptions

if TYPE_CHECKING:
    from megapatch.models.tokenizer import Tokenizer
    from megapatch.trainer.loop import Trainer
    from megapatch.trainer.session import Session
    from megapatch.trainer.watching.metrics import Log

EXAMPLES = """examples:
  # straight from JSON lines of messages (or instruction, input, output), one process
  mp-sft --model Qwen3-0.6B --data chats.jsonl --save run --train-iters 100 --global-batch-size 8 \\
      --seq-length 2048 --lr 1e-5 --on-rewritten-history split
  # from data of mp-preprocess-chat, a blend, two-way tensor parallel, validated every 50 steps
  torchrun --nproc-per-node 2 --no-python mp-sft @sft.args --model qwen3 --tp 2 --sequence-parallel \\
      --data-path 0.7 data/chats 0.3 data/math --valid-data-path data/held --eval-interval 50 --save run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run mp-sft; returns the exit status."""
    return run(SftOptions, sft, prog="mp-sft", epilog=EXAMPLES, argv=argv)


def sft(options: SftOptions) -> None:
    """Fine-tune as the options say; resumes from the newest checkpoint in --save."""
    train(options, FINE_TUNING)


def _check(options: SftOptions, tokenizer: "Tokenizer", vocab_size: int) -> None:
    from megapatch.trainer.tuning import sft_data

    sft_data.check_data(options, tokenizer, vocab_size)


def _trainer(session: "Session", records: "Log", plan: Plan) -> "Trainer":
    from megapatch.trainer.tuning.sft_loop import make_trainer

    return make_trainer(session, records, plan)


FINE_TUNING = Kind(_check, _trainer)

if __name__ == "__main__":
    raise SystemExit(main())
