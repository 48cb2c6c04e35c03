"""Rendering and masks of conversations, as transformers has them where it can be asked."""

import datetime

import chat_data
import numpy as np
import pytest

from megapatch.models.chat import Chat, Renderer, Sample, generation_prompt, rewrites, untrained_end
from megapatch.models.chat_load import load_templates, special_variables
from megapatch.models.chat_mask import Masker
from megapatch.models.chat_special import Special
from megapatch.models.chat_template import ChatError, compile_template
from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer

ENDS = tuple(chat_data.SPECIAL)
VARIABLES = {"bos_token": "<|begin_of_text|>", "eos_token": "</s>"}
ASK, SAY = {"role": "user", "content": "why? "}, {"role": "assistant", "content": "so  "}
THOUGHT = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "é"}}}
TOOLS = [{"type": "function", "function": {"name": "now", "description": "time <&> é", "parameters": {}}}]
WITH_TOOLS = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "now", "content": "12:00"},
    SAY,
]


def template(text, variables=VARIABLES, **more):
    return compile_template(text, variables, where="test", **more)


def renderer(text, **more):
    return Renderer(template(text), ends=ENDS, **more)


def said(sample):
    return [sample.text[start:end] for start, end in sample.spans]


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    root = tmp_path_factory.mktemp("toks")
    return {name: chat_data.make_tokenizer(root / name, text) for name, text in chat_data.TEMPLATES.items()}


@pytest.mark.parametrize("name", chat_data.TEMPLATES)
def test_text_ids_and_masks_are_those_of_transformers(name, toks):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(toks[name]))
    tokenizer = Tokenizer(toks[name])
    ours = Renderer(load_templates(tokenizer)[0], ends=ENDS)
    chats = [record["messages"] for record in chat_data.conversations(60)]
    pairs = [(chat, None) for chat in chats] + ([(WITH_TOOLS, TOOLS)] if name == "tools" else [])
    samples = [ours.samples(Chat(messages, tools))[0] for messages, tools in pairs]
    ids, lengths = tokenizer.encode_flat([sample.text for sample in samples])
    weights, exact = Masker(tokenizer).masks(samples, ids, lengths)
    assert 0 < exact.sum() < len(exact)  # NFC joins the e and its accent in most, not in all
    ends = np.cumsum(lengths)
    for (messages, tools), end, length in zip(pairs, ends, lengths, strict=True):
        expected = theirs.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids[end - length : end].tolist() == expected["input_ids"]
        assert weights[end - length : end].tolist() == expected["assistant_masks"]
        assert sum(expected["input_ids"][0] == one for one in expected["input_ids"][:2]) == 1  # bos is not doubled


@pytest.mark.parametrize("name", chat_data.TEMPLATES)
def test_text_prefixes_give_the_spans_of_generation_tags(name):
    tagged, plain = (
        renderer(text) for text in (chat_data.TEMPLATES[name], chat_data.untagged(chat_data.TEMPLATES[name]))
    )
    assert tagged.template.tagged and not plain.template.tagged
    for record in chat_data.conversations(40):
        assert plain.samples(Chat(record["messages"])) == tagged.samples(Chat(record["messages"]))


@pytest.mark.parametrize("tagged", [True, False])
def test_rewritten_history_is_found_and_each_turn_is_trained_once_as_it_was_said(tagged):
    text = chat_data.THINKING if tagged else chat_data.untagged(chat_data.THINKING)
    chat = Chat([ASK, THOUGHT, ASK, THOUGHT, THOUGHT])
    assert rewrites(template(text)) and not rewrites(template(chat_data.CHATML))
    with pytest.raises(ChatError, match=r"messages\[1\]: the template writes this turn differently"):
        renderer(text).samples(chat)
    whole, first = renderer(text, on_rewritten="split").samples(chat)
    turn = "<think>\nhm\n</think>\n\nso<|im_end|>"
    assert (said(whole), said(first)) == ([turn, turn], [turn])
    assert first.text == whole.text.split("so<|im_end|>")[0] + "<think>\nhm\n</think>\n\nso<|im_end|>\n"
    unweighted = Chat(chat.messages, None, [0, 0, 0, 1, 1])
    assert renderer(text).samples(unweighted) == [whole]  # a turn that is not trained may read otherwise


def test_keep_trains_what_tags_mark_in_rewritten_history():
    (sample,) = renderer(chat_data.THINKING, on_rewritten="keep").samples(Chat([ASK, THOUGHT, ASK, THOUGHT]))
    assert said(sample) == ["so<|im_end|>", "<think>\nhm\n</think>\n\nso<|im_end|>"]


