"""scripts/slurm/pretrain.sbatch: warned before its time limit it saves and queues again, then resumes and finishes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import loopback_slurm
import pytest

from megapatch.tools.convert.new_model import main as new_model
from megapatch.tools.preprocess.preprocess import main as preprocess
from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "slurm" / "pretrain.sbatch"
STEPS, WARNED_AT = 400, 3
SIZES = (
    "hidden_size=32 intermediate_size=64 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=2 head_dim=16"
)

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
    folder = tmp_path_factory.mktemp("slurm")
    text = [str(path) for path in sorted((ROOT / "models").glob("*.py"))]
    tokenizer, model = str(folder / "tokenizer"), str(folder / "model")
    assert train_tokenizer(["--input", *text, "--vocab-size", "300", "--output", tokenizer]) == 0
    data = ["--workers", "1", "--output-prefix", str(folder / "data")]
    assert preprocess(["--input", *text, "--tokenizer", tokenizer, *data]) == 0
    sizes = ["--dtype", "fp32", "--set", *SIZES.split()]
    assert new_model(["--model-type", "qwen3", "--tokenizer", tokenizer, "--target", model, *sizes]) == 0
    (folder / "train.args").write_text(
        f"--model model --data-path data --split 100,0,0 --seq-length 32 --global-batch-size 2 --train-iters {STEPS}\n"
        "--lr 1e-3 --timeout-s 30 --log-interval 100\n"
    )
    return folder


@pytest.fixture
def cluster(run_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks, with srun and scontrol of our own."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = str(loopback_slurm.free_ports(1)[0])
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job_says = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    return os.environ | job_says | {"PATH": path, "ARGS": "train.args", "SAVE": "run"}


def submit(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run the script as Slurm does: a copy of it, with the folder of the submission as current folder."""
    copy = folder / "slurm_script"
    copy.write_text(SCRIPT.read_text())
    return subprocess.run(["bash", str(copy)], cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def events(folder: Path) -> list[dict]:
    """The records of the run's log."""
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def check_resumed_run(folder: Path) -> None:
    """Two processes trained, left after a signal, resumed at that step, and did every step once."""
    found = events(folder)
    starts = [record for record in found if record["event"] == "start"]
    ends = [record for record in found if record["event"] == "end"]
    assert [record["world_size"] for record in starts] == [2, 2]
    assert [record["reason"] for record in ends] == ["signal 10", "done"]
    assert starts[0]["resumed_from"] is None and starts[1]["resumed_from"] == ends[0]["step"]
    steps = [record["step"] for record in found if record["event"] == "train"]
    assert steps == list(range(1, STEPS + 1))


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


def test_a_job_that_makes_no_step_stops(cluster, tmp_path):
    (tmp_path / "srun").write_text(
        '#!/usr/bin/env bash\nmkdir -p run\necho \'{"reason": "signal 10"}\' >run/log.jsonl\n'
    )
    done = submit(tmp_path, cluster)
    assert done.returncode == 1 and "no step was made since checkpoint none" in done.stderr
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(loopback_slurm.missing()), reason=loopback_slurm.missing())
def test_real_slurm_warns_queues_again_and_resumes(run_folder, tmp_path):
    """Two nodes on loopback; the warning comes from scancel instead of a time limit of minutes."""
    folder = tmp_path / "job"
    folder.mkdir()
    for path in run_folder.iterdir():
        if path.name not in ("run", "requeued"):
            (folder / path.name).symlink_to(path)
    with loopback_slurm.slurm(tmp_path / "cluster") as environment:
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment = environment | {"PATH": path, "ARGS": "train.args", "SAVE": "run"}
        sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--parsable"]
        job = subprocess.check_output(["sbatch", *sizes, str(SCRIPT)], cwd=folder, env=environment, text=True).strip()
        log = folder / "run" / "log.jsonl"
        loopback_slurm.wait_for(lambda: log.exists() and '"event": "train"' in log.read_text(), "a step", 120)
        subprocess.run(["scancel", "--signal=USR1", job], env=environment, check=True)
        loopback_slurm.wait_for(lambda: '"reason": "done"' in log.read_text(), "the end", 300)
        queue = ["squeue", "--noheader"]
        loopback_slurm.wait_for(lambda: not subprocess.check_output(queue, env=environment), "an empty queue", 60)
    check_resumed_run(folder)
