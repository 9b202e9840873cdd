r"""Answers with several readings, judged by `math`: conjunctions, lists of three digits, phrases, bases, units.

Each pair was written by hand; the name of its list is the kind. A pair of EQUAL is right and one of DIFFERENT wrong.
"""

from __future__ import annotations

import pytest

from sapo.data import Prompt
from sapo.tasks.verifiers.base import check_reference
from sapo.tasks.verifiers.registry import build_verifier

CONJUNCTIONS = [
    (r"2\le x<5", r"x\ge2 and x<5"),
    (r"2\le x<5", r"x\ge2, x<5"),
    (r"2\le x<5", r"x\ge2\text{ and }x<5"),
    (r"2\le x<5", r"x<5 \wedge x\ge2"),
    (r"2\le x<5", r"5 > x \text{ and } 2 \le x"),
    (r"2\le x<5", r"\{x : x\ge2 \text{ and } x<5\}"),
    ("[2,5)", r"[2,\infty)\cap(-\infty,5)"),
    ("-1<x<4", "x>-1, x<4"),
    ("x>-1, x<4", "(-1,4)"),
    (r"-\frac{1}{2}<x<\sqrt{2}", r"x>-\frac12 \text{ and } x<\sqrt2"),
    ("x>3", "x>1, x>3"),
    (r"x>2 \text{ or } x>5", "x>2"),
    (r"(1,3)\cup(5,7)", "1<x<3, 5<x<7"),
    (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty,-1) \text{ and } (1,\infty)"),
    (r"x\le-3 or x\ge3", r"|x|\ge3"),
    ("-1<x<5", "|x-2|<3"),
    ("x<-1 and x>4", "x<-1 or x>4"),  # a reference that says nothing by the letter
    ("[1,3]", r"[1,2]\cup[2,3]"),
    ("0<x<1", "x in (0,1)"),
    ("x>0", r"\mathbb{R}^+"),
    ("All real numbers", r"\mathbb{R}"),
]
NOT_CONJUNCTIONS = [
    (r"2\le x<5", "x>2 and x<5"),
    (r"2\le x<5", r"x\ge2 or x<5"),
    (r"2\le x<5", r"x\ge2 \text{ and } y<5"),
    ("-1<x<4", "x<-1, x>4"),
    ("-1<x<4", "x<-1, x<4"),
    ("x<-1 or x>4", "x<-1 and x>4"),
    (r"x>2 \text{ and } x>5", "x>2"),
    ("x>0, y<1", "y>0, x<1"),
    ("x<-1 and x>4", "x<0 and x>7"),
    ("[1,3]", r"[1,2)\cup(2,3]"),
]

THREE_DIGITS = [
    ("100,200", r"\{100,200\}"),
    ("100,200", "200,100"),
    ("100,200", r"100 \text{ or } 200"),
    (r"\{100,200\}", "200,100"),
    ("111,222,333", "333,222,111"),
    ("x=100,200", "x=200,100"),
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("100,200", "100200"),  # the form is that of 1,234, and nobody writes it for the list by mistake
    ("1,234", r"\{1234\}"),
]
NOT_THREE_DIGITS = [
    ("100,200", "300,200"),
    ("100,200", "100,300"),
    ("(100,200)", "(200,100)"),
    ("10,080", "80,10"),
    ("100200", "200,100"),
    ("1,000", "1, 0"),
]

PHRASES = [
    (reference, given)
    for reference in (r"\emptyset", "no solution", r"\text{No real solutions}", "There is no solution", r"\{\}")
    for given in (
        "There is no solution",
        "no real solutions",
        r"\text{There are no real solutions.}",
        r"\text{the equation has no solution}",
        r"\text{No real roots}",
        "no such x exists",
        r"\text{none}",
        r"\varnothing",
    )
] + [
    (r"\text{does not exist}", "DNE"),
    (r"\text{infinitely many solutions}", "There are infinitely many solutions"),
    ("5", r"\text{Answer: 5}"),
    ("5", r"\text{The answer is 5}"),
    ("5", r"\text{Total: 5 apples}"),
    (r"\frac12", r"\textbf{Answer: 1/2}"),
    ("52_8", "52_{(8)}"),
    ("52_{(8)}", "52_8"),
    ("52_8", "(52)_{8}"),
    ("52_8", r"52_{\text{eight}}"),
    ("52_8", r"52 \text{ (base 8)}"),
    ("log(2)", r"\ln 2"),
    (r"\ln 2", "log(2)"),
    (r"\ln 2", r"\log_e 2"),
    ("1e-5", "10^{-5}"),
    ("e-5", r"\mathrm{e}-5"),
    ("18", r"18 \text{ eggs per day}"),
    ("18", "18 eggs per day"),
    ("18", "18 eggs a day"),
    ("18", r"\$18/\text{hour}"),
    ("18", "18 (eighteen)"),
    ("5", "5€"),
    ("30", r"30\text{°}"),
    (r"7 \pmod{12}", "7 mod 12"),
    ("7", "seven"),
    ("0", r"\text{zero}"),
    (r"\frac12", r"\text{one half}"),
    ("July 4", r"\text{July 4}"),
    ("10:30 am", r"10{:}30\text{ AM}"),
]
NOT_PHRASES = [
    (r"\emptyset", r"\text{one solution}"),
    (r"\emptyset", r"\text{infinitely many solutions}"),
    (r"\emptyset", r"\{0\}"),
    ("no solution", "0"),
    ("0", r"\text{no solution}"),
    (r"\infty", r"\text{does not exist}"),
    ("5", r"\text{Answer: 6}"),
    ("5", r"\text{Answer: not 5}"),
    ("52_8", "52_{(7)}"),
    ("52_8", r"52 \text{ (base 7)}"),
    ("52_8", "42"),
    (r"\log_{10} 2", r"\ln 2"),
    ("log(2)", r"\ln 3"),
    ("e", r"\mathrm{E}"),
    ("e", "E"),
    (r"\frac{e}{2}", r"\frac{\mathrm{E}}{2}"),
    (r"\pi", r"\Pi"),
    ("a+A", "2a"),
    ("1e-5", "e-5"),
    ("e-5", "1e-5"),
    ("7", "eight"),
    (r"\emptyset", r"\{\emptyset\}"),
    (r"7 \pmod{12}", "7 mod 11"),
    ("7", "seventh"),
    ("July 4", "4"),
    ("18", "18 eggs for 3 days"),
    ("18", r"18\text{ eggs per 2 days}"),
]
EQUAL = CONJUNCTIONS + THREE_DIGITS + PHRASES
DIFFERENT = NOT_CONJUNCTIONS + NOT_THREE_DIGITS + NOT_PHRASES

