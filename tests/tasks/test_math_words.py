r"""Words beside a number that change its value: scales, second units, conditions, names.

Each triple is a reference, a completion and its reward, by hand.
"""

from __future__ import annotations

import pytest

from sapo.data import Prompt
from sapo.tasks.verifiers.registry import build_verifier

SCALES = [
    *[("5", rf"\boxed{{5\text{{ {word}}}}}", 0) for word in ("thousand", "hundred", "Million", "billions", "dozen")],
    *[("5", rf"\boxed{{5 {word}}}", 0) for word in ("thousand", "million", "dozen eggs", "tenths", "bn")],
    *[("5", text, 0) for text in (r"\boxed{5\text{k}}", r"\boxed{\$5k}", r"\boxed{5 \text{ M}}", "It is $5M.")],
    *[("5", text, 0) for text in ("The answer is 5 thousandths.", "<answer>5 million</answer>", "#### 5 million")],
    *[("5000", text, 1) for text in (r"\boxed{5\text{ thousand}}", r"\boxed{\$5k}", r"\boxed{5\text{k}}")],
    *[("30", text, 0) for text in ("It costs $30 million.", "It costs $30$ million.", "The answer is 30 thousand.")],
    *[
        ("30000000", text, 1)
        for text in ("It costs $30 million.", "It costs $30$ million.", r"\boxed{\text{30 million}}")
    ],
    *[("5 million", text, 0) for text in (r"\boxed{5}", r"\boxed{5\text{ billion}}")],
    *[("5 million", text, 1) for text in (r"\boxed{5{,}000{,}000}", r"\boxed{5 \times 10^6}")],
    ("2500000", "It is 2.5 million people.", 1),
    ("200000", r"\boxed{2 hundred thousand}", 1),
    ("200", r"\boxed{5\text{ thousand }200}", 0),
    ("500200", r"\boxed{5 hundred 200}", 0),
    ("1000000, 2000000", r"\boxed{1\text{ million and } 2\text{ million}}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}\text{ million}}", 0),
]
TWO_UNITS = [
    *[
        (reference, sentence.format(quantity), reward)
        for quantity in ("1 hour and 30 minutes", "1 h 30 min", "$1$ hour and $30$ minutes")
        for sentence in ("The answer is {}.", "So it takes {}.", "<answer>{}</answer>", "#### {}")
        for reference, reward in (("30", 0), ("1", 0), ("1.5", 1))
    ],
    ("30", "The answer is 2 dollars and 30 cents.", 0),
    ("2.30", "The answer is 2 dollars and 30 cents.", 1),
    ("3", "The answer is 2 boxes and 3 bags.", 0),
    ("30", "The answer is 1h30.", 0),
    ("30", "The train is 5 km away. He needs 30 minutes.", 1),
]
CONDITIONS = [
    *[
        ("12", rf"\boxed{{12\text{{ {words}}}}}", 0)
        for words in ("or more", "squared", "half", "not possible", "(base 8)")
    ],
    *[
        ("12", f"The answer is 12 {words}.", 0)
        for words in ("or less", "cubed", "not possible", "is wrong", "(base 8)")
    ],
    *[("12", rf"\boxed{{{text}}}", 0) for text in (r"12 \pmod{13}", r"12\ldots", "12...", "12?", "12 and a half")],
    *[("12", rf"\boxed{{\text{{{words} }}12}}", 0) for words in ("at least", "not", "negative", "more than")],
    *[("12", text, 0) for text in ("At least 12", "The answer is not 12.", "So 12 or more.", "at most $12$")],
    *[("12", rf"\boxed{{12\text{{ {words}}}}}", 1) for words in ("more than Tom", "times", "more apples", "(dollars)")],
    *[("90", text, 0) for text in (r"\boxed{90'}", "90'")],
    ("9.8", r"\boxed{9.8 \text{ m/s}^2}", 1),
    (r"12 \pmod{13}", r"\boxed{12 \pmod{13}}", 1),
    (r"12 \pmod{13}", r"\boxed{12 \pmod{14}}", 0),
    ("at least 12", r"\boxed{at least 12}", 1),
    ("at least 12", r"\boxed{12}", 0),
    ("7", "<answer>8 (not 7)</answer>", 0),
    ("8", "<answer>8 (not 7)</answer>", 1),
    ("3", "<answer>12 since 4 times 3</answer>", 0),
    ("13", "<answer>not 13</answer>", 0),
]
OTHERS = [
    ("hash_answer", "18", "#### 18 thousand", 0),
    ("hash_answer", "18000", "#### 18 thousand", 1),
    ("hash_answer", "30", "#### 1 hour and 30 minutes", 0),
    ("boxed_integer", "70", r"\boxed{70 \text{ thousand}}", 0),
    ("boxed_integer", "70000", r"\boxed{70 \text{ thousand}}", 1),
    ("boxed_integer", "12", r"\boxed{12\text{ or more}}", 0),
    ("last_number", "30", "It is 30 million.", 0),
    ("last_number", "30000000", "It is 30 million.", 1),
]