def test_history_that_only_one_conversation_shows_to_be_rewritten_is_found():
    text = chat_data.CHATML.replace(
        "message.content + '<|im_end|>' }}{% end", "message.content[:9] + '<|im_end|>' }}{% end"
    )
    assert not rewrites(template(text))
    long = {"role": "assistant", "content": "more than nine"}
    assert said(
        renderer(text).samples(Chat([ASK, long, ASK, SAY]))[0]
    )  # cut the same way when it was said: no rewriting
    text = text.replace("[:9]", "[: 9 if not loop.last else 99]")
    with pytest.raises(ChatError, match=r"messages\[1\]"):
        renderer(text).samples(Chat([ASK, long, ASK, SAY]))


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    "weights, expected",
    [
        ([0, 1, 0, 0], [("so  <|im_end|>", 1)]),
        ([0, 0.25, 0, 2], [("so  <|im_end|>", 0.25), ("so  <|im_end|>", 2)]),
        ([0] * 4, []),
    ],
)
def test_messages_have_weights(tagged, weights, expected):
    text = chat_data.CHATML if tagged else chat_data.untagged(chat_data.CHATML)
    (sample,) = renderer(text).samples(Chat([ASK, SAY, ASK, SAY], None, weights))
    assert list(zip(said(sample), sample.weights, strict=True)) == expected


def test_generation_prompts_are_trained_when_asked_for():
    (sample,) = renderer(chat_data.CHATML, train_generation_prompt=True).samples(Chat([ASK, SAY]))
    assert said(sample) == ["<|im_start|>assistant\nso  <|im_end|>"]
    assert generation_prompt(template(chat_data.MISTRAL)) == ""


def test_a_generation_prompt_that_its_own_turn_lacks_is_refused():
    text = chat_data.untagged(chat_data.CHATML).replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
    with pytest.raises(ChatError, match=r"messages\[1\]: the generation prompt ends with '.*<think>', but the turn"):
        renderer(text).samples(Chat([ASK, SAY]))


@pytest.mark.parametrize("tagged", [True, False])
def test_what_closes_a_conversation_is_no_rewritten_history(tagged):
    text = (chat_data.CHATML if tagged else chat_data.untagged(chat_data.CHATML)) + "{{ eos_token }}"
    text = text.replace("{{ eos_token }}", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    (sample,) = renderer(text).samples(Chat([ASK, SAY, ASK, SAY]))
    closed = "so  <|im_end|>" if tagged else "so  <|im_end|>\n</s>"
    assert said(sample) == ["so  <|im_end|>", closed]


@pytest.mark.parametrize("tagged", [True, False])
def test_a_last_turn_that_ends_otherwise_is_rewritten_history(tagged):
    text = chat_data.CHATML if tagged else chat_data.untagged(chat_data.CHATML)
    text = text.replace(
        "message.content + '<|im_end|>'", "message.content + ('</s>' if loop.last else '<|im_end|>')", 1
    )
    samples = renderer(text, on_rewritten="split").samples(Chat([ASK, SAY, ASK, SAY]))
    assert [said(sample) for sample in samples] == [["so  </s>"], ["so  </s>"]]


def test_tags_that_leave_out_the_end_of_a_turn_are_told():
    text = chat_data.CHATML.replace(
        "message.content + '<|im_end|>' }}{% endgeneration %}",
        "message.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert "leave out <|im_end|>" in (untrained_end(template(text), ENDS) or "")
    assert "no special token" in (
        untrained_end(template("{% for m in messages %}{{ m.content }}{% endfor %}"), ENDS) or ""
    )
    assert untrained_end(template(chat_data.CHATML), ENDS) is None


def test_variables_set_between_tags_stay_there_and_macros_have_spans():
    text = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert template(text).render([ASK]).text == "21"
    text = "{% macro m() %}{% generation %}b{% endgeneration %}{% endmacro %}aa{{ m() }}c{{ m() }}"
    found = template(text).render([ASK])
    assert (found.text, found.spans) == ("aabcb", [(2, 3), (4, 5)])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses it: can only concatenate str"),
        ("{{ messages[0].content.__class__.mro }}", "refuses it: access to attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "refuses it: a namespace cannot have '_x'"),
        ("{{ messages.append(1) }}", "refuses it: "),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}\ufdd1", "U\\+FDD0"),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", "nested"),
    ],
)
def test_what_a_template_cannot_do_is_told(text, reason):
    with pytest.raises(ChatError, match=reason):
        template(text).render([ASK])


