"""The verifier `math`: which spellings are the same answer, which are not, and what it does with hostile text.

It runs in this process here, except where a test says that it runs in a worker.
"""

import importlib.util
import subprocess
import sys

import pytest

from sapo.data import Prompt, Status
from sapo.errors import TaskError
from sapo.tasks import load_verifier
from sapo.tasks.verifiers import build_verifier
from sapo.tasks.verifiers import math as verifier_module
from sapo.tasks.workers.pool import WorkerPool

MATH = build_verifier("math")


def judge(reference, text, verifier=MATH):
    return verifier(text, Prompt(id=0, task="t", text="?", answer=reference))


# (reference, completion): the same answer in another spelling, by hand.
RIGHT = [
    ("1/2", r"\boxed{\frac12}"),
    ("1/2", r"\boxed{0.5}"),
    ("1/2", r"\boxed{.5}"),
    ("1/2", r"\boxed{50\%}"),
    (r"\frac{1}{3}", r"\boxed{0.333333}"),
    ("0.0000672", r"\boxed{6.72 \times 10^{-5}}"),
    (r"6.72 \times 10^{-5}", r"\boxed{0.0000672}"),
    (r"\sqrt{2}", r"\boxed{1.414214}"),
    ("10^{-20}", r"\boxed{10^{-20}}"),
    ("10^{-20}", r"\boxed{\frac{1}{10^{20}}}"),
    ("(8,-2)", r"\boxed{8,-2}"),
    (r"(2,\infty)", r"\boxed{x > 2}"),
    ("[-2,7]", r"\boxed{-2 \le x \le 7}"),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
    (r"x \in [-2,7]", r"\boxed{-2 \leq x \leq 7}"),
    (r"(0,9) \cup (9,36)", r"\boxed{(0,9)\cup(9,36)}"),
    (r"(0,9) \cup (9,36)", r"\boxed{(9,36)\cup(0,9)}"),
    ("52_8", r"\boxed{52}"),
    ("52_8", r"\boxed{52_{8}}"),
    ("42", r"\boxed{42_{10}}"),
    ("42", r"\boxed{52_8}"),
    ("x=5", r"\boxed{5}"),
    ("5", r"\boxed{x=5}"),
    ("x=5", r"\boxed{y=5}"),
    ("y = 2x + 3", r"\boxed{2x+3}"),
    ("y = 2x + 3", r"\boxed{y=3+2x}"),
    ("y = 2x + 3", r"\boxed{2x - y + 3 = 0}"),
    ("5x - 7y + 11z + 4 = 0", r"\boxed{-5x+7y-11z-4=0}"),
    ("5x - 7y + 11z + 4 = 0", r"\boxed{10x-14y+22z+8=0}"),
    ("1,-2", r"\boxed{-2,1}"),
    ("1,-2", r"\boxed{-2 \text{ and } 1}"),
    ("1,-2", r"\boxed{x=-2, x=1}"),
    ("1,-2", r"\boxed{\{1,-2\}}"),
    ("1,-2", r"$\boxed{1}$ and $\boxed{-2}$"),
    ("3, 5, 7", r"\boxed{(3,5,7)}"),
    ("3, 5, 7", r"\boxed{3,5,7,}"),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"),
    (r"1 \pm \sqrt{19}", r"\boxed{x = 1\pm\sqrt{19}}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\boxed{-2, 1-\sqrt5, 1+\sqrt5}"),
    ("10,080", r"\boxed{10080}"),
    (r"10,\!080", r"\boxed{10{,}080}"),
    (r"10,\!080", r"\boxed{10 080}"),
    ("10080", r"\boxed{10\,080}"),
    (r"11,\! 111,\! 111,\! 100", r"\boxed{11111111100}"),
    (r"\$32,\!348", r"\boxed{32348}"),
    (r"\$18.90", r"\boxed{18.9}"),
    (r"\$18.90", r"\boxed{\$18.90}"),
    (r"\$18.90", r"\boxed{18.90 \text{ dollars}}"),
    (r"1\frac{4}{5}", r"\boxed{\frac95}"),
    (r"1\frac{4}{5}", r"\boxed{1.8}"),
    ("13/4", r"\boxed{\frac{13}{4}}"),
    ("7/4", r"\boxed{1 3/4}"),
    (r"137 \frac{1}{2}", r"\boxed{137.5}"),
    (r"\frac{270}7\text{ degrees}", r"\boxed{\frac{270}{7}^\circ}"),
    (r"\frac{270}7\text{ degrees}", r"\boxed{\frac{270}{7}}"),
    (r"90^\circ", r"\boxed{90}"),
    (r"90^\circ", r"\boxed{90^{\circ}}"),
    (r"90^\circ", r"\boxed{90 \text{ degrees}}"),
    (r"90^\circ", r"\boxed{90°}"),
    (r"864 \mbox{ inches}^2", r"\boxed{864}"),
    (r"864 \mbox{ inches}^2", r"\boxed{864 \text{ in}^2}"),
    (r"864 \mbox{ inches}^2", r"\boxed{864\ \mathrm{in}^2}"),
    (r"5.4 \text{ cents}", r"\boxed{5.4}"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"),
    (r"\text{Evelyn}", r"\boxed{\text{evelyn}}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn.}}"),
    (r"\text{Evelyn}", "The answer is Evelyn."),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\text{(C)}", r"\boxed{(C)}"),
    (r"\text{(C)}", r"\boxed{\text{(C)}}"),
    (r"\text{(C)}", r"\boxed{\textbf{(C) } 5}"),
    ("6 - 5i", r"\boxed{-5i + 6}"),
    ("p - q", r"\boxed{-q+p}"),
    ("(a+5)(b+2)", r"\boxed{(b+2)(a+5)}"),
    ("(a+5)(b+2)", r"\boxed{ab+2a+5b+10}"),
    ("x^5 - x^4 + x^3 - x^2 + x - 1", r"\boxed{(x-1)(x^4+x^2+1)}"),
    ("2k", r"\boxed{2k}"),
    ("3R^2", r"\boxed{3R^2}"),
    ("3R^2", r"\boxed{3r^2}"),
    (r"\cot x", r"\boxed{\frac{1}{\tan x}}"),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"\boxed{\begin{bmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{bmatrix}}",
    ),
    (r"2^{25} \cdot 26!", r"\boxed{26! \cdot 2^{25}}"),
    (r"14+4\sqrt{37}", r"\boxed{2(7+2\sqrt{37})}"),
    (r"\sqrt{\frac{95}{24}}", r"\boxed{\frac{\sqrt{570}}{12}}"),
    (r"\frac{sqrt{7} + 1}{2}", r"\boxed{\frac{1+\sqrt7}{2}}"),
    (r"\frac{9 \sqrt{23}}{23}", r"\boxed{\frac{9}{\sqrt{23}}}"),
    (r"5\pi + 6\sqrt{3}", r"\boxed{6\sqrt3+5\pi}"),
    ("1/91", r"\boxed{\dfrac{1}{91}}"),
    ("8.5", r"\boxed{\frac{17}{2}}"),
    ("8.5", r"\boxed{8\frac12}"),
    (r"-\frac{\pi}{6}", r"\boxed{\frac{-\pi}{6}}"),
    (r"-\frac{\pi}{6}", r"\boxed{\frac{\pi}{-6}}"),
    (r"\frac{1}{-3}", r"\boxed{-1/3}"),
    (r"\pi", r"\boxed{3.141593}"),
    (r"\pi", r"\boxed{π}"),
    ("70", r"\boxed{70 = 7\cdot 10}"),
    ("70", r"\boxed{7 \cdot 10 = 70}"),
    ("70", r"\boxed{7 \cdot 10}"),
    ("70", r"\boxed{\approx 70}"),
    ("70", r"\boxed{70\%}"),
    ("0.7", r"\boxed{70\%}"),
    (r"70\%", r"\boxed{70}"),
    (r"70\%", r"\boxed{0.7}"),
    ("2^{100}", r"\boxed{1267650600228229401496703205376}"),
    ("10!", r"\boxed{3628800}"),
    (r"\binom{10}{3}", r"\boxed{120}"),
    (r"\log_2 8", r"\boxed{3}"),
    (r"\infty", r"\boxed{\infty}"),
    (r"\emptyset", r"\boxed{\emptyset}"),
    (r"\text{no solution}", r"\boxed{\text{No solution}}"),
    (r"\frac{a}{b}", r"\boxed{a/b}"),
    ("xy", r"\boxed{yx}"),
    (r"25\text{ cm}^2", r"\boxed{25 cm^2}"),
    ("25", r"\boxed{25 cm}"),
    ("2, 3", r"\boxed{2} or \boxed{3}"),
    ("18", "It is $18.$"),
    ("18", "18"),
    ("18", "so 18"),
    ("18", "so 18 apples"),
    ("18", "17 then 18"),
    ("18", "The answer is $18$ dollars."),
    ("18", "The answer is **18**."),
    ("18", "The answer is:\n\n18"),
    ("18", "Answer: 18"),
    ("18", r"Therefore, the final answer is \(\boxed{18}\)."),
    ("18", "the area is $18$ and nothing else"),
]

