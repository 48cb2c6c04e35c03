"""mp-offload-bench: bandwidth and the CPU Adam step against its memory floor."""

import itertools
import json
import math
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megapatch.models import space
from megapatch.models.cli import UserError
from megapatch.tools.offload_bench import adam_step, measure, tell
from megapatch.tools.offload_bench import offload_bench as tool
from megapatch.tools.offload_bench.offload_bench import main

TINY = ["--rounds", "1", "--threads", "1"]
TINY_ADAM = [*TINY, "--measure", "adam", "--numel", "5000", "--chunks", "1Ki", "2Ki"]


def json_lines(capsys, argv):
    assert main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_adam_rows_are_ratios_to_the_floor_of_the_same_run(capsys):
    machine, *rows = json_lines(capsys, TINY_ADAM)
    assert machine["part"] == "machine"
    rows = [row for row in rows if row["part"] == "adam"]
    kernels = [(row["kernel"], row["chunk"]) for row in rows]
    sized = [(name, size) for name in ("fused", "fused bf16") for size in (1024, 2048)]
    assert kernels == [("floor", 5000), *sized, ("stream", 2048), ("foreach", 2048), ("for-loop", 2048)]
    for row in rows:
        moved = 30 if row["kernel"] == "fused bf16" else 28
        assert row["x_floor"] == pytest.approx(row["seconds"] / (rows[0]["seconds"] * moved / 28), rel=1e-12)
        assert row["bytes_per_s"] == moved * 5000 / row["seconds"]
        assert row["ms_per_billion"] == row["seconds"] / 5000 * 1e12


def test_bandwidth_rows_count_the_arrays_that_are_touched(capsys):
    rows = json_lines(capsys, [*TINY, "--measure", "bandwidth", "--sizes", "64KiB", "4KiB"])
    rows = [row for row in rows if row["part"] == "memory"]
    arrays = {"copy": 2, "triad": 3, "read": 1, "update": 2}
    assert [(row["operation"], row["bytes"]) for row in rows] == [(o, n) for n in (4096, 65536) for o in arrays]
    for row in rows:
        moved = row["bytes_per_s"] * row["seconds"]
        assert moved == pytest.approx(arrays[row["operation"]] * row["bytes"], rel=1e-12)  # one division, one product


def test_tables_end_with_what_they_mean(capsys):
    words = ["--measure", "bandwidth", "adam", "overlap", *TINY, "--numel", "5000", "--chunks", "1Ki"]
    assert main([*words, "--sizes", "4KiB", "--link-gb-per-s", "1"]) == 0
    out, err = capsys.readouterr()
    heads = ["host memory", "host <-> device", "asked for", "AdamW step", "beside products", "CPU Adam: "]
    assert sorted(heads, key=err.index) == heads
    assert "ms per billion parameters with 1 thread and chunks of 1Ki elements (fused), " in err
    assert "x the memory floor of " in err
    assert "mp-offload-bench: adam: 4.883Ki parameters, threads 1" in err
    rows = [json.loads(line) for line in out.splitlines()]
    link = [row for row in rows if row["part"] == "link"]
    assert [(row["operation"], row["pinned"], row["emulated"]) for row in link] == [
        (way, False, True) for way in ("h2d", "d2h", "both")
    ]
    assert all(row["bytes_per_s"] <= 2.0e9 for row in link)  # as the emulated link allows, both ways at once
    overlap = [row for row in rows if row["part"] == "overlap"]
    assert [row["operation"] for row in overlap] == ["d2h", "h2d", "adam"]
    for row in overlap:
        hidden = row["alone_s"] + row["products_s"] - row["beside_s"]
        assert row["efficiency"] == hidden / min(row["alone_s"], row["products_s"])
    exact = [row for row in rows if row["part"] == "resident"]
    assert [row["bytes"] for row in exact] == [33 << 20, 65 << 20, 129 << 20]


def test_torch_thread_count_is_put_back(capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        json_lines(capsys, [*TINY_ADAM[:2], "--threads", "2", *TINY_ADAM[4:]])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_arrays_do_not_contend_for_cache_sets():
    for numel in (5000, 2**18, 2**20 + 1):
        arrays = adam_step.Arrays(numel)
        starts = [getattr(arrays, x).data_ptr() for x in "pgmv"]
        assert {(b - a) % 2**20 for a, b in itertools.pairwise(starts)} == {65 * 2**10}
        assert {getattr(arrays, x).shape for x in "pgmv"} == {(numel,)}


def test_chunks_do_not_change_the_step():
    whole, chunked = adam_step.Arrays(5000), adam_step.Arrays(5000)
    adam_step.fused_step(whole, 5000)
    adam_step.fused_step(chunked, 512)
    for name in ("p", "g", "m", "v"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name))


