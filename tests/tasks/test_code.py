"""The verifier `code` on small programs of every kind, right, wrong and dishonest."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from sapo.data import Completion, Prompt, Score, Status
from sapo.errors import TaskError
from sapo.sandbox import SandboxError, SandboxUnavailable, choice
from sapo.tasks import load_verifier
from sapo.tasks.verifiers import code as code_module
from sapo.tasks.verifiers.code import code
from sapo.tasks.verifiers.code_outputs import same_output
from sapo.tasks.verifiers.code_program import Program, find_program
from sapo.tasks.verifiers.code_tests import CodeTests
from sapo.tasks.workers.pool import WorkerPool
from sapo.tasks.workers.wire import Home, Job
from sapo.utils.signals import ANNOUNCING

SUM = CodeTests("stdin", cases=(("1 2\n", "3\n"), ("10 -4\n", "6\n"), ("0 0\n", "0\n")), cpu_seconds=2)
ADD = CodeTests("functional", cases=(("1\n2", "3"), ('"a"\n"b"', '"ab"')), function="add", cpu_seconds=1)
SQUARE = CodeTests.from_mbpp(["assert square(2) == 4", "assert square(-3) == 9"], cpu_seconds=1)
HALVE = CodeTests.from_humaneval(
    'def helper(x):\n    return x / 2\n\ndef halve(x: float) -> float:\n    """Half of x."""\n',
    "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(3) == helper(3)\n",
    "halve",
    cpu_seconds=2,
)


@pytest.fixture(autouse=True, scope="module")
def needs_a_sandbox():
    try:
        code.prepare()
    except TaskError as error:
        pytest.skip(str(error))


def judge(text: str, tests: CodeTests) -> Score:
    return code(text, Prompt(id=0, task="t", text="?", metadata={"tests": tests.to_json()}))


def block(source: str) -> str:
    return f"I would write\n\n```python\n{source}\n```\n\nand that is all."


def shows(score: Score) -> tuple[float, str, float | None]:
    return score.reward, score.status.value, score.figures.get("tests_passed")


# ------------------------------------------------------------------------------------------------ finding a program


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```python\nx\n```", "x\n"),
        ("```py\nx\n```", "x\n"),
        ("```Python3\nx\n```", "x\n"),
        ("a\n```python\nx\n```\nb\n```python\ny\n```\nc", "y\n"),
        ("```python\nx\n```\n```\noutput\n```", "x\n"),  # an unmarked block after it is its output
        ("```\nx\n```\n```bash\npip install x\n```", "x\n"),
        ("```python\nx\n", "x\n"),
        ("```python\nx = '''\n``\n'''\n```", "x = '''\n``\n'''\n"),
        ("  ```python\nx\n  ```", "x\n"),
        ("````python title=a.py\nx\n````", "x\n"),
        ("```python\r\nx\r\n```", "x\r\n"),
    ],
)
def test_the_last_python_block_is_the_program(text, source):
    assert find_program(text) == Program(source, fenced=True)


@pytest.mark.parametrize(
    "text", ["", "  \n", "```python\n```", "```python\n\n```", "```bash\nls\n```", "```json\n{}\n```"]
)
def test_blank_text_and_blocks_of_other_languages_are_no_program(text):
    assert find_program(text) is None
    assert shows(judge(text, SUM)) == (0.0, "unparseable", None)


def test_text_without_a_block_is_the_program_itself():
    assert find_program("print(1)\n") == Program("print(1)\n", fenced=False)
    assert judge("a, b = map(int, input().split())\nprint(a + b)", SUM).reward == 1.0


@pytest.mark.parametrize("tests", [SUM, ADD, SQUARE, HALVE], ids=lambda t: t.kind)
def test_prose_is_unparseable_and_a_broken_block_is_wrong(tests):
    prose = judge("The answer is 42, I think.", tests)
    assert shows(prose) == (0.0, "unparseable", None)
    assert "SyntaxError" in prose.detail
    assert shows(judge(block("def f(:"), tests)) == (0.0, "scored", 0.0)


def test_a_program_as_long_as_a_book_is_unparseable():
    assert judge(block("x = 1\n" * 100_000), SUM).status is Status.UNPARSEABLE


# ---------------------------------------------------------------------------------------------------- stdin tests


@pytest.mark.parametrize(
    "source",
    [
        "a, b = map(int, input().split())\nprint(a + b)",
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "print(f'{sum(map(float, input().split())):.2f}')",  # equal as numbers
        "print('  ', sum(map(int, open(0).read().split())), '\\n\\n')",
        "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
        "print(sum(map(int, input().split())))\nimport sys\nsys.exit(1)",  # an exit of its own, as LiveCodeBench has it
        "print(reduce(add, map(int, stdin.readline().split())))",  # names that only the preamble has
        "from __future__ import annotations\nprint(sum(map(int, input().split())))",
        "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "t = threading.Thread(target=lambda: print(sum(map(int, input().split()))))\nt.start()\nt.join()",
    ],
)
def test_a_right_program_passes_the_stdin_tests(source):
    assert judge(block(source), SUM) == Score(1.0, figures={"tests_passed": 1.0})


@pytest.mark.parametrize(
    ("source", "share", "detail"),
    [
        ("print(3)", 1 / 3, "test 2: printed '3', expected '6'"),
        ("pass", 0.0, "test 1: printed '', expected '3'"),
        ("a, b = map(int, input().split())\nprint(a + b, 'x')", 0.0, "test 1: printed '3 x'"),
        ("a, b = map(int, input().split())\nprint(a // b + 3)", 1 / 3, "test 2: printed"),
        ("a, b = map(int, input().split())\nprint(a + b)\na / b", 2 / 3, "test 3: exit code 1: ZeroDivisionError"),
        ("raise ValueError('no\\nidea')", 0.0, "test 1: exit code 1: idea"),
        ("import os\nprint(3)\nos._exit(7)", 0.0, "test 1: exit code 7"),
        ("import os\nos.abort()", 0.0, "test 1: killed by SIG"),
        ("x = [0] * 10**10", 0.0, "test 1: out of memory"),
        ("undefined_name", 0.0, "NameError"),
        ("x = '\\ud800'\nprint(x)", 0.0, "UnicodeEncodeError"),
        ("print('" + "\ud800" + "')", 0.0, "exit code 1"),
        ("x\0y", 0.0, "null byte"),
    ],
)
def test_a_wrong_program_is_scored_with_its_share_and_its_first_failure(source, share, detail):
    score = judge(block(source), SUM)
    assert shows(score) == (0.0, "scored", share)
    assert detail in score.detail
    assert "\n" not in score.detail


def test_a_program_out_of_time_is_wrong_and_its_other_tests_are_not_run():
    source = "a, b = map(int, input().split())\nprint(a + b)\nwhile a == 10: pass"
    score = judge(block(source), CodeTests("stdin", cases=SUM.cases, cpu_seconds=1))
    assert shows(score) == (0.0, "scored", None)  # no share, since the third was not measured
    assert score.detail == "test 2: timed out"


def test_without_partial_a_wrong_program_costs_one_run(monkeypatch):
    runs = []
    monkeypatch.setattr(
        code_module, "run_program", lambda *a, run=code_module.run_program, **k: (runs.append(a), run(*a, **k))[1]
    )
    score = judge(block("print(7)"), CodeTests("stdin", cases=SUM.cases, partial=False))
    assert (shows(score), len(runs)) == ((0.0, "scored", None), 1)


@pytest.mark.parametrize(
    ("printed", "expected", "equal"),
    [
        ("1\n2\n", "1\n2", True),
        ("  1 \n 2", "1\n2\n\n", True),
        ("1\r\n2\r\n", "1\n2\n", True),
        ("1 2", "1\n2", False),
        ("1\n\n2", "1\n2", False),
        ("1  2", "1 2", True),  # numbers, word by word
        ("a  b", "a b", False),
        ("1.0", "1", True),
        ("1e+16", "10000000000000000", True),  # as Python prints a float
        ("1e-05", "0.00001", True),
        ("1e2", "1e2", True),
        ("1e2", "100", False),  # nobody prints so but to please a parser
        ("100", "1e2", True),  # whoever wrote what is expected may write so
        ("100.0 -5", "+1.0E2 -.5e+1", True),
        ("100", "1e 2", False),
        ("1", "1e999", False),  # no float, and its difference from 1 no Decimal
        ("0.1", "0.10000000000000000001", False),  # exactly: floats would call them equal
        ("50000000000000000", "50000000000000001", False),
        ("nan", "nan", True),  # the same text
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("YES", "Yes", False),
        ("1 a", "1.0 a", False),
        ("", "", True),
        ("", "0", False),
        ("1e999999999999999999", "1", False),
    ],
)
def test_outputs_are_compared_as_livecodebench_does(printed, expected, equal):
    assert same_output(printed, expected) is equal
    assert same_output(printed, expected, 1e-30) is equal, "a tolerance that no two of these are within"


# ------------------------------------------------------------------------------------------------ functional tests


@pytest.mark.parametrize(
    "source",
    [
        "class Solution:\n    def add(self, a, b):\n        return a + b",
        "def add(a, b):\n    return a + b",
        "class Solution:\n    def add(self, a: List[int], b: Optional[int]): return a + b",  # no imports
        "def add(a, b):\n    print('debugging')\n    return a + b",
        "class Solution:\n    def __init__(self): self.n = 0\n    def add(self, a, b): return a + b",
    ],
)
def test_a_right_function_passes_the_functional_tests(source):
    assert judge(block(source), ADD) == Score(1.0, figures={"tests_passed": 1.0})


@pytest.mark.parametrize(
    ("source", "share", "detail"),
    [
        ("def add(a, b): return 3", 0.5, "test 2: returned 3, expected ab"),
        ("def add(a, b): return a - b", 0.0, "test 1: returned -1, expected 3"),
        ("def sub(a, b): return a - b", 0.0, "no attribute 'add'"),
        ("def add(a): return a", 0.0, "test 1: TypeError"),
        ("def add(a, b): return {a, b}", 0.0, "test 1: TypeError: Object of type set"),
        ("def add(a, b): return a + b if a == 1 else 1 / 0", 0.5, "test 2: ZeroDivisionError"),
        ("def add(a, b): raise SystemExit", 0.0, "test 1: SystemExit"),
        ("import os\ndef add(a, b): os._exit(0)", None, "test 1: no result"),
        ("def add(a, b):\n    while True: pass", None, "test 1: timed out"),
        ("while True: pass", None, "test 1: timed out"),
        ("1 / 0", 0.0, "ZeroDivisionError"),
        ("def add(a, b): print('{\"value\": 3}')", 0.0, "returned None"),
        ("class Solution:\n    def __init__(self, x): pass\n    def add(self, a, b): return a + b", 0.0, "TypeError"),
    ],
)
def test_a_wrong_function_is_scored_with_its_share(source, share, detail):
    score = judge(block(source), ADD)
    assert shows(score) == (0.0, "scored", share)
    assert detail in score.detail


NODES = CodeTests("functional", cases=(("[]", "[]"), ("[1]", "[]"), ("[1,2,1]", "[2]")), function="drop", cpu_seconds=1)
DROP = """
class Solution:
    def drop(self, head{given}){result}:
        values = []
        while head:
            values.append(head.val)
            head = head.next
        made = None
        for value in reversed([v for v in values if v != 1]):
            made = ListNode(value, made)
        return made