# (reference, completion): another answer, though some look like the same one.
WRONG = [
    (r"\frac{1}{3}", r"\boxed{0.3333}"),
    (r"\frac{1}{3}", r"\boxed{0.33}"),
    ("0.0000672", r"\boxed{.0000673}"),
    (r"\sqrt{2}", r"\boxed{1.41}"),
    ("10^{-20}", r"\boxed{10^{-21}}"),
    ("(8,-2)", r"\boxed{(9,-3)}"),
    ("(8,-2)", r"\boxed{(-2,8)}"),
    ("(8,-2)", r"\boxed{[8,-2]}"),
    (r"(2,\infty)", r"\boxed{[2,\infty)}"),
    (r"(2,\infty)", r"\boxed{x \ge 2}"),
    (r"x \in [-2,7]", r"\boxed{(-2,7)}"),
    (r"(0,9) \cup (9,36)", r"\boxed{(0,36)}"),
    ("52_8", r"\boxed{52_9}"),
    ("y = 2x + 3", r"\boxed{y = 2x + 4}"),
    ("5x - 7y + 11z + 4 = 0", r"\boxed{5x-7y+11z-4=0}"),
    ("1,-2", r"\boxed{1,2}"),
    ("1,-2", r"\boxed{1}"),
    ("1,-2", r"\boxed{1,-2,3}"),
    ("1", r"\boxed{1,-2}"),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}}"),
    ("58,500", r"\boxed{58.5}"),
    (r"1\frac{4}{5}", r"\boxed{\frac{4}{5}}"),
    ("13/4", r"\boxed{1 3/4}"),
    (r"\text{Evelyn}", r"\boxed{nylevE}"),
    (r"\text{(C)}", r"\boxed{\text{B}}"),
    (r"\text{even}", r"\boxed{\text{odd}}"),
    ("6 - 5i", r"\boxed{6+5i}"),
    ("p - q", r"\boxed{q - p}"),
    ("x^5 - x^4 + x^3 - x^2 + x - 1", r"\boxed{x^5}"),
    ("2k", r"\boxed{2n}"),
    ("2k", r"\boxed{2}"),
    (r"\cot x", r"\boxed{\tan x}"),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"\boxed{\begin{pmatrix} -\frac13 \\ \frac23 \\ \frac43 \end{pmatrix}}",
    ),
    (r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}", r"\boxed{(-7,16,5)}"),
    (r"2^{25} \cdot 26!", r"\boxed{2^{26} \cdot 26!}"),
    (r"\pi", r"\boxed{3.14159}"),
    ("70", r"\boxed{70.0000001}"),
    ("70", r"\boxed{70 \text{ or } 71}"),
    (r"70\%", r"\boxed{7}"),
    ("1234567890123", r"\boxed{1234567890124}"),
    ("2^{100}", r"\boxed{1267650600228229401496703205377}"),
    ("2^{100}", r"\boxed{1267650600228229401496703205378}"),
    ("10!", r"\boxed{3628801}"),
    (r"\infty", r"\boxed{-\infty}"),
    (r"\frac{a}{b}", r"\boxed{b/a}"),
    ("xy", r"\boxed{xz}"),
    ("18", "18 or 19?"),
    ("19", "The answer is 18 and not 19."),
]


