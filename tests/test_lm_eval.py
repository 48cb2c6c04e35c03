"""lm_eval with our model says what it says with its own on the exported folder, for tasks of every kind."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_tokenizer, tiny_model

from megapatch.tools.convert.convert import main as convert

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'megapatch[eval]'"
)
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "say": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "roll": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}
DATA = [
    {"question": "2 + 2 = ", "choices": ["3", "4", "forty two"], "label": 1, "text": "The quick brown fox. " * 9},
    {"question": "The sky is ", "choices": ["blue", "loud", "wet"], "label": 0, "text": "A second text, naïve."},
    {"question": "x" * 70, "choices": ["y", "z", "xx"], "label": 2, "text": "One more"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A core checkpoint, the folder that is exported from it, and the tasks."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_model(folder / "made", "llama", vocab_size=260)
    byte_tokenizer(folder / "made")
    assert convert(["--source", str(folder / "made"), "--target", str(folder / "core")]) == 0
    assert convert(["--source", str(folder / "core"), "--target", str(folder / "exported")]) == 0
    (folder / "tasks").mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DATA))
    for name, text in TASKS.items():
        about = f"task: tiny_{name}\ndataset_path: json\ntest_split: test\n"
        about += f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(about + text)
    return folder


def evaluate(place: Path, model: str, arguments: str) -> dict[str, Any]:
    """Results of all tasks, and what was said of each sample."""
    output = place / f"results_{model}"
    command = [sys.executable, "-m", "megapatch.tools.generate.evaluate", "run", "--model", model]
    command += [
        "--model_args",
        arguments,
        "--tasks",
        ",".join(f"tiny_{name}" for name in TASKS),
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    command += ["--include_path", str(place / "tasks"), "--output_path", str(output), "--log_samples"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "cache")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.rglob("results_*.json")
    found = {"results": json.loads(results.read_text())["results"]}
    for name in TASKS:
        (samples,) = output.rglob(f"samples_tiny_{name}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().split("\n")[:-1]]
        found[name] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return found


def test_ours_and_theirs_are_equal(place: Path) -> None:
    ours = evaluate(place, "megapatch", f"pretrained={place / 'core'},dtype=float32")
    theirs = evaluate(place, "hf", f"pretrained={place / 'exported'},dtype=float32")
    assert ours["say"] == theirs["say"] and any(text for [[text]] in ours["say"])
    for name in ("choose", "roll"):
        assert flat(ours[name]) == pytest.approx(flat(theirs[name]), rel=1e-5), name
    assert len(flat(ours["choose"])) == 18 and len(flat(ours["roll"])) == 3
    for task, measures in theirs["results"].items():
        for measure, value in measures.items():
            if isinstance(value, float):
                assert ours["results"][task][measure] == pytest.approx(value, rel=1e-5), (task, measure)


def flat(said: Any) -> list[float]:
    """Every number; whether a choice is greedy counts as one."""
    if isinstance(said, list):
        return [number for one in said for number in flat(one)]
    return [float(said == "True") if said in ("True", "False") else float(said)]


def test_processes_but_the_first_write_nothing() -> None:
    from megapatch.tools.generate.evaluate import silent

    given = [
        "x",
        "run",
        "--output_path",
        "a",
        "--log_samples",
        "--tasks",
        "t",
        "-o",
        "b",
        "--output_path=c",
        "--limit",
        "1",
    ]
    assert silent(given) == ["x", "run", "--tasks", "t", "--limit", "1"]


def test_arguments_that_do_not_exist_are_named(place: Path) -> None:
    from megapatch.models.cli import UserError
    from megapatch.tools.generate.lm_eval_model import _arguments

    for message, given in {
        "expected pretrained=DIR": {},
        "revision is not known; known: pretrained, dtype, ": {"model": "m", "revision": "main"},
        "dtype=int8: expected one of": {"model": "m", "dtype": "int8"},
    }.items():
        with pytest.raises(UserError, match=message):
            _arguments("", given)
    made = _arguments(str(place), {"batch_size": "auto", "max_batch_size": None, "device": "cpu", "dtype": "bfloat16"})
    assert (made.batch_size, made.precision) == (8, "bf16")


def test_conversations_read_as_transformers_writes_them(place: Path) -> None:
    from transformers import AutoTokenizer

    from megapatch.models.tokenizer import Tokenizer
    from megapatch.tools.generate.lm_eval_model import Arguments, MegapatchLM

    text = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    text += "{% if add_generation_prompt %}[a]{% endif %}"
    (place / "made" / "chat_template.jinja").write_text(text)
    ours = MegapatchLM.__new__(MegapatchLM)  # without its weights
    ours.arguments, ours.tokens = Arguments(model=place / "made"), Tokenizer(place / "made")
    theirs = AutoTokenizer.from_pretrained(place / "made")
    ask = [{"role": "user", "content": "Hi"}]
    said = theirs.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(ask) == said == "[user]Hi<eos>[a]"
    begun = [*ask, {"role": "assistant", "content": "The answer is"}]
    said = theirs.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == said
    assert ours.chat_template(True) == text and ours.chat_template(False) is None
    assert ours.tok_encode("Hi") == theirs.encode("Hi")
    assert ours.tok_encode("<eos>Hi") == theirs.encode("<eos>Hi"), "bos is not put before a bos"
