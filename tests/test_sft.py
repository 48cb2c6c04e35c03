"""mp-sft: what is trained, how it is averaged, packed as unpacked, every layout as one process, resumed to the bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sft_runs
import torch
from sft_runs import ROW, ROWS
from slow_cases import marked, wanted
from trainer_runs import error, events, log_of, steps

from megapatch.models import packing
from megapatch.models.indexed_data import read_manifest
from megapatch.models.packed_rows import Conversations, PackedRows

ALL = f"--data-path {{}}/chats --global-batch-size {ROWS}"  # each step meets every conversation once
HALF = f"--data-path {{}}/chats --global-batch-size {ROWS // 2}"
WEIGHTED = f"--data-path {{}}/weighted --global-batch-size {ROWS}"
SOURCES = "--data-path {}/chats {}/more --global-batch-size 4 --valid-data-path {}/chats {}/more --eval-interval 4"
SEQUENCE = "--loss-normalisation sequence"
LAYOUTS = {  # of two processes: name -> (model, arguments, the case of one process that it equals)
    "DP2": ("dense", ALL, "packed"),
    "DP2, rows joined": ("dense", f"{ALL} --micro-batch-size 2", "packed"),
    "TP2 SP": ("dense", f"{ALL} --tp 2 --sequence-parallel", "packed"),
    "PP2": ("dense", f"{ALL} --pp 2", "packed"),
    "PP2 VPP2": ("dense", f"{ALL} --pp 2 --vpp 2 --micro-batch-size 2", "packed"),
    "CP2": ("dense", f"{ALL} --cp 2", "packed"),
    "CP2 padded": ("dense", "{padded} --cp 2", "padded"),
    "DP2 sequence": ("dense", f"{WEIGHTED} {SEQUENCE}", "sequence"),
    "CP2 sequence": ("dense", f"{WEIGHTED} {SEQUENCE} --cp 2", "sequence"),
    "PP2 sequence, recomputed": ("dense", f"{WEIGHTED} {SEQUENCE} --pp 2 --recompute full", "sequence"),
    "EP2 of experts": ("experts", f"{ALL} --ep 2", "experts"),
    "DP2 of the order": ("dense", HALF, "order"),
    "DP2 sources": ("dense", SOURCES, "two sources"),
    "PP2 sources": ("dense", f"{SOURCES} --pp 2", "two sources"),
    "TP2 sources": ("dense", f"{SOURCES} --tp 2", "two sources"),
    "CP2 padded sources": ("dense", f"{SOURCES} --no-packing --cp 2", "two sources padded"),
}
QUICK = LAYOUTS.keys() - {"DP2", "PP2", "CP2", "DP2 sequence", "DP2 of the order", "PP2 sources", "TP2 sources"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and conversations whose rows are one global batch."""
    made = tmp_path_factory.mktemp("sft")
    sft_runs.tokenizer(made)
    sft_runs.filling(made, "chats")
    sft_runs.filling(made, "weighted", weighted=True)
    sft_runs.data(made, "more", sft_runs.chats(20, seed=99))  # of which "chats" has none
    sft_runs.model(made, "dense", num_hidden_layers=4)
    sft_runs.model(made, "experts", "qwen3_moe")
    return made


def padded(folder: Path, name: str = "chats") -> str:
    """Arguments that train each conversation of a set alone, all in one global batch."""
    count = len(Conversations(folder / name))
    return f"--data-path {{}}/{name} --no-packing --global-batch-size {count}"


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[dict]]:
    """Records of the runs of one process."""
    saved = f"{HALF} --save-interval 2"
    words = {
        "packed": ALL,
        "joined": f"{ALL} --micro-batch-size 4",
        "padded": f"{padded(folder)}",
        "accumulated": f"{padded(folder)} --micro-batch-size 2",
        "weighted": WEIGHTED,
        "weighted padded": padded(folder, "weighted"),
        "sequence": f"{WEIGHTED} {SEQUENCE}",
        "sequence padded": f"{padded(folder, 'weighted')} {SEQUENCE}",
        "order": HALF,
        "lines": f"--data {{}}/chats.jsonl --workers 1 --global-batch-size {ROWS // 2}",
        "two sources": SOURCES,
        "two sources padded": f"{SOURCES} --no-packing",
        "blend": "--data-path 3 {}/chats 1 {}/weighted --global-batch-size 4 "
        "--valid-data-path {}/weighted --eval-interval 4 --eval-iters 2",
    }
    cases: dict[str, Any] = {name: sft_runs.arguments(folder, "dense", "run", text) for name, text in words.items()}
    cases["packed"] = sft_runs.arguments(folder, "dense", "packed", ALL)
    cases["experts"] = sft_runs.arguments(folder, "experts", "run", ALL)
    for name in ("whole", "stopped", "again"):
        where = "whole" if name == "whole" else "stopped"
        cases[name] = {"arguments": sft_runs.arguments(folder, "dense", where, saved), "digests": True}
    cases["stopped"]["signal"] = {"step": 2, "number": 10}
    cases["stopped at 2"] = {
        "arguments": sft_runs.arguments(folder, "dense", "other", saved),
        "signal": {"step": 2, "number": 10},
    }
    found = sft_runs.launch(1, cases, folder)
    assert not any(map(error, found.values())), {name: error(log) for name, log in found.items()}
    return found


