"""mp-report: one HTML page from the trainer's log, checks and pipeline steps."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from megapatch.models import svg
from megapatch.tools.report.report import main

VOID = {"meta", "rect", "circle", "br"}


class Page(HTMLParser):
    """Collects tables and text, and refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, head: str, nth: int = 0) -> list[str]:
        return [row for row in self.rows if row and row[0].startswith(head)][nth]


def train(step, loss, **more):
    line = {"event": "train", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.5, "step_s": 0.25}
    line |= {"tokens_per_s": 4096.0, "tflops": 0.5, "consumed_samples": 8 * step, "peak_memory_bytes": 2**30}
    return line | {"ts": 1.75e9 + step} | more


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make(tmp_path):
    """Run mp-report on logs (label -> lines), checks and steps; returns its exit status and the page."""

    def made(logs=None, checks=None, steps=None, more=()):
        argv = ["--output", str(tmp_path / "report.html"), *more]
        for label, lines in (logs or {}).items():
            argv += ["--log", f"{label}={write(tmp_path / f'{len(argv)}.jsonl', lines)}"]
        for name, lines in (("checks", checks), ("steps", steps)):
            if lines is not None:
                argv += [f"--{name}", str(write(tmp_path / f"{name}.jsonl", lines))]
        status = main(argv)
        return status, (tmp_path / "report.html").read_text()

    return made


def test_captions_hold_the_values_of_the_log(make):
    losses = [10.5, 8.25, 6.125, 7.0625]
    times = [2.0, 0.25, 0.5, 0.75]
    lines = [train(i + 1, x, step_s=times[i], tokens_per_s=1000.0 * (i + 1)) for i, x in enumerate(losses)]
    lines.insert(2, {"event": "eval", "step": 2, "loss": 9.125, "split": "valid"})
    status, html = make({"run": [{"event": "start", "world_size": 4, "parameters": 12345678, "config": {}}, *lines]})
    page = Page(html)
    assert status == 0
    assert page.row("run") == ["run", "10.5", "7.0625", "6.125", "3"]  # first, last, min, its step
    assert page.row("run, valid") == ["run, valid", "9.125", "9.125", "9.125", "2"]
    assert page.row("run", 2) == ["run", "1,000", "4,000", "1,000", "2,500"]  # with median
    assert page.row("run", 4) == ["run", "2,000", "750", "250", "625", "2,000", "2,000"]  # ms: median, p95, max
    assert page.row("run", 5) == ["run", "1", "1", "1", "1"]
    assert "Values in GiB." in page.text
    assert {"12,345,678", "4", "1\xa0to\xa04", "32"} <= set(page.row("run", 9))


def test_page_fetches_nothing_and_has_no_script(make):
    _, html = make({"a": [train(1, 3.0), train(2, 2.0)]}, [{"check": "x", "ok": True}], [{"step": "s", "seconds": 1}])
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|javascript:", html)
    tags = Page(html).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not {"src", "href", "onload", "onclick"} & {name for _, attributes in tags for name in attributes}


def test_hostile_strings_are_escaped(make):
    evil = "</title></style><script>alert(1)</script>\"'&<img src=http://x onerror=y>\ud800"
    start = {"event": "start", "config": {evil: [evil]}, "world_size": 1, "parameters": 5, "resumed_from": 1}
    log = [start, train(1, 2.0), {"event": "eval", "step": 1, "loss": 2.0, "split": evil}]
    checks = [{"check": evil, "ok": False, "found": evil, "expected": {evil: evil}, "detail": evil}]
    steps = [{"step": evil, "seconds": 1.5, "command": evil}]
    label = evil.replace("=", "").replace("\ud800", "")
    status, html = make({label: log}, checks, steps, ["--title", label])
    page = Page(html)
    assert status == 1
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") >= 12


@pytest.mark.parametrize(
    ("oks", "status", "banner"),
    [
        ([True, True, True], 0, "✓ All 3 checks hold"),
        ([True], 0, "✓ The check holds"),
        ([True, False, False], 1, "✗ 2 of 3 checks FAILEDcheck 1; check 2"),
        ([False], 1, "✗ 1 of 1 check FAILED"),
    ],
)
def test_failed_check_is_told_at_the_top_and_by_the_exit_status(make, capsys, oks, status, banner):
    found, html = make(checks=[{"check": f"check {i}", "ok": ok, "found": i} for i, ok in enumerate(oks)])
    page = Page(html)
    assert found == status
    assert banner in page.text
    assert [row[0] for row in page.rows[1:]] == ["✓ holds" if ok else "✗ FAILED" for ok in oks]
    assert capsys.readouterr().err.count("check failed: check ") == oks.count(False)


