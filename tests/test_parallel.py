"""Layouts that cannot be are refused before anything starts, with the flags that say so."""

import pytest

from megapatch.models import splits
from megapatch.models.cli import UserError
from megapatch.models.parallel import Parallel

DENSE = {"num_attention_heads": 8, "num_query_groups": 4, "num_layers": 12}
MIXTURE = DENSE | {"num_moe_experts": 6}
FIRST, LAST, TEXT = splits.OPTIONS
CONTRADICTIONS = [
    ({"tp": 0}, "--tp 0: must be at least 1"),
    ({"sequence_parallel": True}, "--sequence-parallel needs --tp above 1"),
    ({"vpp": 2}, "--vpp 2: needs --pp above 1"),
    ({"pp": 2, "vpp": 1}, "--vpp 1: needs"),
    ({FIRST: 1}, "--decoder-first-pipeline-num-layers needs --pp above 1"),
    ({"pp": 2, LAST: 0}, "--decoder-last-pipeline-num-layers 0: must be at least 1"),
    ({TEXT: "EtL"}, "--pipeline-model-parallel-layout needs --pp above 1"),
    ({"pp": 2, TEXT: "Et|tL", FIRST: 1}, "--pipeline-model-parallel-layout: not with --decoder-first"),
    ({"pp": 2, TEXT: "Et|tL|"}, "expected E \\(embedding\\)"),
    ({"pp": 2, TEXT: "Ett|m|L"}, "in the last chunk"),
    ({"pp": 2, TEXT: "Ett|t|t|L"}, "has 4 chunks, --pp 2 x --vpp 1 needs 2"),
]
MISFITS = [
    (DENSE, {"tp": 3}, "--tp 3 does not divide the 8 attention heads"),
    (DENSE | {"num_attention_heads": 12}, {"tp": 6}, "the 4 key-value heads"),
    (DENSE, {"pp": 5}, "--pp = 5 does not divide the 12 layers"),
    (DENSE, {"pp": 4, "vpp": 2}, "--pp x --vpp = 8 does not divide the 12 layers"),
    (DENSE, {"pp": 4, FIRST: 2}, "--decoder-first-pipeline-num-layers 2: 10 of the 12 layers .* for 3 other stages"),
    (DENSE, {"pp": 2, FIRST: 2, LAST: 9}, "num-layers 2 and --decoder-last-pipeline-num-layers 9: 1 of the 12 layers"),
    (DENSE, {"pp": 3, FIRST: 6, LAST: 6}, "0 of the 12 layers of config.json are left for 1 other stages"),
    (DENSE, {"pp": 2, "vpp": 2, FIRST: 5}, "--vpp 2 does not divide the 5 layers of stage 0 into chunks"),
    (DENSE, {"pp": 2, TEXT: "Et|tL"}, "has 2 layers \\(t\\), config.json 12"),
    (DENSE, {"pp": 2, TEXT: "Et*6|t*6mL"}, "1 layers that predict further \\(m\\), config.json 0"),
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
    ("layers", "sizes", "expected"),
    [  # [chunk][stage]
        (12, {"pp": 3}, [[4, 4, 4]]),
        (12, {"pp": 2, "vpp": 3}, [[2, 2], [2, 2], [2, 2]]),
        (12, {"pp": 4, FIRST: 3}, [[3, 3, 3, 3]]),
        (61, {"pp": 16, FIRST: 3, LAST: 2}, [[3, *[4] * 14, 2]]),
        (12, {"pp": 4, "vpp": 2, FIRST: 2, LAST: 2}, [[1, 2, 2, 1]] * 2),
        (5, {"pp": 2, LAST: 1}, [[4, 1]]),
        (61, {"pp": 16, "vpp": 2, TEXT: "Et*3|(tt|)*29,|L"}, [[3, *[2] * 15], [*[2] * 14, 0, 0]]),
        (5, {"pp": 2, "vpp": 2, TEXT: "Ett | t || ttmL"}, [[2, 1], [0, 2]]),
    ],
)
def test_layers_divide_as_asked_for(layers: int, sizes: dict, expected: list) -> None:
    assert Parallel(**sizes).stage_layers(layers) == expected


def test_megatron_core_is_told_an_uneven_division_alone() -> None:
    told = Parallel(pp=2, vpp=2, **{TEXT: "Ett|t||ttmL"}).config({"num_layers": 5, "mtp_num_layers": 1})[TEXT]
    assert told == [["embedding", "decoder", "decoder"], ["decoder"], [], ["decoder", "decoder", "mtp", "loss"]]
    assert Parallel(pp=2, **{FIRST: 3}).config({"num_layers": 5})[TEXT] == [
        ["embedding", *["decoder"] * 3],
        ["decoder", "decoder", "loss"],
    ]
    assert Parallel(pp=2).config({"num_layers": 4})[TEXT] is None


def test_the_final_norm_of_a_model_that_predicts_further_stays_in_the_last_chunk() -> None:
    layout = Parallel(pp=2, **{TEXT: "Ettt|mL"})
    with pytest.raises(UserError, match="--mtp-loss-weight needs a layer"):
        layout.config({"num_layers": 3, "mtp_num_layers": 1})
    assert layout.config({"num_layers": 3, "mtp_num_layers": None})[TEXT][-1] == ["loss"]


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
