"""Every verifier on every real row: the reference answer has reward 1 in several spellings, junk has 0.

The verifiers run in this process here, without their workers, for speed; test_pool.py has the workers.
"""

import json
from pathlib import Path

import pytest

from sapo.data import Prompt, Status
from sapo.tasks.verifiers import build_verifier

ROWS = Path(__file__).parents[2] / ".." / "shared" / "benchdata"

pytestmark = pytest.mark.skipif(not ROWS.is_dir(), reason="the benchmark rows (../shared/benchdata) are not here")

MATHS = {"aime25": 30, "hmmt_feb_2025": 30, "hmmt_nov_2025": 30, "beyond_aime": 100, "math500_full": 500}

WORDS = ("text{Evelyn}", "text{east}", "text{even}", "text{ellipse}", "text{Navin}", "text{(")
BASES = ("52_8", "40_9", "2516_8", "4210_{5}", "204_5", "4343_6")


def rows(name, count):
    found = [json.loads(line) for line in (ROWS / f"{name}.jsonl").open()]
    assert len(found) == count
    return found


def prompt_of(answer, **metadata):
    return Prompt(id=0, task="t", text="?", answer=answer, metadata=metadata)


def is_integer(answer):
    return answer.removeprefix("-").isdigit()


def spellings(answer):
    """Completions that give an answer; all of them are right."""
    yield rf"So the answer is $\boxed{{{answer}}}$."
    yield rf"First \boxed{{0.123}}, no. \[ \boxed{{ {answer} }} \]"
    yield rf"\boxed{{{answer}.}}"
    yield r"\boxed{" + answer.replace(r"\frac", r"\dfrac") + "}"
    yield r"\boxed{" + answer.replace(" ", r"\, ").replace("(", r"\left(").replace(")", r"\right)") + "}"
    yield rf"\boxed{{\boxed{{{answer}}}}}"
    yield rf"The final answer is ${answer}$. I hope it is correct."
    yield rf"**Final Answer:** \({answer}\)"
    yield f"Hence ${answer}$."
    yield f"We are done.\n#### {answer}"
    yield answer
    if not any(part in answer for part in (*WORDS, *BASES, "text", "mbox", "=", "\\in")):
        yield rf"\boxed{{x = {answer}}}"
    if not any(part in answer for part in (*WORDS, *BASES, ",", "=", "\\in", "text", "mbox")):
        yield rf"\boxed{{{answer}\text{{ units}}}}"
    if is_integer(answer):
        sign, digits = "-" * answer.startswith("-"), answer.removeprefix("-")
        yield rf"\boxed{{{sign}0{digits}}}"
        yield rf"\boxed{{{answer}.00}}"
        yield rf"\boxed{{{int(answer):,}}}"
        yield rf"\boxed{{{int(answer):,}}}".replace(",", "{,}")
        yield rf"\boxed{{\frac{{{2 * int(answer)}}}{{2}}}}"
        yield rf"The answer is {answer}"
        yield rf"\boxed{{\text{{{answer}}}}}"
        yield rf"\boxed{{{sign}\${digits}}}"


def wrong(answer):
    """Completions with another answer."""
    yield r"\boxed{123456789}"
    yield rf"\boxed{{{answer}}} is not right; it is \boxed{{-987654321}}"
    yield r"\boxed{\frac{355}{114}}"
    if is_integer(answer):
        yield rf"\boxed{{{int(answer) + 1}}}"
        yield rf"\boxed{{{-int(answer)}}}" if int(answer) else r"\boxed{1}"
        yield rf"\boxed{{{answer}1}}"
        yield rf"\boxed{{{answer}.5}}"
    elif answer[0] not in "([\\x" or answer.startswith((r"\frac", r"\sqrt")):
        yield rf"\boxed{{{answer} + 1}}"


JUNK = ("", "I don't know", r"\boxed{}", r"\boxed{ }", r"\boxed{\frac{1}{", "\\boxed{\\", "}{$$", "\x00\ud800", "#### ")


def failures(verifier, prompt, texts, reward):
    return [(text, score) for text in texts if (score := verifier(text, prompt)).reward != reward]


@pytest.mark.parametrize("name", MATHS)
def test_math_knows_every_reference_answer_in_every_spelling(name):
    math = build_verifier("math")
    bad = []
    for row in rows(name, MATHS[name]):
        prompt = prompt_of(row["answer"])
        bad += failures(math, prompt, spellings(row["answer"]), 1.0)
        if "solution" in row:
            bad += failures(math, prompt, [row["solution"]], 1.0)
            bad += failures(math, prompt_of(row["solution"]), [rf"\boxed{{{row['answer']}}}"], 1.0)
    assert bad == []


@pytest.mark.parametrize("name", MATHS)
def test_math_gives_nothing_for_another_answer_or_for_junk(name):
    math, boxed = build_verifier("math"), build_verifier({"name": "math", "require_box": True})
    bad = []
    for row in rows(name, MATHS[name]):
        prompt = prompt_of(row["answer"])
        for text in wrong(row["answer"]):
            score = math(text, prompt)
            if (score.reward, score.status) != (0.0, Status.SCORED) or not score.answer:
                bad.append((row["answer"], text, score))
        for verifier, texts in [(math, JUNK), (boxed, [*JUNK, row["answer"], f"The answer is ${row['answer']}$."])]:
            for text in texts:
                score = verifier(text, prompt)
                if (score.reward, score.status) != (0.0, Status.UNPARSEABLE) or not score.detail:
                    bad.append((row["answer"], text, score))
    assert bad == []


