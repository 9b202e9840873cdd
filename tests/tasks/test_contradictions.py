r"""Answers that hedge or contradict themselves, and the nearest answers that do not, judged by `math` and `choice`.

Each pair of a reference and a boxed answer was written by hand. A pair of RIGHT gives reward 1, one of WRONG 0.
"""

from __future__ import annotations

import pytest

from support.answers import reward_of

# Relations in another unknown are not swallowed by those in the first.
RIGHT_UNKNOWNS = [
    ("x>0,y>0", "y>0,x>0"),
    ("x>0 or y>0", "y>0 or x>0"),
    ("x>0 and y>1", r"y>1 \text{ and } x>0"),
    ("x>0, y>1", "x>0 and y>1"),
    ("0<x<1, 0<y<1", "0<y<1, 0<x<1"),
    ("x>0", "x>0 or x>1"),
]
WRONG_UNKNOWNS = [
    ("x>0", "x>0 or y>0"),
    ("x>0", "x>0, y>1"),
    ("x>1", "x>1 or y>2"),
    ("x>1", "x>1 and y>2"),
    ("x>0, y>1", "x>0"),
    ("x>0, y>1", "y>0, x>1"),
    ("0<x<1, 0<y<1", "(0,1)"),
    ("a>1, b>2", "a>1"),
    (r"(0,\infty)", "x>0, y>0"),
    ("x>0 and y>0", "x>0 or y>0"),
    ("x>0 or y>0", "x>0, y>0"),
]

# Pairs that a word or a comma joins may be points: each counts.
RIGHT_PAIRS = [
    ("(1,9) or (3,7)", "(3,7) or (1,9)"),
    ("(1,9) or (3,7)", "(3,7), (1,9)"),
    ("(2,8) and (3,4)", "(3,4),(2,8)"),
    (r"(1,3)\cup(5,7)", "(1,3) or (5,7)"),
    ("(1,3) or (5,7)", "5<x<7 or 1<x<3"),
    ("(1,3] or [3,7)", "(1,7)"),
    (r"(1,3] \text{ or } [5,7)", "[5,7) and (1,3]"),
    (r"(-\infty,3) or (1,\infty)", r"\mathbb{R}"),
]
WRONG_PAIRS = [
    ("(1,9) or (3,7)", "(1,9) or (4,6)"),
    (r"(2,8) \text{ or } (3,4)", "(2,8)"),
    ("(1,5)", "(1,5) or (2,3)"),
    ("(3,5) or (4,4)", "(3,5) or (4,5)"),
    ("(1,9) or (3,7) or (4,6)", "(1,9)"),
    ("1<x<9", "(1,9) or (3,7)"),
    ("1<x<9", "(1,9) or (8,-2)"),
    ("[1,9]", "[1,9] or [3,7]"),
    ("(1,9]", "(1,9] or (3,7]"),
    ("(1,9) or (3,7)", r"(1,9)\cup(4,6)"),
]

# Words behind a number are a unit, unless they change or contradict it.
RIGHT_UNITS = [
    ("18", "18 times"),
    (r"90^\circ", r"90^\circ\text{ units}"),
    ("18", "18 times per week"),
    ("18", "18 plus signs"),
    ("18", "18 (eighteen)"),
    ("18", "18 (eighteen eggs)"),
    ("42", r"42 \text{ (forty-two)}"),
    ("42", "forty-two"),
    ("305", "three hundred and five"),
    ("6", "6 (two each)"),
    ("5, 7", "5 or seven"),
    ("18", r"18 \text{ to the nearest integer}"),
    ("18", "18 meters below sea level"),
]
WRONG_UNITS = [
    ("18", "18 minus two"),
    ("18", "18 plus tax"),
    ("18", "18 times two"),
    ("18", "18 (nineteen)"),
    ("18", "18 (nineteen eggs)"),
    ("18", r"18 \text{ (nineteen)}"),
    ("18", r"18 \text{ plus tax}"),
    ("18", r"18 \text{ by seven}"),
    ("18", "18 degrees below zero"),
    ("18", r"18/\text{5}"),
    ("5", r"5 \text{ or seven}"),
    ("5", "5 or seven"),
    ("41", "forty-two"),
    ("35", "twenty fifteen"),
]

