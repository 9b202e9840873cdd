"""From a question to token ids: plain text, chat turns, examples, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapo.config import PromptConfig
from sapo.data import Prompt
from sapo.errors import ConfigError, ModelError
from sapo.rollout.prompting import PromptFormat
from sapo.tasks import ArithmeticTask, make_task

QUESTION = Prompt(id=0, task="sums", text="3+4=")
CHAT = Prompt(id=0, task="chat", text="user: 1+1", metadata={"messages": [{"role": "user", "content": "1+1="}]})
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '-', 'user': '+', 'assistant': '*'}[m['role']] + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% if enable_thinking is defined %}{{ '1' if enable_thinking else '0' }}{% endif %}"
    "{% endif %}"
)
"""A chat template over the tiny alphabet: one sign a role, and a switch for thinking."""


@pytest.fixture
def chatty(new_policy):
    policy = new_policy("qwen3")
    policy.tokenizer.chat_template = TEMPLATE
    return policy


def shown(policy, form: PromptFormat, prompt: Prompt) -> str:
    """What the model sees, read back from its token ids."""
    return policy.tokenizer.decode(form.encode(policy, [prompt])[0].token_ids)


def test_a_plain_prompt_is_the_question_as_it_is(policies) -> None:
    policy = policies("qwen3")
    (encoded,) = PromptFormat().encode(policy, [QUESTION])
    assert encoded.token_ids == policy.encode("3+4=")
    assert encoded.stop == ()


def test_a_question_that_is_an_example_is_not_shown_its_own_answer(chatty) -> None:
    form = PromptFormat(template="{prompt}", answer_template="{answer}-", shots=(("1+1=", "2"), ("3+4=", "7")))
    assert form.text(QUESTION) == "1+1=2-3+4="
    assert [m["content"] for m in form.messages(QUESTION)] == ["1+1=", "2", "3+4="]


def test_examples_and_wording_make_one_plain_text(policies) -> None:
    form = PromptFormat(
        template="={prompt}*", answer_template="{answer}-", shots=(("1", "2"), ("3", "4")), system="99", stop=("-",)
    )
    assert form.text(Prompt(id=0, task="t", text="5")) == "99\n\n=1*2-=3*4-=5*"
    without_system = PromptFormat(template=form.template, answer_template=form.answer_template, shots=form.shots)
    assert shown(policies("qwen3"), without_system, Prompt(id=0, task="t", text="5")) == "=1*2-=3*4-=5*"


def test_braces_of_a_question_are_left_alone() -> None:
    form = PromptFormat(template="Q: {prompt}\nA:")
    assert form.text(Prompt(id=0, task="t", text=r"\frac{a}{b} {prompt}")) == "Q: \\frac{a}{b} {prompt}\nA:"


def test_examples_become_turns_of_a_chat(chatty) -> None:
    form = PromptFormat(style="chat", shots=(("1+1=", "2"),), system="9")
    assert shown(chatty, form, QUESTION) == "-9+1+1=*2+3+4=="


def test_a_rows_own_system_message_stands(chatty) -> None:
    rows = [{"role": "system", "content": "7"}, {"role": "user", "content": "1"}]
    prompt = Prompt(id=0, task="t", text="", metadata={"messages": rows})
    assert shown(chatty, PromptFormat(system="9"), prompt) == "-7+1="
    assert rows[0]["role"] == "system"  # the row itself is not changed


@pytest.mark.parametrize(("thinking", "end"), [(None, "="), (True, "=1"), (False, "=0")])
def test_thinking_is_a_switch_of_the_template(chatty, thinking: bool | None, end: str) -> None:
    assert shown(chatty, PromptFormat(style="chat", thinking=thinking), QUESTION) == "+3+4=" + end


def test_auto_takes_the_chat_a_task_was_written_for_where_there_is_a_template(chatty, policies) -> None:
    form = PromptFormat(prefers_chat=True)
    assert shown(chatty, form, QUESTION) == "+3+4=="
    assert shown(policies("qwen3"), form, QUESTION) == "3+4="
    assert shown(chatty, PromptFormat(style="plain", prefers_chat=True), QUESTION) == "3+4="
    assert shown(chatty, PromptFormat(), QUESTION) == "3+4="


@pytest.mark.parametrize(
    ("form", "prompt", "error", "message"),
    [
        (PromptFormat(style="chat"), QUESTION, ModelError, "no chat template"),
        (PromptFormat(), CHAT, ModelError, "no chat template"),
        (PromptFormat(style="plain"), CHAT, ConfigError, "prompt.style=plain cannot format the chat messages"),
        (PromptFormat(thinking=True), QUESTION, ConfigError, "in plain text; set prompt.style=chat"),
    ],
)
def test_what_cannot_be_put_is_refused(policies, form, prompt, error, message) -> None:
    with pytest.raises(error, match=message):
        form.encode(policies("qwen3"), [prompt])


def test_a_template_that_raises_is_quoted(chatty) -> None:
    chatty.tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ModelError, match="refuses the messages: only one turn"):
        PromptFormat(style="chat").encode(chatty, [QUESTION])


def test_a_number_of_examples_is_asked_of_the_task() -> None:
    task = make_task("sums", seed=0, digits=1)
    form = PromptFormat.of(PromptConfig(shots=4), task)
    assert form.shots == tuple(task.shots(4))
    with pytest.raises(ConfigError, match=r"prompt.shots=2 asks task 'add4' for examples"):
        PromptFormat.of(PromptConfig(shots=2), ArithmeticTask())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "Q"}, r"template must hold \{prompt\}; got 'Q'"),
        ({"answer_template": "A"}, r"answer_template must hold \{answer\}; got 'A'"),
        ({"shots": -1}, "shots must be 0 or more"),
        ({"stop": [""]}, "must not be empty"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptConfig(**settings)


def test_the_shipped_format_of_sums_shows_balanced_examples(tmp_path: Path) -> None:
    import sapo

    config = sapo.load_recipe("smollm2_sums")
    task = make_task("sums", seed=config.eval.seed, **config.tasks[0].options)
    text = PromptFormat.of(config.prompt, task).text(Prompt(id=0, task="sums1", text="4 + 3 ="))
    lines = text.splitlines()
    assert lines[-2:] == ["Q: 4 + 3 =", "A:"]
    assert len(lines) == 10
    assert sum("+" in line for line in lines[:8]) == sum("-" in line for line in lines[:8]) == 2
