"""A report on disk: written anew while runs go on, as images, and by the command line."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from sapo.cli import main
from sapo.errors import ConfigError, StorageError
from sapo.report import make_report
from sapo.report.images import check_images, draw, write_images
from sapo.report.live import fingerprint, watch
from sapo.report.page import plotly_script, write_page
from sapo.report.runs import read_runs
from support.report_cases import ATTACKS, default_rows, settings, step_records, write_run, write_summary


def append(run: Path, *records: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records))


def watched(page: Path) -> bool:
    return '"watch":' in page.read_text().split('id="data">')[1].split("</script>")[0]


@pytest.mark.parametrize(
    ("number", "kind", "way_out"),
    [(errno.ENOSPC, StorageError, "make room"), (errno.EACCES, ConfigError, "choose another --out")],
)
def test_a_full_disk_is_no_mistake_of_a_name(
    number: int, kind: type[Exception], way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, content: str) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr("sapo.report.page.write_whole", refuse)
    monkeypatch.setattr("sapo.report.page.page_text", lambda *_: "")
    with pytest.raises(kind, match=rf"page\.html cannot be written: refused; {way_out}"):
        write_page(None, tmp_path / "page.html")


def test_watching_writes_when_something_is_new_and_ends_with_the_run(tmp_path: Path) -> None:
    records = step_records(4)
    run = write_run(tmp_path / "a", records=[r for r in records if r["step"] <= 2], finished=False)
    page, told = tmp_path / "report.html", []
    waits = 0

    def wait(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 8:  # nothing was new until here
            assert len(told) == 1
            assert watched(page)
            append(run, *(r for r in records if r["step"] == 3))
        elif len(told) == 2 and not (run / "summary.json").exists():
            assert watched(page)
            append(run, *(r for r in records if r["step"] == 4))
            write_summary(run, 4)
        assert waits < 1000

    last = watch([run], page, tokens=None, should_stop=lambda: False, on_report=told.append, wait=wait)
    assert [r.lines[0].steps for r in told] == [2, 3, 4]
    assert last.finished
    assert not watched(page), "the last page reloads itself no more"


def test_watching_ends_with_a_run_that_its_own_rule_ended(tmp_path: Path) -> None:
    records = [r for r in step_records(4) if r["step"] <= 2]
    config = settings()
    config["train"]["stop_when"] = {"metric": "pass@1", "reaches": 0.3, "patience": None}
    run = write_run(tmp_path / "a", config=config, records=records, finished=False)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        write_summary(run, 2, ended_early="pass@1 0.300 has reached 0.3")
        assert len(waits) < 100, "the page waits for steps that will not come"

    last = watch([run], tmp_path / "report.html", tokens=None, should_stop=lambda: False, wait=wait)
    assert waits
    assert last.finished
    assert [(line.state, line.steps) for line in last.lines] == [("done", 2)]
    assert [run.ended for run in read_runs([run])] == [True]
    append(run, *(r for r in step_records(4) if r["step"] == 3))
    assert not make_report([run]).finished, "a resume has taken it further"


def test_asked_to_stop_it_writes_a_last_page_that_rests(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False)
    page, asked = tmp_path / "report.html", []
    watch([run], page, tokens=None, should_stop=lambda: bool(asked), wait=asked.append)
    assert not watched(page)


def test_a_comparison_is_over_when_its_last_run_has_ended_a_broken_one_too(tmp_path: Path) -> None:
    plan = {"arms": {"a": {}, "b": {}}, "learning_rates": [1e-4], "seeds": [0]}
    (tmp_path / "comparison.yaml").write_text(json.dumps(plan))
    write_run(tmp_path / "runs" / "a-lr1e-4-seed0")
    assert not make_report([tmp_path]).finished, "the second run has not begun"
    begun = write_run(tmp_path / "runs" / "b-lr1e-4-seed0", finished=False)
    assert not make_report([tmp_path]).finished
    before = fingerprint([tmp_path])
    (begun / "failure.json").write_text(json.dumps({"reason": "step 2: the loss is nan"}))
    assert fingerprint([tmp_path]) != before
    assert make_report([tmp_path]).finished


def test_a_run_that_appears_in_a_watched_directory_is_something_new(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    before = fingerprint([tmp_path])
    assert fingerprint([tmp_path]) == before
    write_run(tmp_path / "b", config=settings(1))
    assert fingerprint([tmp_path]) != before


def test_images_are_written_of_what_was_measured_and_are_the_same_each_time(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "$a_{b}$ <x>", config=settings(0))
    write_run(tmp_path / "runs" / "_b", config=settings(0, tau_neg=2.0), records=step_records(4, 0.1))
    report = make_report([tmp_path / "runs"])
    figures = [*report.story, *report.paper]
    written = write_images(figures, tmp_path / "png")
    measured = {f.key for f in figures if not f.missing}
    assert {"reward", "pass1", "ratios", "fig1", "fig3", "fig5"} <= measured
    assert {f.name for f in written} == {f"{k}.{end}" for k in measured for end in ("png", "pdf", "csv")}
    for key in measured:
        image = Image.open(tmp_path / "png" / f"{key}.png").convert("L")
        assert image.width > 600
        assert image.getextrema()[0] < 100 < image.getextrema()[1], "something is drawn"
        assert (tmp_path / "png" / f"{key}.pdf").read_bytes().startswith(b"%PDF")
    first = {f.name: f.read_bytes() for f in written}
    write_images(figures[:2], tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == first[file.name]


def test_an_image_has_the_outline_of_a_histogram_as_the_page_has_it(tmp_path: Path) -> None:
    report = make_report([write_run(tmp_path / "a")])
    [figure] = [f for f in report.story if f.key == "ratios"]
    drawn = draw(figure).axes[0].sapo_traces
    for trace, line in zip(figure.panels[0].traces, drawn, strict=True):
        assert line.get_drawstyle() == "default"
        assert [*line.get_xdata()] == [*trace.x]
        assert [None if y != y else y for y in line.get_ydata()] == [*trace.y]


def test_one_step_is_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", rollouts={4: default_rows()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sapo", "report", "a"])
    with pytest.raises(SystemExit):
        main()
    assert "1 step token by token" in capsys.readouterr().out


def test_no_text_of_a_run_ends_the_element_it_stands_in(tmp_path: Path) -> None:
    warning = {"kind": "warning", "step": 1, "text": ATTACKS[0]}
    run = write_run(tmp_path / "a", records=[*step_records(4), warning])
    page = write_page(make_report([run]), tmp_path / "report.html").read_text()
    assert ATTACKS[0] not in page
    assert page.count("<script") == page.count("</script>") == 5 + 2  # data, four scripts, two chunks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no run directory at nothing"),
        (["empty"], "neither a run nor a directory of runs"),
        (["a", "--out", "empty"], "--out must be a file; got the directory empty"),
        (["a", "--out", "a/config.yaml/report.html"], "cannot be written"),
        (["a", "--tokens", "-1"], "Invalid value for '--tokens'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments, message: str
) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sapo", "report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_the_command_says_what_it_wrote_and_what_no_run_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "\x1b[31mred", config=settings(0))
    write_run(tmp_path / "b", config=settings(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sapo", "report", ".", "--png", "png", "-o", "out/page.html"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "SAPO, 2 seeds: 4 steps; held-out pass@1 0.250 → 0.350" in said
    assert "not measured: " in said
    assert "Fig. 6: by task" in said
    assert "wrote out/page.html" in said
    assert (tmp_path / "out" / "page.html").is_file()
    assert (tmp_path / "png" / "reward.pdf").is_file()
    assert "\x1b" not in said


@pytest.mark.parametrize(("missing", "needs"), [("plotly.offline", "plotly"), ("matplotlib", "matplotlib")])
def test_a_missing_library_is_said_with_a_command_that_adds_it(
    missing: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"not installed; pip install {needs}$"):
        plotly_script() if needs == "plotly" else check_images()
