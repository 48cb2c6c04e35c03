"""mp-preprocess-chat: what is left out or refused, and how that is told."""

import json
import shutil

import chat_data
import numpy as np
import pytest
from chat_runs import ASK, GOOD, LONG, SAID, SAY, TEXT, run_tool, said, texts, tokenizers  # noqa: F401

from megapatch.models.indexed_data import IndexedDocuments, read_manifest
from megapatch.tools.preprocess.chats.cuts import cuts
from megapatch.tools.preprocess.preprocess_chat import main

BAD = [
    ({"text": "x"}, "none of the keys 'messages'"),
    ({"messages": [ASK]}, "nothing to train on: no message of the assistant; roles found: user"),
    ({"messages": [ASK, {**SAY, "weight": 0}]}, "nothing to train on: every message has weight 0"),
    ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "weight 0.5; weights other than 0 and 1 need --message-weights"),
    ({"messages": [ASK, {**SAY, "content": "\ud800"}]}, "lone surrogate \\ud800"),
    ({"messages": [ASK, {**SAY, "content": "\ufdd0"}]}, "U+FDD0"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, SAY]},
        "the chat template refuses it: ",
    ),
]


@pytest.mark.parametrize("record, reason", BAD)
def test_a_bad_record_ends_the_run_with_its_place_and_reason(go, tmp_path, capsys, record, reason):
    source = tmp_path / "in.jsonl"
    status, _ = go([GOOD])
    line = json.dumps(record)
    source.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    argv = ["--input", str(source), "--output-prefix", str(tmp_path / "bad"), "--workers", "1"]
    tokenizer = json.loads((tmp_path / "out.manifest.json").read_text())["tokenizer"]["folder"]
    assert status == 0 and main([*argv, "--tokenizer", tokenizer]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{source}:2 " in said and reason in said
    assert not list(tmp_path.glob("bad*"))


def test_every_line_is_accounted_for(go, toks, tmp_path):
    records = [GOOD, {"text": "x"}, GOOD, {"messages": [ASK, LONG, ASK, SAY]}, {"messages": [ASK]}]
    put_aside = tmp_path / "aside.jsonl"
    more = ["--on-bad-line", f"quarantine={put_aside}", "--deduplicate", "--max-length", "50"]
    status, prefix = go(records, *more, "--chunk-bytes", "60", "--workers", "2")
    counts = read_manifest(prefix)["counts"]
    expected = {"lines": 5, "documents": 1, "empty": 0, "bad": 2, "filtered": 1, "duplicate": 1}
    assert status == 0 and {name: counts[name] for name in expected} == expected
    assert counts["filtered_by_reason"] == {"longer than --max-length": 1}
    assert said(toks["chatml"], prefix) == [SAID]
    assert [json.loads(line) for line in put_aside.read_text().splitlines()] == [{"text": "x"}, {"messages": [ASK]}]


CUTS = [  # weights of the tokens, --max-length, --truncate, parts kept
    ("00110011", 8, "drop", [(0, 8)]),
    ("00110011", 7, "drop", []),
    ("00110011", 5, "left", [(3, 8)]),
    ("01110000", 3, "left", []),
    ("00110011", 3, "right", [(0, 3)]),
    ("00110011", 2, "right", []),
    ("00110011", 7, "turn", [(0, 4)]),
    ("00110011", 4, "turn", [(0, 4)]),
    ("00110011", 3, "turn", []),
    ("001100110", 8, "turn", [(0, 8)]),
    ("00110011", 3, "split", [(0, 3), (3, 6), (6, 8)]),
    ("0011000000", 4, "split", [(0, 4)]),
    ("0000000000", 20, "split", []),
]


@pytest.mark.parametrize("weights, most, how, expected", CUTS)
def test_parts_with_trained_tokens_are_kept(weights, most, how, expected):
    assert cuts(np.array(list(map(int, weights)), np.float32), most, how) == expected


@pytest.mark.parametrize("how", ["drop", "left", "right", "turn", "split"])
def test_long_conversations_are_cut_and_what_is_lost_is_told(go, toks, how):
    records = [GOOD, {"messages": [ASK, LONG, ASK, SAY]}, GOOD]
    _, whole = go(records, name="whole")
    ids, masks = IndexedDocuments(whole), IndexedDocuments(f"{whole}_mask")
    most = len(ids[1]) - 4
    _, prefix = go(records, "--max-length", str(most), *([] if how == "drop" else ["--truncate", how]))
    parts = cuts(masks[1], most, how)
    expected = [ids[0], *(ids[1][a:b] for a, b in parts), ids[2]]
    assert [row.tolist() for row in IndexedDocuments(prefix)] == [row.tolist() for row in expected]
    expected = [masks[0], *(masks[1][a:b] for a, b in parts), masks[2]]
    assert [row.tolist() for row in IndexedDocuments(f"{prefix}_mask")] == [row.tolist() for row in expected]
    kept = sum(b - a for a, b in parts)
    lost = len(ids[1]) - kept
    example = {"path": str(prefix.parent / "in.jsonl"), "begins": ASK["content"], "tokens": len(ids[1]), "kept": kept}
    found = read_manifest(prefix)
    assert found["truncation"] == {"records": 1, "lost_tokens": lost, "examples": [example]}
    assert (found["counts"]["documents"], found["counts"]["filtered"]) == ((2, 1) if how == "drop" else (3, 0))


def test_a_conversation_of_which_nothing_trained_is_left_is_filtered(go):
    _, prefix = go(
        [GOOD, {"messages": [ASK, SAY, LONG | {"role": "user"}]}], "--max-length", "30", "--truncate", "left"
    )
    found = read_manifest(prefix)
    assert found["counts"]["filtered_by_reason"] == {"nothing to train on within --max-length": 1}
    assert (
        found["truncation"]["lost_tokens"] == found["truncation"]["examples"][0]["tokens"]
        and len(IndexedDocuments(prefix)) == 1
    )


WRONG = [
    (["--truncate", "turn"], 2, "--truncate turn needs --max-length"),
    (
        ["--chat-format", "prompts", "--max-length", "9", "--truncate", "turn"],
        2,
        "for prompts expected one of drop, left",
    ),
    (["--chat-format", "preference", "--message-weights"], 2, "--message-weights has no effect with"),
    (["--chat-format", "prompts", "--on-rewritten-history", "split"], 2, "--on-rewritten-history has no effect with"),
    (["--deduplicate", "--shards", "2", "--shard", "0"], 2, "--deduplicate needs all records in one process"),
    (["--template-arguments", "{"], 2, "--template-arguments {: not JSON"),
    (["--template-arguments", '{"messages": []}'], 2, "--template-arguments: messages comes from the conversations"),
    (["--template-arguments", '{"no": 1}'], 1, "does not use no; it looks at no further variable"),
    (["--date", "yesterday"], 2, "--date yesterday: "),
    (["--max-length", "0"], 2, "--max-length 0: expected 1 or more"),
    (["--format", "text"], 1, "conversations are JSON; give --format jsonl"),
    (["--template", "nowhere"], 1, "--template nowhere: neither a file nor a template of"),
]


@pytest.mark.parametrize("argv, status, message", WRONG)
def test_wrong_options_are_told_in_a_line(go, tmp_path, capsys, argv, status, message):
    try:
        found, _ = go([GOOD], *argv)
    except SystemExit as ended:
        found = ended.code
    said = capsys.readouterr().err.splitlines()
    assert found == status and message in said[-1]
    assert not list(tmp_path.glob("out*"))


def test_templates_that_cannot_serve_are_told_at_the_start(go, tmp_path, capsys):
    (tmp_path / "today.jinja").write_text("{{ strftime_now('%Y') }}" + chat_data.CHATML)
    assert go([GOOD], "--template", str(tmp_path / "today.jinja"))[0] == 1
    assert "--date" in capsys.readouterr().err
    status, prefix = go([GOOD], "--template", str(tmp_path / "today.jinja"), "--date", "2024-07-06")
    assert status == 0 and IndexedDocuments(prefix)[0].size
    assert go([GOOD], "--on-rewritten-history", "keep", tok="plain", name="a")[0] == 1
    assert "has no generation tags to keep to" in capsys.readouterr().err
    assert go([GOOD], "--train-generation-prompt", tok="mistral", name="a")[0] == 1
    assert "has no generation prompt" in capsys.readouterr().err
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    (tmp_path / "short.jinja").write_text(text)
    assert go([GOOD], "--template", str(tmp_path / "short.jinja"), name="a")[0] == 0
    assert "leave out <|im_end|>" in capsys.readouterr().err


def test_a_template_whose_markers_are_no_tokens_is_refused_or_told(go, toks, tmp_path, capsys):
    text = chat_data.CHATML.replace("<|im_end|>", "<|fin|>")
    (tmp_path / "other.jinja").write_text(text)
    assert go([GOOD], "--template", str(tmp_path / "other.jinja"))[0] == 1
    told = capsys.readouterr().err
    assert "other.jinja: the chat template writes <|fin|>, no token of" in told and "chat_template.jinja" in told
    own = tmp_path / "own"
    shutil.copytree(toks["chatml"], own)
    (own / "chat_template.jinja").write_text(text)
    assert go([GOOD], "--tokenizer", str(own))[0] == 0
    assert "writes <|fin|>, no token of" in capsys.readouterr().err


def test_variables_that_the_template_looks_at_may_be_given(go, toks, tmp_path):
    (tmp_path / "own.jinja").write_text("{% if brief %}<s>{% endif %}" + chat_data.CHATML)
    more = ["--template", str(tmp_path / "own.jinja"), "--template-arguments", '{"brief": true}']
    status, prefix = go([GOOD], *more)
    assert status == 0 and texts(toks["chatml"], prefix) == ["<s>" + TEXT]