"""


@pytest.mark.parametrize(
    ("given", "result"),
    [(": Optional[ListNode]", " -> Optional[ListNode]"), (": ListNode", ""), (": 'ListNode'", " -> 'ListNode'")],
)
def test_none_is_the_empty_list_where_a_function_is_of_linked_lists(given, result):
    assert shows(judge(block(DROP.format(given=given, result=result)), NODES)) == (1.0, "scored", 1.0)


def test_none_is_no_list_elsewhere_and_no_other_value():
    empty = CodeTests("functional", cases=(("[1]", "[]"),), function="f", cpu_seconds=1)
    assert judge(block("def f(x): return None"), empty).reward == 0.0
    assert judge(block("def f(x: list) -> list: return None"), empty).reward == 0.0
    wrong = CodeTests("functional", cases=(("[1]", "[1]"),), function="f", cpu_seconds=1)
    assert judge(block("def f(x: ListNode) -> ListNode: return None"), wrong).reward == 0.0
    null = replace(wrong, cases=(("[1]", "null"),))
    assert judge(block("def f(x: TreeNode) -> TreeNode: return None"), null).reward == 1.0


def test_empty_trees_among_several_are_empty_lists():
    tests = CodeTests("functional", cases=(("[1]", "[[1], []]"), ("[]", "[[], []]")), function="f", cpu_seconds=1)
    source = "def f(root: Optional[TreeNode]) -> List[Optional[TreeNode]]:\n    return [root, None]"
    assert shows(judge(block(source), tests)) == (1.0, "scored", 1.0)


def test_integers_of_50001_digits_are_arguments_and_results_of_functions():
    limit = sys.get_int_max_str_digits()
    power = "1" + "0" * 50_000  # 10^50000
    tests = CodeTests("functional", cases=((power, power[:-1] + "1"), ("1", "2")), function="f", cpu_seconds=2)
    assert shows(judge(block("def f(x): return x + 1"), tests)) == (1.0, "scored", 1.0)
    assert shows(judge(block("def f(x): return x + 1 + (x > 9)"), tests)) == (0.0, "scored", 0.5)
    loose = replace(tests, float_tolerance=0.1)
    assert judge(block("def f(x): return x + 1"), loose).reward == 1.0
    assert judge(block("def f(x): return x + 2"), loose).reward == 0.0
    checked = replace(tests, cases=tests.cases[:1], checker="def check(given, got, expected): return got == expected")
    assert judge(block("def f(x): return x + 1"), checked).reward == 1.0
    assert sys.get_int_max_str_digits() == limit


def test_results_are_compared_as_values():
    tests = CodeTests("functional", cases=(("[3, 1]", "[[1, 3], 2.0, null, true]"),), function="f")
    assert judge(block("def f(x): return (tuple(sorted(x)), 2, None, True)"), tests).reward == 1.0


# ------------------------------------------------------------------------------------------------------ unit tests


@pytest.mark.parametrize(
    ("text", "tests"),
    [
        (block("def square(x): return x * x"), SQUARE),
        (block("import sys\ndef square(x): return x * x\nprint(square(2))\nsys.exit(0)"), SQUARE),
        ("    return x / 2\n", HALVE),
        ("    return helper(x)\n", HALVE),
        (block("def halve(x: float) -> float:\n    return x * 0.5"), HALVE),
        (block("    return x / 2"), HALVE),
        (block("return x / 2"), HALVE),  # a body that lost its indentation
        (block("class Halver:\n    def __call__(self, x): return x / 2\nhalve = Halver()"), HALVE),
        (block("half = .5\nasync def other(): pass\ndef halve(x):\n    return x * half"), HALVE),
    ],
)
def test_a_right_program_passes_the_unit_tests(text, tests):
    assert judge(text, tests) == Score(1.0, figures={"tests_passed": 1.0})


@pytest.mark.parametrize(
    ("source", "share", "detail"),
    [
        ("def square(x): return 4", 0.5, "AssertionError"),
        ("def square(x): return x", 0.0, "AssertionError"),
        ("def other(x): return x", 0.0, "NameError: name 'square' is not defined"),
        ("def square(x): return 1 / 0", 0.0, "ZeroDivisionError"),
        ("1 / 0", 0.0, "ZeroDivisionError"),
        ("def square(x):\n    while True: pass", None, "timed out"),
        ("def square(x): return square(x)", 0.0, "RecursionError"),
    ],
)
def test_a_program_that_fails_unit_tests_is_scored_with_its_share(source, share, detail):
    score = judge(block(source), SQUARE)
    assert shows(score) == (0.0, "scored", share)
    assert detail in score.detail


ALWAYS_EQUAL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
def square(x): return {value}
"""