@pytest.mark.parametrize(("reference", "text"), RIGHT)
def test_the_same_answer_in_another_spelling_is_right(reference, text):
    score = judge(reference, text)
    assert (score.reward, score.status, score.detail) == (1.0, Status.SCORED, "")


@pytest.mark.parametrize(("reference", "text"), WRONG)
def test_another_answer_is_wrong(reference, text):
    score = judge(reference, text)
    assert (score.reward, score.status) == (0.0, Status.SCORED)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "I don't know",
            r"\boxed{}",
            r"\boxed{5",
            r"\boxed{I don't know}",
            r"\boxed{\frac{}{}}",
            r"\boxed{5 & 6}",
        ),
        *(r"\boxed{\begin{pmatrix}}", r"\boxed{5.0.0}", r"\boxed{\\}", r"\boxed{%}", "x" * 100_000),
        r"\boxed{" + "7" * 3000 + "}",
        r"\boxed{__import__('os').getpid()}",
    ],
)
@pytest.mark.parametrize("reference", ["5", r"\sqrt{2}", "(1, 2)", "x^2+1"])
def test_what_is_no_mathematics_is_unparseable_and_the_reason_is_short(reference, text):
    score = judge(reference, text)
    assert (score.reward, score.status, score.answer) == (0.0, Status.UNPARSEABLE, None)
    assert 0 < len(score.detail) < 200
    assert "\n" not in score.detail


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} then \boxed{2} #### 3", "2"),
        ("the answer is 3 #### 4\nBye 9", "4"),
        ("The answer is 3. The final answer is: 4 apples, not 5", "4 apples"),
        ("The answer is 4 apples.", "4 apples"),
        ("The answer is $x^2$, of course.", "x^2"),
        ("We have $x = 1$ and so $y = 2$.", "y = 2"),
        (r"so \( y = 2 \) or \[ z = \frac{1}{2} \]", r"z = \frac{1}{2}"),
        ("It costs \\$5 for 3 days", "3"),
        (r"It costs $\$5$.", r"\$5"),
        ("(3, 4]", "(3, 4]"),
        ("nothing to see", None),
    ],
)
def test_the_answer_is_looked_for_in_boxes_then_hashes_then_phrases_then_formulas(text, found):
    assert verifier_module.answer_in(text) == found


