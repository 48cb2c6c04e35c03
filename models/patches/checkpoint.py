"""Saving a checkpoint without a helper process."""

import queue

from megapatch.models.patches import Patch


def results_queue() -> "queue.Queue[object]":
    """Where the writers' results of one save are put and taken: by this process alone, as saves are synchronous."""
    return queue.Queue()


RESULTS_QUEUE = Patch(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
    results_queue,
    "349269cbdd56",
    "upstream starts a manager process (270 MB, seconds) that only asynchronous saves need, and that a kill -9 orphans",
)
