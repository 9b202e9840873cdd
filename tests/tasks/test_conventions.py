"""Reward functions with the parameters of TRL, verl and OpenRLHF: recognised, called as there, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sapo.data import Completion, Prompt, Status
from sapo.errors import TaskError
from sapo.tasks import load_verifier, score_completions, try_reward
from sapo.tasks.base import JudgedTask

# Each records how it was called in the reward: by hand what its project would pass.
SOURCE = '''
import asyncio

class Tensor:
    """What torch's tensors have in common with this is all that is used of them."""
    def __init__(self, values): self.values = values
    def tolist(self): return self.values
    def item(self): return self.values

def trl(completions, prompts, **columns):
    assert set(columns) == {"solution", "index"}, columns
    assert len(completions) == len(prompts) == len(columns["solution"]) == len(columns["index"])
    assert all(isinstance(c, str) for c in completions)
    return [None if c == "?" else float(c == s) / len(completions) for c, s in zip(completions, columns["solution"])]

def trl_solution(completions, solution, **kwargs):
    return [float(c == s) for c, s in zip(completions, solution)]

def trl_chat(prompts, completions, **kwargs):
    return [float(p[-1]["content"] == "2+2=" and c[0]["role"] == "assistant" and c[0]["content"] == "4")
            for p, c in zip(prompts, completions)]

async def trl_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * len(completions)

def trl_answer(completions, **columns):
    return [float(c == a) for c, a in zip(completions, columns["answer"])]

def trl_short(completions, **kwargs):
    return [1.0]

def trl_tensor(completions, **kwargs):
    return Tensor([0.25] * len(completions))

def trl_ids(completions, completion_ids):
    return [0.0]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info["index"] == 7
    return float(solution_str == ground_truth)

def verl_dict(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": float(solution_str == ground_truth), "acc": solution_str == ground_truth, "pred": solution_str}

def verl_numbers(solution_str, ground_truth, method="strict"):
    return sum(ground_truth["numbers"]) == int(solution_str)

def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(s == g) / len(solution_strs) for s, g in zip(solution_strs, ground_truths)]

def openrlhf(queries, prompts, labels, **kwargs):
    assert all(q.startswith(p) for q, p in zip(queries, prompts))
    right = [float(q[len(p):] == l) for q, p, l in zip(queries, prompts, labels)]
    lengths = Tensor([len(q) for q in queries])
    return {"rewards": Tensor(right), "scores": Tensor(right), "extra_logs": {"length": lengths}}

def verl_huge(solution_str, ground_truth):
    return {"score": 1.0, "time_ns": 10**18, "digits": 10**400, "nan": float("nan"), "acc": True}

def openrlhf_list(queries, prompts, labels):
    return Tensor([float(q[len(p):] == l) for q, p, l in zip(queries, prompts, labels)])

def ours(completion, answer):
    return float(completion == answer)
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the functions' module, in one place for all tests: another would need other workers."""
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "rewards_of_projects.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield "rewards_of_projects"


def scored(spec, prompt: Prompt, *texts: str) -> list:
    """Scores of the completions of a prompt, as a run asks for them."""
    task = JudgedTask()
    task.verifier = load_verifier(spec)
    completions = score_completions(task, prompt, [Completion((), (), "stop", text) for text in texts])
    return [completion.score for completion in completions]


TEXT = Prompt(id=0, task="sums", text="2+2=", answer="4", metadata={"solution": "4", "index": 7})
CHAT = Prompt(
    id=0,
    task="sums",
    text="user: 2+2=",
    answer="4",
    metadata={"messages": [{"role": "user", "content": "2+2="}], "solution": "4"},
)
VERL = Prompt(
    id=0,
    task="rows",
    text="2+2=",
    answer="4",
    metadata={
        "data_source": "sums",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 7},
    },
)


