"""The report in a real browser, opened as a file: what it shows, what one can do, and that no text can act in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from sapo.config.recipes import load_recipe
from sapo.report import make_report, write_page
from sapo.workflows.train import train
from support.browser import CHROMIUM, MISSING
from support.report_cases import ATTACKS, END, default_rows, rollout_row, settings, step_records, write_run
from support.report_page import Visit, texts, wait
from support.runs import write_recipe

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small run that was really made, and its report."""
    directory = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        run = train(load_recipe(write_recipe(directory))).directory
    return run, write_page(make_report([run]), directory / "report.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two arms; names, questions and completions are attacks."""
    directory = tmp_path_factory.mktemp("made")
    rows = default_rows()
    for row, attack in zip(rows, ATTACKS, strict=False):
        row |= {"prompt": attack, "answer": attack, "detail": attack, "text": attack}
    records = step_records(4, extra={f"task/{a}/reward/mean": 0.5 for a in ATTACKS[:2]})
    records += [{**r, "task": ATTACKS[0]} for r in records if r["kind"] == "eval"]
    records.append({"kind": "warning", "step": 2, "cause": ATTACKS[1], "text": ATTACKS[0]})
    write_run(directory / "<img src=x onerror=hacked>", rollouts={2: rows, 4: rows}, records=records)
    write_run(directory / "b", config=settings(0, tau_neg=2.0))
    return write_page(make_report([directory]), directory / "report.html")


def test_it_opens_from_a_file_without_complaint_or_request_and_every_figure_has_data(visit: Visit, real) -> None:
    _, file = real
    page = visit.open(file)
    page.evaluate("sapoReport.drawAll()")
    drawn = page.evaluate(
        "sapoReport.figures.filter((f) => f.panels).map((f) => [f.key, [...document.querySelectorAll("
        "`#figure-${f.key} .plot`)].map((p) => p.data.map((t) => [t.x.length, t.y.filter((v) => v != null).length]))])"
    )
    assert {key for key, _ in drawn} >= {
        "reward",
        "pass1",
        "entropy",
        "zero_variance",
        "eur",
        "ratios",
        "variance",
        "bound",
        "timings",
        "fig1",
    }
    for key, plots in drawn:
        assert plots
        for traces in plots:
            assert traces, key
            assert all(x > 0 and y > 0 for x, y in traces), (key, traces)
    assert visit.complaints == []
    assert visit.requests == [file.as_uri()]


def test_the_numbers_in_the_page_are_those_of_metrics_jsonl(visit: Visit, real) -> None:
    run, file = real
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    page = visit.open(file)
    page.evaluate("sapoReport.drawAll()")

    def plotted(key: str, line: int = 0) -> tuple[list, list]:
        lines = page.evaluate(
            f"document.querySelector('#figure-{key} .plot').data"
            ".filter((t) => t.fill !== 'toself').map((t) => [t.x, t.y])"
        )
        return tuple(lines[line])

    steps = [r for r in records if r["kind"] == "step"]
    for key, metric in (
        ("reward", "reward/mean"),
        ("entropy", "update/entropy"),
        ("zero_variance", "groups/zero_variance"),
    ):
        own = [r for r in steps if metric in r]
        assert plotted(key) == ([r["step"] for r in own], [r[metric] for r in own])
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert plotted("pass1") == ([r["step"] for r in evaluations], [r["reward/mean"] for r in evaluations])
    last = {r["step"]: r for r in records if r["kind"] == "update" and not r["skipped"]}
    for line, metric in enumerate(("gate/eur_pos", "gate/eur_neg")):
        own = [r for r in last.values() if metric in r]
        lost = [1 - r[metric] for r in own]
        # The log axis has six decades: what is below them, 0 too, is a gap.
        least = 1e-6 * max(1 - r[m] for r in last.values() for m in ("gate/eur_pos", "gate/eur_neg") if m in r)
        assert plotted("eur", line) == ([r["step"] for r in own], [v if v >= least else None for v in lost])
    ends = [evaluations[0], evaluations[-1]]
    first, final = (f"{r['reward/mean']:.3f}" for r in ends)  # its rewards are graded
    assert f"held-out mean reward {first} → {final}" in texts(page, "#headlines li")[0]
    assert f"{sum(r['tokens/generated'] for r in steps):,} sampled tokens" in texts(page, "#headlines li")[0]


def test_no_text_runs_as_markup_and_what_steers_is_spelled_out(visit: Visit, made: Path) -> None:
    page = visit.open(made, "#run=%3Cimg+src%3Dx+onerror%3Dhacked%3E&sample=0.1")
    page.evaluate("sapoReport.drawAll()")
    rows = page.locator("#token-view .row")
    assert texts(page, "#token-view .row[aria-selected=true] b") == ["0.1"], "the address chose it"
    assert rows.count() == 8
    shown = set()
    for row in rows.all():
        row.click()
        shown |= {*texts(page, ".tok"), *texts(page, ".question"), *texts(page, ".facts .value")}
        assert page.evaluate("window.hacked ?? null") is None
    for attack in ATTACKS[:5]:
        assert attack in shown
    assert "\\u202egnorw" in shown
    assert "\\x1b[2J\\x07bell" in shown
    assert not any(c in text for text in shown for c in "\u202e\x1b\x07")
    page.evaluate("sapoReport.drawAll()")
    assert page.evaluate("document.querySelectorAll('img, iframe, #token-view script, #token-view svg').length") == 0
    assert ATTACKS[0] in texts(page, "#warning-table td")
    assert "<img src=x onerror=hacked>" in texts(page, "#run-table td")
    assert visit.complaints == []


def test_markup_in_the_page_itself_could_do_nothing_either(visit: Visit, made: Path) -> None:
    page = visit.open(made)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked=1'}))"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked ?? null") is None
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"


def test_a_click_chooses_a_sample_and_colours_say_what_was_measured(visit: Visit, real) -> None:
    _, file = real
    page = visit.open(file)
    before = texts(page, ".about .facts")
    page.locator(".row[aria-selected=false]").first.click()
    assert texts(page, ".about .facts") != before
    assert "sample=" in page.evaluate("location.hash")
    classes = {}
    for color in ("z", "w", "e", "a"):
        page.select_option("#token-color", color)
        classes[color] = page.eval_on_selector_all(".tok", "found => found.map((e) => e.className).join()")
    assert len(set(classes.values())) >= 3
    assert "entropy" in classes["e"], "the run logged it token by token"
    assert "up" in classes["a"] or "down" in classes["a"]


def episode_row(sample: int, **changes: object) -> dict:
    """An episode of three turns; before the third a tool says an attack, after most of the history was dropped."""
    said = "\n".join(ATTACKS)
    speakers = [["tool <b>add</b>", len(said)]]
    observations = [[2, [4], "1924;", None], [4, [5, 6], said, 3, speakers], [7, [6], "no answer", None]]
    return rollout_row(0, sample, [1, 2, 3, 4, 5, 6, END], observations=observations, **changes)


def test_an_episode_shows_its_turns_and_what_a_hostile_tool_said_as_text_without_a_gate(
    visit: Visit, tmp_path: Path
) -> None:
    rows = [episode_row(0, turn_advantages=[1.0, 0.5, -0.25]), episode_row(1)]
    run = write_run(tmp_path / "a", rollouts={4: rows})
    file = write_page(make_report([run]), tmp_path / "report.html")
    page = visit.open(file)
    assert texts(page, ".reading .turn") == ["turn 1advantage 1", "turn 2advantage 0.5", "turn 3advantage -0.25"]
    assert texts(page, ".reading .heard b") == ["environment", "tool <b>add</b>", "environment"]
    escaped = [*ATTACKS[:5], "\\u202egnorw", "\\x1b[2J\\x07bell"]
    assert texts(page, ".reading .said") == ["1924;", "\n".join(escaped), "no answer"]
    assert texts(page, ".reading .forgot") == ["forgot 3 tokens"]  # of 1 + 2 + 1 + 2 it keeps 3
    order = page.eval_on_selector_all(".reading > *", "found => found.map((e) => e.className.split(' ')[0])")
    assert order == [
        *("turn", "tok", "tok", "heard", "turn", "tok", "tok", "forgot", "heard", "turn", "tok", "tok", "tok", "heard")
    ]
    assert page.eval_on_selector_all(".heard, .heard *, .turn, .forgot", "e => e.filter((x) => x.id).length") == 0
    page.locator(".heard").nth(1).hover()
    assert "token 1 of 7" in texts(page, ".numbers")[0], "there is nothing to point at in what a tool said"
    page.locator(".reading").focus()
    page.keyboard.press("End")
    assert "token 7 of 7" in texts(page, ".numbers")[0]
    assert texts(page, ".tok.at") == ["<end>"]
    assert texts(page, ".row .many") == ["3 turns  ", "3 turns  "]
    assert page.evaluate("window.hacked ?? null") is None
    assert page.evaluate("document.querySelectorAll('img, iframe, #token-view script, #token-view svg').length") == 0
    page.locator(".row").nth(1).click()
    assert texts(page, ".reading .turn") == ["turn 1", "turn 2", "turn 3"]
    assert visit.complaints == []
    assert visit.requests == [file.as_uri()]


def test_samples_are_sorted_by_reward_and_by_the_lowest_gate_weight(visit: Visit, made: Path) -> None:
    page = visit.open(made, "#run=b&step=4")
    names = "#token-view .row b"
    assert texts(page, names) == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"]
    page.select_option("#token-order", "-reward")
    assert texts(page, names) == ["0.0", "1.0", "2.0", "3.0", "0.1", "1.1", "2.1", "3.1"]
    page.select_option("#token-order", "low")
    # Only prompt 1 was off policy.
    assert texts(page, names)[:2] in (["1.0", "1.1"], ["1.1", "1.0"])
    assert texts(page, names)[-2:] == ["3.0", "3.1"], "those without a gate are last"
    page.select_option("#token-prompt", "2")
    assert texts(page, names) == ["2.0", "2.1"]


def test_a_name_with_a_placeholder_of_plotly_s_is_shown_as_it_is(visit: Visit, tmp_path: Path) -> None:
    for name, gate in (("a", "%{y}"), ("b", "sigmoid")):
        write_run(tmp_path / name, config=settings(0, gate=gate))
    page = visit.open(write_page(make_report([tmp_path]), tmp_path / "report.html"))
    page.evaluate("sapoReport.drawAll()")
    hovered = page.evaluate(
        """() => {
          const plot = document.querySelector("#figure-reward .plot");
          Plotly.Fx.hover(plot, [{ curveNumber: 0, pointNumber: 1 }]);
          return plot.querySelector(".hoverlayer").textContent;
        }"""
    )
    assert "gate %{y}" in hovered, hovered


def test_prompts_samples_and_updates_have_the_numbers_of_the_files(visit: Visit, tmp_path: Path) -> None:
    rows = [rollout_row(6 << 32 | p, s, [p, 3, END], update=1) for p in (0, 3) for s in range(2)]
    rows[3]["log_ratio"] = [1.0399e-6, -0.25, 0.0]
    page = visit.open(
        write_page(make_report([write_run(tmp_path / "a", rollouts={7: rows})]), tmp_path / "report.html")
    )
    assert texts(page, ".row b") == ["0.0", "0.1", "3.0", "3.1"]
    page.locator(".row").nth(3).click()
    assert "sample=3.1" in page.evaluate("location.hash")
    facts = texts(page, ".about .facts")[0]
    assert "prompt 3, sample 1" in facts
    assert f"prompt_id {6 << 32 | 3}" in facts
    assert f"update {rows[3]['update']}, off policy" in facts
    assert "log r 1.04e-6" in texts(page, ".numbers")[0]


def test_a_figure_between_two_roundings_is_the_same_in_the_table_and_in_the_sentence(
    visit: Visit, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "a")
    seconds = {"generate": 5.0, "update": 1.25, "total": 6.25}
    (run / "summary.json").write_text(json.dumps({"steps": 4, "tokens": {"generated": 108836.5}, "seconds": seconds}))
    page = visit.open(write_page(make_report([run]), tmp_path / "report.html"))
    assert "108,836 sampled tokens; 6.2 s." in texts(page, "#headlines li")[0]
    row = texts(page, "#run-table tbody td")
    assert {"108,836", "6.2"} <= set(row)


def test_the_table_of_runs_fits_into_a_window_of_1280(visit: Visit, tmp_path: Path) -> None:
    records = step_records(4)
    records += [{**r, "task": "add3"} for r in records if r["kind"] == "eval"]
    for number in range(2):
        config = settings(tau_pos=1.0 + number, gate=["sigmoid", "erf"][number])
        config["train"] |= {"learning_rate": 10.0**-number, "minibatches": 2 + number}
        write_run(tmp_path / f"a_rather_long_name_of_run_{number}", config=config, records=records)
    page = visit.open(write_page(make_report([tmp_path]), tmp_path / "report.html"))
    [scrolled, seen] = page.evaluate(
        "(() => { const e = document.querySelector('#run-table .scroll'); return [e.scrollWidth, e.clientWidth]; })()"
    )
    assert page.viewport_size is not None
    assert page.viewport_size["width"] == 1280
    assert scrolled <= seen
    assert "0.250 [0.220, 0.290] add4; 0.250 [0.220, 0.290] add3" in texts(page, "#run-table td")


def test_a_histogram_s_outline_is_drawn_as_it_is_and_gates_are_keyed_in_the_colour_of_text(
    visit: Visit, tmp_path: Path
) -> None:
    for name, tau in (("a", 1.05), ("b", 2.0)):
        write_run(tmp_path / name, config=settings(tau_neg=tau))
    report = make_report([tmp_path])
    page = visit.open(write_page(report, tmp_path / "report.html"))
    page.evaluate("sapoReport.drawAll()")
    [figure] = [f for f in report.story if f.key == "ratios"]
    drawn = page.evaluate(
        "document.querySelector('#figure-ratios .plot').data.map((t) => [[...t.x], [...t.y], t.line.shape ?? null])"
    )
    for trace, (x, y, shape) in zip(figure.panels[0].traces, drawn, strict=True):
        assert (x, y, shape) == ([*trace.x], [*trace.y], None)
    keys = page.eval_on_selector_all(
        "#figure-ratios .legend button",
        "found => found.map((e) => [e.textContent, e.querySelector('line').getAttribute('stroke')])",
    )
    assert [name for name, _ in keys] == ["SAPO, tau_neg 1.05", "SAPO, tau_neg 2", "gate, A > 0", "gate, A ≤ 0"]
    assert keys[2][1] == keys[3][1]
    assert keys[2][1] not in {keys[0][1], keys[1][1]}


def test_hover_and_arrow_keys_give_a_token_s_numbers(visit: Visit, made: Path) -> None:
    page = visit.open(made, "#run=b&step=4&sample=1.1")
    page.locator("#tok-0").hover()
    said = texts(page, ".numbers")[0]
    row = rollout_row(1, 1, list(range(11)), update=1)
    assert "token 1 of 11" in said
    assert f"log r {row['log_ratio'][0]:g}" in said
    assert f"gate weight f' {row['gate_weight'][0]:.5g}" in said
    assert "GRPO clipped" in said, "e^-.4 is below .8"
    assert "GSPO clipped" in said
    page.locator(".reading").focus()
    page.keyboard.press("ArrowRight")
    assert "token 2 of 11" in texts(page, ".numbers")[0]
    page.keyboard.press("End")
    assert 'text "<end>"' in texts(page, ".numbers")[0]
    page.locator(".list").focus()
    page.keyboard.press("ArrowDown")
    assert "prompt 2, sample 0" in texts(page, ".about .facts")[0]


def test_a_sample_that_was_not_measured_says_so_and_shows_no_zero(visit: Visit, made: Path) -> None:
    page = visit.open(made, "#run=b&step=4&sample=3.0")
    assert "not measured" in texts(page, ".about .facts")[0]
    assert "log r not measured" in texts(page, ".numbers")[0]
    assert page.locator(".tok.shade").count() == 0


def test_four_thousand_tokens_show_within_a_second(visit: Visit, tmp_path: Path) -> None:
    """The second is the requirement; the time is the page's own, from the choice of the sample to its layout."""
    ids = [i % 12 for i in range(4000)]
    rows = [rollout_row(0, s, ids, update=1) for s in range(2)]
    file = write_page(make_report([write_run(tmp_path / "long", rollouts={4: rows})]), tmp_path / "report.html")
    page = visit.open(file)
    page.locator(".row").nth(1).click()
    assert page.locator(".tok").count() == 4000
    fastest = float("inf")
    for sample in (0, 1, 0, 1):  # other programs on the machine may have a core of ours for a while
        page.locator(".row").nth(sample).click()
        fastest = min(fastest, float(page.get_attribute("#token-view", "data-milliseconds") or "inf"))
    assert fastest < 1000
    assert visit.complaints == []


def test_twenty_runs_hold_no_more_than_the_budget_and_say_what_is_left_out(visit: Visit, tmp_path: Path) -> None:
    for seed in range(20):
        rollouts = {step: [rollout_row(p, s, [1] * 50) for p in range(20) for s in range(2)] for step in range(1, 9)}
        write_run(tmp_path / "runs" / f"r{seed:02d}", config=settings(seed, 8), rollouts=rollouts)
    report = make_report([tmp_path / "runs"], tokens=40_000)
    assert sum(c.tokens for c in report.tokens.chunks) <= 40_000
    page = visit.open(write_page(report, tmp_path / "report.html"))
    assert "Of 160 logged steps 20 are in this page." in texts(page, ".note")[0]
    assert "`sapo report --tokens 0` takes in all." in texts(page, ".note")[0]
    page.select_option("#token-run", "r19")
    wait(page, "document.querySelectorAll('.tok').length === 50")
    page.evaluate("sapoReport.drawAll()")
    assert page.locator("#run-table tbody tr").count() == 20
    assert page.evaluate("document.querySelector('#figure-reward .plot').data.length") == 22  # seeds, mean and band
    assert visit.complaints == []


def test_light_and_dark_follow_the_system_and_the_button(browser: Browser, made: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    line = "document.querySelector('#figure-reward .plot').data[0].line.color"
    seen = {}
    for scheme in ("light", "dark"):
        visit = Visit(browser, scheme)
        page = visit.open(made)
        page.evaluate("sapoReport.drawAll()")
        seen[scheme] = (page.evaluate(ground), page.evaluate(line))
        page.click("#theme")
        page.wait_for_timeout(50)
        seen[f"{scheme} switched"] = (page.evaluate(ground), page.evaluate(line))
        assert "theme=" in page.evaluate("location.hash")
        page.close()
    assert len(set(seen["light"]) & set(seen["dark"])) == 0
    assert seen["light switched"] == seen["dark"]
    assert seen["dark switched"] == seen["light"]


# The ratio of https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio, colours as a canvas paints them one on another.
CONTRAST = """(selector) => {
  const pixel = (...colors) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...[...document.querySelectorAll(selector)].map((element) => {
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const [a, b] = [pixel(getComputedStyle(element).color), pixel(...grounds)].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""


def test_text_stands_out_from_its_ground_in_light_and_dark_on_every_shade(browser: Browser, made: Path) -> None:
    """WCAG 2: the contrast of text is 4.5 at least; the legend has every shade."""
    for scheme in ("light", "dark"):
        page = Visit(browser, scheme).open(made, "#run=b")
        for color in ("z", "w", "e", "a"):
            page.select_option("#token-color", color)
            assert page.evaluate(CONTRAST, ".scale i") >= 4.5, (scheme, color)
        for selector in (
            "#headlines li",
            ".card p",
            ".legend button",
            ".note",
            ".row .second",
            ".facts b",
            "th",
            ".numbers b",
        ):
            assert page.evaluate(CONTRAST, selector) >= 4.5, (scheme, selector)
        page.close()


def test_a_page_that_is_watched_reloads_and_comes_back_to_where_it_was(visit: Visit, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False)
    file = write_page(make_report([run]), tmp_path / "report.html", reload_every=0.3)
    page = visit.open(file, "#run=a&step=2&sample=1.0&color=w&paused=1")
    page.evaluate("document.getElementById('tokens').scrollIntoView()")
    place = page.evaluate("scrollY")
    assert place > 500
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {**next(r for r in records if r["kind"] == "step"), "step": 5}
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(more) + "\n")
    write_page(make_report([run]), file)  # the last one: it reloads no more
    page.wait_for_timeout(1000)
    assert page.evaluate("sapoReport.data.story[0].panels[0].traces[0].x.length") == 4, "it is paused"
    page.evaluate("document.getElementById('pause').click()")  # by no pointer, for which it would wait
    wait(page, "window.sapoReport?.data.story[0].panels[0].traces[0].x.length === 5")
    page.evaluate("sapoReport.tokens.ready")
    assert abs(page.evaluate("scrollY") - place) < 50
    assert page.evaluate("document.getElementById('token-color').value") == "w"
    assert "prompt 1, sample 0" in texts(page, ".about .facts")[0]
    assert page.evaluate("sapoReport.data.watch ?? null") is None
    assert page.locator("#pause").count() == 0