def test_a_template_that_is_not_jinja_is_told_with_its_place():
    with pytest.raises(UserError, match=r"^x\.jinja: line 2: not a chat template"):
        compile_template("a\n{% if %}", {}, where="x.jinja")


def test_today_is_said_not_taken_from_the_clock():
    text = "{{ strftime_now('%d %b %Y') }}"
    with pytest.raises(UserError, match="--date"):
        template(text).render([ASK])
    assert template(text, date=datetime.date(2024, 7, 6)).render([ASK]).text == "06 Jul 2024"


def test_tojson_writes_json_as_it_is():
    assert template("{{ messages | tojson }}").render([{"role": "<é>&'"}]).text == '[{"role": "<é>&\'"}]'
    assert template("{{ messages | tojson(indent=1) }}").render([{"role": "a"}]).text == '[\n {\n  "role": "a"\n }\n]'


def test_nulls_are_left_out_and_reasoning_has_its_names():
    text = "{{ 'content' in messages[0] }} {{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    message = {"role": "assistant", "content": None, "reasoning": "r"}
    assert template(text).render([message]).text == "False r r"
    assert message == {"role": "assistant", "content": None, "reasoning": "r"}


def test_templates_are_chosen_by_name_file_and_tools(toks, tmp_path):
    tokenizer = Tokenizer(toks["chatml"])
    assert special_variables(tokenizer) == VARIABLES | {"pad_token": "<|endoftext|>"}
    (tmp_path / "own.jinja").write_text("own")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "json"}')
    for name, text in (("own.jinja", "own"), ("tokenizer_config.json", "json")):
        assert load_templates(tokenizer, str(tmp_path / name))[0].render([ASK]).text == text
    tokenizer.chat_templates["tool_use"] = "t {{ tools | length }} {{ x }}"
    plain, tools = load_templates(tokenizer, arguments={"x": 5})
    both = Renderer(plain, tools)
    assert both.prompt(Chat([ASK], [1])) == "t 1 5"
    assert both.prompt(Chat([ASK])) == "<|im_start|>user\nwhy? <|im_end|>\n<|im_start|>assistant\n"
    assert load_templates(tokenizer, "tool_use")[1] is None
    for wanted, message in (("nope", "neither a file nor a template of"), (str(tmp_path / "bad.json"), "neither")):
        with pytest.raises(UserError, match=message):
            load_templates(tokenizer, wanted)
    tokenizer.chat_templates.clear()
    with pytest.raises(UserError, match=r"no chat template .none.; give the model's with --template FILE"):
        load_templates(tokenizer)


@pytest.mark.parametrize(
    "text, spelled",
    [("a <|im_end|><s>", ["<|im_end|>", "<s>"]), ("a <|im_en", []), ("[INST", []), ("x", [])],
)
def test_special_tokens_are_found_wherever_a_message_says_them(text, spelled):
    special = Special(chat_data.SPECIAL)
    for message in ({"content": text}, {"content": "", "tool_calls": [{"function": {"arguments": {"a": [text]}}}]}):
        assert special.spelled(Chat([{"role": "<s>", **message}])) == spelled
    assert special.spelled(Chat([ASK], [{"function": {"description": text}}])) == spelled


def test_what_a_message_spells_stays_text_wherever_the_template_puts_it():
    special, tools = Special(chat_data.SPECIAL), [{"description": "</s>"}]
    chat = Chat([{"role": "user", "content": " <s>"}, {"role": "assistant", "content": "a<s>b"}], tools)
    text = "{{ tools | tojson }}<s>{{ messages[0].content | trim }}"
    text += "{% generation %}{{ messages[1].content }}</s>{% endgeneration %}"
    sample = special.unmarked(renderer(text).samples(special.marked(chat))[0])
    assert sample.text == '[{"description": "</s>"}]<s><s>a<s>b</s>' and said(sample) == ["a<s>b</s>"]
    assert [sample.text[start:end] for start, end in sample.literal] == ["</s>", "<s>", "<s>"]
    assert list(special.pieces(sample.text, sample.literal)) == [
        ('[{"description": "</s>"}]', False),
        ("<s>", True),
        ("<s>a<s>b", False),
        ("</s>", True),
    ]


@pytest.mark.parametrize(
    "text", ["{{ messages[0].content | tojson(ensure_ascii=true) }}", "{{ messages[0].content[:3] }}"]
)
def test_a_template_that_takes_a_spelled_token_apart_is_refused(text):
    special = Special(chat_data.SPECIAL)
    marked = special.marked(Chat([{"role": "user", "content": "x<s>"}]))
    with pytest.raises(ChatError, match="takes a special token apart"):
        special.unmarked(Sample(template(text).render(marked.messages).text, [], []))
