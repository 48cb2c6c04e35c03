"""Process groups of a whole cluster in one process, where nothing is sent."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.testing._internal.distributed.fake_pg import FakeStore

from megapatch.models.parallel import Parallel, make_groups


@contextmanager
def pretending(parallel: Parallel, world_size: int, rank: int) -> Iterator[None]:
    """megatron-core's groups as ``rank`` of ``world_size`` would have them, in this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        make_groups(parallel, create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
