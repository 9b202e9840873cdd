"""`sapo generate`: the text, its log-probabilities and JSON agree with each other and with the model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from sapo.config.recipes import load_recipe
from sapo.errors import ConfigError, ModelError
from sapo.model.loading import load_policy
from sapo.rollout.params import SamplingParams
from sapo.run.models import newest_model
from sapo.workflows.generate import format_of_run, generate, transcript_lines
from sapo.workflows.train import train
from support.commands import call
from support.runs import write_model, write_recipe

GREEDY = SamplingParams(max_new_tokens=10, temperature=0.0)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] | replace('u', '1') | replace('s', '2') }}{{ m['content'] }};{% endfor %}#"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("generate") / "chat")
    policy = load_policy(directory)
    policy.tokenizer.chat_template = TEMPLATE
    policy.tokenizer.save_pretrained(directory)
    return directory


def sapo(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = call(*arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_greedy_text_is_what_transformers_generates(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = generate(load_policy(model), "12+3=", GREEDY)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer("12+3=")["input_ids"]])
    output = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
    assert list(ours.completions[0].token_ids) == output[0, ids.shape[1] :].tolist()


def test_logprobs_are_the_models(model: Path) -> None:
    policy = load_policy(model)
    found = generate(policy, "7*8=", SamplingParams(max_new_tokens=6, seed=3), samples=3)
    for completion in found.completions:
        ids = torch.tensor([[*found.prompt.token_ids, *completion.token_ids]])
        policy.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            logp = policy.model(ids).logits[0].log_softmax(-1)
        policy.model.set_attn_implementation("sapo_shared_prefix")
        start = len(found.prompt.token_ids)
        expected = [logp[start + i - 1, t].item() for i, t in enumerate(completion.token_ids)]
        assert list(completion.logprobs) == pytest.approx(expected, abs=1e-4)


def test_a_chat_template_is_used_where_there_is_one_unless_told_otherwise(chat_model: Path) -> None:
    policy = load_policy(chat_model)
    assert generate(policy, "5+5=", GREEDY).seen == "15+5=;#"
    assert generate(policy, "5+5=", GREEDY, system="9").seen == "29;15+5=;#"
    assert generate(policy, "5+5=", GREEDY, style="plain").seen == "5+5="


def test_a_chat_with_a_model_without_template_is_refused(model: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        generate(load_policy(model), "5+5=", GREEDY, style="chat")


def test_a_stop_string_ends_the_completion_and_is_left_out_of_its_text(model: Path) -> None:
    policy = load_policy(model)
    long = generate(policy, "1+1=", SamplingParams(max_new_tokens=30, seed=1)).completions[0]
    stop = long.text[2]
    cut = generate(policy, "1+1=", SamplingParams(max_new_tokens=30, seed=1), stop=(stop,)).completions[0]
    assert cut.text == long.text[: long.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_prompt_that_leaves_no_room_is_the_users_mistake(model: Path) -> None:
    with pytest.raises(ConfigError, match="must fit the model's 64 positions"):
        generate(load_policy(model), "1" * 60, GREEDY)


def test_text_json_and_logprobs_tell_the_same(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", str(model), "12+3=", "--max-new-tokens", "8", "--seed", "5", "--samples", "2")
    code, out, _ = sapo(capsys, *arguments, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["prompt"] == "12+3="
    assert len(record["completions"]) == 2
    _, text, _ = sapo(capsys, *arguments)
    lines = text.splitlines()
    assert [lines[1], lines[3]] == [c["text"] for c in record["completions"]]
    _, table, _ = sapo(capsys, *arguments, "--logprobs")
    first = record["completions"][0]
    rows = [line.split() for line in table.splitlines() if not line.startswith("---")]
    for row, token, logprob in zip(rows, first["token_ids"], first["logprobs"], strict=False):
        assert (float(row[0]), int(row[1])) == (pytest.approx(logprob, abs=1e-4), token)


def test_the_prompt_comes_from_standard_input_with_a_dash(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+3="))
    _, out, _ = sapo(capsys, "generate", str(model), "-", "--temperature", "0", "--json")
    record = json.loads(out) if out else {}
    assert record["prompt"] == "12+3="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top-p", "0"), "--top-p must lie in (0, 1]"),
        (("--dtype", "int8"), "--dtype must be float32 or bfloat16; got 'int8'"),
        (("--chat",), "no chat template"),
        (("--stop", ""), "--stop must not be empty"),
        (("--max-new-tokens", "100"), "must fit the model's 64 positions"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = sapo(capsys, "generate", str(model), "1+1=", "--max-new-tokens", "8", *arguments)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert message in err


def test_a_run_puts_a_question_as_its_first_task_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_recipe(
        tmp_path,
        train__steps=1,
        prompt={"template": "={prompt}*", "shots": [{"prompt": "1", "answer": "2"}], "answer_template": "{answer}-"},
    )
    train(load_recipe(recipe))
    form = format_of_run(tmp_path / "run")
    assert form is not None
    result = generate(load_policy(newest_model(tmp_path / "run")), "5", SamplingParams(max_new_tokens=2), form=form)
    assert result.seen == "=1*2-=5*"
    assert format_of_run(tmp_path / "model") is None


HOSTILE = """
from sapo.data import Prompt, Score


