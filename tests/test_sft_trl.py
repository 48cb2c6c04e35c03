"""mp-sft trains as trl's SFTTrainer does: losses of every step within 1e-4, optimizer steps between them."""

import json
import subprocess
import sys

import pytest
import sft_runs
from trainer_runs import ENVIRONMENT, ROOT, error, steps

CHATS = 16  # all of them are one global batch
PLAIN = "--lr-schedule constant --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"
OURS = {
    "padded": f"--data-path {{}}/chats --no-packing --global-batch-size {CHATS} --micro-batch-size 4 {PLAIN}",
    "packed": f"--data-path {{}}/chats --global-batch-size {{rows}} {PLAIN}",
}
THEIRS = {
    "padded": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": CHATS // 2},
    "padding-free": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": CHATS // 4,
        "padding_free": True,
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step."""
    folder = tmp_path_factory.mktemp("trl")
    sft_runs.tokenizer(folder)
    sft_runs.data(folder, "chats", sft_runs.chats(CHATS))
    sft_runs.model(folder, "dense")
    given, results = folder / "theirs.json", folder / "found.json"
    given.write_text(json.dumps(THEIRS))
    worker = [str(ROOT / "tests" / "trl_worker.py"), str(folder / "dense"), str(folder / "chats.jsonl")]
    ran = subprocess.run(
        [sys.executable, *worker, str(given), str(results)],
        env=ENVIRONMENT | {"HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    theirs = {name: [tuple(step) for step in log] for name, log in json.loads(results.read_text()).items()}
    rows = sft_runs.rows(folder / "chats")
    cases = {
        name: sft_runs.arguments(folder, "dense", "run", words.replace("{rows}", str(rows)))
        for name, words in OURS.items()
    }
    logs = sft_runs.launch(1, cases, folder)
    assert not any(map(error, logs.values())), {name: error(log) for name, log in logs.items()}
    return theirs | {f"our {name}": [step[1:3] for step in steps(log)] for name, log in logs.items()}


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("ours", OURS)
def test_each_step_is_as_in_trl(found: dict[str, list[tuple[float, float]]], ours: str, theirs: str) -> None:
    a, b = found[f"our {ours}"], found[theirs]
    assert len(a) == len(b) == 4 and b[-1][0] < b[0][0] - 0.1  # it trained
    loss, norm = (max(abs(x[i] - y[i]) for x, y in zip(a, b, strict=True)) for i in (0, 1))
    print(f"{ours} against trl {theirs}: loss off by {loss:.1e}, norm by {norm:.1e}")
    assert loss <= 1e-4
    assert norm <= 1e-3
