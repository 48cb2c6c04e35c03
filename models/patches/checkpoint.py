"""Saving a checkpoint without a helper process."""

import queue
from functools import cache

from megapatch.models.patches import Patch


@cache
def results_queue() -> "queue.Queue[object]":
    """Where the writers' results are put and taken: by this process alone, as long as saves are synchronous."""
    return queue.Queue()


RESULTS_QUEUE = Patch(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
    results_queue,
    "349269cbdd56",
    "upstream starts a manager process (270 MB, seconds) that only asynchronous saves need, and that a kill -9 orphans",
)
