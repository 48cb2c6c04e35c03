"""The Slurm scripts on a real Slurm of two nodes on this machine: shards, requeue, lost ranks and nodes, chains."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import loopback_slurm
import psutil
import pytest
import slurm_runs
from loopback_slurm import Cluster, wait_for
from slurm_runs import STEPS, check_resumed_run, events, steps

pytestmark = pytest.mark.skipif(bool(loopback_slurm.missing()), reason=loopback_slurm.missing())
SMALL = ("--gpus-per-node=0", "--cpus-per-task=1")  # the nodes have 4 CPUs and no GPU
TWO = ("--nodes=2", "--ntasks-per-node=1", *SMALL, "--parsable")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with loopback_slurm.slurm(tmp_path_factory.mktemp("cluster")) as found:
        found.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANKS": "1", "TRAINER": "mp-pretrain"}
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slurm_runs.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder to train in."""
    shutil.copytree(made, tmp_path / "job")
    return tmp_path / "job"


def submit(cluster: Cluster, folder: Path, script: str, *options: str, **given: str) -> str:
    """The number of a job of one of the scripts."""
    environment = {"ARGS": "train.args", "SAVE": "run"} | given
    words = ["env", *(f"{name}={value}" for name, value in environment.items()), "sbatch", *options]
    return cluster.output(*words, str(slurm_runs.SCRIPTS / script), cwd=folder)


def state(cluster: Cluster, job: str) -> str:
    """How a job ended or how it is, such as COMPLETED."""
    shown = cluster.output("scontrol", "show", "job", job)
    return shown.split("JobState=")[1].split()[0]


