"""Files of eight projects and reward functions of three, each trained by a recipe of at most four lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import sapo
from sapo.model.loading import load_policy, prepare_policy
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.rollout.prompting import encode_by_task
from sapo.run.preflight import load_tasks
from support.layouts import EIGHT, write_lines
from support.runs import metrics

CHAT = (
    "{% if tools %}{% for tool in tools %}{% if tool.function.name == 'add' %}#{% endif %}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ {'system': '-', 'user': '*', 'assistant': '%'}[m['role']] + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}%{% endif %}"
)
"""A chat template over the alphabet of the tests: one sign a role, and # for the tool `add`."""

RECIPE = """\
model: {path: model}
tasks: [{name: file, path: rows.jsonl, verifier: %s, score_truncated: true}]
rollout: {prompts_per_step: 4, samples_per_prompt: 4, max_new_tokens: 6}
train: {steps: 1, minibatches: 1}
"""

FUNCTIONS = {
    # The reward counts a sign, so that an untrained model has something to learn; the reference must be a number.
    "trl": """
def reward(prompts, completions, solution, **kwargs):
    assert len(prompts) == len(completions) == len(solution) and all(s.isdigit() for s in solution)
    assert all(p[-1]["role"] == "user" for p in prompts)
    return [turns[0]["content"].count("7") / 6 if turns[0]["content"] else None for turns in completions]
""",
    "verl": """
def reward(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, extra_info["index"]) == ("sums", 7) and ground_truth.isdigit()
    return {"score": solution_str.count("7") / 6, "acc": solution_str == ground_truth}
""",
    "openrlhf": """
def reward(queries, prompts, labels, **kwargs):
    assert all(q.startswith(p) for q, p in zip(queries, prompts)) and all(l.isdigit() for l in labels)
    rewards = [q[len(p):].count("7") / 6 for q, p in zip(queries, prompts)]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"tokens": [len(q) for q in queries]}}
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with a chat template."""
    tokenizer: PreTrainedTokenizerFast = character_tokenizer("0123456789+-*%=;#\n")
    tokenizer.chat_template = CHAT
    size = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 48, "max_length": 64}
    network = tiny_model(
        "qwen3",
        len(tokenizer),
        seed=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size,
    )
    directory = tmp_path_factory.mktemp("model")
    prepare_policy(network, tokenizer).save(directory)
    return directory


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the model, in which a recipe is run."""
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def train(place: Path, layout: str, verifier: str) -> tuple[sapo.RunConfig, list[dict]]:
    """Train one step on 24 rows of a layout, and return the recipe and the lines of the run's rollouts."""
    write_lines(place / "rows.jsonl", [EIGHT[layout](f"{i}+{i}=", str(2 * i)) for i in range(24)])
    (place / "recipe.yaml").write_text(RECIPE % verifier)
    assert len(RECIPE.splitlines()) == 4
    changes = [
        "run_dir=run",
        "threads=1",
        "eval.problems=2",
        "eval.samples=1",
        "log.rollouts_every=1",
        "log.tensorboard=false",
    ]
    config = sapo.load_recipe(place / "recipe.yaml", changes)
    result = sapo.train(config)
    assert [line["step"] for line in metrics(result.directory) if line["kind"] == "step"] == [1]
    (file,) = (place / "run" / "rollouts").iterdir()
    return config, [json.loads(line) for line in file.read_text().splitlines()]


# What the model sees of "7+7=": by hand, from the template above.
SEEN = {
    "verl": "*{}%",
    "trl": "*{}%",
    "swift": "-+*{}%",
    "openai": "#*{}%",
    "openrlhf": "*{}%",
    "verifiers": "*{}%",
    "alpaca": "*+\n{}%",
    "sharegpt": "*{}%",
}


@pytest.mark.parametrize("layout", EIGHT)
def test_a_file_of_each_project_trains_with_a_recipe_of_four_lines(place: Path, layout: str) -> None:
    config, rollouts = train(place, layout, "last_number")
    assert len(rollouts) == 4 * 4
    assert all(line["answer"].isdigit() for line in rollouts)
    tasks, policy = load_tasks(config), load_policy(place / "model")
    (task,) = tasks.train
    prompts = encode_by_task(policy, tasks.formats, [task], [task.train_prompt(i) for i in range(task.num_train)])
    seen = {policy.show(prompt.token_ids) for prompt in prompts}
    assert seen <= {SEEN[layout].format(f"{i}+{i}=") for i in range(24)}, "the question, and not the answer"


@pytest.mark.parametrize("project", FUNCTIONS)
def test_a_reward_function_of_each_project_trains(place: Path, project: str) -> None:
    (place / f"reward_of_{project}.py").write_text(FUNCTIONS[project])
    _, rollouts = train(place, project, f"reward_of_{project}:reward")
    rewards = [line["reward"] for line in rollouts]
    assert rewards == pytest.approx([line["text"].count("7") / 6 for line in rollouts])
    assert any(rewards), "an untrained model writes a 7 now and then"