TO_ALL_DESCRIPTORS = """
import os
for descriptor in range(3, 20):
    for number in range(2):
        try:
            os.write(descriptor, b'{"number": %d, "token": "0"}\\n' % number)
        except OSError:
            pass
os._exit(0)
"""


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "quit()",
        "def square(x): raise SystemExit(0)",
        "import os\ndef square(x): os._exit(0)",
        "import os\ndef square(x): os.execv('/usr/bin/true', ['true'])",
        "import os, signal\ndef square(x): os.kill(os.getpid(), 9)",
        'print(\'passed\'); print(\'{"number": 0, "token": ""}\'); print(\'{"number": 1, "token": ""}\')',
        TO_ALL_DESCRIPTORS,
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\ndef square(x): return 1",
        "import atexit, os\natexit.register(os._exit, 0)\ndef square(x): return 1",
        "import sys\nsys.excepthook = lambda *a: None\ndef square(x): return 1",
        "def check(*a): pass\ndef square(x): return 1",
        ALWAYS_EQUAL.format(base="", value="Equal()"),
        ALWAYS_EQUAL.format(base="(int)", value="Equal(1)"),
        "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\nclass E(metaclass=M): pass\n"
        "def square(x): return E",
        "from unittest.mock import ANY\ndef square(x): return ANY",
        "from unittest.mock import ANY\nimport functools\n@functools.cache\ndef square(x): return ANY",
        ALWAYS_EQUAL.format(base="", value="0") + "    def __init__(self, x): pass\nsquare = Equal",
        ALWAYS_EQUAL.format(base="", value="0") + "class square:\n    def __new__(cls, x): return Equal()",
        ALWAYS_EQUAL.format(base="", value="0") + "class S:\n    def __call__(self, x): return Equal()\nsquare = S()",
        ALWAYS_EQUAL.format(base="", value="Equal()") + "Equal.__module__ = 'decimal'\nEqual.__qualname__ = 'Decimal'",
    ],
)
def test_a_program_cannot_pass_unit_tests_by_pretending(source):
    score = judge(block(source), SQUARE)
    assert score.reward == 0.0
    assert score.status is Status.SCORED


