r"""Where an answer stands in a text, and the forms of options, boxed integers and numbers after ####."""

from __future__ import annotations

import pytest

from sapo.data import Prompt
from sapo.tasks.verifiers.registry import build_verifier

WORDS = ("red", "green", "blue", "pink")
NUMBERS = ("3", "6", "9", "12")

# (reference, completion, reward)
TEXTS = [
    ("18", "She pays $3.00 for each and $5.00 more, $18 in all.", 1),
    ("18", "It costs $18.", 1),
    ("18", "I paid $12, then $6. In total I paid $18.00", 1),
    ("5", "#### Step 1\nAdd.\n#### Step 2\nWe get 5.\n", 1),
    ("5", "#### Step 1: add\nThe sum is 5.\n\n#### Answer\n5", 1),
    ("5", "### Final Answer\n\n5", 1),
    ("5", "## Answer\n\n$5$", 1),
    ("5", "#### 5\n\nLet me know if you need more help!", 1),
    ("5", "#### $5$", 1),
    ("5", "####5", 1),
    ("5", "#### x = 5", 1),
    ("5", "#### 6", 0),
    ("5", "Adding 2 and 3.\n\n5", 1),
    ("5", "Adding 2 and 3.\n\n**5**", 1),
    (r"\frac{2}{3}", "We divide.\n\n2/3", 1),
    ("x+2", "We simplify.\n\nx + 2", 1),
    ("(1,5)", "So the point:\n\n(1, 5)", 1),
    ("5", "<answer>5</answer>", 1),
    ("5", r"<answer>\boxed{5}</answer>", 1),
    ("5", r"\boxed{4} no <answer>5</answer>", 1),
    ("4", r"\boxed{4} no <answer>5</answer>", 0),
    ("5", "<answer>The answer is 5.</answer>", 1),
    ("5", "<answer> 5 apples </answer>", 1),
    (r"\frac{2}{7}", r"<think>x</think><answer>$\frac{2}{7}$</answer>", 1),
    ("2,3", "<answer>x=2 or x=3</answer>", 1),
    ("yes", "<answer>Yes</answer>", 1),
    ("5", r"<think>\boxed{5}</think> I do not know.", 0),
    ("5", r"<think>\boxed{5}", 0),
    ("5", r"Let me think. \boxed{4}</think> \boxed{5}", 1),
    ("4", r"Let me think. \boxed{4}</think> \boxed{5}", 0),
    ("5", "The answer to this question is 5.", 1),
    ("5", "The answer should be 5", 1),
    ("5", "The final answer is:\n\n\\[5\\]", 1),
    ("5", "**Answer**: 5", 1),
    ("5", "Final Answer: **5**", 1),
    ("5", "Answer:\n5", 1),
    ("5", "The answer is 5 because 2+3=5.", 1),
    ("5", "The answer is 5, not 6.", 1),
    ("5", "The answer is not 5 but 6.", 0),
    ("5", "So the answer is $5$ and not $6$.", 1),
    ("-5", "The answer is -5.", 1),
    ("0.5", "The answer is .5", 1),
    ("1234.5", "The answer is $1,234.50.", 1),
    ("5", "= 5", 1),
    ("5", "x = 5", 1),
    ("5", "Therefore $x=5$.", 1),
    ("5", r"Thus \(x = 5\)", 1),
    ("12", "He has 12 apples left.", 1),
    ("12", "He has 12 of 20 apples left.", 0),
    ("10000", "So 10 000 people came.", 1),
    ("10000", "The answer is 10 000 people.", 1),
    ("5", "Answer: x = 5", 1),
    (r"\frac{1}{2}", r"The answer is one half, i.e. $\frac12$.", 1),
    ("5", r"\boxed{5} is my answer. \boxed{}", 1),
    ("5", r"\boxed{\text{5 apples}}", 1),
    ("2, 3", r"\boxed{2}, \boxed{3}", 1),
    ("5", r"The answer is $\boxed{5}$. Check: $2+3=5$, $10/2=5$; so \boxed{5} it is", 1),
    ("3", "The answer is 3 4", 0),
    ("7", "$$x = 7$$", 1),
    ("7", "Hence, $n = 7$ is the answer.", 1),
    ("7", "So the total is $7$ dollars, i.e. 700 cents.", 1),
    ("42", "42", 1),
    ("42", "42.", 1),
    ("42", "**42**", 1),
    ("42", r"\(42\)", 1),
    ("42", "43", 0),
    (r"\frac{1}{2}", r"\frac{1}{2}", 1),
]
# (verifier, reference, completion, options, reward)
FORMS = [
    ("choice", "C", "The answer is C because blue fits.", WORDS, 1),
    ("choice", "C", "The correct answer is C since ...", WORDS, 1),
    ("choice", "C", "Option C", WORDS, 1),
    ("choice", "C", "Option C is correct.", WORDS, 1),
    ("choice", "C", "The correct choice is (C).", WORDS, 1),
    ("choice", "C", "C\n\nBecause blue.", WORDS, 1),
    ("choice", "C", "I choose C.", WORDS, 1),
    ("choice", "C", "The answer is option C: blue", WORDS, 1),
    ("choice", "C", "The answer is option D.", WORDS, 0),
    ("choice", "C", "The answer is not C.", WORDS, 0),
    ("choice", "C", "It is either B or C.", WORDS, 0),
    ("choice", "C", "The answer is B or C", WORDS, 0),
    ("choice", "C", "The answer is C or B", WORDS, 0),
    ("choice", "C", "The answer is C and D", WORDS, 0),
    ("choice", "C", "C, D", WORDS, 0),
    ("choice", "C", r"\boxed{C, D}", WORDS, 0),
    ("choice", "C", r"\boxed{\text{C: blue}}", WORDS, 1),
    ("choice", "C", r"\boxed{C - blue}", WORDS, 1),
    ("choice", "C", r"\boxed{C - green}", WORDS, 0),
    ("choice", "C", r"\boxed{C) blue}", WORDS, 1),
    ("choice", "C", r"\boxed{\text{Option C}}", WORDS, 1),
    ("choice", "C", r"\boxed{\mathrm{C}}", WORDS, 1),
    ("choice", "C", r"\boxed{blue}", WORDS, 1),
    ("choice", "C", r"\boxed{\text{green}}", WORDS, 0),
    ("choice", "C", "**C**: blue", WORDS, 1),
    ("choice", "C", "The answer is **C**.", WORDS, 1),
    ("choice", "C", "Answer: **C. blue**", WORDS, 1),
    ("choice", "C", "(C)", WORDS, 1),
    ("choice", "C", r"<think>\boxed{C}</think>\boxed{D}", WORDS, 0),
    ("choice", "C", "<answer>C</answer>", WORDS, 1),
    ("choice", "C", "<answer>D</answer>", WORDS, 0),
    ("choice", "C", "The answer is C. A is too small, B is out.", WORDS, 1),
    ("choice", "C", "C is wrong, so the answer is D.", WORDS, 0),
    ("choice", "C", "C is wrong. D", WORDS, 0),
    ("choice", "A", "A good question. The answer is B.", WORDS, 0),
    ("choice", "A", "A", WORDS, 1),
    ("choice", "A", "A nice puzzle\nno idea", WORDS, 0),
    ("choice", "C", "The answer is 9.", NUMBERS, 1),
    ("choice", "C", "The answer is 6.", NUMBERS, 0),
    ("choice", "C", r"\boxed{9}", NUMBERS, 1),
    ("choice", "C", r"\boxed{(C) 9}", NUMBERS, 1),
    ("choice", "C", r"\boxed{(C) 6}", NUMBERS, 0),
    ("choice", "C", "Answer: C) 9", NUMBERS, 1),
    ("choice", "C", "**Answer: (C) 9**", NUMBERS, 1),
    ("choice", "C", "Correct answer: C", NUMBERS, 1),
    ("choice", "C", "The best option is C, as shown.", NUMBERS, 1),
    ("choice", "C", "Answer: C, not D", NUMBERS, 1),
    ("choice", "C", "The answer is C!", NUMBERS, 1),
    ("choice", "C", "the answer is c", NUMBERS, 1),
    ("choice", "B", "Answer is B - the second", WORDS, 1),
    ("choice", "B", "The answer is B — green", WORDS, 1),
    ("choice", "B", "Therefore, the correct option is **B**.", WORDS, 1),
    ("choice", "B", "Choice B", WORDS, 1),
    ("choice", "B", "My final answer is B", WORDS, 1),
    ("boxed_integer", "81", r"\boxed{a+b=81}", (), 1),
    ("boxed_integer", "81", r"\boxed{p + q + r = 1 + 30 + 50 = 81}", (), 1),
    ("boxed_integer", "81", r"\boxed{81 \text{ ways}}", (), 1),
    ("boxed_integer", "81", r"\boxed{\text{Final Answer: } 81}", (), 1),
    ("boxed_integer", "81", r"\boxed{081}", (), 1),
    ("boxed_integer", "81", r"\boxed{3^4}", (), 1),
    ("boxed_integer", "81", r"\boxed{81.5}", (), 0),
    ("boxed_integer", "81", r"\boxed{80+2}", (), 0),
    ("boxed_integer", "81", r"\boxed{x=81, y=3}", (), 0),
    ("boxed_integer", "81", r"\boxed{81 or 82}", (), 0),
    ("boxed_integer", "81", r"\boxed{\mathbf{81}}", (), 1),
    ("boxed_integer", "81", r"\boxed{\large 81}", (), 1),
    ("boxed_integer", "81", r"\boxed{81^\circ}", (), 1),
    ("hash_answer", "30", "#### 30 apples", (), 1),
    ("hash_answer", "30", "#### $30.00", (), 1),
    ("hash_answer", "30", "#### 30.", (), 1),
    ("hash_answer", "30", "#### **30**", (), 1),
    ("hash_answer", "30", "#### x = 30", (), 1),
    ("hash_answer", "30", "#### 30\nDone.", (), 1),
    ("hash_answer", "30", "#### 31", (), 0),
    ("hash_answer", "30", "#### 30 or 31", (), 0),
    ("hash_answer", "30", r"#### \boxed{30}", (), 1),
    ("hash_answer", "30", "#### $30$", (), 1),
    ("hash_answer", "30", "#### €30", (), 1),
    ("hash_answer", "30", "#### 30 minutes", (), 1),
    ("hash_answer", "30", "#### 30 km/h", (), 1),
    ("hash_answer", "30", "#### The answer is 30", (), 1),
    ("hash_answer", "30", "#### 30%", (), 1),
    ("hash_answer", "30", "30", (), 0),
    ("hash_answer", "1500", "#### 1,500", (), 1),
    ("hash_answer", "1500", "#### 1 500", (), 1),
    ("last_number", "30", "so 30%", (), 1),
    ("last_number", "30", "It is 30.", (), 1),
    ("last_number", "30", "30 (of 40)", (), 0),
    ("last_number", "25000", "about 25 000 people", (), 1),
    ("last_number", "25000", "25,000", (), 1),
    ("last_number", "-7", "−7", (), 1),
    ("last_number", "30", "<think>30</think> I cannot say", (), 0),
    ("last_number", "30", "2.5e1 and 3e1", (), 1),
    ("last_number", "0.5", "1/2", (), 1),
    ("last_number", "30", "$30", (), 1),
    ("last_number", "3", "The ratio is 2:3", (), 1),
    ("last_number", "300", "12 boxes of 300", (), 1),
]


@pytest.fixture(scope="module")
def judge():
    """Return the reward of a completion for a verifier and a reference."""
    made = {}

    def reward(spec, reference, text, options=()):
        if spec not in made:
            limits = {"minimum": 0, "maximum": 999} if spec == "boxed_integer" else {}
            made[spec] = build_verifier({"name": spec, **limits})
        metadata = {"options": list(options)} if options else {}
        return made[spec](text, Prompt(id=0, task="t", text="?", answer=reference, metadata=metadata)).reward

    return reward


def test_every_answer_is_found_in_its_text(judge):
    wrong = [case for case in TEXTS if judge("math", case[0], case[1]) != case[2]]
    assert wrong == []


def test_options_integers_and_numbers_are_read_in_every_form(judge):
    wrong = [case for case in FORMS if judge(*case[:-1]) != case[-1]]
    assert wrong == []
