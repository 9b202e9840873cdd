"""How long prompts may be: what is refused, dropped and counted, and when the tokenizer is left out of it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sapo
from sapo.data import Prompt
from sapo.errors import ConfigError, TaskError
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.rollout.prompting import PromptFormat, PromptLengths
from sapo.run.preflight import check_prompts, limit_prompts, load_tasks
from sapo.tasks import FileTask, RowTask, load_verifier
from sapo.tasks.rows import task as row_task
from sapo.tasks.rows.settings import PromptLimit
from sapo.workflows.train import resume
from support.pictures import picture
from support.runs import fingerprint, write_recipe

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bytes_tokenizer(merges: list[tuple[str, str]], normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template: 256 bytes and a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT)


@pytest.fixture
def byte_level(new_policy) -> Policy:
    return with_tokenizer(new_policy, bytes_tokenizer([("1", "2"), ("12", "3")]))


def with_tokenizer(new_policy: Any, tokenizer: PreTrainedTokenizerBase) -> Policy:
    policy = new_policy("qwen3")
    policy.model.resize_token_embeddings(len(tokenizer))
    return Policy(policy.model, tokenizer)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text was given to a tokenizer."""
    counted: Counter[str] = Counter()
    call = PreTrainedTokenizerBase.__call__

    def count(self, text, *args, **options):
        counted[text] += 1
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", count)
    return counted


def recipe(tmp_path: Path, rows: list[dict[str, Any]], **task: Any) -> sapo.RunConfig:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"name": "file", "path": str(tmp_path / "rows.jsonl"), "verifier": "last_number", **task}]
    return sapo.load_recipe(write_recipe(tmp_path, tasks=tasks, rollout__max_new_tokens=8))