def said(folder: Path) -> str:
    """What all jobs said."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))


def wait_in_job(cluster: Cluster, folder: Path, condition: Callable[[list[dict]], bool], what: str) -> None:
    """Return when the records of the log are as they should be; fail at once where all jobs have ended before."""

    def there() -> bool:
        ended = not cluster.output("squeue", "--noheader")
        if (folder / "run" / "log.jsonl").exists() and condition(events(folder)):
            return True
        assert not ended, f"ended before {what}: {said(folder)}"
        return False

    wait_for(there, what, 300)


def wait_for_step(cluster: Cluster, folder: Path, after: int = 0) -> None:
    """Return when the log has a step beyond ``after``."""
    wait_in_job(cluster, folder, lambda log: last_step(log) > after, f"a step after {after}")


def last_step(log: list[dict]) -> int:
    """The last step that the records tell of, 0 before the first."""
    return ([0] + [record["step"] for record in log if record["event"] == "train"])[-1]


def wait_for_end(cluster: Cluster, folder: Path) -> None:
    """Return when the run is done, and the jobs have ended."""
    wait_in_job(cluster, folder, lambda log: log[-1].get("reason") == "done", "the end")
    cluster.wait_for_end(60)


def test_shards_of_an_array_are_merged_and_what_depends_on_a_failed_job_is_cancelled(cluster, made, tmp_path):
    (tmp_path / "preprocess.args").write_text(f"--tokenizer {made}/tokenizer --input {' '.join(slurm_runs.TEXT)}\n")
    (tmp_path / "convert.args").write_text("--source nowhere --target core\n")
    (tmp_path / "export.args").write_text("--target hf\n")
    (tmp_path / "cluster.env").write_text('OPTIONS_PREPROCESS="--array=1-3 --cpus-per-task=1"\nexport SBATCH_CPUS=1\n')
    names = "preprocess merge convert export"
    given = {"RUN": ".", "CLUSTER_ENV": "cluster.env", "STEPS": names, "OPTIONS_CONVERT": "--cpus-per-task=1"}
    words = ["env", *(f"{name}={value}" for name, value in given.items()), "OPTIONS_EXPORT=--cpus-per-task=1"]
    printed = cluster.output(*words, str(slurm_runs.SCRIPTS / "chain.sh"), cwd=tmp_path)
    jobs = dict(line.split() for line in printed.splitlines())
    cluster.wait_for_end(100)
    texts = {
        step: "".join(path.read_text() for path in tmp_path.glob(f"{step}-{job}*.out")) for step, job in jobs.items()
    }
    assert {step: state(cluster, job) for step, job in jobs.items() if step != "preprocess"} == {
        "merge": "COMPLETED",
        "convert": "FAILED",
        "export": "CANCELLED",
    }, texts
    assert "nowhere" in texts["convert"]
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"data{suffix}").read_bytes() == (made / f"data{suffix}").read_bytes()


@pytest.mark.slow
def test_two_nodes_warned_save_queue_again_resume_and_finish(cluster, folder):
    """The warning comes from scancel instead of a time limit of minutes."""
    job = submit(cluster, folder, "pretrain.sbatch", *TWO)
    wait_for_step(cluster, folder)
    cluster.output("scancel", "--signal=USR1", job)
    wait_for_end(cluster, folder)
    assert state(cluster, job) == "COMPLETED"
    check_resumed_run(folder)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(cluster, folder):
    job = submit(cluster, folder, "pretrain.sbatch", *TWO)
    wait_for_step(cluster, folder)
    (victim,) = cluster.tasks(job, "n2")
    victim.kill()
    cluster.wait_for_end(30)
    assert state(cluster, job) == "FAILED"
    assert not cluster.tasks(job, "n1")
    assert [record["event"] for record in events(folder)].count("start") == 1


@pytest.mark.slow
def test_a_job_whose_node_dies_is_queued_again_and_resumes_when_the_node_is_back(cluster, folder):
    (folder / "train.args").write_text((folder / "train.args").read_text() + "--save-interval 20\n")
    job = submit(cluster, folder, "pretrain.sbatch", *TWO)
    wait_for_step(cluster, folder, after=45)
    frozen = cluster.lose_node("n2", job)
    wait_for(lambda: state(cluster, job) == "PENDING", "the job is queued again", 120)
    for task in frozen:
        with suppress(psutil.NoSuchProcess):  # Slurm was faster
            task.kill()
    cluster.start_node("n2")
    wait_for_end(cluster, folder)
    starts = [record for record in events(folder) if record["event"] == "start"]
    assert starts[0]["resumed_from"] is None and starts[1]["resumed_from"] >= 40 and len(starts) == 2
    assert steps(folder) == list(range(1, STEPS + 1)) and state(cluster, job) == "COMPLETED"


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_starts_again_within_the_job_which_is_then_warned(cluster, folder):
    (folder / "train.args").write_text((folder / "train.args").read_text() + "--save-interval 20\n")
    job = submit(cluster, folder, "torchrun.sbatch", *TWO)
    wait_for_step(cluster, folder, after=25)
    workers = [task for task in cluster.tasks(job, "n2") if "RANK" in task.environ()]
    os.kill(workers[0].pid, signal.SIGKILL)
    wait_in_job(cluster, folder, lambda log: [r["event"] for r in log].count("start") == 2, "a second start")
    wait_for_step(cluster, folder, after=last_step(events(folder)))
    cluster.output("scancel", "--signal=USR1", job)
    wait_for_end(cluster, folder)
    starts = [record for record in events(folder) if record["event"] == "start"]
    assert [record["world_size"] for record in starts] == [2, 2, 2]
    assert starts[1]["resumed_from"] in range(20, STEPS, 20)
    assert [r["reason"] for r in events(folder) if r["event"] == "end"] == ["signal 10", "done"]
    assert steps(folder) == list(range(1, STEPS + 1)) and state(cluster, job) == "COMPLETED"


@pytest.mark.slow
def test_the_whole_chain_from_text_to_text(cluster, folder):
    shutil.rmtree(folder / "run", ignore_errors=True)
    files = {
        "preprocess": f"--tokenizer tokenizer --input {' '.join(slurm_runs.TEXT)}",
        "convert": "--source model --target core",
        "train": "--model core --data-path made --split 100,0,0 --seq-length 32 --global-batch-size 4 --train-iters 60 "
        "--lr 1e-3 --timeout-s 60 --log-interval 100",
        "export": "--target exported",
        "generate": "--model exported --input prompts.txt --output generated.jsonl --max-new-tokens 4",
    }
    for name, text in files.items():
        (folder / f"{name}.args").write_text(text + "\n")
    (folder / "prompts.txt").write_text("def read(\nimport\n")
    sizes = {step: "--cpus-per-task=1" for step in ("preprocess", "convert", "export", "merge")}
    sizes["preprocess"] += " --array=0-1"
    sizes["train"], sizes["generate"] = " ".join(TWO[:-1]), "--gpus-per-task=0 --cpus-per-task=1"
    lines = [f'OPTIONS_{step.upper()}="{options}"' for step, options in sizes.items()]
    (folder / "cluster.env").write_text("\n".join(lines) + "\n")
    given = ["RUN=.", "CLUSTER_ENV=cluster.env", "DATA=made", "SAVE=run"]
    jobs = cluster.output("env", *given, str(slurm_runs.SCRIPTS / "chain.sh"), cwd=folder).split()[1::2]
    wait_for_step(cluster, folder)
    cluster.output("scancel", "--signal=USR1", jobs[3])  # a job that is queued again keeps the others waiting
    cluster.wait_for_end(500)
    ends = {job: state(cluster, job) for job in jobs}
    assert set(ends.values()) == {"COMPLETED"}, said(folder)
    assert [r["reason"] for r in events(folder) if r["event"] == "end"] == ["signal 10", "done"]
    assert len((folder / "generated.jsonl").read_text().splitlines()) == 2
