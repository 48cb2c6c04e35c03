"""mp-preprocess-chat on real files: what is written for conversations, preference pairs and prompts."""

import gzip
import json
import os
import signal
import subprocess
import sys

import chat_data
import numpy as np
import pytest
from chat_runs import ASK, FORGED, GOOD, LONG, SAID, SAY, TEXT, contents, run_tool, said, texts, tokenizers  # noqa: F401

from megapatch.models.indexed_data import IndexedDocuments, read_manifest
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.chats.job import ChatJob
from megapatch.tools.preprocess.inspect_data import main as inspect_data


def test_conversations_become_documents_with_masks_and_a_manifest(go, toks, capsys):
    status, prefix = go([GOOD, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    assert status == 0
    assert texts(toks["chatml"], prefix)[0] == TEXT
    assert said(toks["chatml"], prefix) == [SAID, "b<|im_end|>"]
    assert (
        IndexedDocuments(prefix).index.dtype == np.uint16 and IndexedDocuments(f"{prefix}_mask").index.dtype == np.uint8
    )
    found = read_manifest(prefix)
    assert found["format"] == "chat" and found["template"]["mask"] == "generation tags"
    assert found["counts"]["lines"] == found["counts"]["documents"] == found["documents"] == 2
    assert found["counts"]["trained_tokens"] == sum(int(mask.sum()) for mask in IndexedDocuments(f"{prefix}_mask"))
    assert found["tokenizer"]["vocab_size"] == 700 and list(found["pairs"]) == ["_mask"]
    assert "of them trained" in capsys.readouterr().err
    assert sorted(contents(prefix)) == [".bin", ".idx", "_mask.bin", "_mask.idx"]


def test_mp_inspect_data_verifies_and_shows_it(go, capsys):
    _, prefix = go([GOOD])
    assert inspect_data([str(prefix), "--verify"]) == 0
    capsys.readouterr()
    assert inspect_data([str(prefix), "--document", "0", "--mask", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert "".join(span["text"] for span in shown["spans"]) == TEXT
    assert "".join(span["text"] for span in shown["spans"] if span["trained"]) == SAID


def test_output_does_not_depend_on_workers_chunks_or_engine(go):
    records = chat_data.conversations(120)
    first = contents(go(records, name="a")[1])
    for number, more in enumerate([("--workers", "3", "--chunk-bytes", "999"), ("--engine", "tokenizers")]):
        assert contents(go(records, *more, name=f"b{number}")[1]) == first


def test_shards_in_order_are_the_whole(go):
    records = chat_data.conversations(50)
    _, whole = go(records, name="whole")
    parts = [go(records, "--shards", "3", "--shard", str(i), name=f"part{i}")[1] for i in range(3)]
    for end in ("", "_mask"):
        rows = [row.tolist() for part in parts for row in IndexedDocuments(f"{part}{end}")]
        assert rows == [row.tolist() for row in IndexedDocuments(f"{whole}{end}")]


def test_compressed_input_and_parquet_rows_are_read(go, toks, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").Table.from_pylist([GOOD, {"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY]}])
    pyarrow.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    _, prefix = go([GOOD], "--input", str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl.gz"))
    assert said(toks["chatml"], prefix) == [SAID] * 3
    assert texts(toks["chatml"], prefix)[0] == texts(toks["chatml"], prefix)[2] == TEXT


def test_rewritten_history_fails_or_becomes_samples(go, toks, capsys):
    thought = {**SAY, "reasoning_content": "hm"}
    records = [{"messages": [ASK, thought, ASK, thought]}, {"messages": [ASK, thought]}]
    assert go(records, tok="thinking")[0] == 1
    assert "--on-rewritten-history split" in capsys.readouterr().err
    status, prefix = go(records, "--on-rewritten-history", "split", "--deduplicate", tok="thinking")
    turn = f"<think>\nhm\n</think>\n\n{SAID}"
    assert status == 0 and said(toks["thinking"], prefix) == [turn] * 3
    counts = read_manifest(prefix)["counts"]
    assert (counts["documents"], counts["sequences"]) == (2, 3)


def test_message_weights_are_a_pair_of_their_own_where_there_are_any(go):
    def weighted(weight):
        return [{"messages": [ASK, SAY, ASK, {**SAY, "weight": weight}]}, GOOD]

    _, prefix = go(weighted(0.25), "--message-weights")
    found = [sorted(set(row.tolist())) for row in IndexedDocuments(f"{prefix}_weight")]
    assert found == [[0, 0.25, 1], [0, 1]]
    for weights, mask in zip(IndexedDocuments(f"{prefix}_weight"), IndexedDocuments(f"{prefix}_mask"), strict=True):
        assert ((weights > 0) == mask).all()
    assert go(weighted(0), "--message-weights")[0] == 1  # files are there
    _, prefix = go(weighted(0), "--message-weights", "--force")
    assert sorted(contents(prefix)) == [".bin", ".idx", "_mask.bin", "_mask.idx"]
    go(weighted(0.5), "--message-weights", "--force")
    go([GOOD], "--force")  # a stale pair of weights would belong to other documents
    assert sorted(contents(prefix)) == [".bin", ".idx", "_mask.bin", "_mask.idx"]


@pytest.mark.parametrize("tok", ["chatml", "plain"])
def test_special_tokens_in_messages_are_tokens_text_or_refused(go, toks, capsys, tok):
    ids = Tokenizer(toks[tok]).token_id("<|im_end|>"), Tokenizer(toks[tok]).token_id("<|im_start|>")

    def numbers(prefix):
        return [sum(int((row == one).sum()) for one in ids) for row in IndexedDocuments(prefix)]

    _, prefix = go([GOOD, FORGED], name="allow", tok=tok)
    assert numbers(prefix) == [4, 6]
    assert read_manifest(prefix)["special_in_text"] == {"<|im_end|>": 1, "<|im_start|>": 1}
    _, literal = go([GOOD, FORGED], "--special-in-text", "literal", name="literal", tok=tok)
    assert numbers(literal) == [4, 4]
    assert texts(toks[tok], literal) == texts(toks[tok], prefix)
    assert said(toks[tok], literal) == [SAID, "<|im_start|>e\u0301<|im_end|>"]
    assert go([GOOD, FORGED], "--special-in-text", "fail", name="fail", tok=tok)[0] == 1
    assert "in.jsonl:2 " in (told := capsys.readouterr().err) and "spells the special token '<|im_end|>'" in told


def test_preference_pairs_are_two_pairs_of_files_with_masks(go, toks):
    records = [
        {"prompt": "why? é", "chosen": SAY["content"], "rejected": "no"},
        {"prompt": [ASK, SAY, ASK], "chosen": [SAY], "rejected": [LONG]},
        {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "maybe"}]},
    ]
    status, prefix = go(records, "--chat-format", "preference", "--max-length", "80")
    tok = toks["chatml"]
    assert status == 0 and texts(tok, f"{prefix}_chosen") == [TEXT, TEXT]  # with the second its other side is left out
    assert said(tok, f"{prefix}_chosen") == [SAID, SAID] and said(tok, f"{prefix}_rejected") == [
        "no<|im_end|>",
        "maybe<|im_end|>",
    ]
    found = read_manifest(prefix)
    assert found["format"] == "preference" and found["counts"]["filtered"] == 1
    assert sorted(found["pairs"]) == ["_chosen", "_chosen_mask", "_rejected", "_rejected_mask"]
    assert inspect_data([str(prefix), "--verify"]) == 0
    assert go(records, "--chat-format", "preference")[0] == 1  # there already


