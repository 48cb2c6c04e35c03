"""Layouts that cannot be are refused before anything starts, with the flags that say so."""

import pytest

from megapatch.models.cli import UserError
from megapatch.models.parallel import Parallel

DENSE = {"num_attention_heads": 8, "num_query_groups": 4, "num_layers": 12}
MIXTURE = DENSE | {"num_moe_experts": 6}
CONTRADICTIONS = [
    ({"tp": 0}, "--tp 0: must be at least 1"),
    ({"sequence_parallel": True}, "--sequence-parallel needs --tp above 1"),
    ({"vpp": 2}, "--vpp 2: needs --pp above 1"),
    ({"pp": 2, "vpp": 1}, "--vpp 1: needs"),
]
MISFITS = [
    (DENSE, {"tp": 3}, "--tp 3 does not divide the 8 attention heads"),
    (DENSE | {"num_attention_heads": 12}, {"tp": 6}, "the 4 key-value heads"),
    (DENSE, {"pp": 5}, "--pp = 5 does not divide the 12 layers"),
    (DENSE, {"pp": 4, "vpp": 2}, "--pp x --vpp = 8 does not divide the 12 layers"),
    (DENSE, {"ep": 2}, "--ep 2: the model of config.json has no experts"),
    (MIXTURE, {"ep": 4}, "--ep 4 does not divide the 6 experts"),
    (MIXTURE, {"tp": 2}, "--tp 2 on a model with experts needs --sequence-parallel"),
]


@pytest.mark.parametrize(("sizes", "message"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_a_usage_error(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parallel(**sizes)


@pytest.mark.parametrize(("model", "sizes", "message"), MISFITS)
def test_a_layout_that_cannot_cut_the_model_is_refused(model: dict, sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Parallel(**sizes).check_model(model)


def test_layouts_that_fit_are_accepted() -> None:
    Parallel(tp=8, pp=3, vpp=2).check_model(DENSE)
    Parallel(tp=2, sequence_parallel=True, ep=3, etp=1).check_model(MIXTURE)


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [({}, 8, 8), ({"tp": 2, "pp": 2}, 8, 2), ({"tp": 2, "cp": 2}, 4, 1), ({"ep": 4, "tp": 2, "etp": 1}, 8, 4)],
)
def test_data_parallelism_takes_the_processes_that_remain(sizes: dict, world_size: int, expected: int) -> None:
    assert Parallel(**sizes).data_parallel_size(world_size) == expected


@pytest.mark.parametrize(
    ("sizes", "flags"), [({"tp": 3}, "--tp x --pp x --cp = 3"), ({"ep": 8}, "--etp x --ep x --pp = 8")]
)
def test_a_number_of_processes_that_the_layout_does_not_divide_is_refused(sizes: dict, flags: str) -> None:
    with pytest.raises(UserError, match=f"{flags} does not divide the number of processes, 4"):
        Parallel(**sizes).data_parallel_size(4)
