"""What of a chunk of layers is on the device, and what in host memory, with --offload-activations."""

import pytest

from megapatch.models.device import start

start("cpu")  # before megatron-core is imported

from megapatch.models.planning.meter import Work  # noqa: E402
from megapatch.models.planning.saved import Saved  # noqa: E402
from megapatch.models.planning.stages import Chunk, Hosted, most_hosted  # noqa: E402
from megapatch.models.planning.trace import Piece  # noqa: E402

WHOLE, PARTS, HELD = Saved(8, 8, 8, 0), Saved(8, 2, 2, 0), Saved(8, 8, 8, 8)


def chunk(saved: Saved, hosted: Hosted, *given: Saved) -> Chunk:
    """Four layers that keep 10 bytes and have 12 and 14 while they run, between ends that hold nothing."""
    layer = Piece(10, 12, 14, 0, 0, 0, 0, 0, Work(), Work(), (saved,))
    begin, end = (Piece(0, 0, 0, 0, 0, 0, 0, 0, Work(), Work(), each) for each in (given, ()))
    return Chunk([begin, *[layer] * 4, end], hosted)


@pytest.mark.parametrize(
    ("saved", "hosted", "held", "host", "forward", "backward"),
    [
        (WHOLE, Hosted(0, 1), 40, 0, 42, 44),
        (WHOLE, Hosted(3, 1), 16, 24, 26, 28),  # the layer before is on its way; it is back before it is needed
        (WHOLE, Hosted(9, 1), 16, 24, 26, 28),  # the last one stays
        (WHOLE, Hosted(1, 1), 32, 8, 34, 36),
        (WHOLE, Hosted(3, 1, in_time=False), 16, 24, 34, 36),  # two are on their way until they are needed
        (WHOLE, Hosted(3, 9), 40, 0, 42, 44),  # too small to move
        (PARTS, Hosted(3, 1), 16, 6, 26, 22),  # parts come back beside the whole that is made of them
        (PARTS, Hosted(3, 3), 40, 0, 42, 44),
        (HELD, Hosted(3, 1), 40, 24, 42, 52),  # copied, and never gone
    ],
)
def test_layers_leave_and_come_back(
    saved: Saved, hosted: Hosted, held: int, host: int, forward: int, backward: int
) -> None:
    found = chunk(saved, hosted)
    assert (found.held, found.host, found.forward, found.backward) == (held, host, forward, backward)


def test_what_a_stage_receives_stays() -> None:
    assert (chunk(WHOLE, Hosted(2, 1), WHOLE).held, chunk(WHOLE, Hosted(2, 1)).held) == (32, 24)


@pytest.mark.parametrize(
    ("stage", "pp", "chunks", "in_flight"), [(0, 1, 1, 1), (0, 4, 1, 4), (3, 4, 1, 1), (1, 2, 2, 3)]
)
def test_host_memory_is_for_all_micro_batches_in_flight(stage: int, pp: int, chunks: int, in_flight: int) -> None:
    """And an eighth more."""
    assert most_hosted([chunk(WHOLE, Hosted(2, 1))] * chunks, stage, pp, 8) == in_flight * 16 * 9 / 8