@pytest.mark.parametrize("size", [5000, 2048, 512])
def test_streamed_chunks_take_the_same_step(size):
    whole, streamed = adam_step.Arrays(5000), adam_step.Arrays(5000)
    adam_step.fused_step(whole, 5000)
    adam_step.Stream(streamed, size, rate=None)()
    for name in ("p", "g", "m", "v"):
        assert torch.equal(getattr(whole, name), getattr(streamed, name))


def test_weights_in_bf16_are_those_of_the_step():
    whole, arrays, weights = adam_step.Arrays(5000), adam_step.Arrays(5000), torch.empty(512, dtype=torch.bfloat16)
    adam_step.fused_step(whole, 5000)
    adam_step.bf16_step(arrays, 512, weights)
    assert torch.equal(whole.p, arrays.p)
    assert torch.equal(weights[: 5000 % 512], whole.p[-(5000 % 512) :].bfloat16())


@pytest.mark.timeout(300)
def test_ranks_are_measured_at_once():
    one, two = adam_step.contention_rows(5000, 1, 1024, 1, (1, 2))
    assert [(row["part"], row["ranks"]) for row in (one, two)] == [("contention", 1), ("contention", 2)]
    assert one["x_alone"] == 1 and two["x_alone"] == two["seconds"] / one["seconds"]
    assert two["bytes_per_s"] == 2 * 28 * 5000 / two["seconds"]


@pytest.mark.parametrize("foreach", [False, True])
def test_all_kernels_take_the_same_step(foreach):
    fused, listed = adam_step.Arrays(5000), adam_step.Arrays(5000)
    before = fused.p.clone()
    adam_step.fused_step(fused, 512)
    adam_step.listed_step(listed, 512, foreach=foreach)
    assert not torch.equal(fused.p, before)
    for name in ("p", "m", "v"):  # the order of operations differs
        torch.testing.assert_close(getattr(fused, name), getattr(listed, name), rtol=1e-5, atol=1e-9)