def test_values_that_are_not_finite_are_gaps_and_counted(make):
    losses = [4.0, 3.0, math.nan, 2.0, 1.0, math.inf, None, 1.5]
    _, html = make({"run": [train(i + 1, loss) for i, loss in enumerate(losses)]})
    assert Page(html).row("run") == ["run (3 not finite)", "4", "1.5", "1", "5"]
    figure = html.split("</figure>")[0]
    assert figure.count("<path") == 2  # 4, 3 and 2, 1; the last stands alone
    assert figure.count("<circle") == 5


@pytest.mark.parametrize("lines", [[], [{"event": "start", "config": {}}], [train(1, None)]])
def test_log_without_points_gives_a_page_that_says_so(make, lines):
    status, html = make({"run": lines})
    assert status == 0
    assert "no finite values to show" in Page(html).text


def test_one_point_is_drawn(make):
    _, html = make({"run": [train(7, 2.5)]})
    assert Page(html).row("run") == ["run", "2.5", "2.5", "2.5", "7"]
    figure = html.split("</figure>")[0]
    assert figure.count("<circle") == 1
    assert ">7</text>" in figure


def test_resumed_run_shows_where_and_whether_its_losses_repeat(make):
    before = [{"event": "start"}, *(train(i, 10.0 / i) for i in range(1, 6))]
    after = [{"event": "start", "resumed_from": 3}, {"event": "resume", "step": 3}]
    same = [*before, *after, *(train(i, 10.0 / i) for i in range(4, 9))]
    other = [*before, *after, *(train(i, 10.0 / i + 0.5) for i in range(4, 9))]
    _, html = make({"same": same, "other": other})
    text = Page(html).text
    assert "same: resumed at step 3 (dashed line); 2 steps were run twice, with equal losses." in text
    assert "other: resumed at step 3 (dashed line); 2 steps were run twice, their losses differ by up to 0.5." in text
    assert html.split("</figure>")[0].count('<line class="mark c0"') == 1


def test_ten_thousand_points_stay_small_and_keep_the_spike(make):
    lines = [train(i, 50.0 if i == 6789 else 2.0 + i % 7 / 100) for i in range(1, 10_001)]
    _, html = make({"run": lines})
    assert len(html) < 200_000
    figure = html.split("</figure>")[0]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", figure.split('<path class="line c0')[1])]
    assert len(heights) < 4 * 980
    assert min(heights) == 30.0  # the top of the plot
    assert Page(html).row("run")[1:4] == ["2.01", "2.04", "2"]


