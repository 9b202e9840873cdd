"""The page of completions as a file; tests/evaluation/test_page_in_browser.py opens it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sapo.evaluation import ConstantAnswer, page_data, write_page
from sapo.evaluation.page import part
from sapo.utils.html import content_security_policy, embedded
from support.evaluation_cases import answered, results, sample

NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'><!-- & \u2028 \ud800 {{data}}"


def data_of(page: str) -> dict:
    """What a browser's JSON.parse is given: the text from the data element to the first end of a script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.S)[1])


def test_the_data_in_the_page_are_those_of_the_evaluation(tmp_path: Path) -> None:
    made = results(
        [answered(0, sample(NASTY, 1.0, answer=NASTY, detail=NASTY), prompt=NASTY, groups={"subject": NASTY})]
    )
    page = write_page(made, tmp_path / "index.html").read_text(encoding="utf-8")
    assert data_of(page) == page_data(made)
    assert data_of(page)["problems"][0]["samples"][0]["text"] == NASTY


def test_answers_and_details_stand_in_the_order_they_have() -> None:
    drawn, greedy = sample("1", answer="\u202e2", detail="\x1b[2J"), sample("3", detail="\u2066")
    [problem] = page_data(results([answered(0, drawn, greedy=greedy)]))["problems"]
    [shown] = problem["samples"]
    assert (shown["answer"], shown["detail"], problem["greedy"]["detail"]) == ("\\u202e2", "\\x1b[2J", "\\u2066")


@pytest.mark.parametrize("text", [NASTY, "<!--<script>", "]]>", "\u2029", "\ud800\ud800", "{{script}}"])
def test_no_character_of_the_data_can_end_their_element(text: str) -> None:
    embedding = embedded({"text": text})
    assert not re.search("[<>&\u2028\u2029]", embedding)
    embedding.encode("utf-8")
    assert json.loads(embedding) == {"text": text}


def test_the_title_and_the_policy_are_escaped(tmp_path: Path) -> None:
    made = results([answered(0, sample("x"))])
    made.about["model"]["path"] = "</title><script>1</script>"  # type: ignore[index]
    page = write_page(made, tmp_path / "index.html").read_text()
    assert "<script>1" not in page
    assert "&lt;/title&gt;&lt;script&gt;1" in page


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write_page(results([answered(0, sample("x"))]), tmp_path / "index.html").read_text()
    for reference in ("http://", "https://", "src=", "href=", "@import", "url("):
        assert reference not in page, reference
    assert "default-src &#x27;none&#x27;" in page
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_the_policy_admits_the_page_s_own_script_and_style_by_their_hashes() -> None:
    # echo -n 'alert(1)' | openssl dgst -sha256 -binary | base64
    policy = content_security_policy(["alert(1)"], ["a{}"])
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in policy
    assert "unsafe" not in policy


def test_the_script_never_makes_markup_of_a_text() -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in part("completions.js"), way


def test_what_all_prompts_begin_with_is_kept_once(tmp_path: Path) -> None:
    examples = "Q: 1 + 1 =\nA: 2\n" * 50
    problems = [answered(i, sample("x"), prompt=f"{i} + 1 =", seen=f"{examples}Q: {i} + 1 =\nA:") for i in range(20)]
    data = page_data(results(problems))
    assert data["opening"] == f"{examples}Q: "
    assert data["opening"] + data["problems"][3]["seen"] == problems[3].seen
    assert len(json.dumps(data)) < 20 * len(examples)


def test_a_prompt_that_is_seen_as_it_is_is_not_told_twice() -> None:
    assert page_data(results([answered(i, sample("x")) for i in range(2)]))["problems"][0]["seen"] is None


def test_the_figures_are_those_that_were_measured() -> None:
    problems = [
        answered(0, sample("x", 1.0, answer="1"), sample("y", answer="2")),
        answered(1, sample("x"), sample("x")),
    ]
    words = {f["name"]: (f["value"], f["more"]) for f in page_data(results(problems))["figures"]}
    assert set(words) == {"mean reward", "mean@2", "majority@2", "tokens"}
    assert words["mean@2"] == ("0.250", "0.000 to 0.500")
    constant = ConstantAnswer("1" * 99, share=1.0, judged=1, distinct=1)
    words = {f["name"]: (f["value"], f["more"]) for f in page_data(results(problems, constant=constant))["figures"]}
    assert words["best constant"][0] == "1.000"
    assert len(words["best constant"][1]) < 40