@pytest.mark.parametrize(
    ("function", "prompt", "rewards"),
    [
        ("trl", TEXT, [0.5, 0.0]),  # both completions in one call: 1/2 for the right one
        ("trl_solution", TEXT, [1.0, 0.0]),
        ("trl_chat", CHAT, [1.0, 0.0]),
        ("trl_async", TEXT, [0.5, 0.5]),
        ("trl_tensor", TEXT, [0.25, 0.25]),
        ("verl", VERL, [1.0, 0.0]),
        ("verl_dict", VERL, [1.0, 0.0]),
        ("verl_batch", VERL, [0.5, 0.0]),
        ("openrlhf", TEXT, [1.0, 0.0]),
        ("openrlhf", CHAT, [1.0, 0.0]),
        ("openrlhf_list", TEXT, [1.0, 0.0]),
        ("ours", TEXT, [1.0, 0.0]),
    ],
)
def test_a_function_of_each_project_is_called_as_there(
    module: str, function: str, prompt: Prompt, rewards: list
) -> None:
    scores = scored(f"{module}:{function}", prompt, "4", "5")
    assert [score.reward for score in scores] == rewards, [score.detail for score in scores]
    assert {score.status for score in scores} == {Status.SCORED}


def test_what_else_a_function_returns_is_kept(module: str) -> None:
    right, wrong = scored(f"{module}:verl_dict", VERL, "4", "5")
    assert (right.answer, right.figures, wrong.figures) == ("4", {"acc": 1.0}, {"acc": 0.0})
    assert [score.figures for score in scored(f"{module}:openrlhf", TEXT, "4", "55")] == [
        {"length": 5.0},
        {"length": 6.0},
    ]


def test_numbers_that_are_no_figures_cost_no_reward(module: str) -> None:
    (score,) = scored(f"{module}:verl_huge", VERL, "4")
    assert (score.reward, score.status, score.figures) == (1.0, Status.SCORED, {"acc": 1.0})


def test_a_ground_truth_that_is_no_text_reaches_verl_s_function_as_it_is(module: str) -> None:
    truth = {"numbers": [1, 3]}
    prompt = Prompt(id=0, task="t", text="?", metadata={"reward_model": {"ground_truth": truth}})
    assert [score.reward for score in scored(f"{module}:verl_numbers", prompt, "4", "5")] == [1.0, 0.0]


def test_none_abstains_alone_and_in_a_sum(module: str) -> None:
    answered, abstained = scored(f"{module}:trl", TEXT, "4", "?")
    assert (answered.status, answered.reward) == (Status.SCORED, 0.5)
    assert (abstained.status, abstained.reward) == (Status.UNPARSEABLE, 0.0)
    assert "abstained" in abstained.detail
    summed = [{"name": f"{module}:trl", "weight": 2.0}, {"name": "exact", "weight": 1.0}]
    both, exact_alone = scored(summed, TEXT, "4", "?")
    assert (both.reward, both.figures) == (2.0, {f"{module}:trl": 0.5, "exact": 1.0})
    assert (exact_alone.reward, exact_alone.status, exact_alone.figures) == (0.0, Status.SCORED, {"exact": 0.0})


def test_a_call_that_fails_costs_the_completions_it_had(module: str) -> None:
    scores = scored(f"{module}:trl_short", TEXT, "4", "5")
    assert {score.status for score in scores} == {Status.VERIFIER_ERROR}
    assert "must return a list with a reward for each of 2 completions; got 1 values" in scores[0].detail


def test_an_argument_that_no_row_has_is_named_before_a_run(module: str) -> None:
    class Rows(JudgedTask):
        name = "rows"
        verifier = load_verifier(f"{module}:trl_ids")

        def train_prompt(self, index: int) -> Prompt:
            return TEXT

    with pytest.raises(
        TaskError, match=r"the function needs completion_ids, and a row of task 'sums' has solution, index"
    ):
        try_reward(Rows())


def test_the_reference_has_the_names_that_functions_call_it_by(module: str) -> None:
    plain = Prompt(id=0, task="t", text="2+2=", answer="4")
    for function in ("trl_solution", "trl_answer"):
        assert [score.reward for score in scored(f"{module}:{function}", plain, "4", "5")] == [1.0, 0.0]


@pytest.mark.parametrize(
    "source",
    [
        "def judge(queries, scores): ...",
        "def judge(solution_str, tokenizer): ...",
        "def judge(text): ...",
        "def judge(completions, /): ...",
    ],
)
def test_parameters_of_no_project_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    name = f"rewards_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        TaskError, match=r"must take completion .* or the parameters of a reward function of TRL, verl or"
    ):
        load_verifier(f"{name}:judge")
