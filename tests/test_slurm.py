"""scripts/slurm/pretrain.sbatch: warned before its time limit it saves and queues again, then resumes and finishes."""

import os
import subprocess
import sys
from pathlib import Path

import loopback_slurm
import pytest
import slurm_runs
from slurm_runs import STEPS, check_resumed_run, events

SCRIPT = slurm_runs.SCRIPTS / "pretrain.sbatch"
WARNED_AT = 3

SRUN = """#!/usr/bin/env bash
# Starts SLURM_NTASKS tasks as srun does; sends them USR1 once the log has step WARNED_AT, if that is set.
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" &
    tasks+=($!)
done
if [ -n "${WARNED_AT:-}" ]; then
    until grep -qs "\\"step\\": $WARNED_AT," "$SAVE/log.jsonl"; do
        [ "$(jobs -rp | wc -l)" = "$SLURM_NTASKS" ] || break
        sleep 0.02
    done
    kill -USR1 "${tasks[@]}" || true
fi
for _ in "${tasks[@]}"; do
    wait -n && continue
    kill -9 "${tasks[@]}" # as --kill-on-bad-exit does
    exit 1
done
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' node1 node2 ;;
    "show node") [ "$3" = node1 ] && echo "   NodeAddr=127.0.0.1 NodeHostName=localhost Version=22.05.8" ;;
    "requeue $SLURM_JOB_ID") echo "$2" >>requeued ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data, and train.args."""
    return slurm_runs.make(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def cluster(run_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks, with srun and scontrol of our own."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = str(loopback_slurm.free_ports(1)[0])
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job_says = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    given = {name: value for name, value in os.environ.items() if name not in ("CLUSTER_ENV", "TRAINER")}
    return given | job_says | {"PATH": path, "ARGS": "train.args", "SAVE": "run"}


def submit(folder: Path, environment: dict[str, str], script: str = SCRIPT.name) -> subprocess.CompletedProcess:
    """Run the script as Slurm does: a copy of it, with the folder of the submission as current folder."""
    copy = folder / "slurm_script"
    copy.write_text((slurm_runs.SCRIPTS / script).read_text())
    return subprocess.run(["bash", str(copy)], cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_a_warned_job_saves_and_queues_again_then_resumes_and_finishes(run_folder, cluster):
    warned = submit(run_folder, cluster | {"WARNED_AT": str(WARNED_AT)})
    assert warned.returncode == 0, warned.stderr
    assert (run_folder / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    assert WARNED_AT <= events(run_folder)[-1]["step"] < STEPS
    again = submit(run_folder, cluster)
    assert again.returncode == 0, again.stderr
    assert (run_folder / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]  # not once more
    check_resumed_run(run_folder)
    assert "mp-pretrain[0]: " in again.stderr and "mp-pretrain[1]: " not in again.stderr  # one rank talks


def test_a_failed_job_fails_and_is_not_queued_again(run_folder, cluster, tmp_path):
    (run_folder / "requeued").unlink(missing_ok=True)
    (run_folder / "wrong.args").write_text("--model model --data-path nowhere --train-iters 5\n")
    done = submit(run_folder, cluster | {"ARGS": "wrong.args", "SAVE": str(tmp_path / "run")})
    assert done.returncode == 1 and "nowhere" in done.stderr
    assert not (run_folder / "requeued").exists()


@pytest.mark.parametrize("name", ["ARGS", "SAVE"])
def test_what_is_not_named_is_asked_for(cluster, name, tmp_path):
    del cluster[name]
    done = submit(tmp_path, cluster)
    assert done.returncode != 0 and f"{name}: f" in done.stderr


MARKED = 'for word; do [ "$before" != --requeue-file ] || touch "$word"; before="$word"; done'
SAVED = "echo $RANDOM >run/latest_checkpointed_iteration.txt"
JOBS: dict[str, tuple[str, dict[str, str], int, str]] = {  # what srun does, environment -> status, and what is said
    "saved": (f"{SAVED}; {MARKED}", {}, 0, ""),
    "saved, and torchrun ends with 1": (f"{SAVED}; {MARKED}; exit 1", {}, 0, ""),
    "without a step": (MARKED, {}, 1, "no step was made since checkpoint none; not queued again"),
    "as often as is allowed": (f"{SAVED}; {MARKED}", {"SLURM_RESTART_COUNT": "3"}, 1, "queued again 3 times"),
    "done": (SAVED, {}, 0, ""),
    "failed": (f"{SAVED}; exit 7", {}, 7, ""),
    "failed, to be tried again": (f"{SAVED}; exit 7", {"REQUEUE_FAILED": "1"}, 0, ""),
    "failed without a step": ("exit 7", {"REQUEUE_FAILED": "1"}, 1, "no step was made"),
}
QUEUED_AGAIN = {"saved", "saved, and torchrun ends with 1", "failed, to be tried again"}


@pytest.mark.parametrize("script", ["pretrain.sbatch", "torchrun.sbatch"])
@pytest.mark.parametrize("job", JOBS)
def test_what_queues_again_and_what_does_not(job, script, cluster, tmp_path):
    does, environment, status, said = JOBS[job]
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\nbefore=none\n{does}\n")
    given = {"MAX_REQUEUES": "3", "SLURM_NNODES": "2"} | environment
    done = submit(tmp_path, cluster | given, script)
    assert done.returncode == status and said in done.stderr, done.stderr
    assert (tmp_path / "requeued").exists() == (job in QUEUED_AGAIN)
    assert not list((tmp_path / "run").glob("requeue-*"))


def test_a_file_left_by_an_earlier_start_queues_nothing(cluster, tmp_path):
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\n{SAVED}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"requeue-{cluster['SLURM_JOB_ID']}").touch()
    assert submit(tmp_path, cluster).returncode == 0
    assert not (tmp_path / "requeued").exists()


SBATCH = """#!/usr/bin/env bash
echo "$ARGS $PREFIX $SAVE $SBATCH_PARTITION: $*" >>submitted
echo "$(wc -l <submitted);cluster"
"""
NAMES = ("preprocess", "convert", "train", "export", "generate")


def chain(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run chain.sh in ``folder`` with an sbatch that only takes notes."""
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}"} | environment
    return subprocess.run(
        [slurm_runs.SCRIPTS / "chain.sh"], cwd=folder, env=given, capture_output=True, text=True, timeout=20
    )


def test_the_chain_submits_each_step_after_the_one_before(tmp_path):
    for name in NAMES:
        (tmp_path / f"{name}.args").touch()
    done = chain(tmp_path, RUN=".", CLUSTER_ENV=str(slurm_runs.SCRIPTS / "cluster.env"))
    steps = ["preprocess", "merge", *NAMES[1:]]
    assert done.stdout.split("\n") == [*(f"{step} {i}" for i, step in enumerate(steps, 1)), ""], done.stderr
    lines = (tmp_path / "submitted").read_text().splitlines()
    for i, (step, line) in enumerate(zip(steps, lines, strict=True), 1):
        before = f" --dependency=afterok:{i - 1} --kill-on-invalid-dep=yes" if i > 1 else ""
        own = {"preprocess": " --array=0-7%4", "train": " --nodes=4"}.get(step, "")
        script = slurm_runs.SCRIPTS / f"{step.replace('train', 'pretrain')}.sbatch"
        assert line == f"./{step}.args ./data ./train gpu: --parsable{before}{own} {script}"


WRONG_CHAINS = {
    "RUN: folder with the .args files": {},
    "./convert.args: no such file; step convert needs it": {"RUN": ".", "STEPS": "merge convert"},
    "STEPS: no step fly; there are: ": {"RUN": ".", "STEPS": "merge fly"},
    "nowhere.env: No such file": {"RUN": ".", "STEPS": "merge", "CLUSTER_ENV": "nowhere.env"},
}


@pytest.mark.parametrize("said", WRONG_CHAINS)
def test_a_chain_that_cannot_run_submits_nothing(said, tmp_path):
    done = chain(tmp_path, **WRONG_CHAINS[said])
    assert done.returncode != 0 and said in done.stderr and not (tmp_path / "submitted").exists()