class Calls(TorchDispatchMode):
    """Lists the operations that run and the tensors they are given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, torch.Tensor)]
        self.found.append((op.__name__.split(".")[0], tensors))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "calls", "changed"),
    [
        ("passes", [("add_", "pg"), ("mul_", "m"), ("mul_", "v")], {"p"}),
        ("momentum", [("_fused_sgd_", "pgm"), ("mul_", "v")], {"p", "m"}),
    ],
)
def test_floor_moves_the_28_bytes_it_counts(name, calls, changed):
    arrays, before = adam_step.Arrays(100), adam_step.Arrays(100)
    with Calls() as seen:
        adam_step.floor_runs(arrays)[name]()
    letters = {getattr(arrays, x).data_ptr(): x for x in "pgmv"}
    assert [(op, "".join(letters[t.data_ptr()] for t in tensors)) for op, tensors in seen.found] == calls
    assert all(tensor.shape == (100,) for _, tensors in seen.found for tensor in tensors)
    assert {x for x in "pgmv" if not torch.equal(getattr(arrays, x), getattr(before, x))} == changed


def test_runs_take_turns_and_the_first_round_does_not_count():
    order = []
    times = adam_step.take_turns(2, {name: lambda name=name: order.append(name) for name in "ab"})
    assert order == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_rounds_end_at_the_time_limit_but_one_counts():
    runs = {"a": lambda: time.sleep(1e-3)}
    assert len(adam_step.take_turns(50, runs, limit_s=0.0)["a"]) == 1
    assert len(adam_step.take_turns(5, runs)["a"]) == 5


def test_transfers_are_timed_one_by_one_and_both_at_once(monkeypatch):
    """Here a batch is a sleep of 2 ms for each transfer; two at once wait for each other."""
    together, meeting = [], threading.Barrier(2, timeout=60)

    def batch(lane, target, source, repeat):
        def run():
            at_once = threading.current_thread() is not threading.main_thread()
            if at_once:
                meeting.wait()
            time.sleep(repeat * 2e-3)
            together.append(2 if at_once else 1)

        return run

    monkeypatch.setattr(measure, "_batch", batch)
    times = measure.transfer_times(8 << 20, pinned=True, rounds=2)  # batches of 8
    assert times.keys() == {"h2d", "d2h", "both"}
    assert all(seconds >= 2e-3 for seconds in times.values())
    assert together == [1, 1, 2, 2] * 3


def link_row(size, rate, operation="h2d", pinned=True):
    row = {"part": "link", "operation": operation, "bytes": size, "pinned": pinned}
    return row | {"seconds": size / rate, "bytes_per_s": rate}


def test_knee_is_the_smallest_transfer_near_the_best_rate():
    rates = {2**16: 6e9, 2**18: 20e9, 2**20: 44e9, 2**22: 50e9, 2**24: 55e9, 2**30: 54e9}
    rows = [link_row(size, rate) for size, rate in rates.items()]
    assert tell.knee(rows) == 2**22
    rows += [link_row(2**20, 11e9, pinned=False)]
    assert tell.meaning(rows) == [
        "Link, host to device: 55.0 GB/s pinned, 11.0 GB/s pageable; the knee is at 4MiB: smaller pinned transfers get "
        "less than 90% of the rate."
    ]
    assert tell.tables(rows).splitlines()[-1].split() == "host to device pageable 1MiB 11.0".split()


def adam_row(kernel, threads, chunk, seconds, floor, median=None):
    row = {"part": "adam", "kernel": kernel, "threads": threads, "chunk": chunk, "numel": 10**9, "seconds": seconds}
    row |= {"bytes_per_s": 28e9 / seconds, "x_floor": seconds / floor, "ms_per_billion": 1e3 * seconds}
    return row | {"median_seconds": median or seconds}


def test_meaning_names_the_best_step_the_chunk_size_and_the_limit():
    rows = []
    for threads, floor in ((1, 1.0), (2, 0.9)):
        rows.append(adam_row("floor", threads, 10**9, floor, floor, median=1.5 * floor))
        rows += [
            adam_row("fused", threads, n, floor * x, floor) for n, x in ((2**14, 2.7), (2**20, 1.15), (2**22, 1.1))
        ]
        rows += [
            adam_row("foreach", threads, 2**22, 11 * floor, floor),
            adam_row("for-loop", threads, 2**22, 22.0, floor),
        ]
    assert tell.meaning(rows) == [
        "CPU Adam: 990 ms per billion parameters with 2 threads and chunks of 4Mi elements (fused), 1.10 x the memory "
        "floor of 900 ms.",
        "Chunks of 1Mi elements or more cost at most 11% over the best chunk size.",
        "foreach takes 10.0 x the time of the fused step.",
        "for-loop takes 22.2 x the time of the fused step.",
        "From 1 to 2 threads the step gets 1.11 x as fast: memory is the limit, more threads will not help.",
        "Rough figures: the floor's median time is 1.50 x its smallest; was other work running?",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--numel", "1024Gi"], "--numel 1024Gi: needs 2.458e+04GiB of memory (24 x), 136MiB are free"),
        (["--numel", "8Mi"], "--numel 8Mi: needs 192MiB of memory (24 x), 136MiB are free (cgroup limits counted); "),
        (
            ["--measure", "bandwidth", "--sizes", "4Ki", "1GiB"],
            "--sizes 1Gi: needs 4GiB of memory (4 x), 136MiB are free",
        ),
        (["--threads", "100000"], "--threads 100000: this process may use"),
        (["--measure", "overlap", "--numel", "1Mi"], "--measure overlap: needs 272MiB of memory, 136MiB are free"),
    ],
)
def test_what_does_not_fit_is_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(tool, "free_bytes", lambda: 200 << 20)
    assert main(argv) == (1 if "--threads" in argv else 3)
    error = capsys.readouterr().err
    assert error.startswith(f"mp-offload-bench: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--measure", "gpu"], "argument --measure: invalid choice: 'gpu'"),
        (["--measure", "adam", "--sizes", "4Ki"], "--sizes has no effect without bandwidth in --measure"),
        (["--measure", "bandwidth", "--numel", "4Ki"], "--numel has no effect without adam or overlap in --measure"),
        (["--measure", "bandwidth", "--chunks", "4Ki"], "--chunks has no effect without adam in --measure"),
        (["--measure", "sweep"], "--measure sweep and --output need each other"),
        (["--output", "x"], "--measure sweep and --output need each other"),
        (["--measure", "bandwidth", "--ranks", "4"], "--ranks has no effect without adam or sweep in --measure"),
        (["--measure", "overlap", "--threads", "2"], "--threads has no effect without bandwidth or adam in --measure"),
        (["--measure", "sweep", "--output", "x", "--quick"], "--quick has no effect without bandwidth or adam or "),
        (["--fractions", "0.5"], "--fractions has no effect without sweep in --measure"),
        (["--steps", "9"], "--steps has no effect without sweep in --measure"),
        (["--timeout-s", "9"], "--timeout-s has no effect without sweep in --measure"),
        (["--measure", "sweep", "--output", "x", "--fractions", "2"], "--fractions 2: must be numbers from 0 to 1, or"),
        (["--measure", "sweep", "--output", "x", "--fractions", "most"], "--fractions most: must be numbers from 0 to"),
        (["--measure", "sweep", "--output", "x", "--timeout-s", "0"], "--timeout-s 0: must be above 0"),
        (["--measure", "sweep", "--output", "x", "--device-memory-gib", "-1"], "--device-memory-gib -1: must be above"),
        (["--ranks", "0"], "--steps and --ranks must be at least 1"),
        (["--link-gb-per-s", "0"], "--link-gb-per-s 0.0: must be above 0"),
        (["--numel", "0"], "'0': expected a number such as 65536, 64Ki, 32Mi or 1GiB"),
        (["--sizes", "1.5MB"], "'1.5MB': expected a number such as 65536"),
    ],
)
def test_wrong_usage_is_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number", "again"),
    [
        ("65536", 65536, "64Ki"),
        ("64KiB", 65536, "64Ki"),
        ("3Mi", 3 << 20, "3Mi"),
        ("1GiB", 1 << 30, "1Gi"),
        ("7B", 7, "7"),
    ],
)
def test_sizes_are_read_and_written_as_people_do(text, number, again):
    assert space.count(text) == number
    assert space.short(number) == again


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/b/memory.current": "9",
            },
            [],
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "1000\n",
                "sys/fs/cgroup/a/memory.current": "700\n",
                "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 300\n",
            },
            [600],
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/x\n5:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "500",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "800",
            },
            [0],
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "800",
            },
            [],
        ),
        ({}, []),
    ],
)
def test_cgroup_limits_count(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert space._cgroup_free(tmp_path) == free
    assert space.free_bytes(tmp_path) <= min([space.psutil.virtual_memory().total, *free])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], tool.Plan(32 << 20, tool.CHUNKS, (256 << 20,), tool.LINK_SIZES, (1, 2, 4, 6), 7, 40.0)),
        (
            ["--quick"],
            tool.Plan(16 << 20, (2**14, 2**18, 2**22), (64 << 20,), tool.LINK_SIZES[::2], (1, 2, 4, 6), 3, 5.0),
        ),
        (["--quick", "--rounds", "9", "--sizes", "2Ki", "1Ki", "--measure", "bandwidth"], None),
    ],
)
def test_defaults_are_filled_in(monkeypatch, argv, expected):
    monkeypatch.setattr(tool.os, "sched_getaffinity", lambda _: set(range(8)))
    options = tool.Options(**vars(parse(argv)))
    found = tool.plan(options, torch_threads=6, gpu=True)
    assert found == (
        expected or tool.Plan(0, (2**14, 2**18, 2**22), (1024, 2048), (1024, 2048), (1, 2, 4, 6), 9, math.inf)
    )
    links = tool.plan(options, torch_threads=6, gpu=False).link_sizes
    assert links == (found.link_sizes if options.sizes else tool.EMULATED_SIZES)


@pytest.mark.parametrize(("cpus", "torch_threads", "threads"), [(1, 4, (1,)), (3, 8, (1, 2, 3)), (8, 2, (1, 2))])
def test_threads_by_default_are_no_more_than_the_cpus(monkeypatch, cpus, torch_threads, threads):
    monkeypatch.setattr(tool.os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert tool.plan(tool.Options(**vars(parse([]))), torch_threads, gpu=False).threads == threads


@pytest.mark.parametrize(("cpus", "told"), [(1, "1 CPU; choose at most 1"), (2, "2 CPUs; choose at most 2")])
def test_more_threads_than_cpus_are_refused(monkeypatch, cpus, told):
    monkeypatch.setattr(tool.os, "sched_getaffinity", lambda _: set(range(cpus)))
    with pytest.raises(UserError, match=f"^--threads 4: this process may use {told}$"):
        tool.plan(tool.Options(**vars(parse(["--threads", "4"]))), 1, gpu=False)


def test_memory_that_is_asked_for_by_no_option_is_counted_too(capsys, monkeypatch):
    monkeypatch.setattr(tool, "free_bytes", lambda: 150 << 20)
    assert main([*TINY, "--measure", "bandwidth", "--sizes", "4KiB"]) == 3
    assert "--measure bandwidth: needs 129MiB of memory, 86MiB are free" in capsys.readouterr().err


def parse(argv):
    from megapatch.models.cli import parser

    return parser(tool.Options, prog="x").parse_args(argv)


@pytest.mark.gpu
def test_link_is_measured_on_a_gpu(capsys):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rows = json_lines(capsys, [*TINY, "--measure", "bandwidth", "--sizes", "64KiB", "16MiB"])
    link = [row for row in rows if row["part"] == "link"]
    assert [(row["pinned"], row["bytes"], row["operation"]) for row in link] == [
        (pinned, size, way) for pinned in (True, False) for size in (2**16, 2**24) for way in ("h2d", "d2h", "both")
    ]
    assert all(1e7 < row["bytes_per_s"] < 1e12 for row in link)