def misjudged(cases, spec="math"):
    judge = build_verifier(spec)
    return [
        (reference, text)
        for reference, text, reward in cases
        if judge(text, Prompt(id=0, task="t", text="?", answer=reference)).reward != reward
    ]


def test_a_word_of_scale_multiplies_the_number_before_it():
    assert misjudged(SCALES) == []


def test_two_units_are_one_quantity_wherever_they_stand():
    assert misjudged(TWO_UNITS) == []


def test_words_that_change_a_number_are_not_units():
    assert misjudged(CONDITIONS) == []


@pytest.mark.parametrize(("spec", "reference", "text", "reward"), OTHERS)
def test_the_other_verifiers_of_numbers_read_the_same_words(spec, reference, text, reward):
    assert misjudged([(reference, text, reward)], spec) == []


NAMES = [
    ("x=5", r"\boxed{y=5}", 1),
    ("x=5", r"\boxed{5=y}", 1),
    ("x=5", r"\boxed{m+n=5}", 0),
    ("x=5", r"\boxed{AB=5}", 0),
    ("x=5", r"\boxed{\text{Answer} = 5}", 1),
    ("5", r"\boxed{y=5}", 1),
    ("x_1=5", r"\boxed{x_2=5}", 1),
    ("-1<x<4", r"\boxed{-1<y<4}", 0),
    ("-1<x<4", r"\boxed{(-1,4)}", 1),
    ("x<1 or x>2", r"\boxed{x<1 or y>2}", 0),
    ("|x| < 2", r"\boxed{-2<y<2}", 0),
    (r"\{x \mid x>2\}", r"\boxed{\{y \mid y>2\}}", 1),
    ("x=1,y=2", r"\boxed{(y,x)=(1,2)}", 0),
    ("x=1,y=2", r"\boxed{(y,x)=(2,1)}", 1),
    ("p=3,q=7", r"\boxed{(q,p)=(3,7)}", 0),
    ("p=3,q=7", r"\boxed{(q,p)=(7,3)}", 1),
    ("(p,q)=(3,7)", r"\boxed{(q,p)=(7,3)}", 1),
    ("(p,q)=(3,7)", r"\boxed{(3,7)}", 1),
    ("(x,y)=(2,5)", r"\boxed{(a,b)=(2,5)}", 0),
    ("y=2x+3", r"\boxed{f(x)=2x+3}", 1),
    ("y=2x+3", r"\boxed{x=\frac{y-3}{2}}", 1),
]
# Pairs of constants that agree in many digits: 434 of e^1000 and e^1000 + 1, 40 of the roots.
CONSTANTS = [
    ("e^{1000}", r"\boxed{e^{1000}+1}", 0),
    (r"\pi^{1000}", r"\boxed{\pi^{1000}+1}", 0),
    ("e^{100}+1", r"\boxed{e^{100}}", 0),
    (r"\sqrt{10^{40}+1}", r"\boxed{10^{20}}", 0),
    ("1", r"\boxed{1+e^{-1000}}", 0),
    (r"\pi+10^{-60}", r"\boxed{\pi}", 0),
    (r"\ln(e^{1000}+1)", r"\boxed{1000}", 0),
    ("e^{20000}+1", r"\boxed{e^{20000}}", 0),
    ("e^{20000}+1", r"\boxed{1+e^{20000}}", 1),
    ("e^{1000}", r"\boxed{e^{500} \cdot e^{500}}", 1),
    (r"\sqrt{2}+\sqrt{3}", r"\boxed{\sqrt{5+2\sqrt{6}}}", 1),
    ("0", r"\boxed{\sin \pi}", 1),
]


def test_names_count_but_that_of_a_single_number():
    assert misjudged(NAMES) == []


def test_constants_are_told_apart_by_their_smallest_part():
    assert misjudged(CONSTANTS) == []


CHOICES = [
    ("The wrong answer is B", 0),
    ("The incorrect option is B", 0),
    ("B\n\nWait, no: C", 0),
    ("The answer is B.\nWait, no, C.", 0),
    ("The answer is A.\nWait, no. The answer is B.", 1),
    ("The answer is B, C", 0),
    ("So B is not correct.", 0),
    ("So, B is correct.", 1),
    ("Hence (B) is right.", 1),
    ("The answer is B since A and C are out.", 1),
    ("The answer is B, 6.", 1),
    ("The answer is B, 5.", 0),
]


@pytest.mark.parametrize(("text", "reward"), CHOICES)
def test_a_choice_is_read_with_the_words_around_it(text, reward):
    row = Prompt(id=0, task="t", text="?", answer="B", metadata={"options": ["5", "6", "7"]})
    assert build_verifier("choice")(text, row).reward == reward
