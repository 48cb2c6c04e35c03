"""Where Adam's state lies changes no bit: fractions, engines, layouts, chunks that move, checkpoints; what is refused.

Two starts serve all cases: two processes, then one, which also goes on from what both saved.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from slow_cases import marked, wanted
from trainer_runs import arguments, corpus, data, error, events, launch, log_of, model, steps

from megapatch.trainer.pretrain import main

Case = tuple[str, str, dict[str, Any]]  # options with and without offloading, those of offloading, more for the worker
DISTRIBUTED = "--use-distributed-optimizer"
OVERLAP = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
SMALL = "--offload-chunk 3000"  # of 66 thousand parameters
CPU, STREAM = (f"{SMALL} --offload-engine {engine} --offload-optimizer" for engine in ("cpu", "stream"))
MOVES = {"place": {"2": 0.1, "3": 0.9, "4": 0.5}}
WEIGHTS = {"digests": "weights"}
SIGNAL = {"signal": {"step": 2, "number": 10}}
GIB = 2**30
KINDS = {
    "fp32": "",
    "bf16": "--precision bf16",
    "distributed fp32": DISTRIBUTED,
    "distributed bf16": f"{DISTRIBUTED} --precision bf16",
}
FRACTIONS = {  # the default suite has each fraction, each engine and each kind
    "fp32": {"0.3 stream"},
    "bf16": {"0 cpu", "0.65 cpu"},
    "distributed fp32": {"1 stream"},
    "distributed bf16": {"1 cpu"},
}


def fractions(*, slow: bool) -> dict[str, Case]:
    """The cases of static fractions."""
    every = [
        (kind, f"{fraction} {engine}", f"{by} {fraction}")
        for kind in KINDS
        for fraction in ("0", "0.3", "0.65", "1")
        for engine, by in (("cpu", CPU), ("stream", STREAM))
    ]
    return {
        f"dense {kind} {name}": (KINDS[kind], given, {})
        for kind, name, given in every
        if slow != (name in FRACTIONS[kind])
    }


SAME: dict[int, dict[str, Case]] = {  # processes: {name: case}; the name's first word is the model
    1: {
        **fractions(slow=False),
        "dense measured engine, default chunk": ("--precision bf16", "--offload-optimizer 0.65", {}),
        "dense chunks move, cpu": (KINDS["bf16"], f"{CPU} 0.65", MOVES),
        "dense chunks move, cpu, fp32": (KINDS["distributed fp32"], f"{CPU} 0.65", MOVES),
        "dense chunks move, stream": ("", f"{STREAM} 0.65", MOVES),
        "dense no clipping": ("--clip-grad 0", f"{CPU} 0.65", {}),
        "dense much clipping": ("--clip-grad 0.01 --precision bf16", f"{STREAM} 0.65", {}),
        "dense no accumulation": ("--micro-batch-size 8", f"{CPU} 0.65", {}),
        "dense a step is skipped": ("--max-nan 2", f"{CPU} 0.65", {"bad": {"2": ["gradient", 0]}}),
        "dense a step is skipped, stream": (
            f"--max-nan 2 {KINDS['distributed bf16']}",
            f"{STREAM} 0.3",
            {"bad": {"2": ["gradient", 0]}},
        ),
        "dense adapters, distributed": (
            f"--lora-rank 4 --lora-alpha 8 {KINDS['distributed fp32']}",
            f"{STREAM} 0.65 --offload-chunk 256",
            {},
        ),
        "dense random weights": ("--init-from {}/dense", f"{CPU} 0.65", {}),
        "dense from a checkpoint": (f"--model {{}}/runs/begin {KINDS['distributed bf16']}", f"{CPU} 0.65", {}),
        "dense from a checkpoint, auto": ("--model {}/runs/begin", f"{STREAM} auto --device-memory-gib 0.0019", {}),
        "dense adapters": ("--lora-rank 4 --lora-alpha 8 --precision bf16", f"{CPU} 0.65 --offload-chunk 256", {}),
        "dense recomputation": ("--recompute full", f"{CPU} 0.65", {}),
        **{
            f"dense {dtype} beside {kind}, one without gradient": (
                KINDS[kind],
                f"{engine} 0.65",
                {"extra": dtype} | WEIGHTS,
            )
            for dtype, kind, engine in (
                ("float32", "bf16", CPU),
                ("float32", "distributed bf16", STREAM),
                ("bfloat16", "bf16", STREAM),
            )
        },
        "mixture bf16": (KINDS["distributed bf16"], f"{CPU} 0.3", {}),
    },
    2: {
        "dense DP2": (KINDS["bf16"], f"{CPU} 0.65", {}),
        "dense DP2 distributed, overlap": (f"{OVERLAP} --precision bf16", f"{CPU} 0.65", MOVES),
        "dense DP2 distributed, fp32": (OVERLAP, f"{STREAM} 1", {}),
        "dense TP2 SP": (f"--tp 2 --sequence-parallel {KINDS['distributed bf16']}", f"{STREAM} 0.65", {}),
        "dense PP2, auto": (
            f"--pp 2 {KINDS['bf16']}",
            f"{CPU} auto --device-memory-gib 0.0008",
            {},
        ),
        "dense TP2": (f"--tp 2 {KINDS['bf16']}", f"{CPU} 0.3", MOVES),
        "dense float32 beside bf16, DP2": (KINDS["distributed bf16"], f"{CPU} 0.65", {"extra": "float32"} | WEIGHTS),
        "mixture EP2, auto": (
            f"--ep 2 {KINDS['distributed bf16']}",
            f"{CPU} auto --device-memory-gib 0.0013",
            {},
        ),
        "dense CP2": (f"--cp 2 {KINDS['bf16']}", f"{CPU} 0.65", {}),
        "dense PP2 VPP2": (f"--pp 2 --vpp 2 {KINDS['distributed bf16']}", f"{STREAM} 0.65", {}),
        "mixture EP2 distributed": (f"--ep 2 {KINDS['distributed bf16']}", f"{CPU} 0.65", MOVES),
        "mixture EP2": ("--ep 2", f"{STREAM} 0.65", {}),
    },
}
MORE = {  # of SAME, slow
    (1, "dense chunks move, cpu, fp32"),
    (1, "dense chunks move, stream"),
    (1, "dense much clipping"),
    (1, "dense no accumulation"),
    (1, "dense recomputation"),
    (1, "dense float32 beside distributed bf16, one without gradient"),
    (1, "dense bfloat16 beside bf16, one without gradient"),
    (1, "dense adapters, distributed"),
    (1, "dense random weights"),
    (2, "dense float32 beside bf16, DP2"),
    (2, "dense DP2 distributed, fp32"),
    (2, "mixture EP2"),
}
EVERY = {(processes, name): case for processes, cases in SAME.items() for name, case in cases.items()}
QUICK = EVERY.keys() - MORE
AUTO: dict[str, tuple[str, list[float], list[str]]] = {  # memory in GiB; fraction at each step, the events
    "little": ("0.0011", [1.0, 0.75, 0.75, 0.75], ["start", "room"]),
    "more": ("0.0015", [1.0, 0.265, 0.265, 0.265], ["start", "room"]),
    "much": ("0.01", [1.0, 0.0, 0.0, 0.0], ["start", "room"]),
}
RESUMED: dict[str, tuple[str, str, str]] = {  # options of all, of the run that is interrupted, of the one that goes on
    **{
        f"{kind}, {before or 'not'} to {after or 'not'} offloaded": (
            options,
            f"{CPU} {before}" if before else "",
            f"{STREAM} {after}" if after else "",
        )
        for kind, options in (("plain", KINDS["bf16"]), ("distributed", KINDS["distributed bf16"]))
        for before, after in (("0.3", "1"), ("1", ""), ("", "0.65"))
    },
    "plain fp32, 1 to 0.3 offloaded": ("", f"{STREAM} 1", f"{CPU} 0.3"),
    "distributed fp32, 0.3 to 1 offloaded": (DISTRIBUTED, f"{STREAM} 0.3", f"{CPU} 1"),
    "auto, after it moved": (
        KINDS["bf16"],
        f"{CPU} auto --device-memory-gib 0.0015",
        f"{CPU} auto --device-memory-gib 0.0015",
    ),
}
GO_ON = {  # of RESUMED, in the default suite
    "plain, 0.3 to 1 offloaded",
    "distributed, 1 to not offloaded",
    "distributed, not to 0.65 offloaded",
    "auto, after it moved",
}
ASYNC = f"{KINDS['bf16']} --save-interval 2 --async-save"
SHORT = f"--precision bf16 {CPU} auto --device-memory-gib 0.01"
MIXED = "--precision bf16 --offload-activations 1 --offload-activation-min-kib 0 --data-path 0.5 {0}/data 0.5 {0}/more"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("offload")
    corpus(made)
    data(made, "more", [str(made / "text03.txt")])
    model(made, "dense")
    model(made, "mixture", "qwen3_moe", attention_dropout=0.2)
    return made


@pytest.fixture(scope="module")
def runs(folder: Path, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """The records of every run, by name; "... , not offloaded" is the run to compare with."""

    def case(name: str, options: str, more: dict[str, Any], save: str = "") -> dict[str, Any]:
        given = arguments(folder, name.split()[0], f"runs/{save or name}", options.format(folder))
        if "--init-from" in given:
            del given[given.index("--model") : given.index("--model") + 2]
        return {"arguments": given, "digests": True} | more

    def same(processes: int) -> dict[str, Any]:
        found = {}
        for (_, name), (options, offload, more) in of(wanted(request, EVERY, QUICK), processes):
            plain = {key: value for key, value in more.items() if key != "place"}
            place = base(processes, name).replace("/", " ")
            found[base(processes, name)] = case(f"{name.split()[0]} {options or 'plain'}", options, plain, place)
            found[name] = case(name, f"{options} {offload}", more)
        return found

    def of(asked: dict, processes: int) -> list:
        return [item for item in asked.items() if item[0][0] == processes]

    one = {"begin": case("dense", "--lr 1e-2", SIGNAL, "begin")} | same(1)
    resumed = wanted(request, RESUMED, GO_ON)
    for name, (gib, _, _) in AUTO.items():
        one[name] = case(f"dense {name}", f"{KINDS['distributed bf16']} {CPU} auto --device-memory-gib {gib}", {}, name)
    for name, (options, before, _) in resumed.items():
        one[f"{name}, first"] = case("dense", f"{options} {before}", SIGNAL, name)
    one["asynchronous"] = case("dense", f"{ASYNC} {CPU} 0.65", {}, "asynchronous")
    one["asynchronous, not offloaded"] = case("dense", ASYNC, {}, "asynchronous plain")
    one["short of memory, plenty"] = case("mixture", MIXED, {}, "plenty")
    one["short of memory"] = case("mixture", f"{MIXED} {SHORT}", {"out of memory": [3]}, "short")
    one["short again"] = case("dense", SHORT, {"out of memory": [3, 3]}, "short again")
    one["no limit known"] = case("dense", f"{CPU} auto", {}, "no limit")
    one["small host"] = case("dense", f"{CPU} 0.65", {"host bytes": 400_000}, "small host")
    one["small host, auto"] = case("dense", f"{CPU} auto --device-memory-gib 1", {"host bytes": 400_000}, "host auto")
    two = same(2)
    two["short of memory in the middle"] = case(
        "dense", f"--tp 2 {CPU} auto --device-memory-gib 0.01", {"out of memory": [3]}, "short in the middle"
    )
    two["one of two short"] = case("dense", SHORT, {"out of memory": [3], "rank": 1}, "one of two short")
    two["short of memory in the update"] = case("dense", SHORT, {"out of memory": [3], "late": True}, "late")
    for name, options in (("of two", ""), ("of two, offloaded", f"{CPU} 0.65")):
        two[name] = case("dense", f"{KINDS['distributed bf16']} {options}", SIGNAL, name)
    rest = {
        f"{name}, rest": case("dense", f"{options} {after}", {}, name) for name, (options, _, after) in resumed.items()
    }
    for name, options in (("of two", ""), ("of two, offloaded", f"{STREAM} 0.3")):
        rest[f"{name}, rest"] = case("dense", f"{KINDS['distributed bf16']} {options}", {}, name)
    return launch(2, two, folder, "offload_worker.py") | launch(1, one | rest, folder, "offload_worker.py")


def base(processes: int, name: str) -> str:
    """The name of the run that does the same without offloading."""
    options, _, more = SAME[processes][name]
    return f"{name.split()[0]} {processes} {options} {more.get('extra')}, not offloaded"


def digests(records: list[dict]) -> list[tuple[int, str]]:
    """Of the state after each step."""
    return [(record["step"], record["digest"]) for record in events(records, "state")]


def finite(found: list[tuple[int, float, float, float]]) -> list[tuple[float, ...]]:
    """Without numbers that are not, which differ from themselves."""
    return [tuple(0.0 if value is None or value != value else value for value in step) for step in found]


@pytest.mark.parametrize(("processes", "name"), marked(EVERY, QUICK))
def test_offloading_changes_no_bit_of_losses_norms_and_state(
    runs: dict[str, list[dict]], processes: int, name: str
) -> None:
    plain = runs[base(processes, name)]
    assert finite(steps(runs[name])) == finite(steps(plain)) and len(steps(plain)) == 4
    assert digests(runs[name]) == digests(plain) and len(digests(plain)) == 4


@pytest.mark.slow
def test_every_fraction_with_either_engine_changes_no_bit(folder: Path) -> None:
    found = {
        name: {"arguments": arguments(folder, "dense", f"every/{name}", f"{options} {given}"), "digests": True}
        for name, (options, given, _) in (fractions(slow=True) | {k: (o, "", {}) for k, o in KINDS.items()}).items()
    }
    ran = launch(1, found, folder, "offload_worker.py")
    for name in fractions(slow=True):
        plain = ran[name.removeprefix("dense ").rsplit(" ", 2)[0]]
        assert (steps(ran[name]), digests(ran[name])) == (steps(plain), digests(plain)), name


@pytest.mark.parametrize("name", fractions(slow=False))
def test_a_static_fraction_is_exact_to_a_grain(runs: dict[str, list[dict]], name: str) -> None:
    asked, parameters = float(name.split()[-2]), 65920
    for record in events(runs[name], "train"):
        assert asked - 64 / parameters <= record["offload_fraction"] <= asked
        wide = record["offload_host_bytes"] / (12 if "bf16" in name or "cpu" in name else 8)
        assert wide == pytest.approx(asked * parameters, rel=0.02)  # gaps between parameters, one grain


@pytest.mark.parametrize("name", ["dense from a checkpoint", "dense from a checkpoint, auto"])
def test_weights_alone_of_a_checkpoint_are_where_training_begins(runs: dict[str, list[dict]], name: str) -> None:
    kind = "dense distributed bf16 1 cpu" if "auto" not in name else "dense fp32 0.3 stream"
    assert steps(runs[name])[0][0] == 1
    assert (
        steps(runs[name])[0][1] < steps(runs[base(1, kind)])[0][1] - 0.01
    )  # of weights that were trained for two steps


@pytest.mark.parametrize(("processes", "name"), [(1, "dense from a checkpoint, auto"), (2, "mixture EP2, auto")])
def test_auto_moved_in_these_runs(runs: dict[str, list[dict]], folder: Path, processes: int, name: str) -> None:
    told = events(log_of(folder / "runs" / name), "offload")
    assert [move["reason"] for move in told] == ["start", "room"] and 0 < told[-1]["fraction"] < 1


def test_chunks_move_where_they_are_told_to(runs: dict[str, list[dict]]) -> None:
    fractions = [record["offload_fraction"] for record in events(runs["dense chunks move, cpu"], "train")]
    assert fractions == pytest.approx([0.65, 0.1, 0.9, 0.5], abs=0.05)


@pytest.mark.parametrize("name", AUTO)
def test_auto_keeps_as_little_in_host_memory_as_fits_and_tells_of_every_move(
    runs: dict[str, list[dict]], folder: Path, name: str
) -> None:
    plain = runs[base(1, "dense distributed bf16 1 cpu")]
    gib, fractions, reasons = AUTO[name]
    assert (steps(runs[name]), digests(runs[name])) == (steps(plain), digests(plain))
    assert [r["offload_fraction"] for r in events(runs[name], "train")] == pytest.approx(fractions, abs=1e-3)
    told = events(log_of(folder / "runs" / name), "offload")
    assert [move["reason"] for move in told] == reasons
    moved = told[-1]
    assert moved["budget_bytes"] == round(0.9 * float(gib) * GIB)
    assert moved["peak_bytes"] + moved["moved_bytes"] <= moved["budget_bytes"] - round(0.02 * moved["budget_bytes"])


def test_auto_decides_by_pipeline_stage(runs: dict[str, list[dict]], folder: Path) -> None:
    assert not error(runs["dense PP2, auto"])
    moves = events(log_of(folder / "runs" / "dense PP2, auto"), "offload")[1:]
    assert sorted(move["stage"] for move in moves) == [0, 1]
    assert len({move["fraction"] for move in moves}) == 2


def test_a_step_that_finds_no_memory_sends_state_away_and_is_done_again(
    runs: dict[str, list[dict]], folder: Path
) -> None:
    plain, found = runs["short of memory, plenty"], runs["short of memory"]
    assert (steps(found), digests(found)) == (steps(plain), digests(plain))
    counted = ("load_balancing_loss", "expert_tokens_mean", "expert_tokens_max", "loss_of")
    assert all(len(r["loss_of"]) == 2 for r in events(plain, "train"))
    assert [[r.get(name) for name in counted] for r in events(found, "train")] == [
        [r.get(name) for name in counted] for r in events(plain, "train")
    ]
    moves = events(log_of(folder / "runs" / "short"), "offload")
    assert [(move["reason"], move["step"]) for move in moves] == [("start", 0), ("room", 1), ("out of memory", 3)]
    assert moves[-1]["fraction_before"] == 0 and 0.45 <= moves[-1]["fraction"] < 0.6


def test_one_data_parallel_rank_does_its_part_again_while_the_others_wait(
    runs: dict[str, list[dict]], folder: Path
) -> None:
    found, plain = runs["one of two short"], runs[base(2, "dense DP2")]
    assert (steps(found), digests(found)) == (steps(plain), digests(plain))
    moves = events(log_of(folder / "runs" / "one of two short"), "offload")
    assert [(m["reason"], m["step"], m.get("rank")) for m in moves][1:] == [("room", 1, 0), ("out of memory", 3, 1)]


REFUSED = {
    "short again": "step 3 found no memory on the device (peak 1.14MiB), and a second time: emulated; use more",
    "short of memory in the middle": "ranks speak within a step (--tp, --pp, --cp, --ep, --overlap-grad-reduce)",
    "short of memory in the update": "found no memory on the device (peak 1.546MiB), in the middle of the update",
    "no limit known": "--offload-optimizer auto: on a CPU it needs --device-memory-gib",
    "small host": "--offload-optimizer 0.65: this process needs 537.3KiB of host memory, 390.6KiB are free "
    "(cgroup limits counted); at most 0.46 of the optimizer's state fits",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_numbers(runs: dict[str, list[dict]], name: str) -> None:
    assert REFUSED[name] in error(runs[name])


def test_auto_begins_with_what_fits_in_host_memory(runs: dict[str, list[dict]]) -> None:
    first = events(runs["small host, auto"], "train")[0]
    assert 0.4 < first["offload_fraction"] < 0.47 and first["offload_host_bytes"] < 400_000


@pytest.mark.parametrize("name", marked(RESUMED, GO_ON))
def test_a_run_goes_on_at_another_fraction_to_the_bit(runs: dict[str, list[dict]], name: str) -> None:
    parts = [runs[f"{name}, first"], runs[f"{name}, rest"]]
    assert [len(steps(part)) for part in parts] == [2, 2]
    whole = runs[f"dense 1 {RESUMED[name][0]} None, not offloaded"]
    assert steps(*parts) == steps(whole)
    assert [pair for part in parts for pair in digests(part)] == digests(whole)


def test_a_run_goes_on_at_another_number_of_ranks_to_the_bit(runs: dict[str, list[dict]]) -> None:
    for part in ("", ", rest"):
        plain, offloaded = runs[f"of two{part}"], runs[f"of two, offloaded{part}"]
        assert (steps(offloaded), digests(offloaded)) == (steps(plain), digests(plain))


def test_a_checkpoint_written_beside_the_training_holds_the_state_of_its_step(
    runs: dict[str, list[dict]], folder: Path
) -> None:
    assert steps(runs["asynchronous"]) == steps(runs["asynchronous, not offloaded"])

    def written(save: str, step: int) -> dict[str, str]:
        manifest = json.loads((folder / "runs" / save / f"iter_{step:07}" / "manifest.json").read_text())
        return {name: file["xxh3_128"] for name, file in manifest["files"].items() if name.endswith(".distcp")}

    for step in (2, 4):
        assert written("asynchronous", step) == written("asynchronous plain", step) != {}


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        ("--offload-optimizer 1.5", 2, "--offload-optimizer 1.5: must be a number from 0 to 1, or auto"),
        ("--offload-optimizer most", 2, "--offload-optimizer most: must be a number from 0 to 1, or auto"),
        ("--offload-engine cpu", 2, "--offload-engine needs --offload-optimizer"),
        ("--offload-chunk 1Mi", 2, "--offload-chunk needs --offload-optimizer"),
        ("--offload-optimizer 1 --offload-chunk 8", 2, "--offload-chunk 8: must be at least 64"),
        ("--offload-optimizer 0.1 --device-memory-gib 0.0008", 3, "--device-memory-gib 0.0008: the estimate is"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], options: str, status: int, told: str
) -> None:
    try:
        ended = main(arguments(folder, "dense", "runs/refused", options))
    except SystemExit as usage:
        ended = int(usage.code or 0)
    assert ended == status and told in capfd.readouterr().err


def test_too_little_host_memory_ends_the_run_with_3_and_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megapatch.trainer.offload import offloading

    monkeypatch.setattr(offloading, "free_bytes", lambda: 400_000)
    assert main(arguments(folder, "dense", "runs/no room", f"{CPU} 0.65")) == 3
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("mp-pretrain: error: --offload-optimizer 0.65: this process needs 537.3KiB of host memory")


PLANNED = {  # the share that is surely on the device, and what is told of host memory
    "": (1, None),
    "--offload-optimizer 0.25": (0.75, "0.00 GiB at most"),
    "--offload-optimizer 1": (0, "0.00 GiB at most"),
    "--offload-optimizer auto --device-memory-gib 1": (0, "at most with all of the optimizer's state; auto takes less"),
}


@pytest.mark.parametrize("offload", PLANNED)
def test_a_plan_counts_what_stays_on_the_device_and_what_leaves(
    folder: Path, capfd: pytest.CaptureFixture[str], offload: str
) -> None:
    share, told = PLANNED[offload]
    assert main(arguments(folder, "dense", "runs/planned", f"{KINDS['bf16']} {offload} --dry-run")) == 0
    said = capfd.readouterr()
    (stage,) = json.loads(said.out)["memory"]
    assert stage["optimizer_bytes"] == 65920 * 12 * share
    assert stage["host_bytes"] == 65920 * 12 * (1 - share)
    lines = [line for line in said.err.splitlines() if line.startswith("host memory of a rank")]
    assert len(lines) == bool(told) and all(told in line for line in lines)


def test_a_plan_counts_activations_that_leave(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = []
    for words in ("", "--offload-activations 1"):
        assert main(arguments(folder, "dense", "runs/planned", f"{KINDS['bf16']} {words} --dry-run")) == 0
        found.append(json.loads(capfd.readouterr().out)["memory"][0])
    plain, moved = found
    assert plain["host_bytes"] == 0 < moved["host_bytes"]
    kept = [stage["total_bytes"] for stage in found]
    assert kept[0] >= kept[1] and moved["total_bytes"] == sum(
        moved[f"{name}_bytes"] for name in ("weights", "gradients", "optimizer", "activations")
    )
