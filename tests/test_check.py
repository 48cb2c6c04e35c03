"""mp-check: equal files, falling values, and what it says when they are not."""

import json
from pathlib import Path

import pytest

from megapatch.tools.report.check import main

TRAIN = [{"event": "train", "step": n, "loss": 5.0 - n / 7} for n in range(1, 5)]


def lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize(
    ("change", "status", "found"),
    [
        (lambda r: r, 0, "4 of 4 equal"),
        (lambda r: [*r[:3], r[1], *r[2:]], 0, "4 of 4 equal"),  # a resumed run repeats steps; the last counts
        (lambda r: [{"event": "resume"}, *r], 0, "4 of 4 equal"),
        (lambda r: [*r[:3], r[3] | {"loss": r[3]["loss"] + 1e-15}], 1, "3 of 4 equal"),
        (lambda r: r[:3], 1, "3 of 4 equal"),
    ],
)
def test_equality_is_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, status: int, found: str
) -> None:
    files = [lines(tmp_path / "a", TRAIN), lines(tmp_path / "b", change(TRAIN))]  # type: ignore[operator]
    assert main(["--name", "é = é", "--equal", *files, "--where", "event=train", "--fields", "loss"]) == status
    out = capsys.readouterr().out
    result = json.loads(out)
    assert "é = é" in out  # readable where it is shown as it is
    assert (result["check"], result["ok"], result["found"]) == ("é = é", status == 0, found)


@pytest.mark.parametrize(("values", "status"), [([3.0, 4.0, 2.9], 0), ([3.0, 3.0], 1), ([3.0], 1), ([3.0, None], 1)])
def test_a_value_falls_or_not(tmp_path: Path, values: list, status: int) -> None:
    file = lines(tmp_path / "a", [{"step": i, "loss": v} for i, v in enumerate(values)])
    assert main(["--name", "fell", "--falls", file, "--fields", "loss"]) == status


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "log:1: not JSON"), ('{"step": 1}', "log:1: no 'loss'"), ("", "no line; nothing to check")],
)
def test_a_file_that_cannot_be_checked_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "log").write_text(text)
    assert main(["--name", "x", "--falls", str(tmp_path / "log"), "--fields", "loss"]) == 1
    assert message in capsys.readouterr().err
