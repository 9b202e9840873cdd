"""The store of token ids by prompt."""

from __future__ import annotations

import sys

import pytest

from sapo.data import Prompt
from sapo.rollout.encoded import BYTES_PER_PROMPT, EncodedPrompts
from sapo.rollout.prompting import PromptFormat


def prompt(text: str, **metadata) -> Prompt:
    return Prompt(id=0, task="t", text=text, metadata=metadata)


def test_the_largest_token_ids_come_back_as_they_were() -> None:
    encoded, ids = EncodedPrompts(), (0, 2**31 - 1, 151_643)
    encoded.add(prompt("a"), ids)
    assert encoded.find(prompt("a")) == (ids, None)


def test_text_and_messages_together_name_a_prompt() -> None:
    turn = {"role": "user", "content": "1"}
    rows = [
        prompt("a"),
        prompt("b"),
        prompt("a", messages=[turn]),
        prompt("b", messages=[turn]),
        prompt("a", messages=[{**turn, "content": "2"}]),
        prompt("a", messages=[{**turn, "role": "system"}]),
        prompt("a", messages=[turn, turn]),
    ]
    encoded = EncodedPrompts()
    for number, row in enumerate(rows):
        assert encoded.find(row) is None
        encoded.add(row, (number,))
    assert [encoded.find(row) for row in rows] == [((number,), None) for number in range(len(rows))]
    assert encoded.find(prompt("a", solution="7")) == ((0,), None), (
        "what else a row brings does not change what is asked"
    )


def test_a_full_store_keeps_what_it_has_and_takes_what_still_fits() -> None:
    encoded = EncodedPrompts(max_bytes=2 * BYTES_PER_PROMPT + 4 * 10)
    encoded.add(prompt("first"), (1,) * 5)
    encoded.add(prompt("long"), (2,) * 50)
    encoded.add(prompt("second"), (3,) * 5)
    encoded.add(prompt("third"), (4,))
    found = [encoded.find(prompt(text)) is not None for text in ("first", "long", "second", "third")]
    assert found == [True, False, True, False]


def test_a_prompt_takes_no_more_memory_than_is_counted() -> None:
    import tracemalloc

    prompts = [prompt(f"{number}" * 100) for number in range(20_000)]
    ids = tuple(range(1000, 1060))
    tracemalloc.start()
    try:
        encoded = EncodedPrompts()
        for row in prompts:
            encoded.add(row, ids)
        taken = tracemalloc.get_traced_memory()[0] / len(encoded)
    finally:
        tracemalloc.stop()
    assert taken <= BYTES_PER_PROMPT + 4 * len(ids)
    assert taken < sys.getsizeof(ids), "less than a tuple's pointers alone"


@pytest.mark.parametrize("change", ["tokenizer", "chat_template"])
def test_ids_of_another_tokenizer_or_template_are_dropped(new_policy, change: str) -> None:
    form, row = PromptFormat(style="chat"), Prompt(id=0, task="t", text="1+1=")
    before, after = new_policy("qwen3"), new_policy("qwen3")
    before.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    form.encode(before, [row])
    after = after if change == "tokenizer" else before
    after.tokenizer.chat_template = "{{ messages[0]['content'] }}7"
    assert form.encode(after, [row])[0].token_ids == after.encode("1+1=7")