def chats(number: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": i + 1} for i in range(number)]


def test_a_file_is_read_once_and_short_prompts_of_bytes_are_not_encoded(
    tmp_path: Path, byte_level: Policy, encoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    whole = row_task.read_rows
    monkeypatch.setattr(row_task, "read_rows", lambda path: read.append(path) or whole(path))
    config = recipe(tmp_path, chats(200))
    tasks = load_tasks(config)
    assert len(read) == 1, "one file, for training and for held-out problems"
    check_prompts(config, byte_level, tasks)
    assert not encoded
    assert {p.text for p in tasks.held_out[0].held_out(200)} == {p.text for p in tasks.train[0].held_out(200)}


def test_a_chat_row_costs_one_rendering_of_the_template_and_no_tokenization(
    tmp_path: Path, byte_level: Policy, encoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work that 20,000 rows take before a run, counted: by the clock it is measured in bench/checking.py."""
    rendered: Counter[str] = Counter()
    render = PreTrainedTokenizerBase.apply_chat_template

    def count(self, messages, *args, **options):
        rendered[messages[0]["content"]] += 1
        return render(self, messages, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", count)
    tasks = load_tasks(config := recipe(tmp_path, chats(300)))
    assert not rendered, "reading renders nothing"
    check_prompts(config, byte_level, tasks)
    assert len(rendered) > 250, "all training rows, and the held-out ones that are evaluated"
    assert set(rendered.values()) == {1}
    assert not encoded


def test_the_two_sides_are_as_if_each_had_read_the_file(tmp_path: Path) -> None:
    config = recipe(tmp_path, chats(200))
    tasks = load_tasks(config)
    own = FileTask(tmp_path / "rows.jsonl", verifier="last_number", seed=config.eval.seed)
    assert tasks.held_out[0].held_out(200) == own.held_out(200)
    assert [tasks.held_out[0].train_prompt(i) for i in range(400)] == [own.train_prompt(i) for i in range(400)]
    assert [p.text for p in tasks.train[0].held_out(200)] != [p.text for p in own.held_out(200)], "another seed's order"


def test_a_prompt_that_could_be_too_long_is_encoded_and_one_that_is_is_refused(
    tmp_path: Path, byte_level: Policy, encoded: Counter[str]
) -> None:
    # "<user>" and "<assistant>" are 17 bytes around the question, and 8 new tokens need room; 123 is one token.
    room = byte_level.max_length - 8 - 17
    shortest, middle, longest = "1" * (room - 8), "123" * (room // 3), "1" * (room + 1)
    for question, tokens in ((shortest, None), (middle, 17 + room // 3), (longest, 17 + room + 1)):
        config = recipe(tmp_path, [*chats(30), {"prompt": [{"role": "user", "content": question}], "answer": 1}])
        encoded.clear()
        if question == longest:
            with pytest.raises(ConfigError, match=f"leave room for the prompt; got 8 with a prompt of {tokens} tokens"):
                check_prompts(config, byte_level, load_tasks(config))
        else:
            check_prompts(config, byte_level, load_tasks(config))
            assert len(encoded) == (tokens is not None)
        if tokens is not None:
            assert len(byte_level.encode_messages([{"role": "user", "content": question}])) == tokens


def test_a_template_that_refuses_a_row_is_found_without_encoding(tmp_path: Path, byte_level: Policy) -> None:
    config = recipe(tmp_path, [*chats(40), {"prompt": [{"role": "tool", "content": "1"}], "answer": 1}])
    with pytest.raises(sapo.errors.ModelError, match="refuses the messages: no tools"):
        check_prompts(config, byte_level, load_tasks(config))


TEXTS = [
    "",
    " a  b\n\n",
    "\N{GRINNING FACE}\N{MUSICAL SYMBOL SIXTEENTH NOTE}",
    "한국어 日本語",
    "a\u0301\u0323 ﬁ ㍿",
    "\x00\x7f\xad\xff",
    "<end><end>",
]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_bytes_are_a_bound_of_the_tokens(new_policy, normalizer: Any) -> None:
    policy = with_tokenizer(new_policy, bytes_tokenizer([("1", "2")], normalizer))
    draw = random.Random(0)
    made = [
        "".join(chr(draw.choice([*range(1, 256), *range(0x4E00, 0x4E10), 0x1D160])) for _ in range(40))
        for _ in range(50)
    ]
    for text in (*TEXTS, *made):
        messages = [{"role": "user", "content": text}]
        prompt = sapo.data.Prompt(id=0, task="t", text=text, metadata={"messages": messages})
        tokens = len(policy.encode_messages(messages))
        assert tokens <= PromptLengths(policy, PromptFormat()).count(prompt, within=None)
        assert PromptLengths(policy, PromptFormat()).count(prompt, within=0) == tokens, "encoded where it matters"


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Replace("a", "a" * 9)])
def test_a_normalizer_that_may_lengthen_a_text_leaves_no_bound(new_policy, normalizer: Any) -> None:
    assert with_tokenizer(new_policy, bytes_tokenizer([], normalizer)).tokens_per_byte() is None


def test_a_tokenizer_that_does_not_read_bytes_leaves_no_bound(policies) -> None:
    assert policies("qwen3").tokens_per_byte() is None


# ------------------------------------------------------------------------------------------------- max_prompt_tokens


def long_rows() -> list[dict[str, Any]]:
    """40 prompts of 4 characters and 10 of 12, which are as many tokens for the model of the tests."""
    short = [{"prompt": f"{10 + i}+1"[:4], "answer": i} for i in range(40)]
    return [*short, *({"prompt": f"{10 + i}+1+1+1+1+1"[:12], "answer": i} for i in range(10))]


def test_rows_with_longer_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    config = recipe(tmp_path, long_rows(), max_prompt_tokens=4, on_long_prompt="drop")
    policy = load_policy(tmp_path / "model")
    tasks = load_tasks(config)
    digest = tasks.train[0].content_digest()
    before = (tasks.train[0].num_train, tasks.train[0].num_held_out)
    limit_prompts(policy, tasks)
    (train,), (held_out,) = tasks.train, tasks.held_out
    assert sum(before) == 50
    assert train.num_train + held_out.num_held_out == 40
    assert {len(train.train_prompt(i).text) for i in range(80)} == {4}
    assert {len(p.text) for p in held_out.held_out(50)} == {4}
    dropped = (before[0] - train.num_train, before[1] - train.num_held_out)
    assert train.notices == (
        f"rows: {dropped[0]} training and {dropped[1]} held-out rows with prompts of more than 4 tokens were dropped, "
        f"and {train.num_train} and {train.num_held_out} are left",
    )
    assert train.content_digest() == digest, "a resumed run knows its rows by what was read"


def test_pictures_of_dropped_rows_are_known_to_a_resumed_run_too() -> None:
    """It compares them before it drops any."""
    rows = [Prompt(id=i, task="rows", text="?" * i, answer="7", pictures=(picture(i),)) for i in range(1, 9)]
    limit = PromptLimit(6, drop=True)
    task = RowTask(name="rows", train=rows[::2], held_out=rows[1::2], verifier=load_verifier("exact"), limit=limit)
    digest = task.picture_digest()
    task.apply_limit(lambda prompt: len(prompt.text))
    assert (task.num_train, task.num_held_out) == (3, 3)
    assert task.picture_digest() == digest


def test_rows_with_longer_prompts_are_refused_unless_they_are_dropped(tmp_path: Path) -> None:
    config = recipe(tmp_path, long_rows(), max_prompt_tokens=11)
    policy = load_policy(tmp_path / "model")
    with pytest.raises(
        TaskError, match=r"rows: a prompt must have at most 11 tokens \(max_prompt_tokens\); got 12: '1"
    ):
        limit_prompts(policy, load_tasks(config))
    with pytest.raises(TaskError, match=r"\.jsonl:\d+: task rows: a prompt must have at most 11 tokens") as refused:
        limit_prompts(policy, load_tasks(config))
    place, line = re.search(r"(\S+):(\d+): task", str(refused.value)).groups()
    assert len(json.loads(Path(place).read_text().splitlines()[int(line) - 1])["prompt"]) == 12
    roomy = recipe(tmp_path, long_rows(), max_prompt_tokens=12)
    tasks = load_tasks(roomy)
    limit_prompts(policy, tasks)
    assert tasks.train[0].notices == ()
    none_left = recipe(tmp_path, long_rows(), max_prompt_tokens=1, on_long_prompt="drop")
    with pytest.raises(TaskError, match="max_prompt_tokens=1 must leave some rows"):
        limit_prompts(policy, load_tasks(none_left))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be 1 or more, or null; got 0"),
        ({"max_prompt_tokens": 5, "on_long_prompt": "cut"}, "on_long_prompt must be refuse or drop; got 'cut'"),
    ],
)
def test_a_wrong_limit_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        load_tasks(recipe(tmp_path, long_rows(), **options))


def test_a_run_that_drops_rows_resumes_with_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config = recipe(
        tmp_path,
        long_rows(),
        max_prompt_tokens=4,
        on_long_prompt="drop",
        verifier="rewards_of_a_test:share_of_sevens",
        score_truncated=True,
    )
    whole = sapo.train(config.model_copy(update={"run_dir": str(tmp_path / "whole")})).directory
    assert sapo.train(config, should_stop=(tmp_path / "run" / "checkpoints" / "step-000002").exists).stopped
    assert fingerprint(resume(tmp_path / "run").directory, 6) == fingerprint(whole, 6)
