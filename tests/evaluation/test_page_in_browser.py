"""The page of completions in a real browser: what it shows, what one can do, and that no completion can act in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sapo.data import Status
from sapo.evaluation import write_page
from support.browser import CHROMIUM, MISSING, Browser
from support.evaluation_cases import answered, results, sample

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

ATTACKS = [
    "</script><script>window.hacked = 'script'</script>",
    "<img src=x onerror=\"window.hacked='image'\">",
    "<svg onload=\"window.hacked='svg'\"></svg>",
    "<style>* { display: none }</style>",
    "<!--<script>",
    '"><iframe srcdoc="<script>parent.hacked=1</script>"></iframe>',
    "javascript:window.hacked=1",
    "\u202egnorw",
]


def problems():
    """20 problems: every third all right, the others all wrong; one completion of each is an attack."""
    made = []
    for i in range(20):
        right = float(i % 3 == 0)
        attack = ATTACKS[i % len(ATTACKS)]
        made.append(
            answered(
                i,
                sample(f"completion {i} says {'word ' * (i + 1)}", right, answer=str(i)),
                sample(attack, right, answer=attack, tokens=1000, detail=attack),
                sample("cut off", 0.0, status=Status.TRUNCATED, finish_reason="length", tokens=500),
                prompt=f"question {i} {attack}",
                groups={"subject": "Algebra" if i % 2 else "Geometry", "level": attack if i == 7 else "1"},
                seen=f"<s>question {i}",
                greedy=sample(f"greedily {i}", right),
            )
        )
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "index.html"
    write_page(results(problems(), ks=(1, 2)), file)
    return file.as_uri()


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")


def choose(browser: Browser, control: str, value: str) -> None:
    """As a person choosing from a list does: the value, then the event."""
    browser.run(
        f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('change', {{bubbles: true}})) }})"
        f"(document.getElementById({control!r}))"
    )


def complaints(browser: Browser) -> list[dict]:
    """Errors, refusals of the content security policy and requests beside that of the page."""
    requests = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    told = [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    return told + [r for r in requests if r["params"]["request"]["url"].partition("#")[0] != r["params"]["documentURL"]]


def test_no_completion_runs_as_markup_wherever_it_is_shown(browser: Browser, page: str) -> None:
    for number in range(20):
        browser.open(f"{page}#problem={number}")
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        attack = ATTACKS[number % len(ATTACKS)]
        shown = texts(browser, ".text")
        assert shown[0] == f"question {number} {attack}"
        assert attack in shown, "shown as it was written"
        assert browser.run("window.hacked ?? null") is None
        assert (
            browser.run("document.querySelectorAll('img, svg, iframe, #completions style, #completions script').length")
            == 0
        )
        assert complaints(browser) == []
    assert browser.run("getComputedStyle(document.querySelector('h1')).display") == "block"


def test_an_episode_shows_turns_and_what_a_hostile_tool_said_as_text(browser: Browser, tmp_path: Path) -> None:
    hostile = "\n".join([*ATTACKS, "\x1b[2J", "turn 9"])
    said = (("policy", "37*52="), ("history", "forgot 812 tokens"), (f"tool {ATTACKS[1]}", hostile), ("policy", "#1"))
    shown = sample("#1", 1.0, transcript=said)
    write_page(results([answered(0, shown, sample("#2"))]), tmp_path / "index.html")
    browser.open((tmp_path / "index.html").as_uri())
    assert texts(browser, ".sample .turn") == ["turn 1", "turn 2"]
    assert texts(browser, ".sample .forgot") == ["forgot 812 tokens"]
    assert texts(browser, ".sample .heard b") == [f"tool {ATTACKS[1]}"]
    escaped = hostile.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert texts(browser, ".sample .text") == ["37*52=", escaped, "#1", "#2"]
    assert "2 turns" in texts(browser, ".sample .facts")[0]
    assert "turns" not in texts(browser, ".sample .facts")[1]
    browser.run("(e => { e.value = 'GNORW'; e.dispatchEvent(new Event('input')) })(document.getElementById('q'))")
    browser.wait("document.querySelectorAll('.sample mark').length === 1")
    assert browser.run("window.hacked ?? null") is None
    assert browser.run("document.querySelectorAll('#completions img, svg, iframe, #completions script').length") == 0
    assert complaints(browser) == []


def test_markup_in_the_page_itself_could_do_nothing_either(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', "
        '\'<img src=x onerror="window.hacked=1"><svg onload="window.hacked=1">\')'
    )
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked=1'}))"
    )
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("window.hacked ?? null") is None
    assert browser.run("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"


def test_the_first_problem_is_shown_with_its_completions(browser: Browser, page: str) -> None:
    browser.open(page)
    assert texts(browser, ".count") == ["20 of 20 problems, 80 of 80 completions"]
    assert texts(browser, ".row[aria-selected=true] .rate") == ["2/3"]
    names = texts(browser, ".sample .name")
    assert names == ["Greedy", "Sample 1", "Sample 2", "Sample 3"]
    assert texts(browser, ".sample .verdict") == ["✓ right", "✓ right", "✓ right", "✗ wrong"]
    assert texts(browser, ".sample .status") == ["truncated"]
    assert "reference answer 1" in browser.run("document.querySelector('.problem').innerText")
    assert "mean@3" in texts(browser, ".figures dt")


def test_a_click_and_the_arrow_keys_choose_a_problem(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.click("#row-4")
    assert texts(browser, "h2") == ["Problem 5"]
    browser.run("document.querySelector('.list').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    assert texts(browser, "h2") == ["Problem 7"]
    browser.press("End")
    assert texts(browser, "h2") == ["Problem 20"]
    assert browser.run("location.hash") == "#problem=19"
    assert browser.run("document.querySelector('.list').getAttribute('aria-activedescendant')") == "row-19"
    top, bottom, list_bottom = browser.run(
        "(r => (l => [r.top, r.bottom, l.bottom])(document.querySelector('.list').getBoundingClientRect()))"
        "(document.querySelector('#row-19').getBoundingClientRect())"
    )
    assert top > 0
    assert bottom <= list_bottom + 1, "the chosen row is in view"


def test_filters_leave_what_they_say(browser: Browser, page: str) -> None:
    browser.open(page)
    choose(browser, "result", "right")  # problems 0, 3, ..., 18: seven, each with two samples and the greedy one
    assert texts(browser, ".count") == ["7 of 20 problems, 21 of 80 completions"]
    choose(browser, "status", "truncated")
    assert texts(browser, ".count") == ["0 of 20 problems, 0 of 80 completions"]
    assert texts(browser, ".empty") == ["No completion is left by the filters."]
    choose(browser, "result", "wrong")
    assert texts(browser, ".count") == ["20 of 20 problems, 20 of 80 completions"]
    assert texts(browser, ".sample .name") == ["Sample 3"]
    choose(browser, "group", "subject:Algebra")
    assert texts(browser, ".count") == ["10 of 20 problems, 10 of 80 completions"]
    choose(browser, "group", f"level:{ATTACKS[7]}")
    assert texts(browser, ".count") == ["1 of 20 problems, 1 of 80 completions"]
    browser.click("#reset")
    assert texts(browser, ".count") == ["20 of 20 problems, 80 of 80 completions"]
    assert browser.run("document.getElementById('status').value") == ""


def test_the_search_finds_completions_and_marks_the_place(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run("document.getElementById('q').focus()")
    browser.type("Greedily 1")  # whatever the case: 1, 10 .. 19
    browser.wait("document.querySelector('.count').textContent.startsWith('11 of 20')")
    assert texts(browser, ".count") == ["11 of 20 problems, 11 of 80 completions"]
    assert texts(browser, ".sample mark") == ["greedily 1"]
    assert browser.run("document.activeElement.id") == "q", "typing can go on"
    browser.open(page + "#q=question+7")
    assert texts(browser, ".count") == ["1 of 20 problems, 4 of 80 completions"], "a question found shows all of it"
    browser.open(page + "#q=%3Cimg")
    assert set(texts(browser, ".sample mark")) == {"<img"}


def test_problems_and_samples_are_sorted_by_reward_and_length(browser: Browser, page: str) -> None:
    browser.open(page)
    choose(browser, "order", "-length")
    assert texts(browser, ".sample .name") == ["Sample 2", "Sample 3", "Sample 1", "Greedy"]
    first = texts(browser, ".row .words")[0]
    assert first.startswith("20question 19"), "20 words and the same attack"
    choose(browser, "order", "length")
    assert texts(browser, ".row .words")[0].startswith("1question 0")
    choose(browser, "order", "reward")
    assert texts(browser, ".row .rate")[:13] == ["0/3"] * 13
    choose(browser, "order", "-reward")
    assert texts(browser, ".row .rate")[:8] == ["2/3"] * 7 + ["0/3"]


def test_the_address_holds_choice_filters_and_order(browser: Browser, page: str) -> None:
    browser.open(page + "#problem=9&result=right&order=-length")
    assert texts(browser, "h2") == ["Problem 10"]
    assert browser.run("document.getElementById('order').value") == "-length"
    assert browser.run("document.getElementById('result').value") == "right"
    browser.open(page + "#problem=9&order=nonsense&q=")
    assert browser.run("document.getElementById('order').value") == "asked"
    assert complaints(browser) == []


def test_thousands_of_completions_cost_only_those_in_view(browser: Browser, tmp_path: Path) -> None:
    many = [
        answered(i, *(sample(f"sample {j} of {i}: {'long ' * 200}", float(j < i % 17)) for j in range(16)))
        for i in range(1500)
    ]
    file = write_page(results(many), tmp_path / "many.html")
    browser.open(file.as_uri())
    assert texts(browser, ".count") == ["1,500 of 1,500 problems, 24,000 of 24,000 completions"]
    assert browser.run("document.querySelectorAll('*').length") < 1000
    browser.run("document.querySelector('.list').scrollTop = 46 * 1200")
    browser.wait("document.getElementById('row-1200') !== null")
    browser.click("#row-1200")
    assert texts(browser, "h2") == ["Problem 1201"]
    choose(browser, "result", "right")
    browser.open(file.as_uri() + "#q=sample+15+of+1499")
    assert texts(browser, ".count") == ["1 of 1,500 problems, 1 of 24,000 completions"]


def test_a_very_long_completion_is_shown_whole_when_asked_for(browser: Browser, tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(5000))
    file = write_page(results([answered(0, sample(text))]), tmp_path / "long.html")
    browser.open(file.as_uri())
    assert len(texts(browser, ".sample .text")[0]) == 4000
    browser.click(".sample .more")
    assert texts(browser, ".sample .text") == [text]


def test_light_and_dark_follow_the_system_and_the_button(browser: Browser, page: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    grounds = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(page)
        grounds[scheme] = browser.run(ground)
    assert grounds["light"] != grounds["dark"]
    browser.click("#theme")
    assert browser.run(ground) == grounds["light"]
    browser.click("#theme")
    assert browser.run(ground) == grounds["dark"]
    browser.prefer("light")


def test_text_stands_out_from_its_ground_in_light_and_dark(browser: Browser, page: str) -> None:
    """WCAG 2: the contrast of text is 4.5 at least."""
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(page)
        for selector in (
            ".model",
            ".count",
            ".rate",
            ".text",
            ".verdict",
            ".right .verdict",
            ".status",
            ".facts b",
            "h3",
        ):
            contrast = browser.run(CONTRAST.replace("SELECTOR", selector))
            assert contrast >= 4.5, (scheme, selector, contrast)
    browser.prefer("light")


# The ratio of https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio between an element's colour and the first ground below.
CONTRAST = """(() => {
  const luminance = (rgb) => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector("SELECTOR");
  let below = element;
  while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") below = below.parentElement;
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(below).backgroundColor].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})()"""
