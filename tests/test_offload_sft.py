"""mp-sft with Adam's state and activations in host memory is mp-sft without, to the bit; two processes."""

from pathlib import Path

import pytest
import sft_runs
from trainer_runs import error, events, launch, steps

WORDS = "--data-path {}/chats --global-batch-size 4"
OPTIMIZER = "--offload-optimizer 0.5 --offload-engine cpu --offload-chunk 3000"
ACTIVATIONS = "--offload-activations 2 --offload-activation-min-kib 0"
LAYOUTS = {  # what is shared by the runs that are compared
    "distributed bf16": f"{WORDS} --precision bf16 --use-distributed-optimizer",
    "CP2": f"{WORDS} --cp 2",
    "adapters": f"{WORDS} --precision bf16 --lora-rank 4",  # all else is frozen
}
MOVED = {
    "optimizer": OPTIMIZER,
    "streamed": "--offload-optimizer 0.5 --offload-engine stream --offload-chunk 256",
    "activations": ACTIVATIONS,
    "both": f"{OPTIMIZER} {ACTIVATIONS}",
}
CASES = {f"{name} {moved}": f"{LAYOUTS[name]} {words}" for name in LAYOUTS for moved, words in MOVED.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Records of each case, and of each layout without."""
    folder: Path = tmp_path_factory.mktemp("offload_sft")
    sft_runs.tokenizer(folder)
    sft_runs.data(folder, "chats", sft_runs.chats(32))
    sft_runs.model(folder, "dense", num_hidden_layers=4, attention_dropout=0.1)
    cases = {
        name: {"arguments": sft_runs.arguments(folder, "dense", "run", words), "digests": True}
        for name, words in (LAYOUTS | CASES).items()
    }
    found = launch(2, cases, folder, "offload_sft_worker.py")
    assert not any(map(error, found.values())), {name: error(log) for name, log in found.items() if error(log)}
    return found


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_changes(runs: dict[str, list[dict]], layout: str, moved: str) -> None:
    plain, found = runs[layout], runs[f"{layout} {moved}"]
    assert steps(found) == steps(plain) and len(steps(plain)) == 4
    states = [[record["digest"] for record in events(records, "state")] for records in (plain, found)]
    assert states[0] == states[1] and len(set(states[0])) == 4  # it trained
    for step in events(found, "train"):
        assert ("offload_fraction" in step) == (moved != "activations")
        assert 0.49 < step.get("offload_fraction", 0.5) <= 0.5
        assert (step.get("activations_out_bytes", 0) > 0) == ("--offload-activations" in MOVED[moved])
