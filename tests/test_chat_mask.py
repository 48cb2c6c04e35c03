"""Which tokens are trained: by the bytes that tokens stand for, by the tokenizer's own offsets, and by transformers."""

import chat_data
import pytest
import tokenizer_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from megapatch.models.chat import Chat, Renderer, Sample
from megapatch.models.chat_load import load_templates
from megapatch.models.chat_mask import Masker
from megapatch.models.tokenizer import Tokenizer


@pytest.mark.parametrize("normalizer", [None, "NFC", "Lowercase"])
def test_masks_are_the_same_by_bytes_and_by_offsets(tmp_path, normalizer):
    tokenizer = Tokenizer(chat_data.make_tokenizer(tmp_path / "tok", "x", normalizer=normalizer))
    texts = ["abé e\u0301漢字 ñ👩‍👩‍👧b", "plain ascii TEXT", "ſ İ x", "", "\u0301\u0301"]
    cuts = [(a, b, c) for a in range(3) for b in (4, 6) for c in (9, 11)]
    samples = [
        Sample(text, [(a, b), (c, len(text))], [1.0, 0.5]) for text in texts for a, b, c in cuts if c < len(text)
    ] + [Sample("", [], [])]
    ids, lengths = tokenizer.encode_flat([sample.text for sample in samples])
    fast, slow = Masker(tokenizer), Masker(tokenizer)
    slow._bytewise = False
    weights, exact = fast.masks(samples, ids, lengths)
    reference, none = slow.masks(samples, ids, lengths)
    assert exact.any() and not none.any()
    assert exact.all() == (normalizer is None)
    assert weights.tolist() == pytest.approx(reference.tolist())


SPM_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message.content + ' ' + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""


def test_masks_of_sentencepiece_models_are_those_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    folder = tokenizer_folders.sentencepiece(tmp_path / "tok")
    (folder / "chat_template.jinja").write_text(SPM_TEMPLATE)
    tokenizer, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    chats = [record["messages"] for record in chat_data.conversations(20)]
    samples = [Renderer(load_templates(tokenizer)[0]).samples(Chat(messages))[0] for messages in chats]
    ids, lengths = tokenizer.encode_flat([sample.text for sample in samples])
    weights, exact = Masker(tokenizer).masks(samples, ids, lengths)
    expected = [
        theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for messages in chats
    ]
    assert ids.tolist() == [token for one in expected for token in one["input_ids"]]
    assert weights.tolist() == [weight for one in expected for weight in one["assistant_masks"]]
    assert not exact.any()  # such a tokenizer's tokens do not tell their bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(chat_data.make_tokenizer(tmp_path_factory.mktemp("tok") / "tok", "x"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), st.randoms())
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_same_mask_by_bytes_and_by_offsets(tokenizer, texts, rng):
    samples = []
    for text in texts:
        bounds = sorted(rng.sample(range(len(text) + 1), k=min(4, (len(text) + 1) // 2 * 2)))
        spans = list(zip(bounds[::2], bounds[1::2], strict=True))
        samples.append(Sample(text, spans, [1.0] * len(spans)))
    ids, lengths = tokenizer.encode_flat(texts)
    fast, slow = Masker(tokenizer), Masker(tokenizer)
    slow._bytewise = False
    assert fast.masks(samples, ids, lengths)[0].tolist() == slow.masks(samples, ids, lengths)[0].tolist()