def test_an_equal_to_all_inside_a_list_does_not_pass_either():
    tests = CodeTests.from_mbpp(["assert square(2) == [{'a': 4}]"])
    assert judge(block("def square(x): return [{'a': 4}]"), tests).reward == 1.0
    assert judge(block(ALWAYS_EQUAL.format(base="", value="[{'a': Equal()}]")), tests).reward == 0.0


def test_replaced_builtins_do_not_reach_the_tests():
    tests = CodeTests.from_mbpp(["assert all(square(x) == x * x for x in range(9))", "assert len(square(2)) == 1"])
    source = "import builtins\nbuiltins.all = lambda xs: True\nbuiltins.len = lambda x: 1\ndef square(x): return 'ab'"
    score = judge(block(source), tests)
    assert (score.reward, score.status) == (0.0, Status.SCORED)


def test_a_class_of_the_programs_own_is_a_fine_argument():
    tests = CodeTests.from_mbpp(["assert total([Pair(1, 2), Pair(3, 4)]) == 10", "assert isinstance(Pair(1, 2), Pair)"])
    source = """
class Pair(object):
    def __init__(self, a, b):
        self.a, self.b = a, b
def total(pairs):
    return sum(pair.a + pair.b for pair in pairs)
"""
    assert judge(block(source), tests).reward == 1.0


