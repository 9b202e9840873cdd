"""Verifiers that compare a text or a number, and the user's own."""

import sys

import pytest

from sapo.data import Completion, Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks import FileTask, load_verifier, score_completions


def judge(name, text, answer):
    return load_verifier(name)(text, Prompt(id=0, task="t", text="?", answer=answer))


@pytest.mark.parametrize(
    ("name", "text", "answer", "reward"),
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("exact", "It is Paris", "Paris", 0),
        ("last_number", "so 6 * 3 = 18.", "18", 1),
        ("last_number", "18 or 19", "18", 0),
        ("last_number", "it costs $1,234.50", "1234.5", 1),
        ("last_number", "1,234,567", "1234567", 1),
        ("last_number", "1,2", "2", 1),  # not a thousands separator
        ("last_number", "0.1", "1/10", 1),  # exactly, which floats would not show
        ("last_number", "0.10000000000000000001", "0.1", 0),
        ("last_number", "3/4", "0.75", 1),
        ("last_number", "x = -5", "-5", 1),
        ("last_number", "x = \N{MINUS SIGN}5", "-5", 1),
        ("last_number", "x = \N{MINUS SIGN}5", "5", 0),
        ("last_number", "10-5", "5", 1),
        ("last_number", "1.5e3", "1500", 1),
        ("last_number", "007", "7", 1),
        ("last_number", ".5", "0.5", 1),
        ("last_number", "the answer is 18", "6 * 3 = 18 #### 18", 1),
        ("hash_answer", "6 * 3 = 18 #### 18", "18", 1),
        ("hash_answer", "#1 #2", "1", 0),
        ("hash_answer", "#### 1,000", "1000", 1),
        ("hash_answer", "#### $1000.00", "1,000", 1),
        ("hash_answer", "#### Paris", "Paris", 1),
        ("hash_answer", "#### Rome", "Paris", 0),
        ("hash_answer", "#### 18", "three sixes make 18\n#### 18", 1),
    ],
)
def test_a_readable_answer_is_scored(name, text, answer, reward):
    score = judge(name, text, answer)
    assert (score.reward, score.status, score.detail) == (float(reward), Status.SCORED, "")


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("exact", " Paris\n", "Paris"),
        ("last_number", "so $1,234.50", "2469/2"),
        ("last_number", "the 2469/2nd", "2469/2"),
        ("hash_answer", "## 007", "7"),
        ("hash_answer", "#### Rome", "Rome"),
    ],
)
def test_equal_answers_are_equal_text_for_a_majority(name, text, answer):
    assert judge(name, text, "1" if name == "last_number" or answer == "7" else "Paris").answer == answer


@pytest.mark.parametrize(
    ("name", "text", "detail"),
    [
        ("last_number", "eighteen", "no number"),
        ("last_number", "", "no number"),
        ("last_number", "18 then 1/0", "cannot be read: '1/0'"),
        ("last_number", "9" * 1_000_000, "cannot be read: '999"),
        ("last_number", "٣", "no number"),
        ("hash_answer", "18", "no '#'"),
        ("hash_answer", "18 ####  ", "nothing after"),
        ("hash_answer", "#### eighteen", "no number after the last '#': 'eighteen'"),
        ("hash_answer", "#" + "9" * 1_000_000, "no number"),
    ],
)
def test_an_answer_that_cannot_be_read_is_unparseable(name, text, detail):
    score = judge(name, text, "18")
    assert (score.reward, score.status) == (0.0, Status.UNPARSEABLE)
    assert detail in score.detail
    assert len(score.detail) < 100


@pytest.mark.parametrize("name", ["exact", "last_number", "hash_answer"])
def test_a_prompt_without_an_answer_cannot_be_judged(name):
    with pytest.raises(ValueError, match="answer"):
        judge(name, "#1", None)


def test_last_number_refuses_an_answer_that_is_no_number():
    with pytest.raises(ValueError, match="'Paris'; use another verifier"):
        judge("last_number", "1", "Paris")


# -------------------------------------------------------------------------------------------------- the user's own


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(source, name="my_rewards"):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


