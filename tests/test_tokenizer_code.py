"""Tokenizers that are Python code of their folder: run by flag only, and as the published ones are written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_folders import HARD, tiktoken, write

from megapatch.models.cli import UserError
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.convert.new_model import main as new_model
from megapatch.tools.generate.generate import main as generate
from megapatch.tools.preprocess.preprocess import main as preprocess
from megapatch.trainer.pretrain import main as pretrain


def tools(folder: Path, to: Path) -> dict[str, tuple[Callable[[list[str]], int], list[str]]]:
    """Each tool that reads a tokenizer, and its arguments."""
    (to / "text.txt").write_text("hé")
    text = ["--input", str(to / "text.txt"), "--tokenizer", str(folder), "--workers", "1"]
    model = ["--config", str(to / "config.json"), "--tokenizer", str(folder), "--target", str(to / "model")]
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    write(to, "config.json", model_type="llama", rms_norm_eps=1e-6, max_position_embeddings=64, **tiny)
    train = ["--model", str(to / "model"), "--data-path", str(to / "data"), "--train-iters", "1", "--dry-run"]
    return {
        "mp-preprocess": (preprocess, [*text, "--output-prefix", str(to / "data"), "--bos", "no", "--eod", "no"]),
        "mp-new-model": (new_model, model),
        "mp-pretrain": (pretrain, [*train, "--save", str(to / "run"), "--seq-length", "2", "--global-batch-size", "1"]),
        "mp-generate": (generate, ["--model", str(to / "model"), "--prompt", "hé", "--max-new-tokens", "1"]),
    }


def test_code_of_a_folder_runs_by_the_flag_of_each_tool_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "ran"
    folder = tiktoken(tmp_path / "own", canary)
    for name, (main, argv) in tools(folder, tmp_path).items():
        capsys.readouterr()
        assert main(argv) == 1
        said = capsys.readouterr().err.splitlines()
        assert "tokenization_own.OwnTokenizer" in said[-1] and "give --trust-remote-code" in said[-1], name
        assert not canary.exists(), name
        assert main([*argv, "--trust-remote-code"]) == 0, capsys.readouterr().err
        assert canary.exists(), name
        canary.unlink()
    assert (tmp_path / "model" / "tokenization_own.py").is_file()  # goes along with the model
    assert (tmp_path / "data.bin").read_bytes() == bytes([104, 0, 0xC3, 0, 0xA9, 0])


def test_code_may_bring_special_tokens_of_its_own(tmp_path: Path) -> None:
    ours = Tokenizer(tiktoken(tmp_path / "own", tmp_path / "ran"), trust_remote_code=True)
    assert (ours.eod_id, ours.prefix_ids, ours.bos_id) == (256, (7, 8), None)
    assert (ours.vocab_size, ours.token_id("<|end|>"), ours.token_id("a"), max(ours.vocabulary.values())) == (
        257,
        256,
        97,
        255,
    )
    for text in HARD:
        assert ours.encode(text) == list(text.encode()) and ours.decode(ours.encode(text)) == text


def test_code_from_elsewhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["some/where--own.Own", None]})
    with pytest.raises(UserError, match="the code of its tokenizer lies elsewhere"):
        Tokenizer(tmp_path, trust_remote_code=True)