def test_a_library_class_with_its_own_equality_is_a_fine_result():
    tests = CodeTests.from_mbpp(["assert f() == [Fraction(1, 2), Decimal(2), Counter('aa')]"])
    source = """
from fractions import Fraction
from decimal import Decimal
from collections import Counter
def f():
    return [Fraction(1, 2), Decimal(2), Counter(a=2)]
"""
    assert judge(block(source), tests).reward == 1.0


def test_setup_runs_before_each_unit_test():
    tests = CodeTests.from_mbpp(
        ["assert f(box) == 1", "assert f(box) == 1"], setup="box = [1]", imports=["import math"]
    )
    assert judge(block("def f(box): return box.pop()"), tests).reward == 1.0


# ---------------------------------------------------------------------------------------------- the schema, errors


@pytest.mark.parametrize("tests", [SUM, ADD, SQUARE, HALVE], ids=lambda t: t.kind)
def test_tests_survive_json(tests):
    assert CodeTests.from_json(json.loads(json.dumps(tests.to_json()))) == tests


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "stdio", "cases": [["", ""]]}, "kind='stdio'; did you mean 'stdin'"),
        ({"kind": "stdin"}, "stdin tests need cases; got none"),
        ({"kind": "unit", "cases": [["1", "2"]]}, "unit tests need statements; got none"),
        ({"kind": "functional", "cases": [["1", "2"]]}, "set function, or func_name in the metadata"),
        ({"kind": "stdin", "cases": [["1"]]}, "pairs of input and output"),
        ({"kind": "stdin", "cases": 3}, "as CodeTests.to_json gives them"),
        ({"kind": "stdin", "case": [["1", "1"]]}, "got 'case'; did you mean 'cases'"),
        ({"cases": [["1", "1"]]}, "as CodeTests.to_json gives them"),
        ({"kind": "stdin", "cases": [["1", "1"]], "cpu_seconds": 0}, "at least 1 s"),
    ],
)
def test_tests_of_another_form_are_refused_in_one_line(value, message):
    with pytest.raises(TaskError, match=message.replace("[", r"\[")) as caught:
        CodeTests.from_json(value)
    assert "\n" not in str(caught.value)