@pytest.fixture(scope="module")
def pairs(folder: Path, alone: dict[str, list[dict]], request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """Records of the runs of two processes, after those of one."""
    cases = {
        name: sft_runs.arguments(folder, model, "run", words.replace("{padded}", padded(folder)))
        for name, (model, words, _) in wanted(request, LAYOUTS, QUICK).items()
    }
    cases["resumed on two"] = sft_runs.arguments(folder, "dense", "other", f"{HALF} --save-interval 2")
    return sft_runs.launch(2, cases, folder)


def apart(one: list[dict], other: list[dict]) -> tuple[float, float]:
    """Largest differences of losses and of gradient norms, over all steps."""
    a, b = steps(one), steps(other)
    assert len(a) == len(b) and a[-1][1] != a[0][1]  # it trained
    return tuple(max(abs(x[i] - y[i]) for x, y in zip(a, b, strict=True)) for i in (1, 2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("packed", "padded"),
        ("packed", "joined"),
        ("padded", "accumulated"),
        ("weighted", "weighted padded"),
        ("sequence", "sequence padded"),
    ],
)
def test_packed_trains_as_unpacked(alone: dict[str, list[dict]], one: str, other: str) -> None:
    loss, norm = apart(alone[one], alone[other])
    print(f"{one} against {other}: loss {loss:.1e}, norm {norm:.1e}")
    assert loss <= 1e-5
    assert norm <= 1e-5


def test_the_normalisations_and_weights_differ(alone: dict[str, list[dict]]) -> None:
    first = {name: steps(alone[name])[0][1] for name in ("weighted", "sequence")}
    assert abs(first["weighted"] - first["sequence"]) > 1e-4


@pytest.mark.parametrize("name", marked(LAYOUTS, QUICK))
def test_a_layout_trains_as_one_process(alone: dict[str, list[dict]], pairs: dict[str, list[dict]], name: str) -> None:
    loss, norm = apart(alone[LAYOUTS[name][2]], pairs[name])
    print(f"{name}: loss {loss:.1e}, norm {norm:.1e}")
    assert loss <= 1e-5
    assert norm <= 1e-4


def test_it_resumes_to_the_bit(alone: dict[str, list[dict]]) -> None:
    parts = [alone[name] for name in ("stopped", "again")]
    assert [len(events(part, "train")) for part in parts] == [2, 2]
    assert steps(*parts) == steps(alone["whole"]) == steps(alone["order"])
    said = [[r["digest"] for r in events(log, "state")] for log in (*parts, alone["whole"])]
    assert said[0] + said[1] == said[2]


def test_the_order_of_samples_stays_at_another_number_of_processes(
    alone: dict[str, list[dict]], pairs: dict[str, list[dict]]
) -> None:
    later = steps(pairs["resumed on two"])
    expected = steps(alone["order"])[2:]
    assert [step for step, *_ in later] == [3, 4]
    assert all(abs(a[1] - b[1]) <= 1e-5 for a, b in zip(later, expected, strict=True))
    same = ("trained_tokens", "conversations", "fill")
    records = [events(log, "train")[-2:] for log in (alone["order"], pairs["resumed on two"])]
    assert [[r[name] for name in same] for r in records[0]] == [[r[name] for name in same] for r in records[1]]


def test_an_epoch_meets_each_conversation_once(folder: Path, alone: dict[str, list[dict]]) -> None:
    """Two steps of half of the rows are an epoch; the next is in another order."""
    counts = (read_manifest(folder / "chats") or {})["counts"]
    trained = [r["trained_tokens"] for r in events(alone["order"], "train")]
    assert sum(trained[:2]) == sum(trained[2:]) == counts["trained_tokens"]
    met = [r["conversations"] for r in events(alone["order"], "train")]
    assert sum(met[:2]) == sum(met[2:]) == counts["documents"]
    assert trained[:2] != trained[2:]


def test_json_lines_are_what_mp_preprocess_chat_makes(folder: Path, alone: dict[str, list[dict]]) -> None:
    assert steps(alone["lines"]) == steps(alone["order"])
    (made,) = (folder / "run" / "data-cache").glob("chats-*.manifest.json")
    assert json.loads(made.read_text())["options"]["max_length"] == ROW


def test_the_log_says_what_was_trained(folder: Path, alone: dict[str, list[dict]]) -> None:
    (about,) = events(log_of(folder / "packed"), "data")
    counts = (read_manifest(folder / "chats") or {})["counts"]
    assert {name: about[name] for name in ("split", "rows", "conversations", "tokens", "trained_tokens")} == {
        "split": "training",
        "rows": ROWS,
        "conversations": counts["documents"],
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained_tokens"],
    }
    first = events(alone["packed"], "train")[0]
    assert (first["trained_tokens"], first["conversations"]) == (counts["trained_tokens"], counts["documents"])
    assert math.isclose(first["fill"], counts["tokens"] / (ROW * ROWS))
    of = events(alone["blend"], "train")[0]["trained_tokens_of"]
    assert list(of) == [str(folder / "chats"), str(folder / "weighted")] and of[str(folder / "chats")] > 0


def test_losses_are_told_by_source(folder: Path, alone: dict[str, list[dict]], pairs: dict[str, list[dict]]) -> None:
    """Two rows of each set: the loss is their mean by trained tokens, and those of two processes are the same."""
    first = events(alone["two sources"], "train")[0]
    losses, counts = first["loss_of"], first["trained_tokens_of"]
    assert list(losses) == [str(folder / "chats"), str(folder / "more")]
    mean = sum(losses[name] * counts[name] for name in losses) / sum(counts.values())
    assert abs(mean - first["loss"]) <= 1e-6 and len({round(loss, 3) for loss in losses.values()}) == 2
    for layout in ("DP2 sources", "CP2 padded sources", *(pairs.keys() & {"PP2 sources", "TP2 sources"})):
        one = "two sources padded" if "padded" in layout else "two sources"
        for kind in ("train", "eval"):
            for a, b in zip(events(alone[one], kind), events(pairs[layout], kind), strict=True):
                assert all(abs(a["loss_of"][name] - b["loss_of"][name]) <= 1e-5 for name in losses)
    held = events(alone["two sources"], "eval")[-1]
    low, high = sorted(held["loss_of"].values())
    assert list(held["loss_of"]) == list(losses) and low < held["loss"] < high


def expected(folder: Path, name: str, normalisation: str) -> tuple[float, float]:
    """Loss and gradient norm of the model of transformers, conversation by conversation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    sums, weights = [], []
    for number in range(len(data := Conversations(folder / name))):
        one = data[number]
        ids = torch.from_numpy(one.ids.astype("int64"))[None]
        counts = torch.from_numpy(one.mask * (1.0 if one.weights is None else one.weights))[1:].float()
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        sums.append((losses * counts).sum())
        weights.append(counts.sum())
    if normalisation == "token":
        loss = torch.stack(sums).sum() / torch.stack(weights).sum()
    else:
        loss = torch.stack([total / weight for total, weight in zip(sums, weights, strict=True)]).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return float(loss), float(norm)


@pytest.mark.parametrize(
    ("case", "data", "normalisation"),
    [("packed", "chats", "token"), ("weighted", "weighted", "token"), ("sequence", "weighted", "sequence")],
)
def test_loss_and_gradient_are_those_of_plain_torch(
    folder: Path, alone: dict[str, list[dict]], case: str, data: str, normalisation: str
) -> None:
    loss, norm = expected(folder, data, normalisation)
    _, found, found_norm, _ = steps(alone[case])[0]
    print(f"{case}: loss off by {abs(found - loss):.1e}, norm by {abs(found_norm - norm):.1e}")
    assert abs(found - loss) <= 1e-5
    assert abs(found_norm - norm) <= 1e-4


def test_validation_is_by_the_same_loss(folder: Path, alone: dict[str, list[dict]]) -> None:
    """Two global batches of four rows are all of the set; of the model before its first step."""
    before = events(alone["blend"], "eval")[0]
    assert before["step"] == 0
    assert abs(before["loss"] - expected(folder, "weighted", "token")[0]) <= 1e-5


def test_what_is_trained_are_the_words_of_the_assistant(folder: Path) -> None:
    from megapatch.models.tokenizer import Tokenizer

    rows = PackedRows(folder / "chats", packing.read_plan(folder / "chats", ROW))
    records = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    row = rows[0]
    said = Tokenizer(folder / "tokenizer").decode(row.labels[row.loss_mask > 0])
    turns = [m["content"] + "<|im_end|>" for n in row.conversations for m in records[n]["messages"][1::2]]
    assert said == "".join(turns)