# References that some answer meets, by reading or by text, however odd they look.
ODD_REFERENCES = [
    r"f(x) = x \text{ for all } x",
    r"(2, 3) \text{ or } (3, 2)",
    r"11:00 \text{ a.m.}",
    "O-",
    r"Na^{+}",
    "0^+",
    "[0,1[",
    "1) x=2; 2) x=3",
    "(A) 5",
    "B)",
    r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.",
    "Yes, since the sum is even",
    "It is impossible to tell from what is given here",
    "2 hours, 15 minutes and 10 seconds",
    "f'(x)",
    ">",
    "-",
    "=",
    r"\approx",
    "≈",
    r"x \in \mathbb{R}_+",
    r"\lambda_+",
    "100+",
    "Fe3+",
    "i) 3, ii) 4",
    "1.) 5 2.) 6",
    r"12 \text{ red balls and } 5 \text{ blue balls in each box}",
    r"7 \text{ (since the sum of the two digits is seven)}",
]

# (reference, completion, reward) where the answer has no box.
COMPLETIONS = [
    ("18", "She eats.\n#### 18 eggs per day", 1.0),
    ("18", "#### 18 eggs each day for 3 days", 0.0),
    (r"\emptyset", "x^2 = -1 for no real x. We see that the equation has no real solutions.", 1.0),
    (r"\emptyset", "The answer is that there is no solution.", 1.0),
    (r"\emptyset", "There is no solution for x = 1, but x = 2 works.", 0.0),
    ("3", "We get 3. For negative numbers there are no solutions.", 1.0),
]


@pytest.fixture(scope="module")
def math():
    """Return the reward of a completion for a reference."""
    verifier = build_verifier("math")
    return lambda reference, text: verifier(text, Prompt(id=0, task="t", text="?", answer=reference)).reward


def test_an_answer_in_another_reading_is_right(math):
    assert [pair for pair in EQUAL if math(pair[0], rf"So $\boxed{{{pair[1]}}}$.") != 1.0] == []


def test_another_answer_in_no_reading_is_right(math):
    assert [pair for pair in DIFFERENT if math(pair[0], rf"So $\boxed{{{pair[1]}}}$.") != 0.0] == []


@pytest.mark.parametrize(("reference", "completion", "reward"), COMPLETIONS)
def test_an_answer_without_a_box_is_read_with_its_sentence(math, reference, completion, reward):
    assert math(reference, completion) == reward


def test_a_unit_of_several_words_follows_the_hashes():
    verifier = build_verifier("hash_answer")
    prompt = Prompt(id=0, task="t", text="?", answer="18")
    assert verifier("#### 18 eggs per day", prompt).reward == 1.0
    assert verifier("#### 19 eggs per day", prompt).reward == 0.0


@pytest.mark.parametrize("reference", ODD_REFERENCES)
def test_a_reference_that_some_answer_meets_is_taken_at_load(reference):
    verifier, prompt = build_verifier("math"), Prompt(id=0, task="t", text="?", answer=reference)
    check_reference(verifier, prompt)
    assert verifier(rf"So $\boxed{{{reference}}}$", prompt).reward == 1.0


CHOICES = [
    ("The answer is B. Carbon", 1.0),
    ("The correct answer is **B) mitochondria**.", 1.0),
    ("I would choose option B over A", 1.0),
    ("The answer is B rather than A", 1.0),
    ("A is wrong. C is wrong. So B.", 1.0),
    ("Final answer: [B]", 1.0),
    ("I'd go with B.", 1.0),
    ("Answer -> B", 1.0),
    ("Answer => B", 1.0),
    ("Ans: B", 1.0),
    ("The answer is B) or C)", 0.0),
    ("The answer is A. Paris or B. London", 0.0),
    ("I would pick A over B", 0.0),
    ("So A or B.", 0.0),
    ("A is right. So not B.", 0.0),
    ("A. Paris\nB. London", 0.0),
    ("The plans: B", 0.0),
]


@pytest.mark.parametrize(("text", "reward"), CHOICES)
def test_a_letter_is_read_with_the_text_of_its_option_where_the_row_has_none(text, reward):
    assert build_verifier("choice")(text, Prompt(id=0, task="t", text="?", answer="B")).reward == reward