def test_prompts_end_with_the_generation_prompt_and_have_answers(go, toks):
    records = [{"prompt": "why? é", "answer": "4 é"}, {"prompt": [ASK], "answer": 5}, {"prompt": [ASK]}]
    _, prefix = go(records, "--chat-format", "prompts")
    assert texts(toks["chatml"], prefix) == [TEXT.removesuffix(SAID + "\n")] * 3
    assert [row.tobytes().decode() for row in IndexedDocuments(f"{prefix}_answer")] == ["4 é", "5", ""]
    assert read_manifest(prefix)["format"] == "prompts"
    half = [*records, r'{"prompt": "a", "answer": "\ud800"}']
    _, skipped = go(half, "--chat-format", "prompts", "--on-bad-line", "skip", name="half")
    assert contents(skipped) == contents(prefix)
    _, none = go(records[2:], "--chat-format", "prompts", name="none")
    assert sorted(contents(none)) == [".bin", ".idx"]


def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(go, capsys, monkeypatch):
    records = [*chat_data.conversations(90), *chat_data.conversations(20), FORGED]
    more = ["--chunk-bytes", "4000", "--deduplicate", "--max-length", "300", "--truncate", "right"]
    _, whole = go(records, *more, name="whole")
    settle, settled = ChatJob.settle, []

    def interrupted(job, report):
        settled.append(report)
        if len(settled) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return settle(job, report)

    monkeypatch.setattr(ChatJob, "settle", interrupted)
    with pytest.raises(SystemExit) as ended:
        go(records, *more)
    assert ended.value.code == 128 + signal.SIGTERM and "--resume" in capsys.readouterr().err
    before = len(settled)
    status, prefix = go(records, *more, "--resume")
    assert status == 0 and contents(prefix) == contents(whole)
    with_all = len(settled) - before
    assert 0 < with_all < sum(1 for _ in range(0, (prefix.parent / "in.jsonl").stat().st_size, 4000))
    told = [read_manifest(one) for one in (prefix, whole)]
    for name in ("counts", "truncation", "special_in_text", "sources", "xxh3_128", "pairs"):
        assert told[0][name] == told[1][name]


def test_the_manifest_goes_to_stdout(go, capsys):
    _, prefix = go([GOOD], "--json")
    assert json.loads(capsys.readouterr().out) == read_manifest(prefix)


def test_neither_torch_nor_transformers_is_imported(toks, tmp_path):
    source = chat_data.write(tmp_path / "in.jsonl", [GOOD])
    argv = ["--input", str(source), "--tokenizer", str(toks["chatml"]), "--output-prefix", str(tmp_path / "out")]
    code = (
        "import sys; from megapatch.tools.preprocess.preprocess_chat import main; status = main(sys.argv[1:]);"
        "sys.exit(status or ' '.join({'torch', 'transformers', 'megatron'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
