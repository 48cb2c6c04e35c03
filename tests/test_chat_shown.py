"""What a conversation has and its template does not write is found, counted and told; nothing vanishes in silence."""

import json

import chat_data
import pytest
from chat_runs import ASK, GOOD, SAY, contents, run_tool, said, tokenizers  # noqa: F401

from megapatch.models.chat import Chat, Renderer, rewrites
from megapatch.models.chat_shown import silent_turn, unshown
from megapatch.models.chat_template import compile_template
from megapatch.models.indexed_data import IndexedDocuments, read_manifest
from megapatch.tools.preprocess.chatml import CHATML

SYSTEM, RESULT = {"role": "system", "content": "be"}, {"role": "tool", "content": "3"}
THOUGHT = {**SAY, "reasoning_content": "a"}  # one letter, which stands in other words, too
CALLS = [{"type": "function", "function": {"name": "a", "arguments": {"a": 1}}}]
CALL, BOTH = {"role": "assistant", "content": "", "tool_calls": CALLS}, {**SAY, "tool_calls": CALLS}
TOOLS = [{"type": "function", "function": {"name": "a", "description": "adds é", "parameters": {"type": "object"}}}]
FLAT = chat_data.CHATML
NO_CONTENT = chat_data.TOOLS.replace("if message.content %}", "if message.content and not message.tool_calls %}")
FOUND = [  # template, messages, tools, what it leaves out
    (FLAT, [ASK, SAY], None, []),
    (FLAT, [ASK, THOUGHT], None, [(1, "reasoning_content")]),
    (FLAT, [ASK, {**SAY, "thinking": "a"}], None, [(1, "thinking")]),
    (FLAT, [ASK, CALL, RESULT, SAY], TOOLS, [(1, "tool_calls"), (-1, "tools")]),
    (FLAT, [ASK, BOTH], None, [(1, "tool_calls")]),
    (chat_data.TOOLS, [ASK, CALL, RESULT, SAY, ASK, BOTH], TOOLS, []),
    (chat_data.TOOLS.replace("said | tojson", "''"), [ASK, CALL, RESULT, SAY], TOOLS, [(1, "tool_calls")]),
    (NO_CONTENT, [ASK, BOTH], TOOLS, [(1, "content")]),
    (chat_data.THINKING, [ASK, THOUGHT, ASK, THOUGHT], None, []),  # taken out of history, and there when it is said
    (chat_data.THINKING, [ASK, {**SAY, "content": "<think>\nd</think>\n"}], None, []),
    (FLAT.replace("message.content + '<|im_end|>\\n'", "'<|im_end|>\\n'"), [ASK, SAY], None, [(0, "content")]),
    (chat_data.LLAMA3, [SYSTEM, {"role": "user", "content": " \n blanks\n"}, SAY], None, []),
    (CHATML, [SYSTEM, ASK, THOUGHT, ASK, CALL, RESULT, {**BOTH, "reasoning_content": "b"}], TOOLS, []),
]


def template(text):
    return compile_template(text, {"bos_token": "", "eos_token": ""}, where="test")


@pytest.mark.parametrize("text, messages, tools, expected", FOUND)
def test_fields_that_a_template_leaves_out_are_found(text, messages, tools, expected):
    made, chat = template(text), Chat(messages, tools)
    assert unshown(made, chat, made.render(messages, tools).text) == expected


@pytest.mark.parametrize(
    "messages, number", [([ASK, THOUGHT], None), ([ASK, CALL, RESULT, SAY], 1), ([ASK, BOTH], None), ([ASK, SAY], None)]
)
def test_a_turn_of_which_nothing_is_shown_is_found(messages, number):
    made, chat = template(FLAT), Chat(messages)
    assert silent_turn(chat, unshown(made, chat, made.render(messages).text)) == number


def test_the_chatml_template_has_a_place_for_reasoning_tools_and_calls():
    chat = Chat([SYSTEM, ASK, {**BOTH, "reasoning_content": "hm", "tool_calls": CALLS * 2}, RESULT, SAY], TOOLS)
    made = template(CHATML)
    assert not rewrites(made)
    (sample,) = Renderer(made, ends=("<|im_end|>",)).samples(chat)
    call = '<tool_call>\n{"name": "a", "arguments": {"a": 1}}\n</tool_call>'
    turn = f"<think>\nhm\n</think>\n\nso 漢字\n{call}\n{call}<|im_end|>"
    assert [sample.text[start:end] for start, end in sample.spans] == [turn, "so 漢字<|im_end|>"]
    assert sample.text == (
        f"<|im_start|>system\nbe\n\nFunctions, as JSON:\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n\n"
        'To call one, write:\n<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\nwhy? é<|im_end|>\n<|im_start|>assistant\n{turn}\n<|im_start|>tool\n3<|im_end|>\n"
        "<|im_start|>assistant\nso 漢字<|im_end|>\n"
    )