PROMPT = Prompt(id=0, task="t", text="the question", answer="the answer", metadata={"level": 3})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(completion): return len(completion)", Score(4.0)),
        ("def f(completion, answer): return answer == 'the answer'", Score(1.0)),
        ("def f(prompt, completion): return 0.5 if prompt == 'the question' else 0", Score(0.5)),
        ("def f(*, completion, metadata): return metadata['level']", Score(3.0)),
        ("def f(completion, weight=2): return weight", Score(2.0)),
        ("def f(**k): return sorted(k) == ['answer', 'completion', 'metadata', 'prompt']", Score(1.0)),
        ("def f(completion, **k): return len(k)", Score(3.0)),
        (
            "from sapo.data import Score, Status\ndef f(completion): return Score(0.0, Status.UNPARSEABLE, 'why')",
            Score(0.0, Status.UNPARSEABLE, "why"),
        ),
        ("class F:\n  def __call__(self, completion): return True\nf = F()", Score(1.0)),
        ("import asyncio\nasync def f(completion):\n  await asyncio.sleep(0)\n  return 0.25", Score(0.25)),
        ("async def g():\n  return 0.125\ndef f(completion): return g()", Score(0.125)),
        (
            "from sapo.data import Score\ndef f(completion): return Score(0.5, answer='b', figures={'a': 2})",
            Score(0.5, answer="b", figures={"a": 2.0}),
        ),
        ("import numpy\ndef f(completion): return numpy.float32(0.5)", Score(0.5)),
        ("import numpy\ndef f(completion): return numpy.bool_(True)", Score(1.0)),
    ],
)
def test_a_users_function_gets_what_its_signature_takes(module, source, expected):
    name = module(source)
    assert load_verifier(f"{name}:f")("text", PROMPT) == expected


def test_a_users_module_may_import_its_neighbour_late(module):
    module("REWARD = 0.75", name="my_neighbour")
    module("def f(completion):\n  import my_neighbour\n  return my_neighbour.REWARD")
    assert load_verifier("my_rewards:f")("text", PROMPT) == Score(0.75)


def test_coroutines_of_one_worker_run_in_one_event_loop(module):
    module(
        "import asyncio\nloops = set()\n"
        "async def f(completion):\n  loops.add(asyncio.get_running_loop())\n  return len(loops)"
    )
    verifier = load_verifier("my_rewards:f")
    assert [verifier(text, PROMPT).reward for text in "abc"] == [1.0, 1.0, 1.0]


def test_the_current_directory_comes_last_on_the_path_so_that_it_shadows_nothing(module, tmp_path):
    module("import os, sys\ndef f(completion): return sys.path.index(os.getcwd()) - len(sys.path)")
    assert load_verifier("my_rewards:f")("text", PROMPT) == Score(-1.0)
    assert str(tmp_path) not in sys.path


def test_a_users_module_is_never_imported_here(module):
    module("import os\nPID = os.getpid()\ndef f(completion): return PID")
    import os

    assert load_verifier("my_rewards:f")("text", PROMPT) != Score(float(os.getpid()))
    assert "my_rewards" not in sys.modules


def test_a_verifier_keeps_the_directory_it_was_loaded_in(module, tmp_path, monkeypatch):
    module("def f(completion): return 0.75")
    verifier = load_verifier("my_rewards:f")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert verifier("text", PROMPT) == Score(0.75)


@pytest.mark.parametrize("source", ["def f(completion): return 'yes'", "def f(completion): return None"])
def test_what_a_users_function_may_not_return_is_an_error_of_the_verifier(module, tmp_path, source):
    name = module(source)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(100)))
    task = FileTask("d.jsonl", answer_field=None, verifier=f"{name}:f")
    scored = score_completions(task, task.train_prompt(0), [Completion((1,), (0.0,), "stop", "x")])[0]
    assert scored.score.status is Status.VERIFIER_ERROR
    assert "a reward must be a number" in scored.score.detail


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def f(response): return 1", ["must take completion", "['response']", "rename"]),
        ("def f(answer): return 1", ["must take completion", "['answer']"]),
        ("def f(completion, /): return 1", ["must take completion", "['completion']"]),
        ("def g(completion): return 1", ["my_rewards.py has no function 'f'"]),
        ("f = 3", ["has no function 'f'"]),
        ("import my_missing_module", ["importing 'my_rewards' failed", "ModuleNotFoundError", "my_missing_module"]),
        ("def f(:", ["importing 'my_rewards' failed", "SyntaxError"]),
        ("raise RuntimeError('a\\nb')", ["RuntimeError: a b"]),
    ],
)
def test_a_users_function_that_cannot_be_called_is_refused_in_one_line(module, source, parts):
    name = module(source)
    with pytest.raises(TaskError) as caught:
        load_verifier(f"{name}:f")
    message = str(caught.value)
    assert "\n" not in message
    for part in ["'my_rewards:f'", *parts]:
        assert part in message


def test_a_misspelt_function_gets_the_nearest_name(module):
    name = module("def reward_length(completion): return 1")
    with pytest.raises(TaskError, match="no function 'reward_lenght'; did you mean 'reward_length'"):
        load_verifier(f"{name}:reward_lenght")


@pytest.mark.parametrize(("spec", "hint"), [("exakt", "did you mean 'exact'"), ("a:", "module:function"), (":f", "")])
def test_an_unknown_verifier_is_refused_with_the_known_ones(spec, hint):
    with pytest.raises(TaskError, match="exact, last_number, hash_answer") as caught:
        load_verifier(spec)
    assert repr(spec) in str(caught.value)
    assert hint in str(caught.value)


def test_a_missing_module_is_refused():
    with pytest.raises(TaskError, match="importing 'no_such_module_here' failed: ModuleNotFoundError"):
        load_verifier("no_such_module_here:f")
