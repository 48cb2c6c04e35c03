"""Batches: every token counts, the order is of the seed and the step, blends have their shares, the cache is whole."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
from preprocess_data import make_tokenizer
from trainer_runs import arguments

from megapatch.models import cli, commit, device, parallel
from megapatch.models.cli import UserError
from megapatch.models.indexed_data import write_index
from megapatch.models.tokenizer import Tokenizer
from megapatch.trainer.options import PretrainOptions

device.start()  # before megatron-core is imported

from megapatch.trainer.data import gpt_data  # noqa: E402

LENGTH, BATCH = 16, 8


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """The process group of one."""
    parallel.start(options([Path("x")], Path("x")), device.start())
    yield
    parallel.stop()


class Digits:
    """As much of a Tokenizer as the datasets need."""

    folder, vocab_size, eod_id, digest = Path("digits"), 1000, 0, "d" * 32


TOKENIZER: Any = Digits()


def pair(
    folder: Path, name: str, documents: list[list[int]], digest: str | None = TOKENIZER.digest, **said: Any
) -> Path:
    """The prefix of a .bin/.idx pair with these documents; ``said``: what else its manifest says."""
    folder.mkdir(exist_ok=True)
    prefix = folder / name
    ids = np.array([token for document in documents for token in document], np.uint16)
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    write_index(prefix.with_suffix(".idx"), np.array([len(d) for d in documents], np.int64), np.dtype(np.uint16))
    if digest is not None:
        manifest = {"format": "corpus", "tokenizer": {"digest": digest}, "bin_bytes": ids.nbytes, **said}
        (folder / f"{name}.manifest.json").write_text(json.dumps(manifest))
    return prefix


def options(words: list[Any], folder: Path, extra: str = "") -> PretrainOptions:
    """mp-pretrain's options for these data."""
    given = arguments(folder, "model", "run", f"--seq-length {LENGTH} --global-batch-size {BATCH} {extra}")
    at = given.index("--data-path")
    given[at + 1 : at + 2] = [str(word) for word in words]
    return cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(given)


def counting(start: int, documents: int, length: int = 40) -> list[list[int]]:
    """Documents of counting numbers, no two tokens alike."""
    return [list(range(start + i * length, start + (i + 1) * length)) for i in range(documents)]