def test_a_completion_without_a_box_is_unparseable_where_a_box_is_required():
    strict = build_verifier({"name": "math", "require_box": True})
    for text in ("5", "The answer is $5$.", "#### 5", r"\boxed{5"):
        assert judge("5", text, strict).status is Status.UNPARSEABLE
    assert judge("5", r"\boxed{5}", strict).reward == 1.0


@pytest.mark.parametrize(
    "same",
    [
        [r"\frac12", "0.5", "1/2", r"\frac{2}{4}", "x = .50"],
        ["1, 2", "2,1", r"\{2, 1\}", r"x = 2 \text{ or } x = 1"],
        [r"(1, \frac12)", r"\left(1, 0.5\right)"],
        [r"\sqrt{8}", r"2\sqrt2", r"\frac{4}{\sqrt{2}}"],
        ["a+b", "b + a"],
        ["52_8", "52_{8}"],
        [r"\text{East}", r"\text{east.}"],
    ],
)
def test_equal_wrong_answers_are_equal_text_so_that_a_majority_counts_them(same):
    answers = {judge("77", rf"\boxed{{{text}}}").answer for text in same}
    assert len(answers) == 1
    assert None not in answers


def test_right_answers_are_equal_text_whatever_their_form():
    forms = ["(a+5)(b+2)", "ab+2a+5b+10", "(b+2)(a+5)"]
    assert len({judge("(a+5)(b+2)", rf"\boxed{{{form}}}").answer for form in forms}) == 1


def test_an_answer_field_may_hold_the_whole_solution():
    assert judge("so 2 * 3 = 6\n#### 6", r"\boxed{6}").reward == 1.0
    assert judge(r"We get $x = \boxed{\frac{1}{2}}$.", r"\boxed{0.5}").reward == 1.0


@pytest.mark.parametrize("reference", [None, "", "   "])
def test_a_prompt_without_an_answer_cannot_be_judged(reference):
    with pytest.raises(ValueError, match="answer"):
        judge(reference, r"\boxed{5}")


def test_a_fresh_worker_compares_expressions(monkeypatch):
    # In a process that has not simplified anything yet: what SymPy imports late must not meet the closed evaluator.
    job = load_verifier("math").job(r"\boxed{ab+2a+5b+10}", Prompt(id=0, task="t", text="?", answer="(a+5)(b+2)"))
    pool = WorkerPool(1)
    try:
        assert pool.run([job])[0].reward == 1.0
    finally:
        pool.close()


SLOW = r"\boxed{(x+1)^{5000}}"


def test_an_answer_that_would_take_for_ever_costs_its_completion_and_no_other():
    pool = WorkerPool(1)
    math = load_verifier({"name": "math", "deadline": 3})
    prompt = Prompt(id=0, task="t", text="?", answer="x^2")
    texts = [r"\boxed{x^2}", SLOW, r"\boxed{x \cdot x}", r"\boxed{(" + "9!" * 400 + ")!!!}", r"\boxed{x^2}"]
    try:
        scores = pool.run([math.job(text, prompt) for text in texts])
    finally:
        pool.close()
    assert [score.reward for score in scores] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert scores[1].status is Status.VERIFIER_ERROR
    assert scores[1].detail.startswith("TimeoutError: ")


def test_nothing_of_a_completion_is_evaluated_not_even_where_sympy_would():
    # In a process of its own, where SymPy's eval only takes note; what SymPy imports late is imported before.
    source = """
from sapo.data import Prompt
from sapo.tasks.verifiers import build_verifier
math = build_verifier("math")
prompt = Prompt(id=0, task="t", text="?", answer="x^2+1")
math(r"\\boxed{(x+1)^2-2x}", prompt)
seen = []
import sympy.parsing.sympy_parser as parser
parser.eval = lambda code, *rest: seen.append(code)
hostile = ["__import__('os').system('id')", "1+1", "2.5", "f(x)", "x__class__", "lambda: 5", "\\\\text{print(1)}", "7"]
for text in hostile:
    for wrap in ("\\\\boxed{%s}", "%s", "The answer is %s", "$%s$"):
        math(wrap % text, prompt)
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_sympy_evaluates_again_afterwards():
    import sympy

    judge("x^2", r"\boxed{x}")
    assert sympy.sympify("1 + x") == sympy.Symbol("x") + 1


def test_without_math_verify_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(TaskError, match=r"'math' needs the package math-verify; pip install 'sapo-rl\[tasks\]'"):
        load_verifier("math")
