"""`sapo watch`: what a run says of itself while it goes on, and the page that takes it in place."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from sapo.cli import main
from sapo.config.recipes import load_recipe
from sapo.data import Completion, Group, Observation, Prompt, Score
from sapo.report import served
from sapo.report.assemble import make_report
from sapo.report.served import KEPT, Watch, application, refusal, run_state
from sapo.run.live import MOST_CHARACTERS, LiveFile
from sapo.utils.text import visible
from sapo.workflows.serving.web import Guard, bound
from sapo.workflows.train import train
from support.browser import CHROMIUM, MISSING
from support.report_cases import ATTACKS, default_rows, settings, step_records, write_run, write_summary
from support.runs import write_recipe
from support.served import in_a_thread

PATIENCE = 120.0
"""Seconds; a limit for a hung server, not a measurement."""


@contextmanager
def watched(*runs: Path) -> Iterator[tuple[str, Watch]]:
    with bound("127.0.0.1", 0) as (taken, address):
        watch = Watch(runs, None)
        app = Guard(application(watch), address, refusal)
        watch.start()
        with in_a_thread(app, taken, watch.close):
            yield address.url, watch


def live(run: Path, **changes) -> None:
    own = psutil.Process()
    state = {"host": socket.gethostname(), "pid": own.pid, "started": own.create_time(), "since": time.time()}
    state |= {"step": 3, "phase": "generate", "samples": []}
    (run / "live.json").write_text(json.dumps(state | changes))


def sample(text: str, reward: float = 1.0) -> dict:
    shown = {"task": "t", "prompt": "1+1=", "text": text, "cut": False, "tokens": 2, "reward": reward}
    return {**shown, "rewards": [reward, 0.0], "status": "scored"}


def append(run: Path, *records: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records))


def test_a_run_says_what_it_is_doing_and_what_it_sampled_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[dict] = []
    write = LiveFile._write

    def watching(self: LiveFile, **changes) -> None:
        write(self, **changes)
        seen.append(json.loads(self._file.read_text()))

    monkeypatch.setattr(LiveFile, "_write", watching)
    run = train(load_recipe(write_recipe(tmp_path))).directory
    steps = len([r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "step"])
    assert {s["step"] for s in seen} == set(range(steps + 1))
    assert {"generate", "score", "update", "evaluate"} <= {s["phase"] for s in seen}
    assert all(s["pid"] == os.getpid() for s in seen)
    rows = [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    [shown, *_] = [s["samples"] for s in seen if s["samples"]]
    assert shown[0]["text"] == rows[0]["text"]
    assert shown[0]["reward"] == rows[0]["reward"]
    assert 1 <= len(shown) <= 4
    assert not list(run.glob("*live*")), "it goes when the run ends"
    figures = dict(run_state(run, "a")["figures"])
    assert {"mean reward", "entropy", "mean length"} <= set(figures), "every figure that a real step has"


def test_a_run_goes_on_where_live_json_cannot_be_written(tmp_path: Path) -> None:
    made = LiveFile(tmp_path / "nowhere")
    made.begin_step(1)
    made.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_transcript_that_is_cut_says_so_wherever_the_cut_falls(tmp_path: Path) -> None:
    def shown(*said: int, last: int = 1) -> list[list[str]]:
        """Return the transcript of turns of a character, texts of so many between them, and the last turn."""
        observations = [Observation(at, (5,), "1" * length) for at, length in enumerate(said, 1)]
        drawn = len(said) + last
        episode = Completion((7,) * drawn, (-0.1,) * drawn, "stop", "7", Score(1.0), observations=tuple(observations))
        LiveFile(tmp_path, lambda ids: "7" * len(ids)).show([Group(Prompt(0, "t", "?", (1,)), (episode,))])
        found: list[list[str]] = json.loads((tmp_path / "live.json").read_text())["samples"][0]["transcript"]
        return found

    rest = ["history", "the rest is not shown"]
    assert shown(5) == [["policy", "7"], ["environment", "1" * 5], ["policy", "7"]]
    assert shown(5, last=5000)[-2:] == [["policy", "7" * (MOST_CHARACTERS - 6)], rest]
    assert shown(5000) == [["policy", "7"], ["environment", "1" * (MOST_CHARACTERS - 1)], rest]
    assert shown(MOST_CHARACTERS - 1) == [["policy", "7"], ["environment", "1" * (MOST_CHARACTERS - 1)], rest]
    assert shown(MOST_CHARACTERS - 2)[-1] == ["policy", "7"], "it fits to the last character"


def test_states_of_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False)
    assert run_state(run, "a")["state"] == "stopped"
    live(run, samples=[sample("\x1b[2J")])
    found = run_state(run, "a")
    assert (found["state"], found["steps"], found["planned"]) == ("running", 4, 4)
    assert found["live"]["samples"][0]["text"] == "\\x1b[2J"
    last = [r for r in step_records(4) if r["kind"] == "step"][-1]
    assert last["reward/mean"] in [value for _, value in found["figures"]]
    # Its process has gone, or its number is another's by now; on another machine its age tells.
    for changes, state in (
        ({"pid": 2**22 + 1}, "stopped"),
        ({"started": 1.0}, "stopped"),
        ({"host": "another"}, "running"),
        ({"host": "another", "since": time.time() - 7200}, "stopped"),
    ):
        live(run, **changes)
        assert run_state(run, "a")["state"] == state, changes
    live(run, pid=2**22 + 1)
    (run / "failure.json").write_text(json.dumps({"reason": "step 2: the loss is nan"}))
    assert (run_state(run, "a")["state"], run_state(run, "a")["reason"]) == ("failed", "step 2: the loss is nan")
    for odd in ("{", "[]", '{"pid": true}'):
        (run / "live.json").write_text(odd)
        assert run_state(run, "a")["live"] is None
    write_summary(run, 4)
    assert run_state(run, "a")["state"] == "done"


def test_a_run_that_its_own_rule_ended_is_done_until_a_resume_goes_on_without_it(tmp_path: Path) -> None:
    config = settings(steps=8)
    config["train"]["stop_when"] = {"metric": "pass@1", "reaches": 0.3, "patience": None}
    run = write_run(tmp_path / "a", config=config, records=step_records(4), finished=False)
    write_summary(run, 4, ended_early="pass@1 0.350 has reached 0.3")
    found = run_state(run, "a")
    assert (found["state"], found["steps"], found["planned"]) == ("done", 4, 8)
    config["train"]["stop_when"] = None  # as `sapo resume RUN train.stop_when=null` writes it
    (run / "config.yaml").write_text(json.dumps(config))
    assert run_state(run, "a")["state"] == "stopped"


def test_the_last_step_is_found_in_a_file_longer_than_what_is_read_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False)
    last = run_state(run, "a")["figures"]
    append(run, *({"kind": "distribution", "step": 5, "x": "y" * 9000} for _ in range(20)))
    assert run_state(run, "a")["figures"] == last


def test_it_serves_the_report_and_nothing_else_and_takes_no_orders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False, rollouts={2: default_rows()})
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    with watched(tmp_path) as (url, watch), httpx.Client(base_url=url, timeout=60) as client:
        page = client.get("/").text
        assert "connect-src &#x27;self&#x27;" in page
        assert client.get("/report.json").json()["served"] == watch.version
        assert client.get(f"/chunks/{watch.version}/0").text == watch.report.tokens.chunks[0].data
        for path in (
            "/chunks/99/0",
            f"/chunks/{watch.version}/7",
            f"/chunks/{watch.version + 1}/0",
            "/a/config.yaml",
            "/../a/metrics.jsonl",
        ):
            assert client.get(path).status_code == 404
        for method in ("POST", "PUT", "DELETE"):
            assert client.request(method, "/").status_code == 405
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        with client.stream("GET", "/events?report=0") as response:
            lines = (line for line in response.iter_lines() if line)
            assert [next(lines) for _ in range(2)].index("event: live") == 0
            assert [next(lines) for _ in range(2)] == ["event: report", f"data: {watch.version}"]
            live(run, phase="update")
            assert next(lines) == "event: live"
            [state] = json.loads(next(lines).removeprefix("data: "))["runs"]
            assert state["live"]["phase"] == "update"
    (run / "live.json").unlink()
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")}.keys() == before.keys()
    assert all(f.stat().st_mtime_ns == at for f, at in before.items() if f.is_file())


def test_a_page_that_is_paused_may_ask_for_tokens_of_the_last_reports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False, rollouts={2: default_rows()})
    watch = Watch([run], None)
    first, old = watch.version, watch.report.tokens.chunks[0].data
    rows = "".join(json.dumps({**row, "text": "another"}) + "\n" for row in default_rows())
    (run / "rollouts" / "step-000002.jsonl").write_text(rows)
    other = make_report([run], tokens=None)
    new = other.tokens.chunks[0].data
    assert old != new
    for later in range(1, KEPT):
        watch._take(first + later, other)
        assert (watch.chunk(first, 0), watch.chunk(first + later, 0)) == (old, new)
    assert watch.chunk(first + KEPT - 1, 0) is watch.chunk(first + 1, 0), "what did not change is held once"
    watch._take(first + KEPT, other)
    assert watch.chunk(first, 0) is None
    assert (watch.chunk(first + 1, 0), watch.version) == (new, first + KEPT)


def test_two_servers_give_no_version_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    before = Watch([run], None).version
    assert Watch([run], None).version > before


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, with a limit for a hung process."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_runs_that_stay_unreadable_are_said_once_and_so_is_their_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(served, "LASTING", 0.1)
    run = write_run(tmp_path / "a", finished=False)
    said: list[str] = []
    watch = Watch([run], None, on_trouble=said.append)
    assert watch.news["trouble"] is None
    watch.start()
    try:
        run.rename(tmp_path / "moved")
        until(lambda: len(said) == 1)
        assert str(run) in said[0]
        assert watch.news["trouble"] == said[0]
        assert len(watch.news["runs"]) == 1, "what was known is still shown"
        version = watch.news_version
        time.sleep(0.3)
        assert (len(said), watch.news_version) == (1, version), "it is said once"
        (tmp_path / "moved").rename(run)
        until(lambda: len(said) == 2)
        assert said[1] == "the runs can be read again"
        assert watch.news["trouble"] is None
    finally:
        watch.close()


def test_a_file_that_is_whole_at_the_next_look_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LOOK_EVERY", 0.02)
    failures = iter([OSError("half written")] * 3)
    reading = served.fingerprint
    run = write_run(tmp_path / "a", finished=False)
    said: list[str] = []
    watch = Watch([run], None, on_trouble=said.append)
    looks: list[int] = []

    def sometimes(paths: list[Path]) -> object:
        looks.append(1)
        if (failure := next(failures, None)) is not None:
            raise failure
        return reading(paths)

    monkeypatch.setattr(served, "fingerprint", sometimes)
    watch.start()
    until(lambda: len(looks) > 5)
    watch.close()
    assert said == []


@pytest.mark.parametrize(("part", "rest"), [("find_runs", 1e12), ("fingerprint", 0.0)])
def test_failures_with_good_looks_between_them_are_no_trouble(
    part: str, rest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(served, "LASTING", 0.05)
    monkeypatch.setattr(served, "REST", rest)  # the report is renewed once, or all the time
    reading, run = getattr(served, part), write_run(tmp_path / "a", finished=False)
    said: list[str] = []
    watch = Watch([run], None, on_trouble=said.append)
    good, failed = [0], [0.0]

    def sometimes(paths: list[Path]) -> object:
        if good[-1] >= 2 and time.monotonic() - failed[-1] > 0.1:
            good.append(0)
            failed.append(time.monotonic())
            raise OSError("half written")
        good[-1] += 1
        return reading(paths)

    monkeypatch.setattr(served, part, sometimes)
    watch.start()
    until(lambda: len(failed) == 4 and good[-1] > 1)
    watch.close()
    assert said == []


def test_a_fault_that_ends_the_watch_is_shown_on_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LOOK_EVERY", 0.02)
    raised: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda event: raised.append(event.exc_type))
    watch = Watch([write_run(tmp_path / "a", finished=False)], None)

    def broken(paths: list[Path]) -> object:
        raise RuntimeError("a fault")

    monkeypatch.setattr(served, "fingerprint", broken)
    watch.start()
    until(lambda: raised == [RuntimeError])
    watch.close()
    assert "a fault of sapo" in watch.news["trouble"]


def test_the_command_watches_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a")
    printed: list[str] = []
    monkeypatch.setattr("sapo.cli.watch.say", printed.append)

    def visit() -> None:
        deadline = time.monotonic() + PATIENCE
        while not printed and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            printed.append(str(httpx.get(printed[0].split(" at ")[1].split(";")[0], timeout=60).status_code))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    monkeypatch.setattr(sys, "argv", ["sapo", "watch", str(run), "--port", "0"])
    with pytest.raises(SystemExit) as end:
        main()
    visitor.join(PATIENCE)
    assert not end.value.code
    assert printed[1:] == ["200", f"next: sapo report {run}"]


def test_a_token_of_the_users_is_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a")
    printed: list[str] = []
    monkeypatch.setattr("sapo.cli.watch.say", printed.append)

    def ready_at_once(app: object, taken: object, *, on_ready, **ends: object) -> None:
        on_ready()

    monkeypatch.setattr("sapo.workflows.serving.web.serve", ready_at_once)
    monkeypatch.setenv("SAPO_SERVER_TOKEN", "secret-of-mine")
    monkeypatch.setattr(sys, "argv", ["sapo", "watch", str(run), "--port", "0"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "/?token=$SAPO_SERVER_TOKEN;" in printed[0]
    assert "secret" not in " ".join(printed)


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_page_rests_between_failures_and_says_what_it_cannot_show(
    tmp_path: Path, browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.report_page import Visit, texts, wait

    monkeypatch.setattr(served, "LASTING", 0.0)
    records = step_records(4)
    run = write_run(
        tmp_path / "a",
        records=[r for r in records if r["step"] <= 3],
        finished=False,
        rollouts={2: default_rows(), 3: default_rows()},
    )
    visit = Visit(browser)
    with watched(run) as (url, watch):
        page = visit.page
        page.goto(url)
        page.evaluate("sapoReport.tokens.ready")
        wait(page, "document.querySelectorAll('#token-view .tok').length > 0")
        page.evaluate(
            "window.asked = {report: 0, chunks: 0}; window.broken = true; const real = window.fetch;"
            "window.fetch = (path) => {"
            " asked[path === 'report.json' ? 'report' : 'chunks'] += 1;"
            " return broken ? Promise.resolve(new Response('gone', {status: 503})) : real(path); }; 0"
        )
        # What cannot be had is said, and asked for again where it is chosen again.
        for times in (1, 2):
            page.select_option("#token-step", "2")
            wait(page, f"asked.chunks === {times}")
            wait(page, "document.querySelector('#token-view .count').textContent.includes('gone')")
            assert texts(page, "#token-view .tok") == []
            page.select_option("#token-color", "w")
            page.select_option("#token-order", "reward")
            page.select_option("#token-step", "3")
            wait(page, "document.querySelectorAll('#token-view .tok').length > 0")
        # A report that cannot be had is asked for after a rest, and taken when it can.
        before = watch.version
        append(run, *(r for r in records if r["step"] > 3))
        wait(page, "asked.report > 0")
        page.wait_for_timeout(1000)
        assert page.evaluate("asked.report") <= 2
        page.evaluate("window.broken = false")
        wait(page, f"sapoReport.data.served > {before}")
        page.select_option("#token-step", "2")
        wait(page, "document.querySelectorAll('#token-view .tok').length > 0")
        assert page.evaluate("document.querySelector('#live').textContent").startswith("live")
        assert page.evaluate("document.querySelector('#trouble').hidden")
        run.rename(tmp_path / "moved")
        wait(page, "document.querySelector('#live').textContent.startsWith('cannot read the runs')")
        assert str(run) in page.evaluate("document.querySelector('#trouble').innerText")
        (tmp_path / "moved").rename(run)
        wait(page, "document.querySelector('#live').textContent.startsWith('live')")
        assert page.evaluate("document.querySelector('#trouble').hidden")
        assert visit.complaints == []
        page.close()


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_page_takes_news_in_place_and_keeps_what_was_chosen(tmp_path: Path, browser) -> None:
    from support.report_page import Visit, texts, wait

    records = step_records(4)
    run = write_run(
        tmp_path / "a",
        records=[r for r in records if r["step"] <= 2],
        finished=False,
        rollouts={2: default_rows()},
    )
    other = write_run(tmp_path / ATTACKS[1].replace("/", ""), config=settings(1))
    visit = Visit(browser)
    with watched(run, other) as (url, _):
        page = visit.page
        page.goto(url)
        wait(page, "document.querySelectorAll('.going').length === 2")
        page.evaluate("sapoReport.tokens.ready")
        page.evaluate("sapoReport.drawAll()")
        page.evaluate("window.mark = 1")  # a reload would lose it
        assert texts(page, ".going .state") == ["not running", "done"]
        hostile = "\n".join([*ATTACKS, "turn 9"])
        talk = [["policy", ATTACKS[0]], [f"tool {ATTACKS[1]}", hostile], ["history", "forgot 8 tokens"]]
        played = sample("#1", 0.0) | {"transcript": [*talk, ["policy", "#1"]]}
        shown = [sample(ATTACKS[0]), sample("second", 0.0), played]
        live(run, step=3, phase="update", update=1, updates=2, samples=shown)
        wait(page, "document.querySelector('.going .phase').textContent === 'updating 1 of 2'")
        assert texts(page, ".going .step")[0] == "step 3 of 4"
        assert texts(page, ".going .answered") == [ATTACKS[0], "second", ATTACKS[0], "#1"]
        heard = [f"tool {ATTACKS[1]} {visible(hostile)}", "forgot 8 tokens"]
        assert page.evaluate("[...document.querySelectorAll('.going .heard')].map((e) => e.textContent)") == heard
        assert page.evaluate("window.hacked ?? null") is None

        page.click("#run-table th:has-text('seed') button")
        page.select_option("#token-color", "w")
        plot = "document.querySelector('#figure-reward .plot')"
        page.evaluate(f"window.plot = {plot}")
        assert page.evaluate(f"Math.max(...{plot}.data.map((t) => Math.max(...t.x)))") == 4  # of the other run
        before = page.evaluate(f"{plot}.data.reduce((n, t) => n + t.x.length, 0)")
        append(run, *(r for r in records if r["step"] > 2))
        rows = "".join(json.dumps(row) + "\n" for row in default_rows())
        (run / "rollouts" / "step-000004.jsonl").write_text(rows)
        wait(page, f"{plot}.data.reduce((n, t) => n + t.x.length, 0) > {before}")
        wait(page, "document.querySelectorAll('#token-step option').length === 2")
        wait(page, "document.querySelectorAll('#token-view .tok').length > 0")
        assert page.evaluate(f"window.plot === {plot}"), "the figure is the same one, with more points"
        assert page.evaluate("document.querySelector('#run-table th[aria-sort]').textContent") == "seed"
        assert page.evaluate("document.querySelector('#token-color').value") == "w"
        assert texts(page, "#run-table tbody tr") != []

        page.click("#pause")
        live(run, step=4, phase="generate")
        page.wait_for_timeout(1500)
        assert texts(page, ".going .step")[0] == "step 3 of 4", "a paused page stands still"
        page.click("#pause")
        assert texts(page, ".going .step")[0] == "step 4 of 4"

        write_summary(run, 4)
        (run / "live.json").unlink()
        wait(page, "document.querySelector('#live').textContent.startsWith('every run has ended')")
        assert page.evaluate("window.mark === 1 && window.hacked === undefined")
        assert visit.complaints == []
        assert {r.split(url)[0] for r in visit.requests} == {""}, "it asks its own server alone"
    wait(page, "document.querySelector('#live').textContent.startsWith('connection lost')")
    page.close()