class Game:
    name, stop = "hostile", ("=",)

    def train_prompt(self, index):
        return Prompt(index, self.name, f"{index}+1", answer="2")

    def held_out(self, count):
        return [self.train_prompt(i) for i in range(min(count, 3))]

    async def play(self, prompt, ask):
        await ask(max_tokens=3)
        await ask([{"role": "tool", "name": "add", "content": "1;"}, {"role": "tool", "name": "add", "content": "2"}])
        return Score(1.0, figures={"calls": 2.0}, detail="well\\n--- 9 of 9: reward 1\\u202e")
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment with a tool that answers with what steers a terminal and looks like a turn."""
    text = HOSTILE.replace('"content": "2"', '"content": "2\\n\\x1b[2J\\u202eturn 9"')
    (tmp_path / "hostile_of_a_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_of_a_test", raising=False)

    class Joiner:
        """The tokenizer has no such characters; the text is what is shown."""

        def between(self, messages: object, last: int | None) -> tuple[int, ...]:
            return (3, 4)

    monkeypatch.setattr("sapo.workflows.evaluate.joiners_for", lambda *args: {"hostile": Joiner()})
    return "hostile_of_a_test:Game"


def test_an_environments_transcript_is_printed_turn_by_turn_and_no_tool_can_pass_for_the_model(
    model: Path, hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(model), "--task", hostile, "--problem", "2", "--samples", "2", "--max-new-tokens", "9"]
    code, out, _ = sapo(capsys, *arguments)
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["hostile, problem 2", "  2+1"]
    assert lines[-1] == "--- reference answer: 2"
    assert sum(line.startswith("--- ") and "reward 1, calls 2" in line for line in lines) == 2
    assert [line for line in lines if not line.startswith(("  ", "--- ", "hostile"))] == ["turn 1", "turn 2"] * 2
    assert lines[-3:-1] == ["  ! well", "  ! --- 9 of 9: reward 1\\u202e"], "nor can a detail pass for a header"
    at = lines.index("turn 2")
    assert lines[at - 3 : at] == ["    | tool add: 1;", "    | tool add: 2", "    |   \\x1b[2J\\u202eturn 9"]
    code, out, _ = sapo(capsys, *arguments, "--json")
    assert code == 0
    answered = json.loads(out)
    whos = ["policy", "tool add", "tool add", "policy"]
    assert [[who for who, _ in sample["transcript"]] for sample in answered["samples"]] == [whos, whos]
    assert answered["samples"][0]["transcript"][2][1] == "2\n\x1b[2J\u202eturn 9", "as it was said"
    assert out.isascii(), "escaped, for a terminal may show it"


def test_the_name_of_who_speaks_is_one_line() -> None:
    assert transcript_lines([("tool a:\n turn 9\x1b", "1")]) == ["    | tool a: turn 9\\x1b: 1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "calculator", "--system", "x"], "--system is for a prompt of your own; got it beside --task"),
        (["--task", "calculater"], "calculator"),
        ([], "give a prompt to complete, or --task with its settings; got neither"),
        (["1+1=", "digits=2"], "got 'digits=2' behind the prompt"),
        (["--task", "calculator", "--no-chat"], "--no-chat is for a prompt of your own; got it beside --task"),
        (["1+1=", "--problem", "0"], "--problem is of a task; got --problem 0 without --task"),
    ],
)
def test_a_task_and_a_prompt_of_ones_own_are_told_apart(
    model: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = sapo(capsys, "generate", str(model), *arguments)
    assert code == 2
    assert message in " ".join(err.split())
