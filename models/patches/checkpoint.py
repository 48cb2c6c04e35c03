"""Saving a checkpoint without a helper process, and what of upstream that does by itself."""

import queue

from megapatch.models.patches import Patch, Upstream


def results_queue() -> "queue.Queue[object]":
    """Where the writers' results of one save are put and taken: by this process alone, as saves are synchronous."""
    return queue.Queue()


RESULTS_QUEUE = Patch(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
    results_queue,
    "349269cbdd56",
    "upstream starts a manager process (270 MB, seconds) that only asynchronous saves need, and that a kill -9 orphans",
)

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"
ONE_FILE = Upstream(
    f"{_WRITER}.write_preloaded_data",
    "0aef9e6cbe57",
    "a checkpoint's files are written by it in a thread (trainer/saving/writing.py), which gives it queues of its own",
)
REQUEST = Upstream(
    f"{_WRITER}.get_save_function_and_args",
    "0ff91ddb4e33",
    "its arguments are taken apart, for copies that training does not change (trainer/saving/writing.py)",
)
