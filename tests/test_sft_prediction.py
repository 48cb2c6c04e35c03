"""mp-sft with a layer that predicts further: its loss is over the assistant's tokens of each conversation, weighed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sft_runs
from sft_runs import ROW, ROWS, VOCABULARY
from slow_cases import marked, wanted
from test_prediction import published
from trainer_runs import error, events, steps

STILL = "--moe-aux-loss none --moe-bias-update-rate 0"  # what depends on how conversations share rows
FURTHER = f"{STILL} --mtp-loss-weight 0.5"
PACKED = f"--data-path {{}}/weighted --global-batch-size {ROWS}"
SEQUENCE = "--loss-normalisation sequence"
LAYOUTS = {  # two processes: arguments, the case of one process that it equals
    "DP2": (PACKED, "packed"),
    "CP2": (f"{PACKED} --cp 2", "packed"),
    "TP2 SP, rows joined": (f"{PACKED} --tp 2 --sequence-parallel --micro-batch-size 2", "packed"),
    "PP2 VPP2 sequence": (f"{PACKED} {SEQUENCE} --pp 2 --vpp 2", "sequence"),
    "EP2 sequence": (f"{PACKED} {SEQUENCE} --ep 2", "sequence"),
}
SAME = {"padded": "packed", "sequence padded": "sequence"} | {name: same for name, (_, same) in LAYOUTS.items()}
QUICK = SAME.keys() - {"DP2", "EP2 sequence"}
Runs = dict[str, list[dict]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """Records of each case."""
    folder: Path = tmp_path_factory.mktemp("further")
    sft_runs.tokenizer(folder)
    number = sft_runs.filling(folder, "weighted", weighted=True)
    made = published(folder / "v3", vocab_size=VOCABULARY, max_position_embeddings=2 * ROW)
    (made / "chat_template.jinja").unlink()
    for path in (folder / "tokenizer").iterdir():
        shutil.copy(path, made / path.name)
    padded = f"--data-path {{}}/weighted --no-packing --global-batch-size {number}"
    alone = {"packed": PACKED, "padded": padded, "sequence": f"{PACKED} {SEQUENCE}"}
    alone["sequence padded"] = f"{padded} {SEQUENCE}"

    def arguments(words: str, more: str = FURTHER) -> list[str]:
        return sft_runs.arguments(folder, "v3", "run", f"{words} {more}")

    one: dict[str, Any] = {name: arguments(words) for name, words in alone.items()}
    one["without"] = arguments(PACKED, STILL)
    two = {name: arguments(words) for name, (words, _) in wanted(request, LAYOUTS, QUICK).items()}
    found = sft_runs.launch(1, one, folder) | sft_runs.launch(2, two, folder)
    assert not any(map(error, found.values())), {name: error(log) for name, log in found.items() if error(log)}
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", marked(SAME, QUICK))
def test_a_loss_does_not_depend_on_how_rows_are_cut_or_shared(runs: Runs, name: str) -> None:
    same = SAME[name]
    loss, norm = (
        max(abs(a[i] - b[i]) for a, b in zip(steps(runs[name]), steps(runs[same]), strict=True)) for i in (1, 2)
    )
    print(f"{name}: loss off by {loss:.1e}, norm by {norm:.1e}")
    assert loss <= 1e-5 and norm <= 1e-4


@pytest.mark.timeout(900)
def test_the_further_loss_is_logged_falls_and_moves_the_model(runs: Runs) -> None:
    further = [record["mtp_1_loss"] for record in events(runs["packed"], "train")]
    assert further[-1] < further[0]
    assert steps(runs["without"])[0][1] == steps(runs["packed"])[0][1]
    assert steps(runs["without"])[0][2] != steps(runs["packed"])[0][2]
    assert "mtp_1_loss" not in events(runs["without"], "train")[0]
