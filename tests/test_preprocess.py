"""mp-preprocess: megatron-core's own bytes, whatever the number of workers and the kind of input."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from preprocess_data import DOCUMENTS, make_tokenizer, outputs, run, write_jsonl

from megapatch.models import commit
from megapatch.models.indexed_data import IndexedDocuments, read_manifest
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.run import progress


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("preprocess"))


@pytest.fixture
def large_tok(tok: Path, tmp_path: Path) -> Path:
    """A tokenizer with an id above 65,500, which needs int32."""
    copied = tmp_path / "large"
    copied.mkdir()
    for path in tok.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    content = json.loads((copied / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 65_500
    (copied / "tokenizer.json").write_text(json.dumps(content))
    return copied


@pytest.mark.parametrize("eod", ["no", "yes"])
@pytest.mark.parametrize("vocabulary", ["tok", "large_tok"])
def test_files_are_those_of_megatron_cores_builder(
    request: pytest.FixtureRequest, tmp_path: Path, vocabulary: str, eod: str
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    folder = request.getfixturevalue(vocabulary)
    tokenizer = Tokenizer(folder)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    assert dtype == {"tok": np.uint16, "large_tok": np.int32}[vocabulary]
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=dtype)
    expected = [tokenizer.encode(text) + [tokenizer.eod_id] * (eod == "yes") for text in DOCUMENTS if text]
    for ids in expected:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "core.idx"))
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert run(folder, tmp_path / "ours", source, more=("--eod", eod)) == 0
    assert outputs(tmp_path / "ours") == outputs(tmp_path / "core")
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected


def test_core_trains_on_the_files(tok: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} of many words" for i in range(200)])
    assert run(tok, tmp_path / "data", source) == 0
    tokenizer = SimpleNamespace(unique_identifiers={"name": "tok"}, eod=Tokenizer(tok).eod_id, pad=399, vocab_size=400)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([str(tmp_path / "data")], None),
        split="90,10,0",
        tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [20, 2, 0], lambda: True, config).build()[0]
    sample = train[0]
    stream = b"".join(document.tobytes() for document in IndexedDocuments(tmp_path / "data"))
    assert len(train) >= 20
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    document = Tokenizer(tok).decode(sample["tokens"].tolist()).split("<|endoftext|>")[1]
    assert np.array(Tokenizer(tok).encode(document), np.uint16).tobytes() in stream


@pytest.mark.parametrize("chunk_bytes", ["1", "37", "1000", "4194304"])
@pytest.mark.parametrize("workers", ["1", "2", "3"])
def test_output_does_not_depend_on_workers_or_chunks(
    tok: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str, chunk_bytes: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"text {i}\r\n" * i, newline="")
    first = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    second = write_jsonl(tmp_path / "b.json", DOCUMENTS[:3])
    second.write_bytes(b"\n \r\n" + second.read_bytes().rstrip())  # blank lines, none at the end
    more = ("--glob", "*.txt", "--workers", workers, "--chunk-bytes", chunk_bytes)
    assert run(tok, tmp_path / "out", first, folder, second, more=more) == 0
    assert "became tokens: <|endoftext|> 1; see --special-in-text" in capfd.readouterr().err
    tokenizer = Tokenizer(tok)
    texts = [*DOCUMENTS, *(f"text {i}\r\n" * i for i in range(7)), *DOCUMENTS[:3]]
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts if text]
    assert [document.tolist() for document in IndexedDocuments(tmp_path / "out")] == expected
    about = json.loads((tmp_path / "out.manifest.json").read_text())
    assert about["counts"] == {
        "lines": 20,
        "documents": 15,
        "empty": 5,
        "bad": 0,
        "filtered": 0,
        "duplicate": 0,
        "filtered_by_reason": {},
        "tokens": sum(map(len, expected)),
    }
    assert about["special_in_text"] == {"<|endoftext|>": 1}
    assert (about["documents"], about["tokens"]) == (15, sum(map(len, expected)))


def test_manifest_names_tokenizer_options_and_inputs(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"], key="body")
    assert run(tok, tmp_path / "out", source, more=("--text-key", "body")) == 0
    about = json.loads((tmp_path / "out.manifest.json").read_text())
    tokenizer = Tokenizer(tok)
    assert about["tokenizer"] == {
        "folder": str(tok),
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "bos_ids": [],
    }
    said = {"eod": "yes", "format": "auto", "text_key": ["body"], "on_bad_line": "fail", "special_in_text": "allow"}
    assert said.items() <= about["options"].items()
    assert about["format"] == "corpus"
    digests = {"bin": commit.digest(tmp_path / "out.bin"), "idx": commit.digest(tmp_path / "out.idx")}
    assert about["xxh3_128"] == digests
    assert about["inputs"] == [{"path": str(source), "bytes": source.stat().st_size, "xxh3_128": commit.digest(source)}]
    assert about["sources"] == {str(source): {"lines": 2, "documents": 2, "tokens": about["tokens"]}}
    assert (tmp_path / "out.args").read_text() == f"--data-path {tmp_path / 'out'}\n"
    assert (about["dtype"], about["bin_bytes"]) == ("uint16", (tmp_path / "out.bin").stat().st_size)
    assert read_manifest(tmp_path / "out") == about
    assert about["versions"]["megatron-core"].startswith("0.16.")


def test_a_log_gets_lines_and_a_terminal_a_bar_with_messages_above_it(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    source.write_bytes(source.read_bytes() + b"{}\n")
    more = ("--chunk-bytes", "50", "--on-bad-line", "skip", "--force")
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert run(tok, tmp_path / "out", source, more=more) == 0
    log = capfd.readouterr().err
    assert log.count(" of 0.0 MB in ") > 3 and "\r" not in log
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tok, tmp_path / "out", source, more=more) == 0
    shown = capfd.readouterr().err.replace("\r", "\n").split("\n")
    assert any("%|" in line and "B/s" in line for line in shown)
    messages = [line for line in shown if "mp-preprocess:" in line]
    assert all(line.startswith("mp-preprocess: ") for line in messages)
    assert len([line for line in messages if line.endswith("; skipped")]) == 1


@pytest.mark.parametrize("more", [(), ("--format", "text")])
def test_standard_input_is_lines_or_one_text(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(tok, tmp_path / "out", "-", more=(*more, "--chunk-bytes", "50")) == 0
    tokenizer = Tokenizer(tok)
    texts = [data.decode()] if more else [text for text in DOCUMENTS if text]
    expected = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]
    assert [document.tolist() for document in IndexedDocuments(tmp_path / "out")] == expected
    about = json.loads((tmp_path / "out.manifest.json").read_text())
    assert about["inputs"] == [{"path": "stdin", "bytes": len(data), "xxh3_128": commit.digest(tmp_path / "a.jsonl")}]


def test_a_pipe_given_as_a_file_is_read_once(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with subprocess.Popen(["sh", "-c", f"cat '{source}' > '{tmp_path}/pipe.jsonl'"]):
        assert run(tok, tmp_path / "piped", tmp_path / "pipe.jsonl") == 0
    assert run(tok, tmp_path / "plain", source) == 0
    assert outputs(tmp_path / "piped") == outputs(tmp_path / "plain")


def test_a_run_imports_neither_torch_nor_transformers(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    code = (
        "import sys; from megapatch.tools.preprocess.preprocess import main; status = main(sys.argv[1:]);"
        "print(status, {'torch', 'transformers', 'megatron'} & set(sys.modules))"
    )
    argv = ["--input", str(source), "--tokenizer", str(tok), "--output-prefix", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.stdout == "0 set()\n"
    assert "7 documents" in done.stderr
