"""Records in the shapes in which conversations, preference pairs and prompts are published."""

import pytest

from megapatch.models.chat import Chat
from megapatch.tools.preprocess.chats.records import Preference, Prompt, taker
from megapatch.tools.preprocess.reading.records import BadRecord

SYSTEM = {"role": "system", "content": "be"}
ASK, SAY, OTHER = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)
CALL = {"type": "function", "function": {"name": "f"}}
PLAIN = Chat([ASK, SAY])
ANSWERED = Chat([ASK, SAY], None, [0, 1])
GOOD = [
    ("messages", {"messages": [ASK, SAY]}, PLAIN),
    ("messages", {"messages": [ASK, SAY], "tools": '[{"name": "f"}]', "id": 7}, Chat([ASK, SAY], [{"name": "f"}])),
    ("messages", {"messages": [ASK, SAY], "tools": [CALL]}, Chat([ASK, SAY], [CALL])),
    ("messages", {"messages": [ASK, SAY], "tools": ""}, PLAIN),
    ("messages", {"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY]}, Chat([ASK, SAY, ASK, SAY], None, [0, 0, 0, 1])),
    ("messages", {"messages": [{**ASK, "train": False}, {**SAY, "train": True}]}, Chat([ASK, SAY], None, [0, 1])),
    ("messages", {"messages": [ASK, {**SAY, "weight": None, "train": None}]}, PLAIN),
    ("messages", {"messages": [ASK, {**SAY, "weight": 0.5}]}, Chat([ASK, SAY], None, [0, 0.5])),
    (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        Chat([ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
    ),
    (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        Chat([ASK, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]),
    ),
    ("conversations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
    (
        "conversations",
        {
            "system": "be",
            "conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a", "weight": 0}],
        },
        Chat([SYSTEM, ASK, SAY], None, [0, 0, 0]),
    ),
    (
        "conversations",
        {
            "conversations": [
                {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "observation", "value": "1"},
                SAY,
            ]
        },
        Chat([{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, SAY]),
    ),
    ("instruction", {"instruction": "q", "input": "", "output": "a"}, PLAIN),
    (
        "instruction",
        {"instruction": "q", "input": "x", "output": "a", "system": "be", "history": [["h", "i"]]},
        Chat(
            [
                SYSTEM,
                {"role": "user", "content": "h"},
                {"role": "assistant", "content": "i"},
                {"role": "user", "content": "q\nx"},
                SAY,
            ]
        ),
    ),
    ("completion", {"prompt": "q", "completion": "a"}, ANSWERED),
    ("completion", {"prompt": [ASK, SAY, ASK], "completion": [SAY]}, Chat([ASK, SAY, ASK, SAY], None, [0, 0, 0, 1])),
    ("auto", {"prompt": "q", "completion": "a"}, ANSWERED),
    ("auto", {"instruction": "q", "output": "a"}, PLAIN),
    ("auto", {"conversations": [ASK, SAY]}, PLAIN),
    ("auto", {"messages": [ASK, SAY], "conversations": []}, PLAIN),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        Preference(ANSWERED, Chat([ASK, OTHER], None, [0, 1])),
    ),
    (
        "preference",
        {"prompt": [ASK], "chosen": [SAY], "rejected": [ASK, OTHER]},
        Preference(ANSWERED, Chat([ASK, OTHER], None, [0, 1])),
    ),
    (
        "preference",
        {"chosen": [ASK, SAY], "rejected": [ASK, OTHER], "system": "x"},
        Preference(ANSWERED, Chat([ASK, OTHER], None, [0, 1])),
    ),
    (
        "preference",
        {"chosen": [ASK, SAY, ASK, SAY], "rejected": [ASK, SAY, ASK, OTHER]},
        Preference(Chat([ASK, SAY, ASK, SAY], None, [0, 0, 0, 1]), Chat([ASK, SAY, ASK, OTHER], None, [0, 0, 0, 1])),
    ),
    ("preference", {"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, Preference(ANSWERED, ANSWERED)),
    ("prompts", {"prompt": "q"}, Prompt(Chat([ASK]), None)),
    ("prompts", {"prompt": [SYSTEM, ASK], "answer": "4"}, Prompt(Chat([SYSTEM, ASK]), "4")),
    ("prompts", {"prompt": "q", "answer": 4.5, "system": "be"}, Prompt(Chat([SYSTEM, ASK]), "4.5")),
]
BAD = [
    ("auto", [1], "an array found, expected an object"),
    (
        "auto",
        {"text": "x"},
        "none of the keys 'messages', 'conversations', 'instruction', 'completion'; keys found: 'text'",
    ),
    ("auto", {"prompt": "q", "chosen": "a", "rejected": "b"}, "--chat-format preference"),
    ("auto", {"prompt": "q"}, "--chat-format prompts"),
    ("messages", {}, "no key 'messages'; keys found: none"),
    ("messages", {"messages": "q"}, "'messages' is a string, expected an array"),
    ("messages", {"messages": []}, "'messages' is empty"),
    ("messages", {"messages": ["q"]}, "messages[0] is a string, expected an object with 'role' and 'content'"),
    (
        "messages",
        {"messages": [{"content": "q"}]},
        "messages[0]: 'role' is null, expected a string; keys found: 'content'",
    ),
    ("messages", {"messages": [{"role": "user"}]}, "messages[0]: no 'content'; keys found: 'role'"),
    (
        "messages",
        {"messages": [{"role": "user", "content": None}]},
        "messages[0]: 'content' is null, expected a string",
    ),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "messages[0]: 'content' is a number"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'; only text"),
    ("messages", {"messages": [{**ASK, "weight": 1}]}, "'weight' is 1 for 'user'; only the assistant's"),
    ("messages", {"messages": [{**SAY, "weight": -1}]}, "messages[0]: 'weight' is -1, expected 0 or more"),
    ("messages", {"messages": [{**SAY, "train": "yes"}]}, "messages[0]: 'train' is 'yes', expected 0 or more"),
    ("messages", {"messages": [{**SAY, "weight": 1, "train": 1}]}, "both 'weight' and 'train'"),
    ("messages", {"messages": [ASK], "tools": "{"}, "tools: a string found, expected JSON"),
    ("messages", {"messages": [ASK], "tools": {"a": 1}}, "'tools' is an object, expected an array of objects"),
    (
        "conversations",
        {"conversations": [{"from": "bot", "value": "x"}]},
        "conversations[0]: 'from' is 'bot', expected one of",
    ),
    ("conversations", {"conversations": [{"from": "human", "value": None}]}, "conversations[0]: 'value' is null"),
    ("conversations", {"conversations": [3]}, "conversations[0] is a number"),
    ("instruction", {"instruction": "q"}, "no key 'output'; keys found: 'instruction'"),
    (
        "instruction",
        {"instruction": "q", "output": "a", "history": [["x"]]},
        "history[0] is an array, expected an array of two strings",
    ),
    (
        "completion",
        {"prompt": "q", "completion": 3},
        "'completion' is a number, expected a string or an array of messages",
    ),
    ("preference", {"prompt": "q", "chosen": "a"}, "no key 'rejected'"),
    ("preference", {"chosen": [ASK, SAY], "rejected": [OTHER]}, "do not begin with the same messages"),
    ("preference", {"chosen": "a", "rejected": "b"}, "'chosen' is a string, expected an array"),
    ("prompts", {"prompt": []}, "'prompt' is an empty array"),
    ("prompts", {"prompt": [ASK, SAY]}, "'prompt' ends with a message of the assistant"),
    ("prompts", {"prompt": "q", "answer": ["4"]}, "'answer' is an array, expected a string or a number"),
]


@pytest.mark.parametrize("form, record, expected", GOOD)
def test_records_become_conversations(form, record, expected):
    assert taker(form)(record) == expected


@pytest.mark.parametrize("form, record, reason", BAD)
def test_a_malformed_record_is_told_by_key_and_by_what_was_found(form, record, reason):
    with pytest.raises(BadRecord) as told:
        taker(form)(record)
    assert reason in told.value.reason