def test_livecodebench_columns_become_tests():
    public = json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}])
    tests = CodeTests.from_livecodebench(public, public, json.dumps({"func_name": "add"}), cpu_seconds=2)
    assert (tests.kind, tests.function, len(tests), tests.cpu_seconds) == ("functional", "add", 2, 2)
    assert judge(block("class Solution:\n    def add(self, a, b): return a + b"), tests).reward == 1.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("[]",), "got no tests"),
        (('[{"input": "", "output": "", "testtype": "files"}]',), "got files"),
        (('[{"input": "1", "output": "1", "testtype": "functional"}]', None, "{}"), "got no name"),
        (('[{"input": "1", "output": "1", "testtype": "functional"}]', None, "{"), "metadata must be JSON"),
    ],
)
def test_livecodebench_columns_of_another_form_are_refused(columns, message):
    with pytest.raises(TaskError, match=message):
        CodeTests.from_livecodebench(*columns)


@pytest.mark.parametrize("metadata", [{}, {"tests": None}, {"tests": "x"}])
def test_a_prompt_without_tests_is_refused(metadata):
    with pytest.raises(TaskError, match="set metadata\\['tests'\\]"):
        code("print(1)", Prompt(id=0, task="t", text="?", metadata=metadata))


def test_a_failure_of_the_sandbox_is_an_error_of_the_verifier(monkeypatch):
    from sapo.tasks.scoring import score_completions

    class Coding:
        name = "coding"
        verify = staticmethod(code)

    def fails(*arguments, **options):
        raise SandboxError("no room for another process")

    monkeypatch.setattr(code_module, "run_program", fails)
    prompt = Prompt(id=0, task="t", text="?", metadata={"tests": SUM.to_json()})
    (scored,) = score_completions(Coding(), prompt, [Completion((), (), "stop", block("print(3)"))])
    assert scored.score == Score(0.0, Status.VERIFIER_ERROR, "SandboxError: no room for another process")


def test_tests_that_outlast_the_budget_are_not_judged(monkeypatch):
    monkeypatch.setattr(code_module, "BUDGET_SECONDS", 0.001)
    with pytest.raises(SandboxError, match=r"3 tests take longer than 0.001 s: stopped before test 2"):
        judge(block("print(3)"), SUM)


def test_without_a_sandbox_a_run_is_refused_before_it_begins(monkeypatch):
    def refuses():
        raise SandboxUnavailable("none works here; apt-get install bubblewrap")

    monkeypatch.setattr(code_module, "choose_backend", refuses)
    with pytest.raises(TaskError, match="verifier 'code': none works here; apt-get install bubblewrap"):
        code.prepare()


@pytest.mark.parametrize("spec", ["code", [{"name": "code", "weight": 0.9}, {"name": "format", "pattern": "a"}]])
def test_without_a_sandbox_its_name_in_a_recipe_is_refused_in_one_line(monkeypatch, spec):
    monkeypatch.setattr(choice, "_proven", {})
    monkeypatch.setattr(choice, "_refused", {"bubblewrap": "no bwrap", "landlock": "the kernel has no Landlock"})
    with pytest.raises(TaskError) as refusal:
        load_verifier(spec)
    message = str(refusal.value)
    assert message.startswith("verifier 'code': programs run only in a sandbox, and none works here")
    assert "bubblewrap: no bwrap; landlock: the kernel has no Landlock; pip install 'sapo-rl[sandbox]'" in message
    assert "\n" not in message


def test_a_pool_may_run_it_and_knows_how_long():
    assert code.isolated is True
    assert code.deadline > code_module.BUDGET_SECONDS


# ----------------------------------------------------------------------------------------------------------- signals


def test_a_cluster_that_announces_its_end_costs_no_program(tmp_path):
    """It signals every process of a job, those in a sandbox too."""
    home, reached = Home(str(tmp_path), tuple(sys.path)), []
    tests = CodeTests("stdin", cases=(("", "done\n"),), cpu_seconds=2)
    prompt = Prompt(id=0, task="t", text="?", metadata={"tests": tests.to_json()})
    sleeping = Job("code", block("import time\ntime.sleep(1)\nprint('done')"), prompt, 60.0, home)
    pool = WorkerPool(1)
    try:
        pool.run([replace(sleeping, text=block("print('done')"))])  # the worker has proven its sandbox from here on
        worker = psutil.Process(pool.worker_ids()[0])

        def signal_all_below() -> None:
            while not any("-s" in process.cmdline() for process in worker.children(recursive=True)):
                time.sleep(0.01)
            time.sleep(0.3)
            for process in worker.children(recursive=True):
                reached.append(process.pid)
                for number in ANNOUNCING:
                    process.send_signal(number)

        thread = threading.Thread(target=signal_all_below, daemon=True)
        thread.start()
        [score] = pool.run([sleeping])
        thread.join()
    finally:
        pool.close()
    assert reached
    assert score.reward == 1.0, score