def batches(dataset: Any, given: PretrainOptions, rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tokens of each micro-batch of the first global batch on a data-parallel rank."""
    monkeypatch.setattr(gpt_data.parallel_state, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(gpt_data.parallel_state, "get_data_parallel_world_size", lambda: size)
    found = gpt_data.micro_batches(dataset, given, TOKENIZER.vocab_size, 0, torch.device("cpu"))
    return [batch["tokens"] for batch in found]


def test_every_token_counts_and_labels_are_the_next_ones(tmp_path: Path) -> None:
    prefix = pair(tmp_path, "data", [[*range(1, 40), 0] for _ in range(20)])
    train, valid, _ = gpt_data.build_datasets(options([prefix], tmp_path), TOKENIZER)
    assert valid is None
    for i in range(len(train)):
        sample = train[i]
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH
        assert sample["position_ids"].tolist() == list(range(LENGTH))
        assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()


def test_ends_of_documents_can_be_masked_and_restart_positions(tmp_path: Path) -> None:
    prefix = pair(tmp_path, "data", [[1, 2, 3, 0] for _ in range(40)])
    given = options([prefix], tmp_path, "--eod-mask-loss --reset-position-ids")
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    sample = train[0]
    tokens = sample["tokens"].tolist()
    assert sample["loss_mask"].tolist() == [float(token != 0) for token in tokens]
    positions = sample["position_ids"].tolist()
    after = [i + 1 for i, token in enumerate(tokens[:-1]) if token == 0]
    assert after and all(positions[i] == 0 for i in after)
    assert max(positions) == 3


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2])
def test_the_samples_of_a_step_do_not_depend_on_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, width: int
) -> None:
    given = options([pair(tmp_path, "data", counting(0, 20))], tmp_path, f"--micro-batch-size {width}")
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    expected = [train[i]["tokens"].tolist() for i in range(BATCH)]
    by_rank = [batches(train, given, rank, size, monkeypatch) for rank in range(size)]
    found = [row for step in zip(*by_rank, strict=True) for batch in step for row in batch.tolist()]
    assert found == expected


def test_samples_of_preprocessed_text_are_the_tokenizers_ids(tmp_path: Path) -> None:
    tok = make_tokenizer(tmp_path)
    texts = [f"Document {n}: {'word ' * (n % 13)}\u00e9\n" for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", tmp_path / "text.jsonl", "--tokenizer", tok, "--output-prefix", tmp_path / "data"]
    tool = [sys.executable, "-m", "megapatch.tools.preprocess.preprocess"]  # its workers are forked, without torch
    subprocess.run([*tool, *map(str, words)], check=True)
    reference = tokenizers.Tokenizer.from_file(str(tok / "tokenizer.json"))
    eod = reference.token_to_id("<|endoftext|>")
    documents = [[*reference.encode(text, add_special_tokens=False).ids, eod] for text in texts]
    given = options([tmp_path / "data"], tmp_path, "--split 1")
    gpt, *_ = gpt_data.build_datasets(given, Tokenizer(tok))
    stream = [token for number in gpt.document_index.tolist() for token in documents[number]]
    for position, place in enumerate(gpt.shuffle_index.tolist()):
        sample = gpt[position]
        assert sample["tokens"].tolist() == stream[place * LENGTH : (place + 1) * LENGTH]
        assert sample["labels"].tolist() == stream[place * LENGTH + 1 : (place + 1) * LENGTH + 1]
    assert len(gpt) == (len(stream) - 1) // LENGTH


def test_a_new_seed_is_a_new_order_of_the_same_tokens(tmp_path: Path) -> None:
    prefix = pair(tmp_path, "data", counting(0, 20))
    one, same, other = (
        gpt_data.build_datasets(options([prefix], tmp_path, f"--seed {seed}"), TOKENIZER)[0] for seed in (1, 1, 2)
    )
    rows = [[tuple(train[i]["tokens"].tolist()) for i in range(32)] for train in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]


def test_an_epoch_brings_every_token_once(tmp_path: Path) -> None:
    documents = 16  # x 40 tokens = 40 samples of 16
    given = options([pair(tmp_path, "data", counting(0, documents))], tmp_path, "--split 1")
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    counts = Counter(token for i in range(39) for token in train[i]["tokens"].tolist())
    assert set(counts.values()) == {1} and len(counts) == 39 * LENGTH


@pytest.mark.parametrize(("weights", "share"), [((3, 1), 0.75), ((1, 1), 0.5), (None, 0.25)])
def test_a_blend_has_its_shares(tmp_path: Path, weights: tuple[int, int] | None, share: float) -> None:
    one, two = pair(tmp_path, "one", counting(0, 5)), pair(tmp_path, "two", counting(500, 15, 30))  # 200 and 450 tokens
    words = [weights[0], one, weights[1], two] if weights else [one, two]
    share = share if weights else 200 / 650  # of the tokens
    given = options(words, tmp_path, "--train-iters 50 --split 1")
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    first = sum(int(train[i]["tokens"][0] < 500) for i in range(400))
    assert len(train) >= 400 and first / 400 == pytest.approx(share, abs=0.01)


def test_validation_reads_the_documents_that_training_does_not(tmp_path: Path) -> None:
    given = options([pair(tmp_path, "data", counting(0, 20))], tmp_path, "--split 80,10,10 --eval-interval 1")
    train, valid, _ = gpt_data.build_datasets(given, TOKENIZER)
    assert {t for i in range(len(train)) for t in train[i]["tokens"].tolist()} <= set(range(640))
    assert {t for i in range(len(valid)) for t in valid[i]["tokens"].tolist()} <= set(range(640, 720))


def test_with_data_to_validate_with_all_others_are_trained_on(tmp_path: Path) -> None:
    one, two = pair(tmp_path, "one", counting(0, 16)), pair(tmp_path, "two", counting(700, 4))
    given = options([one], tmp_path, f"--valid-data-path {two} --eval-interval 1 --train-iters 5")
    gpt_data.check_data(given, TOKENIZER, 1000)
    train, valid, _ = gpt_data.build_datasets(given, TOKENIZER)
    assert {t for i in range(len(train)) for t in train[i]["tokens"].tolist()} >= set(range(39 * LENGTH))
    assert {t for i in range(len(valid)) for t in valid[i]["tokens"].tolist()} <= set(range(700, 860))
    assert len(valid) >= given.eval_iters * BATCH
    whole, *_ = gpt_data.build_datasets(options([one], tmp_path, "--split 1 --train-iters 5"), TOKENIZER)
    assert [train[i]["tokens"].tolist() for i in range(40)] == [whole[i]["tokens"].tolist() for i in range(40)]


def tokens_of(dataset: Any) -> set[int]:
    return {t for i in range(len(dataset)) for t in dataset[i]["tokens"].tolist()}


def test_a_third_share_and_data_of_their_own_are_what_is_tested_with(tmp_path: Path) -> None:
    one, two = pair(tmp_path, "one", counting(0, 20)), pair(tmp_path, "two", counting(900, 2))
    third = options([one], tmp_path, "--split 80,10,10")
    apart = options([one], tmp_path, f"--test-data-path {two} --split 80,20 --eval-interval 1")
    assert (third.tests, apart.tests, options([one], tmp_path).tests) == (True, True, False)
    train, valid, test = gpt_data.build_datasets(third, TOKENIZER)
    assert valid is None and tokens_of(train) <= set(range(640)) and tokens_of(test) <= set(range(720, 800))
    assert len(test) >= third.eval_iters * BATCH
    gpt_data.check_data(apart, TOKENIZER, 1000)
    train, valid, test = gpt_data.build_datasets(apart, TOKENIZER)
    assert tokens_of(train) <= set(range(640)) and tokens_of(valid) <= set(range(640, 800))
    assert tokens_of(test) <= set(range(900, 980))


def test_both_may_be_blends(tmp_path: Path) -> None:
    one, two = pair(tmp_path, "one", counting(0, 5)), pair(tmp_path, "two", counting(500, 5))
    extra = f"--valid-data-path {two} {one} --eval-interval 1 --eval-iters 50 --train-iters 50"
    train, valid, _ = gpt_data.build_datasets(options([3, one, 1, two], tmp_path, extra), TOKENIZER)
    shares = [sum(int(some[i]["tokens"][0] < 500) for i in range(400)) / 400 for some in (train, valid)]
    assert shares == pytest.approx([0.75, 0.5], abs=0.01)


def test_without_evaluation_the_data_to_validate_with_are_only_checked(tmp_path: Path) -> None:
    one, two = pair(tmp_path, "one", counting(0, 9)), pair(tmp_path, "two", [[1]])
    given = options([one], tmp_path, f"--valid-data-path {two}")
    with pytest.raises(UserError, match=r"two: 1 of its 1 documents are for validation, with 1 tokens; bring more"):
        gpt_data.check_data(given, TOKENIZER, 1000)
    train, valid, _ = gpt_data.build_datasets(given, TOKENIZER)
    assert valid is None and len(train) >= 4 * BATCH


def test_new_data_to_validate_with_get_new_indices(tmp_path: Path) -> None:
    one, two = pair(tmp_path, "one", counting(0, 9)), pair(tmp_path, "two", counting(700, 2))
    given = options([one], tmp_path, f"--valid-data-path {two} --eval-interval 1")
    gpt_data.build_datasets(given, TOKENIZER)
    pair(tmp_path, "two", counting(600, 3, 30))
    _, valid, _ = gpt_data.build_datasets(given, TOKENIZER)
    assert {t for i in range(len(valid)) for t in valid[i]["tokens"].tolist()} <= set(range(600, 690))


def test_a_split_and_data_to_validate_with_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--split and --valid-data-path: give one"):
        options(["a"], tmp_path, "--split 98,2,0 --valid-data-path b")


ENDS = "--eod-mask-loss"
UNFIT = {  # what: (options, what the manifest says, part of the message; None: fits)
    "chats": ("", {"format": "chat"}, "data.manifest.json: format chat; mp-pretrain trains on corpora"),
    "preferences": ("", {"format": "preference"}, "format preference; mp-pretrain trains on corpora"),
    "a format of its own": ("", {"format": "mine"}, "format 'mine'; expected one of corpus, "),
    "another end": (ENDS, {"eod_id": 7}, "documents end with token 7, but --eod-mask-loss looks for 0"),
    "no end": ("--reset-position-ids", {"eod_id": None}, "end with token None, but --reset-position-ids looks for 0"),
    "no end, none needed": ("", {"eod_id": None}, None),
    "the end looked for": (ENDS, {"eod_id": 0}, None),
    "another size": ("", {"bin_bytes": 2}, "data.manifest.json: does not describe"),
}


@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path"])
@pytest.mark.parametrize("case", UNFIT)
def test_the_manifest_is_held_against_the_run(tmp_path: Path, case: str, flag: str) -> None:
    extra, said, message = UNFIT[case]
    said = {"tokenizer": {"digest": TOKENIZER.digest} | said} if "eod_id" in said else said
    prefix, good = pair(tmp_path, "data", counting(1, 9), **said), pair(tmp_path, "good", counting(1, 9))
    words = [prefix] if flag == "--data-path" else [good]
    given = options(words, tmp_path, f"{extra} --valid-data-path {prefix}" if words == [good] else extra)
    if message is None:
        gpt_data.check_data(given, TOKENIZER, 1000)
        return
    with pytest.raises(UserError) as caught:
        gpt_data.check_data(given, TOKENIZER, 1000)
    assert message in str(caught.value)


PARTS = [("chat", "_mask"), ("chat", "_weight"), ("preference", "_chosen"), ("preference", "_rejected_mask")]


@pytest.mark.parametrize("form, end", [*PARTS, ("prompts", "_answer")])
def test_a_part_of_chats_or_preferences_is_refused_as_the_whole_is(tmp_path: Path, form: str, end: str) -> None:
    part = pair(tmp_path, f"data{end}", counting(1, 9), None)
    whole = {"format": form, "bin_bytes": None, "pairs": {end: {"bin_bytes": 2}}}
    (tmp_path / "data.manifest.json").write_text(json.dumps(whole))
    with pytest.raises(UserError) as caught:
        gpt_data.check_data(options([part], tmp_path), TOKENIZER, 1000)
    what = f"format {form}, of which {part} is a part; mp-pretrain trains on corpora, made by mp-preprocess"
    assert str(caught.value) == f"{tmp_path}/data.manifest.json: {what}"


def test_a_corpus_that_is_only_named_like_a_part_is_taken(tmp_path: Path) -> None:
    pair(tmp_path, "data", counting(1, 9))
    gpt_data.check_data(options([pair(tmp_path, "data_mask", counting(1, 9))], tmp_path), TOKENIZER, 1000)
    gpt_data.check_data(options([pair(tmp_path, "data_chosen", counting(1, 9), None)], tmp_path), TOKENIZER, 1000)


def test_an_interrupted_preprocessing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data.partial").mkdir()
    with pytest.raises(UserError, match=r"data\.idx: no such file, but .*data\.partial is there.* --resume"):
        gpt_data.check_data(options([tmp_path / "data"], tmp_path), TOKENIZER, 1000)
    assert "names no tokenizer" not in caplog.text


def test_the_words_of_each_blend_are_checked_under_its_flag(tmp_path: Path) -> None:
    given = options([pair(tmp_path, "data", counting(1, 9))], tmp_path, "--valid-data-path 1 a 2")
    with pytest.raises(UserError, match="--valid-data-path: 3 words; a blend needs WEIGHT PREFIX pairs"):
        gpt_data.check_data(given, TOKENIZER, 1000)


@pytest.mark.parametrize("documents", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [2, 5, 17, 100])
def test_however_little_there_is_it_is_repeated_for_as_long_as_asked(
    tmp_path: Path, documents: int, length: int
) -> None:
    prefix = pair(tmp_path, "data", counting(0, documents, length))
    train, *_ = gpt_data.build_datasets(options([prefix], tmp_path, "--split 1"), TOKENIZER)
    assert {len(train[i]["tokens"]) for i in range(4 * BATCH)} == {LENGTH}


REFUSED = {  # what: (options, documents, digest, part of the message)
    "no document left to train on": ("--split 1,99", 1, TOKENIZER.digest, "0 of its 1 documents are for training"),
    "no document left to validate with": (
        "--split 99,1 --eval-interval 1",
        9,
        TOKENIZER.digest,
        "0 of its 9 documents are for validation (--split 99,1), with 0 tokens",
    ),
    "another tokenizer": ("", 9, "e" * 32, "made with another tokenizer than digits"),
    "shares below zero": ("--split 9,-1", 9, TOKENIZER.digest, "expected up to three shares"),
    "a third share without documents": ("--split 98,1,1", 9, TOKENIZER.digest, "0 of its 9 documents are for test"),
    "two kinds of test": ("--split 8,1,1 --test-data-path x", 9, TOKENIZER.digest, "8,1,1: its third share and --test"),
    "four shares": ("--split 1,1,1,1", 9, TOKENIZER.digest, "expected up to three shares"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    extra, documents, digest, message = REFUSED[case]
    prefix = pair(tmp_path, "data", counting(1, documents), digest)
    with pytest.raises(UserError) as caught:
        gpt_data.check_data(options([prefix], tmp_path, extra.replace("--split 9,-1", "--split=9,-1")), TOKENIZER, 1000)
    assert message in str(caught.value)


@pytest.mark.parametrize("named", [False, True])
def test_data_that_name_no_tokenizer_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, named: bool) -> None:
    prefix = pair(tmp_path, "data", counting(1, 9), None)
    if named:
        size = prefix.with_suffix(".bin").stat().st_size
        (tmp_path / "data.manifest.json").write_text(
            json.dumps({"format": "corpus", "tokenizer": {}, "bin_bytes": size})
        )
    gpt_data.check_data(options([prefix], tmp_path), TOKENIZER, 1000)
    found = "names no tokenizer" if named else "no such file, so the data name no tokenizer"
    assert f"data.manifest.json: {found}; cannot check that the data fit" in caplog.text


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options([pair(tmp_path, "data", counting(900, 3, 60))], tmp_path, "--split 1")
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    with pytest.raises(UserError, match="the model's vocabulary ends at 999; run mp-preprocess with"):
        batches(train, given, 0, 1, monkeypatch)


def test_data_made_anew_at_the_same_place_get_new_indices(tmp_path: Path) -> None:
    given = options([tmp_path / "data"], tmp_path, "--split 1")
    pair(tmp_path, "data", counting(0, 20))
    gpt_data.build_datasets(given, TOKENIZER)
    pair(tmp_path, "data", counting(100, 2, 30))
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    assert {t for i in range(len(train)) for t in train[i]["tokens"].tolist()} <= set(range(100, 160))


def test_a_cache_left_half_built_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options([pair(tmp_path, "data", counting(0, 20))], tmp_path)
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        gpt_data.build_datasets(given, TOKENIZER)
    assert list(cache.iterdir()) == []
    gpt_data.build_datasets(given, TOKENIZER)
    (made,) = cache.iterdir()
    kept = tmp_path / "kept"
    shutil.copytree(made, kept)
    made.rename(commit.staging_name(made))  # as a run leaves it that is killed before the last step
    for file in commit.staging_name(made).iterdir():
        file.write_bytes(file.read_bytes()[:100])
    gpt_data.build_datasets(given, TOKENIZER)
    assert {file.name: file.read_bytes() for file in made.iterdir()} == {
        file.name: file.read_bytes() for file in kept.iterdir()
    }


def build(folder: Path, results: Any) -> None:
    """What each of several runs does at its start: a process group of its own, and the same indices."""
    device.start()
    given = options([folder / "data"], folder, "--split 1 --train-iters 200")
    parallel.start(given, device.start())
    train, *_ = gpt_data.build_datasets(given, TOKENIZER)
    results.put(hash(tuple(tuple(train[i]["tokens"].tolist()) for i in range(64))))
    dist.destroy_process_group()


def test_runs_that_build_the_same_indices_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    pair(tmp_path, "data", counting(0, 20))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    runs = [context.Process(target=build, args=(tmp_path, results)) for _ in range(3)]
    for run in runs:
        run.start()
    found = {results.get(timeout=120) for _ in runs}
    for run in runs:
        run.join()
    assert len(found) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_real_tokenizer_fits(tmp_path: Path) -> None:
    from tiny_models import letter_tokenizer

    tokenizer = Tokenizer(letter_tokenizer(tmp_path / "tokenizer"))
    prefix = pair(tmp_path, "data", counting(0, 2, 40), tokenizer.digest)
    gpt_data.check_data(options([prefix], tmp_path), tokenizer, 96)
    with pytest.raises(UserError, match="the tokenizer has 96 tokens, the model's vocabulary 95"):
        gpt_data.check_data(options([prefix], tmp_path), tokenizer, 95)