def test_every_gsm8k_row_is_judged_by_value_whether_boxed_or_after_hashes():
    math, hashes = build_verifier("math"), build_verifier("hash_answer")
    bad = []
    for row in rows("gsm8k_test", 1319):
        prompt, answer = prompt_of(row["answer"]), row["answer"].split("####")[1].strip()
        right = [row["answer"], f"#### {answer}", f"so #### {answer.replace(',', '')}.00", f"#### ${answer}"]
        plain = [
            rf"\boxed{{{answer}}}",
            f"The answer is {answer}.",
            f"He pays ${answer} for it",
            rf"\boxed{{\${answer}}}",
        ]
        bad += failures(math, prompt, [*right, *plain, rf"\boxed{{{answer}\text{{ dollars}}}}"], 1.0)
        bad += failures(hashes, prompt, right, 1.0)
        other = str(int(answer.replace(",", "")) + 1)
        bad += failures(math, prompt, [rf"\boxed{{{other}}}", f"#### {other}", f"{answer} {other}", *JUNK], 0.0)
        bad += failures(hashes, prompt, [f"#### {other}", f"{answer}", *JUNK], 0.0)
    assert bad == []


@pytest.mark.parametrize("name", ["aime25", "beyond_aime"])
def test_boxed_integer_knows_every_integer_of_the_contests(name):
    verifier = build_verifier("boxed_integer")
    contest = build_verifier({"name": "boxed_integer", "minimum": 0, "maximum": 999})
    bad = []
    for row in rows(name, MATHS[name]):
        answer, prompt = row["answer"], prompt_of(row["answer"])
        boxed = [text for text in spellings(answer) if "boxed" in text]
        bad += failures(verifier, prompt, boxed, 1.0)
        bad += failures(contest, prompt, boxed, float(int(answer) <= 999))
        texts = [*wrong(answer), *JUNK, answer, f"The answer is ${answer}$.", f"#### {answer}", f"\\boxed{{{answer}"]
        bad += failures(verifier, prompt, texts, 0.0)
        bad += [(text, s) for text in JUNK if (s := verifier(text, prompt)).status is not Status.UNPARSEABLE]
        bad += [(text, s) for text in wrong(answer) if (s := verifier(text, prompt)).status is not Status.SCORED]
    assert bad == []


def test_choice_knows_every_mathvision_row_by_letter_and_by_value():
    verifier = build_verifier("choice")
    bad = []
    with_values = 0
    for row in rows("mathvision_testmini_40", 40):
        answer, options = row["answer"], row["options"]
        prompt = prompt_of(answer, options=options)
        right = [
            rf"\boxed{{{answer}}}",
            rf"So \boxed{{ \text{{{answer}}} }}.",
            f"The answer is {answer}.",
            f"**Answer:** {answer}",
            f"I think\n{answer}",
        ]
        if answer.isalpha():
            right += [
                rf"\boxed{{({answer})}}",
                f"The answer is ({answer}).",
                f"The answer is: **{answer}**",
                rf"\boxed{{\textbf{{({answer})}}}}",
            ]
        if options and options[0] != "A":
            with_values += 1
            value = options["ABCDE".index(answer)]
            right += [
                rf"\boxed{{{value}}}",
                f"The answer is {value}",
                rf"\boxed{{{answer}. {value}}}",
                f"({answer}) {value}",
            ]
        bad += failures(verifier, prompt, right, 1.0)
        others = [option for i, option in enumerate(options) if i != "ABCDE".index(answer)] or ["1000", "F"]
        others += [letter for letter in "ABCDE" if letter != answer]
        bad += failures(verifier, prompt, [*(rf"\boxed{{{o}}}" for o in others), *JUNK, r"\boxed{Z}"], 0.0)
        bad += [(text, s) for text in JUNK if (s := verifier(text, prompt)).status is not Status.UNPARSEABLE]
    assert bad == []
    assert with_values == 4


def grid(solution):
    """The answer a model should give."""
    return {f"House {row[0]}": dict(zip(solution["header"][1:], row[1:], strict=True)) for row in solution["rows"]}


def changed(answer, change):
    return {house: {name: change(cell) for name, cell in cells.items()} for house, cells in answer["solution"].items()}


def test_zebra_knows_every_puzzle_and_counts_cells():
    verifier = build_verifier("zebra")
    bad = []
    for row in rows("zebralogic_12", 12):
        prompt = prompt_of(None, solution=row["solution"])
        answer = {"reasoning": "because {of} it", "solution": grid(row["solution"])}
        text = json.dumps(answer)
        right = [
            text,
            f"I think so.\n```json\n{json.dumps(answer, indent=2)}\n```\nThat is {{all}}.",
            f'Let S = {{1, 2}}. First {{"solution": {{}}}}, then {text} done',
            json.dumps({"solution": changed(answer, lambda cell: f" {cell.upper()} ")}).replace("House", "house"),
            json.dumps({"solution": changed(answer, lambda cell: [cell])}),
        ]
        for given in right:
            score = verifier(given, prompt)
            if (score.reward, score.figures) != (1.0, {"cell_accuracy": 1.0}):
                bad.append((given, score))
        cells = len(row["solution"]["rows"]) * (len(row["solution"]["header"]) - 1)
        answer["solution"]["House 1"]["Name"] = "nobody"
        score = verifier(json.dumps(answer), prompt)
        assert (score.reward, score.status) == (0.0, Status.SCORED)
        assert score.figures == {"cell_accuracy": (cells - 1) / cells}
        bad += failures(verifier, prompt, [*JUNK, "{}", "[]", text[:-2]], 0.0)
        bad += [(text, s) for text in JUNK if (s := verifier(text, prompt)).status is not Status.UNPARSEABLE]
    assert bad == []
