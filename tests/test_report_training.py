"""mp-report on what training logs: sources, experts, data, adapters, skipped steps, marks, several runs, a picture."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, train, write

from megapatch.tools.report.report import main


def page(folder: Path, *more: str, **logs: list[dict[str, Any]]) -> str:
    """The page of these logs."""
    runs = [str(write(folder / f"{label}.jsonl", lines)) for label, lines in logs.items()]
    given = [word for label, path in zip(logs, runs, strict=True) for word in ("--log", f"{label}={path}")]
    assert main([*given, "--output", str(folder / "report.html"), *more]) == 0
    return (folder / "report.html").read_text()


def figure(html: str, title: str) -> str:
    """The part of a page that shows one chart."""
    return next(part for part in html.split("</figure>") if f"<h3>{title}</h3>" in part)


def test_losses_of_sources_have_their_chart(tmp_path: Path) -> None:
    """A colour a source; a source that a batch does not have leaves a gap, no number that is not finite."""
    lines = [
        train(1, 3.0, loss_of={"a/code": 4.0, "b/text": 2.0}),
        train(2, 2.5, loss_of={"b/text": 2.5}),
        {"event": "eval", "step": 2, "loss": 2.25, "split": "valid", "loss_of": {"a/code": 3.0, "b/text": 1.5}},
        train(3, 2.0, loss_of={"a/code": 2.5, "b/text": None}),
        {"event": "test", "step": 3, "loss": 2.125, "split": "test", "loss_of": {"a/code": 2.75}},
    ]
    html = page(tmp_path, run=lines)
    shown, made = figure(html, "Loss by source"), Page(html)
    assert made.row("run, code") == ["run, code", "4", "2.5", "2.5", "3"]
    assert made.row("run, code, valid") == ["run, code, valid", "3", "3", "3", "2"]
    assert made.row("run, test")[1] == "2.125" and made.row("run, code, test")[1] == "2.75"
    assert made.row("run, text") == ["run, text (1 not finite)", "2", "2.5", "2", "1"]
    assert made.row("run, text, valid") == ["run, text, valid", "1.5", "1.5", "1.5", "2"]
    plot = shown.split('class="plot"')[1]
    assert plot.count('class="hollow c0"') == 2 and plot.count('class="hollow c1"') == 1
    assert 'class="line c0"' in plot and 'class="line c1"' in plot


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    html = page(tmp_path, run=[train(1, 3.0, loss_of={"a/data": 4.0, "b/data": 2.0, "b/more": 1.0})])
    assert [Page(html).row(f"run, {name}")[1] for name in ("a/data", "b/data", "more")] == ["4", "2", "1"]


def test_experts_show_their_balance(tmp_path: Path) -> None:
    mixture = {"expert_tokens_mean": 32.0, "tokens_dropped": 0.0, "load_balancing_loss": 1.25, "router_z_loss": 7.5}
    html = page(tmp_path, run=[train(n, 2.0, expert_tokens_max=32.0 * n, **mixture) for n in (1, 2, 4)])
    rows = {title: Page(figure(html, title).split("</h3>")[1]).row("run") for title in TITLES}
    assert rows == TITLES


TITLES = {
    "Busiest expert, by the average": ["run", "1", "4", "1", "4", "2"],
    "Tokens dropped, of a step and all layers": ["run", "0", "0", "0", "0"],
    "Balancing loss of routers": ["run", "1.25", "1.25", "1.25", "1.25"],
    "z-loss of routers": ["run", "7.5", "7.5", "7.5", "7.5"],
}


def test_fine_tuning_shows_its_data_and_what_is_trained(tmp_path: Path) -> None:
    about = {"event": "data", "split": "training", "prefix": "data/chats", "conversations": 1200, "rows": 300}
    about |= {"tokens": 50_000, "trained_tokens": 20_000, "fill_percent": 97.5, "truncated": 12, "lost_tokens": 345}
    start = {"event": "start", "parameters": 1_000_000, "trained_parameters": 4096, "world_size": 2}
    lines = [start, about, train(1, 2.0, fill=0.975, trained_tokens=640), about, train(2, 1.5, fill=0.5)]
    made = Page(page(tmp_path, run=lines))
    assert ["run", "training", "data/chats", "1,200", "300", "50,000", "20,000", "97.5", "12", "345"] in made.rows
    assert sum("data/chats" in row for row in made.rows) == 1  # a resumed run tells it again
    assert any("1,000,000, 4,096 trained" in row for row in made.rows)
    assert ["run", "97.5", "50", "50", "73.75", "97.5"] in made.rows


def test_saves_resumes_and_skipped_steps_are_marked(tmp_path: Path) -> None:
    lines = [train(1, 3.0), {"event": "save", "step": 1}, train(2, None)]
    lines += [{"event": "bad_step", "step": 2, "what": "loss", "samples": []}, {"event": "samples", "step": 2}]
    lines += [{"event": "resume", "step": 2}, train(3, 2.0), {"event": "save", "step": 3}]
    html = page(tmp_path, run=lines)
    plot = figure(html, "Loss").split('class="plot"')[1]
    marks = re.findall(r'<line class="mark ([^"]*)"[^>]*><title>([^<]*)</title>', plot)
    assert marks == [
        ("c0 foot", "run saved step 1"),
        ("c0 foot", "run saved step 3"),
        ("c0", "run resumed at step 2"),
        ("skipped head", "run skipped step 2: loss not finite"),
    ]
    text = Page(html).text
    assert "run: steps skipped, for numbers that are not finite: 2 (loss)." in text
    assert {"resumed", "saved", "step skipped"} <= set(re.findall(r"</svg>([^<]*)</li>", figure(html, "Loss")))


def test_a_thousand_saves_are_a_mark_a_pixel(tmp_path: Path) -> None:
    saves = [{"event": "save", "step": step} for step in range(1, 20_001)]
    html = page(tmp_path, run=[train(1, 3.0), *saves, train(20_000, 2.0)])
    assert figure(html, "Loss").split('class="plot"')[1].count("saved step") < 980
    assert len(html) < 800_000


def test_runs_are_compared_on_the_same_axes(tmp_path: Path) -> None:
    """Named after their folders; what differs between them is told, and one axis holds both."""
    for name, lr in (("low", 1e-4), ("high", 1e-3)):
        (tmp_path / name).mkdir()
        start = {"event": "start", "config": {"lr": lr, "seed": 1}}
        write(tmp_path / name / "log.jsonl", [start, train(1, 3.0), train(10, 2.0 - 500 * lr)])
    assert main([str(tmp_path / "low"), str(tmp_path / "high"), "--output", str(tmp_path / "both.html")]) == 0
    html = (tmp_path / "both.html").read_text()
    made = Page(html)
    assert ["lr", "0.0001", "0.001"] in made.rows and not any(row[:1] == ["seed"] for row in made.rows[-40:-20])
    assert (made.row("low")[1:3], made.row("high")[1:3]) == (["3", "1.95"], ["3", "1.5"])
    plot = figure(html, "Loss").split('class="plot"')[1]
    assert plot.count("<svg") == 1
    ends = {
        c: re.search(rf'class="line {c}[^"]*"[^>]* d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', plot)
        for c in ("c0", "c1")
    }
    low, high = ([float(x) for x in found.groups()] for found in ends.values() if found)
    assert low[:3] == high[:3] and high[3] > low[3]  # the same start and the same last step; the lower loss lies lower


def test_memory_of_ranks_and_utilisation_have_charts(tmp_path: Path) -> None:
    ranks = {"memory_bytes": 2**29, "peak_memory_bytes_by_rank": [2**30, 2**31], "mfu": 0.25}
    html = page(tmp_path, run=[train(1, 3.0, **ranks), train(2, 2.0)])
    made = Page(html)
    assert made.row("run, held") == ["run, held", "0.5", "0.5", "0.5", "0.5"]
    assert made.row("run, peak of the largest rank")[1:] == ["2", "2", "2", "2"]
    assert "Values in %." in figure(html, "MFU")
    assert "Not in the logs" not in made.text


def test_offloading_shows_its_share_its_moves_and_the_time_it_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = {"event": "offload", "step": 2, "stage": 0, "fraction_before": 1.0, "fraction": 0.25}
    lines = [{"event": "offload", "step": 0, "reason": "start", "engine": "cpu", "fraction": 1.0}]
    lines += [train(1, 3.0, offload_fraction=1.0, offload_exposed_s=0.004), moved | {"reason": "room"}]
    lines += [train(2, 2.0, offload_fraction=0.25, offload_exposed_s=0.001)]
    lines += [moved | {"step": 3, "stage": 1, "reason": "out of memory", "fraction_before": 0.25, "fraction": 0.5}]
    html = page(tmp_path, run=lines)
    rows = {title: Page(figure(html, title).split("</h3>")[1]).row("run") for title in OFFLOADED}
    assert rows == OFFLOADED
    told = "step 2 (room: 100 % to 25 %), step 3 (out of memory, stage 1: 25 % to 50 %)."
    assert f"run: optimizer state moved, by its share in host memory: {told}" in Page(html).text
    assert "does not know" not in caplog.text


OFFLOADED = {
    "Optimizer state in host memory, rank 0": ["run", "100", "25", "25", "100"],
    "Optimizer step that hides behind nothing, rank 0": ["run", "4", "1", "1", "2.5", "4"],
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"loss_of": 3.0}, "'loss_of' is 3.0; expected dict"),
        ({"loss_of": {"a": "low"}}, "'loss_of a' is 'low'; expected a number or null"),
        ({"mfu": []}, "'mfu' is []; expected a number or null"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, line: dict, message: str) -> None:
    log = write(tmp_path / "log.jsonl", [train(1, 3.0, **line)])
    assert main([str(log), "--output", str(tmp_path / "report.html")]) == 1
    assert f"mp-report: error: {log}:1: {message}" in capsys.readouterr().err


def test_a_picture_is_one_file_of_all_charts(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [train(n, 3.0 / n, loss_of={"a": 3.0, "<b>": 2.0}) for n in range(1, 9)])
    assert main(["--log", f"run={log}", "--output", str(tmp_path / "curves.svg")]) == 0
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    charts = root.findall("{*}g/{*}svg")
    assert [chart.get("aria-label") for chart in charts][:2] == ["Loss by step", "Loss by source by step"]
    assert len(charts) == 8
    width, height = map(float, root.get("viewBox", "").split()[2:])
    places = [tuple(map(float, re.findall(r"[\d.]+", g.get("transform", "")))) for g in root.findall("{*}g")]
    assert len(set(places)) == len(places)  # none over another
    for (x, y), chart in zip(places, charts, strict=True):
        assert x + float(chart.get("width", "0")) <= width and y + float(chart.get("height", "0")) < height


def test_charts_are_chosen_by_field(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    html = page(tmp_path, "--charts", "lr", "loss", run=[train(1, 3.0), train(2, 2.0)])
    assert re.findall("<h3>([^<]*)</h3>", html) == ["Learning rate", "Loss"]
    log = str(write(tmp_path / "log.jsonl", [train(1, 3.0)]))
    for words, message in (
        ("speed", "--charts speed: no such chart; there are loss, loss_of, mtp_1_loss, "),
        ("mfu", "--charts mfu: not in the logs, so there is nothing to draw"),
    ):
        assert main([log, "--charts", words, "--output", str(tmp_path / "x.svg")]) == 1
        assert message in capsys.readouterr().err


def test_a_picture_of_checks_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--checks", "checks.jsonl", "--output", "x.svg"])
    assert stop.value.code == 2 and "a picture shows charts" in capsys.readouterr().err
