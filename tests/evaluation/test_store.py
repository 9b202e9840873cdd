"""An evaluation on disk: what was kept comes back, what was cut is drawn again, what is another's is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapo.data import Status
from sapo.errors import ConfigError
from sapo.evaluation import EvaluationStore, Results, ask, examine, read_results
from sapo.evaluation.figures import Clock
from sapo.evaluation.store import difference
from sapo.rollout.params import SamplingParams
from support.evaluation_cases import PlainPolicy, ScriptedEngine, WrittenTask, answered, results, sample

ASKED = {"samples": 4, "sampling": {"temperature": 1.0, "stop": [2]}, "model": {"weights": "abc"}}
MACHINE = {"threads": 1}
# Line separators that JSON leaves alone, half of a surrogate pair, markup and a null: what models write.
ODD = "a\u2028b\u2029c\x85d\x00e\ud800f</script>\r\n\x1c"


def store(path: Path, asked: dict = ASKED) -> EvaluationStore:
    return EvaluationStore(path, asked, MACHINE)


def problems(count: int):
    return [
        answered(
            i,
            sample(ODD, 1.0, figures={"x": 0.1 + i}),
            sample("?", status=Status.TRUNCATED, finish_reason="length", detail=ODD),
            groups={"level": str(i)},
            greedy=sample("g", answer=ODD),
        )
        for i in range(count)
    ]


def test_what_was_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    with store(tmp_path / "e") as first:
        first.keep(problems(4)[:2], Clock(1.0, 0.25))
        first.keep(problems(4)[2:], Clock(2.0, 0.25))
    with store(tmp_path / "e") as second:
        assert second.answered == problems(4)
        assert second.clock == Clock(3.0, 0.5)
        assert second.machine == MACHINE
        assert not second.finished


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_a_chunk_that_was_cut_anywhere_is_drawn_again_and_the_one_before_stays(tmp_path: Path, cut: int) -> None:
    with store(tmp_path / "e") as first:
        first.keep(problems(4)[:2], Clock(1.0))
        whole = (tmp_path / "e" / "progress.jsonl").read_bytes()
        first.keep(problems(4)[2:], Clock(2.0))
    file = tmp_path / "e" / "progress.jsonl"
    added = file.read_bytes()[len(whole) :]
    file.write_bytes(whole + added[: len(added) * cut // 120])
    with store(tmp_path / "e") as second:
        assert second.answered == problems(4)[:2]
        assert file.read_bytes() == whole, "what was cut is gone, and the next chunk follows the last whole one"
        second.keep(problems(4)[2:], Clock(2.0))
    assert file.read_bytes() == whole + added


def test_a_finished_evaluation_is_read_from_its_completions(tmp_path: Path) -> None:
    with store(tmp_path / "e") as first:
        first.keep(problems(3), Clock(1.0, 0.5))
        made = results(problems(3), ks=(1, 2), clock=first.clock)
        first.finish(made.to_json())
    assert not (tmp_path / "e" / "progress.jsonl").exists()
    with store(tmp_path / "e") as second:
        assert second.finished
        assert (second.answered, second.clock) == (problems(3), Clock(1.0, 0.5))
    read = Results.read(tmp_path / "e")
    assert read.evaluation == made.evaluation
    assert read.to_json() == json.loads(json.dumps(made.to_json()))


def test_a_kill_between_the_files_of_the_end_loses_nothing(tmp_path: Path) -> None:
    with store(tmp_path / "e") as first:
        first.keep(problems(3), Clock(1.0))
        progress = (tmp_path / "e" / "progress.jsonl").read_bytes()
        first.finish(results(problems(3), clock=first.clock).to_json())
    lines = (tmp_path / "e" / "completions.jsonl").read_bytes()
    (tmp_path / "e" / "completions.jsonl").unlink()  # results.json is the first to be written
    (tmp_path / "e" / "progress.jsonl").write_bytes(progress)
    with store(tmp_path / "e") as second:
        assert not second.finished
        assert second.answered == problems(3)
        second.finish(results(problems(3), clock=second.clock).to_json())
    assert (tmp_path / "e" / "completions.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 8}, "with samples=4 where this one has 8"),
        ({"sampling": {"temperature": 0.5, "stop": [2]}}, "with sampling.temperature=1.0 where this one has 0.5"),
        ({"model": {"weights": "xyz"}}, 'with model.weights="abc" where this one has "xyz"'),
        ({"task": {"name": "t"}}, 'with task=null where this one has {"name": "t"}'),
    ],
)
def test_another_evaluation_is_refused_and_told_apart(tmp_path: Path, change: dict, words: str) -> None:
    store(tmp_path / "e").close()
    before = (tmp_path / "e" / "config.json").read_bytes()
    with pytest.raises(ConfigError) as refusal:
        store(tmp_path / "e", {**ASKED, **change})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "e" / "config.json").read_bytes() == before


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, words in (("file", "it is a file"), ("other", "precious.txt"), ("broken", "not of an evaluation")):
        with pytest.raises(ConfigError, match=words):
            store(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be written"):
        store(tmp_path / "file" / "below")
    assert difference(tmp_path / "new", ASKED) is None
    (tmp_path / "empty").mkdir()
    assert difference(tmp_path / "empty", ASKED) is None


def test_two_processes_never_write_one(tmp_path: Path) -> None:
    with store(tmp_path / "e"), pytest.raises(ConfigError, match="another process is writing"):
        store(tmp_path / "e")
    store(tmp_path / "e").close()


def test_results_that_are_not_there_or_of_another_version_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`sapo eval` writes them"):
        read_results(tmp_path)
    with store(tmp_path / "e") as unfinished:
        unfinished.keep(problems(1), Clock())
    with pytest.raises(ConfigError, match="was not finished"):
        read_results(tmp_path / "e")
    file = tmp_path / "results.json"
    for text, words in (
        ("{", "is not the results.json"),
        ("[]", "is not"),
        ('{"schema": "sapo.evaluation/0"}', "got 's"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_results(file)


def test_what_is_left_is_drawn_in_the_chunks_it_would_have_been_drawn_in(tmp_path: Path) -> None:
    task = WrittenTask(*((f"q{i}", "1", {}) for i in range(7)))
    texts = [["1", "2"]] * 7
    policy, params = PlainPolicy(), SamplingParams(max_new_tokens=4)
    prompts = ask(policy, task, 7)
    progress: list[tuple[int, int]] = []

    def go(path: Path, engine: ScriptedEngine, prompts=prompts) -> None:
        with store(path) as keeper:
            examine(
                policy,
                engine,
                task,
                prompts,
                keeper,
                chunk=3,
                samples=2,
                params=params,
                on_progress=lambda *p: progress.append(p),
            )

    whole, second = ScriptedEngine(texts), ScriptedEngine(texts)
    go(tmp_path / "whole", whole)
    assert [ids for ids, _ in whole.calls] == [[0, 1, 2], [3, 4, 5], [6]]
    assert progress == [(3, 7), (6, 7), (7, 7)]
    go(tmp_path / "killed", ScriptedEngine(texts), prompts[:3])
    go(tmp_path / "killed", second)
    assert [ids for ids, _ in second.calls] == [[3, 4, 5], [6]]
    with store(tmp_path / "whole") as a, store(tmp_path / "killed") as b:
        assert a.answered == b.answered
