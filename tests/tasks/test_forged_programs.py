"""Programs that try to earn what they did not compute, and honest ones that look alike, under both sandboxes.

They stand in programs.txt. Each forged program computes nothing right: it lies in its operators, shadows what the tests
call, or looks for the tests and the channel. Each honest one returns something else than a plain number.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.sandbox import choice
from sapo.tasks.verifiers.code import code
from sapo.tasks.verifiers.code_tests import CodeTests

LIAR = """
class E:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __hash__(self): return 7
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __mul__ = __getitem__ = __sub__
    def __abs__(self): return self
    def __round__(self, digits=0): return self
    def __bool__(self): return True
    def __len__(self): return 3
    def __iter__(self): return iter([self, self, self])
    def __float__(self): return 3.0
    def __int__(self): return 3
"""
ROOT = CodeTests.from_humaneval(
    "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef root(xs):\n    '''Return a root.'''\n",
    "def check(candidate):\n    for xs in ([1, 2], [-6, 3]):\n        assert abs(poly(xs, candidate(xs))) < 1e-4\n",
    "root",
)
FOUR = CodeTests("functional", function="f", cases=(("3", "4"),))
TWELVE = CodeTests("stdin", cases=(("1", "12"),))
WRITES = "import os\nfor fd in range(1, 20):\n    try: os.write(fd, b'{\"value\": 13}\\n')\n    except OSError: pass\n"
MORE_FORGED = {
    "a helper of the prefix replaced": ("def poly(xs, x): return 0\ndef root(xs): return 5", ROOT),
    "a liar for a root": (f"{LIAR}def root(xs): return E()", ROOT),
    "a report written to every descriptor": (f"{WRITES}def f(x): return 0", FOUR),
    "a liar where JSON is returned": (f"{LIAR}def f(x): return E()", FOUR),
    **{f"prints {word}": (f"print('{word}')", TWELVE) for word in ("12e0", "nan", "1_2", "sNaN", "0x0c", "1.2e1")},
}
MORE_HONEST = {
    "a future import below a prefix": (
        "from __future__ import annotations\ndef root(xs: list[float]) -> float: return -xs[0] / xs[1]",
        ROOT,
    ),
    "a guard that fails": ("def f(x): return x + 1\nif __name__ == '__main__':\n    assert f(int(input())) == 0", FOUR),
    "a float as Python prints it": ("print(12.0)", TWELVE),
}


def programs(kind: str) -> dict[str, tuple[str, CodeTests]]:
    """Return the programs of programs.txt of a kind, by title."""
    found = {}
    for section in Path(__file__).with_name("programs.txt").read_text().split("\n=== ")[1:]:
        title, _, rest = section.partition("\n")
        source, _, tests = rest.partition("\n---\n")
        paragraphs = [part.strip("\n") for part in tests.split("\n\n") if part.strip()]
        setup = paragraphs.pop(0).removeprefix("setup:\n") if paragraphs[0].startswith("setup:") else ""
        if title.startswith(f"{kind}: "):
            found[title] = (source.replace("LIAR\n", LIAR), CodeTests.from_mbpp(paragraphs, setup=setup))
    return found


FORGED = programs("forged") | MORE_FORGED
HONEST = programs("honest") | MORE_HONEST


@pytest.fixture(params=choice.BACKENDS)
def backend(request, monkeypatch):
    """Each backend alone."""
    monkeypatch.setattr(choice, "BACKENDS", (request.param,))
    try:
        code.prepare()
    except TaskError as error:
        pytest.skip(str(error))


def judge(source: str, tests: CodeTests) -> Score:
    return code(f"```python\n{source}\n```", Prompt(id=0, task="t", text="?", metadata={"tests": tests.to_json()}))


@pytest.mark.slow
def test_no_forged_program_passes_a_single_test(backend):
    assert len(FORGED) > 50
    assert {
        name: s for name, case in FORGED.items() if (s := judge(*case)).reward or s.figures.get("tests_passed")
    } == {}


@pytest.mark.slow
def test_honest_programs_pass_whatever_they_return(backend):
    assert len(HONEST) > 40
    assert {name: s for name, case in HONEST.items() if (s := judge(*case)).reward != 1.0} == {}


def test_linked_lists_and_trees_are_arguments_and_results():
    listed = CodeTests("functional", function="tail", cases=(("[1, 2, 3]", "[2, 3]"), ("[1]", "[]")))
    source = "class Solution:\n    def tail(self, head: Optional[ListNode]) -> Optional[ListNode]:\n"
    assert judge(f"{source}        return head.next or []", listed).reward == 1.0
    tree = CodeTests("functional", function="mirror", cases=(("[1, 2, 3, null, 4]", "[1, 3, 2, null, null, 4]"),))
    mirror = (
        "class Solution:\n    def mirror(self, root: 'TreeNode'):\n        if root:\n"
        "            root.left, root.right = self.mirror(root.right), self.mirror(root.left)\n        return root"
    )
    assert judge(mirror, tree).reward == 1.0
    assert judge(mirror.replace("self.mirror(root.left)", "root.left"), tree).reward == 0.0


def test_a_tolerance_and_a_checker_are_settings_of_the_tests():
    third = CodeTests("stdin", cases=(("", "0.333333"),))
    assert judge("print(1 / 3)", third).reward == 0.0
    near = CodeTests("stdin", cases=(("", "0.333333"),), float_tolerance=1e-5)
    assert [judge(f"print({value})", near).reward for value in ("1 / 3", "0.334")] == [1.0, 0.0]
    checker = "def check(given, got, expected):\n    return sorted(got) == [1, 2] and given == [[2]]"
    either = CodeTests("functional", function="f", cases=(("[2]", "[1, 2]"),), checker=checker)
    assert [judge(f"def f(x): return {value}", either).reward for value in ("[2, 1]", "[1, 1]")] == [1.0, 0.0]
    with pytest.raises(TaskError, match="a checker belongs to stdin or functional tests"):
        CodeTests("unit", statements=("assert f()",), checker=checker)
