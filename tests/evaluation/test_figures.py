"""The figures of an evaluation against completions counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan

import pytest

from sapo.data import Completion, Prompt, Score, Status
from sapo.errors import Interrupted, TaskError
from sapo.evaluation import Evaluation, Sample, evaluate_policy
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
    assert result.mean.value == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert result.pass_at[1].value == result.mean.value
    assert result.pass_at[2].value == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)  # 1 - C(n-c, 2) / C(4, 2)
    assert result.majority.value == pytest.approx((1 + 0) / 2)  # 1 1 3 -, right; 2 1 - 1, wrong
    assert result.statuses == {"scored": 6, "unparseable": 0, "truncated": 1, "verifier_error": 1}
    assert result.finish_reasons == {"stop": 7, "length": 1}
    assert result.length_mean == pytest.approx((2 + 2 + 2 + 4 + 2 + 2 + 4 + 2) / 8)
    assert result.length_max == 4
    assert result.tokens == 20
    assert result.reward_mean == pytest.approx(3 / 8)
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