# A letter with another letter, or with words that reject it, is no choice.
RIGHT_LETTERS = [
    ("A", "(A) 5"),
    ("A", "(A) None of these"),
    ("A", "A) not enough information"),
    ("A", "(A) Both I and II"),
    ("A", "(A) f(A) = 5"),
    ("B", r"\text{(B) False}"),
]
WRONG_LETTERS = [
    ("A", "(A) or (B)"),
    ("A", "(A), (B)"),
    ("A", "(A) and (B)"),
    ("A", "(A) or B"),
    ("A", "A) 5 or B) 6"),
    ("A", "(A) 5, (B) 6"),
    ("A", "(A) false"),
    ("A", "(A) is wrong"),
]

# A quantity of two units equals one of any of its kind; a number without a unit is in the largest.
RIGHT_QUANTITIES = [
    (r"7 \text{ hours and } 30 \text{ minutes}", "450 minutes"),
    ("7 hours 30 minutes", "7.5"),
    ("5 feet 6 inches", "66 inches"),
    ("3 dollars 50 cents", "350 cents"),
    ("3 dollars 50 cents", r"\$3.50"),
    ("1 day 2 hours", "26 hours 0 minutes"),
    ("7.5 hours", "7 hours 30 minutes"),
]
WRONG_QUANTITIES = [
    ("7 hours 30 minutes", "7.5 minutes"),
    ("7 hours 30 minutes", "7.5 days"),
    ("3 dollars 50 cents", "3.5 cents"),
    ("5 feet 6 inches", "5 hours 30 minutes"),
    ("7 hours 30 minutes", "7.5 eggs"),
]

# The numbers of a chain agree.
RIGHT_CHAINS = [
    ("5", "2+3=5"),
    ("18", r"16 - 3 - 4 = 9 \cdot 2 = 18"),
    ("0.33", r"\frac{1}{3}=0.33"),
    ("17.32", r"10\sqrt{3} \approx 17.32"),
    (r"\frac13", r"\frac13 \approx 0.33"),
]
WRONG_CHAINS = [
    ("5", "7=5"),
    ("5", "x=7=5"),
    ("5", "2+2=5"),
    ("5", r"5 \approx 7"),
    ("17.32", r"5 \approx 17.32"),
]

# Nothing, days and numbers in words.
RIGHT_WORDS = [
    (r"\emptyset", "x<1 and x>3"),
    ("no solution", "x<1 and x>3"),
    ("x<-1 and x>4", "x<-1 or x>4"),
    ("March 5", "5 March"),
    ("March 5", "March 5th"),
    ("5 March", "March 5"),
    ("three", "3"),
]
WRONG_WORDS = [
    (r"\emptyset", "x<1 or x>3"),
    ("x>1", r"\emptyset"),
    ("5 March", "5 April"),
    ("March 5", "March 6"),
    ("three", "4"),
    ("three", r"3 \text{ or } 4"),
    ("=", "<"),
    ("=", "x=5"),
]

RIGHT = [*RIGHT_UNKNOWNS, *RIGHT_PAIRS, *RIGHT_UNITS, *RIGHT_LETTERS, *RIGHT_QUANTITIES, *RIGHT_CHAINS, *RIGHT_WORDS]
WRONG = [*WRONG_UNKNOWNS, *WRONG_PAIRS, *WRONG_UNITS, *WRONG_LETTERS, *WRONG_QUANTITIES, *WRONG_CHAINS, *WRONG_WORDS]


def reward_of_boxed(reference: str, answer: str) -> float:
    return reward_of("math", reference, rf"So the answer is $\boxed{{{answer}}}$.")


def test_an_answer_without_contradiction_is_right() -> None:
    assert [pair for pair in RIGHT if reward_of_boxed(*pair) != 1.0] == []


def test_an_answer_that_hedges_or_contradicts_itself_is_wrong() -> None:
    assert [pair for pair in WRONG if reward_of_boxed(*pair) != 0.0] == []


# (completion, reward) where B is right, of options with texts.
CHOICES = [
    ("The answer is (B) Rome.", 1.0),
    ("B, and C is wrong", 1.0),
    ("B. It cannot be A or C.", 1.0),
    ("B. Rome, since A and C are not in Italy", 1.0),
    ("So it must be B rather than C.", 1.0),
    ("The answer is (B) Rome or (C) Paris", 0.0),
    ("B) Rome and C) Paris", 0.0),
    ("I'd go with B, or perhaps C", 0.0),
    ("(B), (C)", 0.0),
    (r"\boxed{B, or C}", 0.0),
]


@pytest.mark.parametrize(("text", "reward"), CHOICES)
def test_a_letter_with_another_letter_is_no_choice(text: str, reward: float) -> None:
    assert reward_of("choice", "B", text, ["London", "Rome", "Paris", "Oslo"]) == reward
