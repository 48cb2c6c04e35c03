"""What mp-plan says that a rank holds, against runs of the trainer whose tensors are counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import corpus, launch

from megapatch.models import device, parallel

CPU = device.start()  # before megatron-core is imported

from megatron.core.pipeline_parallel.schedules import get_schedule_table  # noqa: E402

from megapatch.models.build import ModelOptions  # noqa: E402
from megapatch.models.planning import scaling, stages, stand_ins, trace  # noqa: E402

BASE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
BASE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512}
BASE |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
LATENT: dict[str, Any] = {"num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32}
LATENT |= {"qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
LATENT |= {"n_shared_experts": 1, "moe_intermediate_size": 256, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
LATENT |= {"routed_scaling_factor": 1.5, "rope_theta": 1e4, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", **BASE},
    "experts": {"model_type": "qwen3_moe", **BASE, **EXPERTS},
    "latent": {"model_type": "deepseek_v3", **BASE, **LATENT},
    "tied": {"model_type": "llama", **BASE, "tie_word_embeddings": True},
    "deep": {"model_type": "llama", **BASE, "num_hidden_layers": 8},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe"]}
UP = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
WORDS = {  # the same for mp-pretrain
    None: "",
    "full": "--recompute full",
    "mlp": "--recompute selective --recompute-modules layernorm mlp",
    "moe": "--recompute selective --recompute-modules layernorm moe",
    "up": "--recompute selective --recompute-modules mla_up_proj",
}
FIELDS: dict[str | None, dict[str, Any]] = {None: {}, "full": FULL, "mlp": MLP, "moe": MOE, "up": UP}
BESIDE = ("offload_activations", "offload_activation_min_kib", "offload_link_gb_per_s", "use_distributed_optimizer")
ONE = [  # model, precision, micro-batch, recomputation, and what goes to host memory
    ("dense", "fp32", 4, None),
    ("dense", "bf16", 1, "mlp"),
    ("dense", "bf16", 4, None, {"offload_activations": 2}),
    ("experts", "bf16", 4, "moe"),
    ("latent", "bf16", 4, None),
    ("dense", "bf16", 1, None),
    ("dense", "bf16", 4, "full"),
    ("experts", "bf16", 4, None),
    ("experts", "fp32", 1, "full"),
    ("latent", "fp32", 4, "up"),
    ("latent", "bf16", 4, "full"),
    ("dense", "bf16", 4, "full", {"offload_activations": 2, "offload_activation_min_kib": 64}),
    ("dense", "bf16", 4, None, {"offload_activations": 3, "offload_activation_min_kib": 64}),
    ("dense", "fp32", 4, "mlp", {"offload_activations": 3}),
    ("deep", "bf16", 4, None, {"offload_activations": 7, "offload_link_gb_per_s": 0.01}),
    ("deep", "bf16", 4, None, {"offload_activations": 4, "offload_link_gb_per_s": 0.01}),
    ("experts", "bf16", 4, None, {"offload_activations": 3, "offload_activation_min_kib": 64}),
    ("latent", "bf16", 4, "up", {"offload_activations": 2, "offload_activation_min_kib": 64}),
]
TWO = [  # and what cuts the model over two processes
    ("dense", "bf16", 2, None, {"pp": 2}),
    ("experts", "bf16", 4, None, {"ep": 2, "use_distributed_optimizer": True}),
    ("dense", "bf16", 4, None, {"use_distributed_optimizer": True}),
    ("experts", "bf16", 4, None, {"ep": 2}),
    ("dense", "bf16", 4, "mlp", {"tp": 2, "sequence_parallel": True}),
    ("tied", "fp32", 1, "full", {"pp": 2, "vpp": 2}),
    ("dense", "bf16", 4, "mlp", {"cp": 2}),
    ("latent", "bf16", 2, None, {"pp": 2}),
    ("dense", "bf16", 2, None, {"pp": 2, "offload_activations": 1, "offload_activation_min_kib": 64}),
    ("deep", "bf16", 2, None, {"pp": 2, "vpp": 2, "offload_activations": 1, "offload_activation_min_kib": 64}),
]
BATCH, LENGTH = 8, 256
QUICK = {1: 3, 2: 2}  # processes: cases in the default suite


def planned(
    model: str, precision: Any, samples: int, again: str | None, layout: dict[str, Any], world: int
) -> list[tuple[stages.Need, int]]:
    """Bytes on a rank of each stage, and numbers in its buffers; copies are in time unless a slow link is emulated."""
    hf, least = MODELS[model], layout.get("offload_activation_min_kib", 1024) << 10
    hosted = stages.Hosted(layout.get("offload_activations", 0), least, "offload_link_gb_per_s" not in layout)
    divided = "use_distributed_optimizer" in layout
    layout = {name: size for name, size in layout.items() if name not in BESIDE}
    own = {name: size for name, size in layout.items() if name not in ("pp", "vpp")}
    made = ModelOptions(parallel.Parallel(**own), CPU, precision, LENGTH, FIELDS[again])
    pp, batch = layout.get("pp", 1), trace.Batch(LENGTH, samples)
    found = trace.trace(hf, made, batch, alone=pp == 1)
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    cut = stages.Layout(world, **sizes)
    cut = replace(cut, etp=layout.get("etp", cut.tp))
    kinds, count = trace.layer_kinds(hf), BATCH // samples // cut.copies
    parts = [stages.stage_of(cut, n, kinds, [found], precision, hosted=hosted) for n in range(pp)]
    parts = [replace(part, distributed=divided) for part in parts]
    return [(part.need(count), sum(part.parameters) + part.padding) for part in parts]


def cases(rows: list) -> dict[str, list[str]]:
    """mp-pretrain arguments of each case."""
    made = {}
    for model, precision, samples, again, *rest in rows:
        words = f"--precision {precision} --micro-batch-size {samples} {WORDS[again]} "
        for name, size in (rest[0] if rest else {}).items():
            words += f"--{name.replace('_', '-')} " + f"{size} " * (size is not True)
        made[name_of(model, precision, samples, again, *rest)] = words.split()
    return made


def name_of(*case: Any) -> str:
    """Of a case."""
    return " ".join(map(str, case)).replace("/", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan")
    corpus(made)
    for name, hf in MODELS.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(hf))
    return made


def measured(folder: Path, rows: list, processes: int) -> dict[str, list[list[int]]]:
    """The most bytes alive on each rank of each case."""
    given = {}
    numbers = {name_of(*row): number for number, row in enumerate([*ONE, *TWO])}  # a run for each in the folder
    for name, words in cases(rows).items():
        common = (
            f"--tokenizer {folder}/tokenizer --data-path {folder}/data --data-cache-path {folder}/cache --seq-length "
        )
        common += f"{LENGTH} --global-batch-size {BATCH} --train-iters 1 --lr 1e-3 --save-interval 100 --device cpu "
        common += f"--save {folder}/run{numbers[name]} --init-from {folder}/{name.split()[0]}"
        given[name] = [*common.split(), *words]
    return launch(processes, given, folder, "plan_worker.py")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def found(folder: Path) -> Callable[[list, int], dict[str, list[list[int]]]]:
    """What is measured of the first few cases, or of the others, in one start."""
    return cache(lambda quick, processes: measured(folder, _rows(quick, processes), processes))


def _rows(quick: bool, processes: int) -> list:
    rows = ONE if processes == 1 else TWO
    return rows[: QUICK[processes]] if quick else rows[QUICK[processes] :]


def parameters(processes: int) -> list:
    """The first few cases, and the others as slow ones."""
    quick = [pytest.param(row, True, id=name_of(*row)) for row in _rows(True, processes)]
    return quick + [
        pytest.param(row, False, id=name_of(*row), marks=pytest.mark.slow) for row in _rows(False, processes)
    ]


@pytest.mark.parametrize(("case", "quick"), parameters(1))
def test_a_process_holds_what_was_planned(found: Callable, case: tuple, quick: bool) -> None:
    need, numbers = planned(*case[:4], dict(*case[4:]), 1)[0]
    bytes_, pool, buffers = found(quick, 1)[name_of(*case)][0]
    print(f"planned {need.total:,}, measured {bytes_:,}, ratio {need.total / bytes_:.4f}: {need}, pool {pool:,}")
    assert need.total == pytest.approx(bytes_, rel=0.02)
    assert 8 / 9 * need.host <= pool <= need.host
    assert numbers == buffers


@pytest.mark.parametrize(("case", "quick"), parameters(2))
def test_ranks_hold_what_was_planned(found: Callable, case: tuple, quick: bool) -> None:
    needs = planned(*case, 2)
    for rank, (bytes_, pool, buffers) in enumerate(found(quick, 2)[name_of(*case)]):
        need, numbers = needs[rank if len(needs) == 2 else 0]
        ratio = need.total / bytes_
        print(f"rank {rank} planned {need.total:,}, measured {bytes_:,}, ratio {ratio:.4f}: {need}, pool {pool:,}")
        assert need.total == pytest.approx(bytes_, rel=0.05)
        assert 8 / 9 * need.host <= pool <= need.host
        assert numbers == buffers


def sums() -> list:
    """Models, recomputation and layouts, each with each; slow are all but those where each two meet once."""
    made = []
    for at, (model, part, last) in enumerate(
        [("dense", "mlp", "tp"), ("experts", "moe", "ep"), ("latent", "moe", "ep")]
    ):
        for (i, again), (j, layout) in product(
            enumerate([None, "full", part]), enumerate([{}, {"tp": 2, "sequence_parallel": True, "cp": 2}, {last: 2}])
        ):
            marks = () if (at + i + j) % 3 == 0 else pytest.mark.slow
            made.append(pytest.param(model, again, layout, id=name_of(model, again, layout), marks=marks))
    return made


@pytest.mark.parametrize(("model", "again", "layout"), sums())
def test_the_sum_of_pieces_is_the_whole_model(model: str, again: str | None, layout: dict[str, int]) -> None:
    """Each layer of a deeper model run: to the byte, but for sums of the balancing loss, 4 bytes a layer; where layers
    with experts are computed again, modules hold one gradient of hidden states, which is counted for each kind."""
    hf = {**MODELS[model], "num_hidden_layers": 6}
    made = ModelOptions(
        parallel.Parallel(**layout), stand_ins.Pretended("cpu", False, False, ""), "bf16", LENGTH, FIELDS[again]
    )  # type: ignore[arg-type]
    batch = trace.Batch(LENGTH, 2)
    kinds, once, every = trace.layer_kinds(hf), trace.trace(hf, made, batch), trace.whole(hf, made, batch)
    summed = stages.Chunk([once.pieces[name] for name in (trace.BEFORE, *kinds, trace.AFTER)])
    run = stages.Chunk(every)
    hidden = 2 * 2 * LENGTH * 256 if again == "full" else 0
    slack = 0 if model == "dense" else 200 + hidden
    for name in ("kept", "forward", "backward", "forward_alone", "backward_alone"):
        assert abs(getattr(summed, name) - getattr(run, name)) <= slack, name
    count = [sum(getattr(piece, name) for piece in every) for name in ("parameters", "experts")]
    assert count == [sum(getattr(piece, name) for piece in summed.pieces) for name in ("parameters", "experts")]


def test_pieces_of_more_samples_lie_on_a_line() -> None:
    made = ModelOptions(parallel.Parallel(), CPU, "bf16", LENGTH)
    two, four, eight = (trace.trace(MODELS["latent"], made, trace.Batch(LENGTH, n)) for n in (2, 4, 8))
    line = scaling.scaled(two, four, 3)
    assert line is not None
    for name, piece in eight.pieces.items():
        assert line.pieces[name].kept == pytest.approx(piece.kept, rel=1e-4)
        assert line.pieces[name].backward == pytest.approx(piece.backward, rel=1e-2)
        assert line.pieces[name].forward_work.flops == piece.forward_work.flops


@pytest.mark.parametrize(("pp", "vpp", "count"), [(1, 1, 3), (2, 1, 4), (4, 1, 2), (2, 2, 4), (4, 2, 8), (2, 3, 2)])
def test_every_micro_batch_goes_forward_then_backward_through_every_chunk(pp: int, vpp: int, count: int) -> None:
    """And as far ahead as megatron-core's schedule says."""
    for stage in range(pp):
        held, most, passes = [0] * vpp, 0, list(stages.order(stage, pp, vpp, count))
        for forward, chunk in passes:
            held[chunk] += 1 if forward else -1
            assert held[chunk] >= 0
            most = max(most, sum(held))
        assert held == [0] * vpp and len(passes) == 2 * count * vpp
        ahead = (pp - stage - 1) * 2 + (vpp - 1) * pp + 1 if vpp > 1 else pp - stage
        assert most == min(ahead, count * vpp)
        if vpp > 1:
            table = [chunk for _, chunk in get_schedule_table(count, vpp, pp)]
            assert [chunk for forward, chunk in passes if forward] == table
            assert [chunk for forward, chunk in passes if not forward] == [vpp - 1 - chunk for chunk in table]
