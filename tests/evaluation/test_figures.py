"""The figures of an evaluation against completions counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan

import pytest
from rich.console import Console

from sapo.cli.tables import evaluation_table, suite_table
from sapo.data import Completion, Prompt, Score, Status
from sapo.errors import Interrupted, TaskError
from sapo.evaluation import Evaluation, Sample, evaluate_policy
from sapo.evaluation.page import figures_in_words
from sapo.evaluation.records import groups_of
from sapo.rollout.params import SamplingParams
from support.evaluation_cases import PlainPolicy, ScriptedEngine, WrittenTask, answered, sample

TASK = WrittenTask(("one", "1", {}), ("two", "2", {}))
TEXTS = [["1", "1", "3", "cut"], ["2", "1", "bug", "1"]]


def evaluate(task=TASK, texts=TEXTS, **options):
    settings = {"problems": 5, "samples": 4, "params": SamplingParams(max_new_tokens=4), **options}
    return evaluate_policy(PlainPolicy(), ScriptedEngine(texts), task, **settings)


def test_the_figures_are_those_of_the_completions() -> None:
    result = evaluate(ks=(1, 2))
    assert (result.problems, result.samples) == (2, 4)
    assert result.mean.value == pytest.approx((2 / 4 + 1 / 3) / 2), "the verifier failed on one of the four"
    assert result.pass_at[1].value == result.mean.value
    assert result.pass_at[2].value == pytest.approx(((1 - 1 / 6) + (1 - 1 / 3)) / 2)  # 1 - C(n-c, 2) / C(n, 2)
    assert result.majority.value == pytest.approx((1 + 0) / 2)  # 1 1 3 -, right; 2 1 - 1, wrong
    assert result.statuses == {"scored": 6, "unparseable": 0, "truncated": 1, "verifier_error": 1}
    assert result.finish_reasons == {"stop": 7, "length": 1}
    assert result.length_mean == pytest.approx((2 + 2 + 2 + 4 + 2 + 2 + 4 + 2) / 8)
    assert result.length_max == 4
    assert result.tokens == 20
    assert result.reward_mean == pytest.approx(3 / 7)
    figure = result.figures["characters"]
    assert (figure.mean.value, figure.completions) == (pytest.approx(3 / 6), 6), "of the six that were judged"


def test_nothing_is_reported_that_was_not_measured() -> None:
    result = evaluate()
    assert (result.greedy, result.constant) == (None, None)
    assert not {"greedy", "constant"} & set(result.metrics())
    silent = Evaluation.of("t", [answered(0, sample("x", 1.0), sample("y"))])
    assert silent.majority is None, "the verifier named no answers"
    assert "majority@2" not in silent.metrics()
    assert silent.figures == {}
    assert silent.tokens_per_second is None


def test_greedy_adds_one_completion_at_temperature_0_that_counts_nowhere_else() -> None:
    engine = ScriptedEngine([["1", "1", "3", "1"], ["2", "1", "1", "1"]])
    params = SamplingParams(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=3, seed=5)
    arguments = {"problems": 2, "samples": 4, "params": params}
    result = evaluate_policy(PlainPolicy(), engine, TASK, greedy=True, **arguments)
    plain = evaluate_policy(PlainPolicy(), ScriptedEngine(engine.texts), TASK, **arguments)
    assert [temperature for _, temperature in engine.calls] == [0.7, 0.0]
    assert result.greedy.value == 0.5  # "1" is right on the first problem only
    assert result.greedy_tokens == 2 + 2
    assert result.metrics()["tokens/generated"] == result.tokens + 4
    shared = set(plain.metrics()) - {"tokens/generated"}
    assert {k: result.metrics()[k] for k in shared} == {k: plain.metrics()[k] for k in shared}


def test_greedy_samples_are_their_own_greedy_completion() -> None:
    engine = ScriptedEngine([["1"], ["1"]])
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    result = evaluate_policy(PlainPolicy(), engine, TASK, problems=2, samples=1, params=params, greedy=True)
    assert len(engine.calls) == 1, "nothing is drawn twice"
    assert result.greedy == result.mean


def test_the_clock_is_in_the_timing_alone() -> None:
    result = evaluate(greedy=True)
    assert result.timing()["generate_seconds"] > 0
    later = replace(result, clock=type(result.clock)(generate=99.0, score=1.0))
    assert later == result
    assert later.to_json() == result.to_json()
    assert later.metrics() == result.metrics()
    assert later.timing()["seconds"] == 100.0
    assert later.tokens_per_second == pytest.approx((20 + result.greedy_tokens) / 99.0)


def test_a_reward_below_the_threshold_is_wrong_and_at_it_right() -> None:
    problems = [answered(0, sample("a", 0.5), sample("b", 0.25), sample("c", 1.0), sample("d", 0.49))]
    assert Evaluation.of("t", problems).mean.value == 1 / 4
    assert Evaluation.of("t", problems, threshold=0.5).mean.value == 2 / 4


def test_the_figures_of_each_subject_are_those_of_its_problems() -> None:
    problems = [
        answered(0, sample("x", 1.0), sample("x"), groups={"subject": "Algebra", "level": "10"}),
        answered(1, sample("x"), sample("?", status=Status.UNPARSEABLE), groups={"subject": "Geometry", "level": "2"}),
        answered(2, sample("x", 1.0), sample("x", 1.0), groups={"level": "2"}),
    ]
    problems[2] = replace(problems[2], groups={"subject": ("Algebra", "Geometry"), "level": ("2",)})
    slices = Evaluation.of("t", problems, ks=(1, 2)).slices
    found = {s.value: (s.problems, s.mean.value, s.pass_at[2].value) for s in slices["subject"]}
    assert found == {"Algebra": (2, 0.75, 1.0), "Geometry": (2, 0.5, 0.5)}, "a problem of two subjects is in both"
    assert [s.value for s in slices["level"]] == ["2", "10"], "numbers are sorted as numbers"
    assert slices["subject"][1].statuses["unparseable"] == 1
    assert "difficulty" not in slices


LOST = [sample("", status=Status.ENVIRONMENT_ERROR, detail="ConnectionError: gone, after turn 2")]


@pytest.mark.parametrize("status", [Status.ENVIRONMENT_ERROR, Status.VERIFIER_ERROR])
def test_a_completion_that_failed_is_counted_and_in_no_other_figure(status: Status) -> None:
    lost = sample("", status=status, detail="gone")
    groups = [{"subject": "Algebra"}, {"subject": "Geometry"}]
    right = sample("x", 1.0, answer="x", figures={"cells": 0.5})
    wrong = sample("y", answer="y")
    with_lost = [
        answered(0, right, lost, wrong, right, groups=groups[0], greedy=right),
        answered(1, lost, right, wrong, wrong, groups=groups[1], greedy=lost),
    ]
    without = [
        answered(0, right, wrong, right, groups=groups[0], greedy=right),
        answered(1, right, wrong, wrong, groups=groups[1]),
    ]
    found, expected = Evaluation.of("t", with_lost, ks=(1, 2, 4)), Evaluation.of("t", without, ks=(1, 2))
    for name in ("mean", "majority", "greedy", "reward_mean", "figures", "correct", "judged", "binary"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.pass_at == {**expected.pass_at, 4: None}, "no problem has four judged samples"
    assert found.slices["subject"][0].mean == expected.slices["subject"][0].mean
    assert found.slices["subject"][1].pass_at == {**expected.slices["subject"][1].pass_at, 4: None}
    assert found.statuses[status.value] == 2
    assert found.failed == 3, "the greedy one too"
    assert [p.get("judged") for p in found.to_json()["per_problem"]] == [3, 3]
    assert found.to_json()["per_problem"][1]["greedy"] is None
    assert not any(name.startswith("pass@4") for name in found.metrics())
    assert found.metrics()["pass@2"] == expected.pass_at[2].value


def test_right_answers_beside_failed_episodes_are_a_pass_rate_of_one() -> None:
    result = Evaluation.of("t", [answered(i, sample("x", 1.0), *LOST) for i in range(4)])
    assert (result.mean.value, result.pass_at[1].value, result.reward_mean) == (1.0, 1.0, 1.0)
    assert result.statuses["environment_error"] == 4
    assert result.failure(0.5) is None
    assert result.failure(0.49) == (
        "evaluation on t: environments failed in 4 of 8 completions, 4 times with ConnectionError: gone; its figures "
        "are over the others"
    )


def test_of_an_evaluation_in_which_all_failed_nothing_is_said_but_that() -> None:
    result = Evaluation.of("t", [answered(i, *LOST, *LOST) for i in range(2)], ks=(1, 2))
    assert (result.mean, result.pass_at, result.reward_mean, result.majority) == (None, {1: None, 2: None}, None, None)
    assert set(result.metrics()) & {"reward/mean", "mean@2", "pass@1", "pass@2"} == set()
    assert result.metrics()["status/environment_error"] == 4
    assert result.failure(1.0) is not None
    json.dumps(result.to_json(), allow_nan=False)
    for shown in (evaluation_table(result), suite_table("suite", {"t": result})):
        console = Console(width=160, record=True)
        console.print(shown)
        assert "not judged" in console.export_text()
    assert {"name": "mean reward", "value": "not judged", "more": ""} in figures_in_words(result)


def test_a_grouping_of_one_value_makes_no_table() -> None:
    problems = [answered(i, sample("x"), groups={"subject": "Algebra"}) for i in range(3)]
    assert Evaluation.of("t", problems).slices == {}


def test_difficulties_are_in_their_own_order() -> None:
    problems = [answered(i, sample("x"), groups={"difficulty": d}) for i, d in enumerate(("hard", "easy", "medium"))]
    assert [s.value for s in Evaluation.of("t", problems).slices["difficulty"]] == ["easy", "medium", "hard"]


def test_groupings_are_read_from_whatever_a_row_holds() -> None:
    metadata = {"subject": ["Algebra", "Algebra", "Geometry"], "level": 3, "difficulty": " ", "other": "x"}
    prompt = Prompt(0, "t", "?", metadata=metadata)
    assert groups_of(prompt) == {"subject": ("Algebra", "Geometry"), "level": ("3",)}
    assert groups_of(Prompt(0, "t", "?", metadata={"subject": None})) == {}


def test_a_figure_that_is_no_finite_number_was_not_measured() -> None:
    score = Score(1.0, figures={"good": 1, "nan": nan, "text": "x"})  # type: ignore[dict-item]
    assert Sample.of(Completion((1,), (0.0,), "stop", score=score)).figures == {"good": 1.0}


def test_metrics_are_flat_and_can_be_written_as_json() -> None:
    metrics = evaluate(ks=(1, 4), greedy=True, constant=True).metrics()
    assert all(isinstance(v, int | float | str) for v in metrics.values())
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert {"mean@4", "majority@4", "greedy", "constant", "pass@4/low", "figure/characters"} <= set(metrics)


def test_the_same_draws_are_made_whatever_the_problems_were_numbered() -> None:
    class Renumbered(WrittenTask):
        def held_out(self, count: int) -> list[Prompt]:
            return [replace(p, id=77 + i) for i, p in enumerate(super().held_out(count))]

    assert evaluate() == evaluate(Renumbered(*TASK.problems))


def test_a_task_without_held_out_problems_is_refused() -> None:
    with pytest.raises(TaskError, match="needs a held-out problem; task 'written' has none"):
        evaluate(WrittenTask())


def test_an_evaluation_that_is_stopped_says_so() -> None:
    class Stopping(ScriptedEngine):
        def generate(self, requests, params, should_stop=lambda: False):
            if should_stop():
                raise Interrupted
            return super().generate(requests, params)

    with pytest.raises(Interrupted):
        evaluate_policy(
            PlainPolicy(),
            Stopping(TEXTS),
            TASK,
            problems=2,
            samples=4,
            params=SamplingParams(max_new_tokens=4),
            should_stop=lambda: True,
        )


def test_the_mean_reward_stands_beside_pass_at_1_and_alone_where_rewards_are_not_0_or_1() -> None:
    from io import StringIO

    from rich.console import Console

    from sapo.cli.tables import evaluation_table
    from sapo.evaluation.page import figures_in_words
    from sapo.front.lines import evaluation_line

    def shown(rewards):
        problem = answered(0, *(sample("five", reward) for reward in rewards))
        evaluation = Evaluation.of("poems", [problem])
        console = Console(file=StringIO(), width=100)
        console.print(evaluation_table(evaluation))
        line = evaluation_line({"kind": "eval", "step": 3, **evaluation.metrics()})
        return line, console.file.getvalue(), {word["name"] for word in figures_in_words(evaluation)}

    line, table, words = shown([1.0, 0.0])
    assert line.startswith("step 3: held-out pass@1 0.500 [")
    assert "], mean reward 0.500 on poems" in line
    assert "mean reward" in table
    assert "pass@1" in table
    assert {"mean reward", "mean@2"} <= words
    line, table, words = shown([0.25, 0.5])
    assert line.startswith("step 3: held-out mean reward 0.375 on poems")
    assert "0.375" in table
    assert "pass@1" not in table
    assert "mean@2" not in words
