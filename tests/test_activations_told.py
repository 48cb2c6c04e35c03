"""--offload-activations that moves nothing says so, once."""

import logging
from typing import Any

import pytest

from megapatch.models import device

device.start()

from megapatch.trainer.offload.activations import Offload  # noqa: E402

SAID = "no tensor left the device: all that these layers keep is under 1MiB (--offload-activation-min-kib)"


@pytest.mark.parametrize(("out_bytes", "times"), [((0, 0), 1), ((8, 0), 0), ((0, 8), 1)])
def test_offloading_that_moves_nothing_is_told_after_the_first_step(
    out_bytes: tuple[int, int], times: int, caplog: pytest.LogCaptureFixture
) -> None:
    link: Any = None  # nothing is moved
    offload = Offload(link, [], 1 << 20)
    with caplog.at_level(logging.INFO, "megapatch"):
        for moved in out_bytes:
            offload._tell(moved)
    assert caplog.text.count(SAID) == times