def test_the_chatml_template_gives_transformers_the_same_text(toks):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(toks["chatml"]))
    messages = [ASK, {**CALL, "reasoning_content": "hm"}, RESULT, SAY, ASK]
    for some, tools in ((messages, TOOLS), ([SYSTEM, *messages], TOOLS), ([SYSTEM, *messages], None)):
        expected = theirs.apply_chat_template(some, tools, chat_template=CHATML, tokenize=False)
        assert template(CHATML).render(some, tools).text == expected


def test_what_is_left_out_is_counted_and_told_once(go, toks, capsys):
    records = [GOOD, {"messages": [ASK, THOUGHT, ASK, THOUGHT]}, {"messages": [ASK, BOTH], "tools": TOOLS}]
    status, prefix = go(records)
    told = [line for line in capsys.readouterr().err.splitlines() if "leaves out" in line]
    assert status == 0 and len(told) == 1
    assert "reasoning_content 2, tool_calls 1, tools 1; as in" in told[0] and "in.jsonl that begins 'why? é'" in told[0]
    found, source = read_manifest(prefix), str(prefix.parent / "in.jsonl")
    assert found["unshown"] == {
        "fields": {"reasoning_content": 2, "tool_calls": 1, "tools": 1},
        "examples": [
            {"path": source, "begins": ASK["content"], "fields": names}
            for names in (["reasoning_content"], ["tool_calls", "tools"])
        ],
    }
    assert (found["counts"]["unshown_reasoning_content"], found["counts"]["unshown_tools"]) == (2, 1)
    _, none = go([GOOD], name="none")
    assert read_manifest(none)["unshown"] == {"fields": {}, "examples": []}
    assert "leaves out" not in capsys.readouterr().err


def test_a_turn_that_would_vanish_is_a_bad_line(go, toks, capsys):
    records = [GOOD, {"messages": [ASK, CALL, RESULT, SAY], "tools": TOOLS}]
    assert go(records)[0] == 1
    assert "in.jsonl:2 " in (told := capsys.readouterr().err) and "messages[1]: the template writes nothing" in told
    status, prefix = go(records, tok="tools")
    assert status == 0 and len(said(toks["tools"], prefix)) == 2


def test_rows_of_a_table_give_the_ids_of_the_same_json_lines(go, tmp_path):
    """A struct column has each key that any row has; nulls that nobody wrote are no part of tools and calls."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = []
    for name in ("a", "b"):
        call = {"type": "function", "function": {"name": name, "arguments": {name: 1}}}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "int"}}}}}
        messages = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT, SAY]
        records.append({"messages": messages, "tools": [tool]})
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    _, lines = go(records, tok="tools", name="lines")
    _, rows = go(records, "--input", str(tmp_path / "a.parquet"), tok="tools", name="rows")
    assert contents(lines) == contents(rows)


def test_preferences_and_prompts_that_teach_nothing_are_told(go, capsys):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pairs = [good, {**good, "chosen": " "}, {**good, "rejected": ""}, {**good, "prompt": "\n"}]
    status, prefix = go(pairs, "--chat-format", "preference", name="pairs")
    told, counts = capsys.readouterr().err, read_manifest(prefix)["counts"]
    assert status == 0 and [counts[f"empty_{name}"] for name in ("prompt", "chosen", "rejected")] == [1, 1, 1]
    assert all(told.count(f"1 records with an empty '{name}'") == 1 for name in ("prompt", "chosen", "rejected"))
    assert go([good, {**good, "rejected": "a"}], "--chat-format", "preference", name="same")[0] == 1
    assert "in.jsonl:2 " in (told := capsys.readouterr().err) and "'chosen' and 'rejected' are the same" in told
    status, prefix = go([{"prompt": "q", "answer": "4"}, {"prompt": ""}], "--chat-format", "prompts", name="prompts")
    told = capsys.readouterr().err
    assert status == 0 and "1 records with an empty 'prompt'" in told and "1 of 2 prompts have no answer" in told


def test_records_that_become_several_documents_are_told_apart(go, capsys):
    status, prefix = go([GOOD, {"messages": [ASK, SAY] * 9}], "--max-length", "60", "--truncate", "split")
    told = capsys.readouterr().err
    assert status == 0 and (number := len(IndexedDocuments(prefix))) > 2
    assert f"2 records became {number} documents, " in told
