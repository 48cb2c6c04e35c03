"""mp-families: every family, told from its file; figures only where they were measured; a table renewed in place."""

import json
from pathlib import Path

import pytest

from megapatch.models import family
from megapatch.tools.convert import list_families
from megapatch.tools.convert.list_families import BEGIN, END, main

FILES = Path(list_families.__file__).parents[2] / "models" / "families"


def measured(path: Path, **changes: float | None) -> Path:
    """A file of figures for all families; None leaves one out."""
    figures: dict[str, float | None] = dict.fromkeys(family.known(), 2.5e-6) | changes
    rows = [{"model_type": name, "max_abs_diff": found} for name, found in figures.items() if found is not None]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_family_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == sorted(family.known())
    assert {line.count(" | ") for line in lines} == {4} and all(line.endswith("not measured |") for line in lines[2:])


KINDS = {  # from the papers
    "llama": (False, "GQA", "RoPE"),
    "qwen": (False, "MHA", "RoPE"),
    "gpt_bigcode": (False, "MQA", "learned positions"),
    "bloom": (False, "MHA", "ALiBi"),
    "mixtral": (True, "GQA", "RoPE"),
    "deepseek_v3": (True, "MLA", "RoPE"),
}


def test_a_row_tells_models_kind_and_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--json", "--measured", str(measured(tmp_path / "m.jsonl", llama=0.0))]) == 0
    rows = {row["model_type"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    for name, kind in KINDS.items():
        assert (rows[name]["experts"], rows[name]["heads"], rows[name]["positions"]) == kind
        text = (FILES / f"{name}.py").read_text()
        assert rows[name]["lines"] == len(text.splitlines()) and text.startswith(f'"""{rows[name]["models"]}')
    assert {name: row["max_abs_diff"] for name, row in rows.items()} == dict.fromkeys(rows, 2.5e-6) | {"llama": 0.0}


def test_only_what_lies_between_the_marks_is_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figures = tmp_path / "page.md", measured(tmp_path / "m.jsonl", llama=0.0)
    page.write_text(f"# é\n{BEGIN}\nbefore it\n{END}\nend\n")
    for _ in range(2):
        assert main(["--measured", str(figures), "--update", str(page)]) == 0
    text = page.read_text()
    assert (
        text.startswith(f"# é\n{BEGIN}\n| `model_type` |")
        and text.endswith(f" |\n{END}\nend\n")
        and "before it" not in text
    )
    assert text.count("| 2.5e-06 |\n") == len(family.known()) - 1 and text.count("| 0 |\n") == 1
    assert capsys.readouterr().out == ""


REFUSED = [
    (lambda folder: ["--measured", str(measured(folder / "m", llama=None))], "differ in llama; measure again"),
    (lambda folder: ["--measured", str(measured(folder / "m", gone=1.0))], "differ in gone; measure again"),
    (lambda folder: ["--measured", str(folder / "page.md")], "not JSON lines with model_type and max_abs_diff"),
    (lambda folder: ["--update", str(folder / "page.md")], "page.md: no lines "),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_does_not_fit_is_named(argv, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "page.md").write_text("text\n")
    assert main(argv(tmp_path)) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert (tmp_path / "page.md").read_text() == "text\n"


def test_a_table_is_not_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--json", "--update", "README.md"])
    assert "--update writes a table" in capsys.readouterr().err