def test_outlier_step_does_not_flatten_the_step_times(make):
    _, html = make({"run": [train(i, 2.0, step_s=30.0 if i == 1 else 0.5) for i in range(1, 101)]})
    figure = next(part for part in html.split("</figure>") if "Step time" in part)
    assert "▲ marks steps that took longer than the axis is high." in figure
    assert Page(html).row("run", 3)[-1] == "30,000"
    assert ">2,000</text>" in figure
    assert ">30,000</text>" not in figure


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (2.3, 10.8, ["2", "4", "6", "8", "10", "12"]),
        (0, 3e-4, ["0", "1e-4", "2e-4", "3e-4"]),
        (0, 0.19, ["0", "0.05", "0.10", "0.15", "0.20"]),
        (0, 41_000, ["0", "10,000", "20,000", "30,000", "40,000", "50,000"]),
        (1_000_000, 2_400_000, ["1.0M", "1.5M", "2.0M", "2.5M"]),
        (0, 0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (5, 5, ["4.7", "4.8", "4.9", "5.0", "5.1", "5.2", "5.3"]),
        (-3, 1, ["-3", "-2", "-1", "0", "1"]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, labels):
    ticks = svg.nice_ticks(low, high, 5)
    assert svg.tick_labels(ticks) == labels
    assert ticks[0] <= low <= high <= ticks[-1]


@pytest.mark.parametrize("values", [[1e99, -1e99], [1e-300, 2e-300], [1.0, 1.0 + 1e-15], [-5.0, -5.0], [1e308, 1.0]])
def test_extreme_values_stay_inside_the_frame(values):
    picture = svg.draw(svg.Chart("t", "u", [svg.Line("a", [1, 2], values, "c0")]))
    numbers = [float(n) for n in re.findall(r'(?:cx|cy|x1|y1|x2|y2)="([^"]+)"', picture)]
    assert numbers
    assert all(0 <= n <= 480 for n in numbers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"event": "train", "step": 2, "lo', "not JSON (Unterminated string"),
        ("[1]", "list found; expected one JSON object a line"),
        ('{"step": 2}', "no 'event'; found 'step'"),
        ('{"event": "train", "loss": 2}', "no 'step'; found 'event', 'loss'"),
        ('{"event": "train", "step": 1.5, "loss": 2}', "'step' is 1.5; expected int"),
        ('{"event": "train", "step": true, "loss": 2}', "'step' is True; expected int"),
        ('{"event": "eval", "step": 1, "loss": "low"}', "'loss' is 'low'; expected a number or null"),
        ('{"event": "train", "step": 1, "loss": 1, "lr": []}', "'lr' is []; expected a number or null"),
        ("[" * 100_000, "not JSON ("),
        ("\xff\xfe", "not JSON ("),
    ],
)
def test_bad_line_is_named_and_nothing_is_written(tmp_path, capsys, text, message):
    log = tmp_path / "log.jsonl"
    log.write_bytes(json.dumps(train(1, 3.0)).encode() + b"\n\n" + text.encode("latin-1") + b"\n")
    assert main(["--log", f"run={log}", "--output", str(tmp_path / "report.html")]) == 1
    error = capsys.readouterr().err
    assert f"mp-report: error: {log}:3: {message}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("flag", "line", "message"),
    [
        ("--checks", {"check": "x"}, ":1: no 'ok'; found 'check'"),
        ("--checks", {"check": "x", "ok": 1}, ":1: 'ok' is 1; expected bool"),
        ("--checks", None, ": no checks in it; expected lines such as"),
        ("--steps", {"step": "x", "seconds": "1"}, ":1: 'seconds' is '1'; expected int or float"),
        (
            "--steps",
            {"step": "x", "seconds": math.nan},
            ":1: 'seconds' is nan; expected a number of seconds, 0 or more",
        ),
    ],
)
def test_bad_checks_and_steps_are_named(tmp_path, capsys, flag, line, message):
    path = write(tmp_path / "x.jsonl", [line] if line else [])
    assert main([flag, str(path), "--output", str(tmp_path / "report.html")]) == 1
    assert f"error: {path}{message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to report; give a RUN, --log, --checks or --steps"),
        (["--log", "file.jsonl"], "--log 'file.jsonl': expected LABEL=FILE"),
        (["--log", "a=x", "--log", "a=y"], "label 'a' is given twice"),
    ],
)
def test_wrong_usage_is_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_log_is_one_line(tmp_path, capsys):
    assert main(["--log", f"a={tmp_path}/none.jsonl", "--output", str(tmp_path / "r.html")]) == 1
    assert capsys.readouterr().err == f"mp-report: error: {tmp_path}/none.jsonl: No such file or directory\n"


def test_steps_show_their_share_of_the_total(make):
    steps = [
        {"step": "preprocess", "seconds": 1.5, "command": "mp-preprocess --x"},
        {"step": "pretrain", "seconds": 4.5},
    ]
    page = Page(make(steps=steps)[1])
    assert page.rows == [
        ["step", "seconds", "share", "command"],
        ["preprocess", "1.50", "", "mp-preprocess --x"],
        ["pretrain", "4.50", "", ""],
        ["total", "6.00", "", ""],
    ]
    assert [a["width"] for tag, a in page.tags if tag == "rect" and "class" not in a] == ["25.0", "75.0"]


def test_unknown_events_are_not_shown_and_said(make, capsys):
    status, _ = make({"run": [train(1, 2.0), {"event": "profile"}, {"event": "profile"}]})
    assert status == 0
    assert "2 lines with events that mp-report does not know are not shown" in capsys.readouterr().err


def test_fields_no_log_has_are_listed(make):
    page = Page(make({"run": [{"event": "train", "step": 1, "loss": 2.0, "step_s": 1.0}]})[1])
    assert "Not in the logs: Throughput; Model TFLOP/s, all ranks; Peak memory" in page.text


def test_same_input_gives_the_same_bytes_on_stdout(tmp_path, capfdbinary):
    log = write(tmp_path / "log.jsonl", [train(1, 2.0), train(2, 1.0)])
    pages = []
    for _ in range(2):
        assert main(["--log", f"run={log}", "--output", "-"]) == 0
        pages.append(capfdbinary.readouterr().out)
    assert pages[0] == pages[1]
    Page(pages[0].decode())
