"""What mp-generate reads and writes besides plain prompts: conversations, OpenAI batches, samples, bad lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, byte_tokenizer, chat_model, tiny_model

from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.generate.generate import main

USER = [{"role": "user", "content": "Hi"}]
SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a chat template."""
    return chat_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def ask(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Rows for lines, which are JSON values or raw text."""

    def run(lines: list[Any], *arguments: object, status: int = 0) -> list[dict[str, Any]]:
        file = tmp_path / "in.jsonl"
        file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
        capsys.readouterr()
        assert main(["--model", str(model), "--input", str(file), *SHORT, *map(str, arguments)]) == status
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_messages_go_through_the_chat_template(ask: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = ask([{"messages": USER}, {"prompt": "<user>Hi\n<assistant>"}, {"messages": parts}])
    assert [row["prompt"] for row in found] == ["<user>Hi\n<assistant>"] * 3
    assert found[0]["token_ids"] == found[1]["token_ids"] == found[2]["token_ids"]
    (spoken,) = ask([{"prompt": "Hi"}], "--as-chat", "--system", "S")
    assert spoken["prompt"] == "<system>S\n<user>Hi\n<assistant>"
    (other, tooled) = ask([{"messages": [{"role": "oracle", "content": "x"}]}, {"messages": USER, "tools": tools}])
    assert other["prompt"] == "<oracle>x\n!<assistant>", "a role that the template names is known"
    assert tooled["prompt"] == "<user>Hi\n[1]<assistant>"


def test_samples_are_rows_of_their_own_and_do_not_depend_on_each_other(ask: Any) -> None:
    line = {"prompt": "abc", "temperature": 1, "seed": 5}
    three, other = line | {"n": 3, "id": "a"}, line | {"id": "b"}
    found = ask([three, other])
    assert [(row["id"], row.get("sample")) for row in found] == [("a", 0), ("a", 1), ("a", 2), ("b", None)]
    assert len({str(row["token_ids"]) for row in found}) == 4
    assert ask([line | {"id": "a"}])[0]["token_ids"] == found[0]["token_ids"]
    assert ask([three, other], "--batch-size", 1) == found


def test_rows_in_order_of_the_input_and_as_finished_are_the_same_rows(ask: Any) -> None:
    lines = [{"prompt": "abc", "max_new_tokens": most} for most in (6, 1, 3)]
    found = ask(lines)
    assert [row["id"] for row in found] == [0, 1, 2]
    finished = ask(lines, "--order", "finished")
    assert [row["id"] for row in finished] == [1, 2, 0]
    assert sorted(finished, key=lambda row: row["id"]) == found


def test_each_option_has_its_flag_and_its_field(ask: Any) -> None:
    plain = {"prompt": "abcabc", "max_new_tokens": 12}
    settings: dict[str, Any] = {
        "repetition_penalty": 5.0,
        "presence_penalty": 9.0,
        "frequency_penalty": 9.0,
        "logit_bias": {"65": 100},
        "min_p": 0.5,
        "top_k": 3,
        "top_p": 0.5,
    }
    hot = {"temperature": 1.5, "seed": 1}
    base = {False: ask([plain])[0]["token_ids"], True: ask([plain | hot])[0]["token_ids"]}
    for name, value in settings.items():
        more = hot if name in ("min_p", "top_k", "top_p") else {}
        (by_field,) = ask([plain | more | {name: value}])
        flags = ["--temperature", 1.5, "--seed", 1] if more else []
        given = "65=100" if name == "logit_bias" else value
        (by_flag,) = ask([plain], *flags, f"--{name.replace('_', '-')}", given)
        assert by_field == by_flag
        assert by_field["token_ids"] != base[bool(more)], name
    stopped = base[False][0]
    (row,) = ask([plain | {"stop_token_ids": [stopped], "min_new_tokens": 2}])
    assert len(row["token_ids"]) >= 3 and stopped not in row["token_ids"][:2]


def test_log_probabilities_of_alternatives_and_of_the_prompt(ask: Any) -> None:
    (row,) = ask([{"prompt": "abc"}], "--logprobs", "--top-logprobs", 2, "--prompt-logprobs")
    assert [next(iter(top.values())) for top in row["top_logprobs"]] == row["logprobs"]
    assert row["prompt_logprobs"][0] is None and len(row["prompt_logprobs"]) == len(row["prompt_top_logprobs"]) == 3
    (read,) = ask([{"prompt": "abc", "max_new_tokens": 0, "prompt_logprobs": True}])
    assert (read["token_ids"], read["finish_reason"]) == ([], "length")
    assert read["prompt_logprobs"] == row["prompt_logprobs"]


def test_timings_are_written_when_asked_for(ask: Any) -> None:
    (row,) = ask([{"prompt": "abc"}], "--timings")
    assert 0 < row["timings"]["first_token_s"] <= row["timings"]["total_s"] < 600
    assert "timings" not in ask([{"prompt": "abc"}])[0], "without, equal runs write equal bytes"


def batch(name: str, body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "any", **body}}


def test_an_openai_batch_is_answered_in_its_own_format(ask: Any, model: Path) -> None:
    chat = {"messages": USER, "max_tokens": 4, "temperature": 1, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 1}
    text = {"prompt": "<user>Hi\n<assistant>", "max_tokens": 4, "temperature": 0, "top_p": 0.9}
    ids = {"prompt": Tokenizer(model).encode("<user>Hi\n<assistant>"), "max_tokens": 4, "logprobs": 2}
    found = ask([batch("c", chat), *(batch(name, body, "/v1/completions") for name, body in (("t", text), ("i", ids)))])
    assert [(row["custom_id"], row["error"], row["response"]["status_code"]) for row in found] == [
        (name, None, 200) for name in "cti"
    ]
    first, second, third = (row["response"]["body"] for row in found)
    assert (first["object"], second["object"]) == ("chat.completion", "text_completion")
    usage = {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28}
    assert first["usage"] == usage and first["model"] == "hf"
    native = ask([{"messages": USER, "max_new_tokens": 4, "temperature": 1, "seed": 3, "n": 2, "id": "c"}])
    assert [choice["index"] for choice in first["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in first["choices"]] == [row["text"] for row in native]
    content = first["choices"][0]["logprobs"]["content"]
    assert len(content) == 4 and {*content[0]} == {"token", "logprob", "bytes", "top_logprobs"}
    (greedy,) = ask([{"messages": USER, "max_new_tokens": 4}])
    assert second["choices"][0]["text"] == third["choices"][0]["text"] == greedy["text"]
    assert second["choices"][0]["finish_reason"] == "length"
    assert len(third["choices"][0]["logprobs"]["top_logprobs"]) == 4


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "in.jsonl:2: not JSON"),
    "no line": ("", "in.jsonl:2: an empty line; expected one object a line"),
    "no line of another system": ("\r", "in.jsonl:2: an empty line; expected one object a line"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0]: unknown role 'wizard'"),
    "no role": ({"messages": [{"content": "a"}]}, "unknown role None"),
    "no messages": ({"messages": []}, "messages []; expected a list"),
    "assistant last": ({"messages": [*USER, {"role": "assistant", "content": "a"}]}, "the last of messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected text"),
    "empty": ({"prompt": ""}, "the prompt has no tokens"),
    "too long": ({"prompt": "a" * 64}, "the prompt has 64 tokens and leaves no room; the model takes 64 in all"),
    "half a character": ('{"prompt": "\\ud800"}', "is half a character"),
    "a field of OpenAI": ({"prompt": "a", "max_tokens": 1}, "give --format openai"),
    "n": ({"prompt": "a", "n": 2}, "n 2 at temperature 0"),
    "a bias": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    "more texts than there is room for": ({"prompt": "a", "n": 10**9, "temperature": 1}, "n 1000000000: at most 10000"),
    "a number without end": ({"prompt": "a", "temperature": 10**400}, "temperature: a number of 401 digits"),
    "no number": ('{"prompt": "a", "temperature": NaN}', "temperature nan: must be 0 or at least"),
    "a biased token": ({"prompt": "a", "logit_bias": {"999": 1}}, "token id 999"),
}
BAD_BATCH: dict[str, tuple[Any, str]] = {
    "no body": ({"custom_id": "x", "method": "POST", "url": "/v1/completions"}, "no body"),
    "embeddings": (batch("x", {}, "/v1/embeddings"), "'/v1/embeddings'; expected POST and one of"),
    "streaming": (batch("x", {"messages": USER, "stream": True}), "stream True is not supported"),
    "no messages": (batch("x", {"prompt": "a"}), "no messages in the body"),
    "an unknown field": (
        batch("x", {"messages": USER, "response_format": {}}),
        "field 'response_format' is not known in the body of /v1/chat/completions; leave it out",
    ),
    "an id of the body": (batch("x", {"messages": USER, "id": "y"}), "field 'id' is not known in the body of"),
    "many prompts": (batch("x", {"prompt": ["a", "b"]}, "/v1/completions"), "expected a list of integers"),
}


@pytest.mark.parametrize(("kind", "name"), [*(("native", n) for n in BAD), *(("openai", n) for n in BAD_BATCH)])
def test_a_bad_line_is_named(
    kind: str, name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = (BAD if kind == "native" else BAD_BATCH)[name]
    good = {"prompt": "good"} if kind == "native" else batch("good", {"messages": USER})
    file = tmp_path / "in.jsonl"
    file.write_text(f"{json.dumps(good)}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    assert main(["--model", str(model), "--input", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "in.jsonl:2: " in err and message in err


def test_bad_lines_are_named_and_skipped_and_the_others_go_on(
    ask: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "good"}
    lines = [good, *(line for line, _ in BAD.values()), good]
    file = tmp_path / "bad.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    assert main(["--model", str(model), "--input", str(file), *SHORT, "--on-bad-line", "skip"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in rows] == [0, len(BAD) + 1]
    for number, (_, message) in enumerate(BAD.values(), start=2):
        (told,) = [line for line in err.splitlines() if f"bad.jsonl:{number}: " in line]
        assert message.removeprefix("in.jsonl:2: ") in told and told.endswith("; skipped")
    assert f"{len(BAD)} of {len(BAD) + 2} lines skipped" in err
    file.write_text("{\n")
    assert main(["--model", str(model), "--input", str(file), "--on-bad-line", "skip"]) == 1
    assert "no good line" in capsys.readouterr().err


def test_marks_of_byte_order_and_of_ends_of_lines_are_no_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.txt"
    for ends in ("\n", "\r\n"):
        file.write_text(f"Hi{ends}there{ends}", encoding="utf-8-sig", newline="")
        assert main(["--model", str(model), "--input", str(file), *SHORT]) == 0
        assert [json.loads(row)["prompt"] for row in capsys.readouterr().out.splitlines()] == ["Hi", "there"]
    file.write_text("Hi\n\n")
    assert main(["--model", str(model), "--input", str(file), *SHORT]) == 1
    assert "in.txt:2: the prompt has no tokens; expected at least 1" in capsys.readouterr().err


def test_without_a_template_there_are_no_conversations(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = byte_tokenizer(tmp_path / "plain")
    base = ["--model", str(model), "--tokenizer", str(plain), *SHORT]
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"messages": USER}) + "\n")
    for arguments in (["--input", str(file)], ["--prompt", "a", "--as-chat"], ["--chat"]):
        assert main([*base, *arguments, *(["--on-bad-line", "skip"] if "--input" in arguments else [])]) == 1
        assert "no chat template" in capsys.readouterr().err
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE)
    assert main([*base, "--input", str(file), "--template", str(template)]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "<user>Hi\n<assistant>"


def test_a_cache_that_holds_no_sequence_is_an_error_and_a_small_one_changes_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["--model", str(model), "--prompt", "abc", "--prompt", "de", *SHORT]
    assert main(asked) == 0
    expected = capsys.readouterr().out
    assert main([*asked, "--cache-mib", "1"]) == 0
    assert capsys.readouterr().out == expected
    large = tmp_path / "large"
    tiny_model(large, "qwen3", vocab_size=260, max_position_embeddings=1 << 20)
    byte_tokenizer(large)
    asked = ["--model", str(large), "--prompt", "abc", "--max-new-tokens", str(1 << 19), "--cache-mib", "1"]
    assert main(asked) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "cache budget of 1,048,576 bytes: keys and values of one sequence" in err


def test_a_stop_string_that_never_comes_is_recorded_as_length(ask: Any) -> None:
    (row,) = ask([{"prompt": "abc", "stop": ["never to be seen"]}])
    assert (row["finish_reason"], len(row["token_ids"])) == ("length", 6) and "stop" not in row
    (row,) = ask([{"prompt": "abc", "stop": ["never to be seen"], "max_new_tokens": 1000}])
    assert row["finish_reason"] == "length" and sum(row["usage"].values()) == 64, "ends at the model's length"


def test_a_draft_model_changes_no_text(
    model: Path, tmp_path: Path, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "abc"}, {"prompt": "The quick", "temperature": 1}]
    expected = ask(lines)
    draft = tmp_path / "draft"
    tiny_model(draft, "llama", vocab_size=260)
    byte_tokenizer(draft)
    assert ask(lines, "--draft", draft, "--draft-tokens", 3) == expected
    asked = ["--model", str(model), "--prompt", "abc", *SHORT]
    assert main([*asked, "--draft", str(model)]) == 0
    assert "drafted tokens accepted" in capsys.readouterr().err
    config = json.loads((draft / "tokenizer.json").read_text())
    (draft / "tokenizer.json").write_text(json.dumps(config | {"version": "1.0", "truncation": None}, indent=1))
    assert main([*asked, "--draft", str(draft)]) == 1
    assert "its tokenizer is another one" in capsys.readouterr().err
