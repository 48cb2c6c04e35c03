"""What would lose a run, or publish a damaged one, is refused before anything is read or written."""

import errno
import json
from pathlib import Path

import pytest
from model_folders import make

from megapatch.models import core_files, device
from megapatch.models.cli import UserError
from megapatch.models.commit import naming_full_disks
from megapatch.tools.convert.convert import main as convert

device.start()

from megapatch.trainer.data.data_cache import naming_the_cause  # noqa: E402
from megapatch.trainer.pretrain import main as pretrain  # noqa: E402
from megapatch.trainer.saving import checkpoint  # noqa: E402


def step_folder(root: Path, step: int, config: dict | None = None) -> Path:
    folder = core_files.iteration_folder(root, step)
    (folder / "hf").mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "hf" / "config.json").write_text(json.dumps(config or {}))
    return folder


def test_a_run_whose_tracker_is_gone_does_not_start_anew_over_its_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    step_folder(tmp_path, 2)
    step_folder(tmp_path, 4)
    with pytest.raises(UserError, match=r"no tracker; to use iter_0000004, write 4 into .*, or name another --save"):
        checkpoint.newest(tmp_path)
    core_files.write_tracker(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == core_files.iteration_folder(tmp_path, 2)


def test_a_run_is_not_resumed_with_another_model(tmp_path: Path) -> None:
    resumed = step_folder(tmp_path / "run", 3, {"model_type": "llama"})
    for name, kind in {"same": "llama", "other": "mixtral"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    checkpoint.refuse_other_model(tmp_path / "same", resumed)
    checkpoint.refuse_other_model(tmp_path / "gone", resumed)
    for given in (tmp_path / "other", tmp_path / "other" / "config.json"):
        with pytest.raises(UserError, match=r"other/config\.json: differs from the config\.json of .*iter_0000003"):
            checkpoint.refuse_other_model(given, resumed)


def test_a_full_disk_behind_megatron_cores_cache_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk full"), naming_full_disks(tmp_path / "cache"), naming_the_cause():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise Exception("Failed to write dataset materials to the data cache directory") from error  # as core does
    with pytest.raises(ZeroDivisionError), naming_the_cause():
        print(1 / 0)


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_a_learning_rate_that_teaches_nothing_is_wrong_usage(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        pretrain(["--init-from", "x", "--save", "y", "--data-path", "z", "--train-iters", "1", "--lr", rate])
    assert left.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


def test_a_flipped_bit_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["--source", str(make(tmp_path / "hf", "qwen3")), "--target", str(tmp_path / "core")]) == 0
    path = max((tmp_path / "core" / "release").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    export = ["--source", str(tmp_path / "core"), "--target", str(tmp_path / "back")]
    assert convert(export) == 1
    assert f"{path}: content differs from manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert convert([*export, "--skip-digests"]) == 0
