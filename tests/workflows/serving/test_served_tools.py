"""Tools in a chat: what the model is shown of them, and the calls that its answers are read for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from sapo.errors import ModelError
from sapo.workflows.serving.answers import ChatAnswers
from sapo.workflows.serving.requests import ChatRequest, Message, parse
from sapo.workflows.serving.served import Begun, Order, Piece, ServedModel
from sapo.workflows.serving.tools import OfferedTools
from support.served import TEMPLATE, served_here, talker

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Say the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 2}}</tool_call>'
SHOWN = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
CALLED = "{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments.city }}{% endfor %}"
WITH_TOOLS = SHOWN + TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}" + CALLED)
ASKED = [{"role": "user", "content": "Rome?"}]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (CALL, None),
        (f"Let me see.\n{CALL}", "Let me see."),
        (f"<think>They mean <tool_call>.</think>{CALL}", "<think>They mean <tool_call>.</think>"),
        (
            "<tool_call><function=weather><parameter=city>\nRome\n</parameter><parameter=days>\n2\n</parameter>"
            "</function></tool_call>",
            None,
        ),
        ('{"name": "weather", "parameters": {"city": "Rome", "days": 2}}', None),
        ('[weather("Rome", days=2)]', None),
        (f"{CALL}\nOne moment.", "One moment."),
        (f"<think>So.</think>Let me see.{CALL}One moment.", "<think>So.</think>Let me see.One moment."),
        (
            "First <tool_call>\n<function=weather><parameter=city>Rome</parameter><parameter=days>2</parameter>"
            "</function>\n</tool_call> then",
            "First  then",
        ),
    ],
)
def test_a_call_in_any_format_is_openais(written: str, said: str | None) -> None:
    text, [call] = OfferedTools([WEATHER]).split(written)
    assert text == said
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome", "days": 2}
    assert call["id"].startswith("call_")


@pytest.mark.parametrize(
    "written",
    ["It is warm.", '<tool_call>{"name": "weather", ', CALL.replace("weather", "whether"), '{"city": "Rome"}', ""],
)
def test_what_is_no_call_of_an_offered_tool_stays_text(written: str) -> None:
    assert OfferedTools([WEATHER]).split(written) == (written, [])


@pytest.mark.parametrize(
    "written",
    [
        "[weather(city={1, 2})]",
        '[weather(city=b"x")]',
        '[weather("Rome", days=1j)]',
        '[weather("Rome", days=...)]',
        "[weather(city={(1, 2): 2})]",
        '[weather("Rome", days=1e999)]',
        '[weather("Rome"), weather("Rome", days=-1e999)]',
        '{"name": "weather", "parameters": {"days": NaN}}',
        CALL.replace("2}", "Infinity}"),
    ],
)
def test_a_call_whose_arguments_json_does_not_have_stays_text(written: str) -> None:
    assert OfferedTools([WEATHER]).split(written) == (written, [])


def test_a_call_in_json_may_hold_the_mark_of_another_format() -> None:
    text, [call] = OfferedTools([WEATHER]).split('{"name": "weather", "parameters": {"city": "[TOOL_CALLS]"}}')
    assert text is None
    assert json.loads(call["function"]["arguments"]) == {"city": "[TOOL_CALLS]"}


def test_every_call_comes_with_an_id_of_its_own() -> None:
    named = CALL.replace('{"name"', '{"id": "x\\n\\u202e", "name"')
    text, calls = OfferedTools([WEATHER]).split(named * 40)
    assert text is None
    assert len({call["id"] for call in calls}) == 40
    assert all(call["id"].startswith("call_") for call in calls)


def test_calls_that_are_not_to_be_parallel_are_the_first_alone() -> None:
    body = {"model": "tiny", "messages": ASKED, "tools": [WEATHER]}
    two = CALL + CALL.replace("Rome", "Oslo")
    for given, cities in ((None, ["Rome", "Oslo"]), (True, ["Rome", "Oslo"]), (False, ["Rome"])):
        asked = parse(ChatRequest, json.dumps({**body, "parallel_tool_calls": given}).encode(), "tiny")
        calls = asked.offered.split(two)[1]
        assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == cities


def pieces(text: str, finish: str = "stop") -> list[Piece]:
    return [*(Piece(0, letter, (), 1) for letter in text), Piece(0, "", (), 1, finish)]


def test_an_answer_that_was_cut_says_so_beside_its_calls() -> None:
    answers = ChatAnswers("tiny", False, OfferedTools([WEATHER]))
    cut = pieces(CALL, "length")
    [*_, last] = [answers.event(piece)["choices"][0] for piece in cut]
    for choice, given in ((last, last["delta"]), (whole := answers.whole([cut], {})["choices"][0], whole["message"])):
        assert len(given["tool_calls"]) == 1
        assert choice["finish_reason"] == "length"


def test_a_streamed_call_is_one_event_and_text_is_held_until_it_is_none() -> None:
    answers = ChatAnswers("tiny", False, OfferedTools([WEATHER]))
    *before, last = [answers.event(piece)["choices"][0] for piece in pieces(f"Well. {CALL}")]
    assert all(choice["delta"] == {} for choice in before)
    assert (last["delta"]["content"], last["finish_reason"]) == ("Well.", "tool_calls")
    [call] = last["delta"]["tool_calls"]
    assert (call["index"], call["function"]["name"]) == (0, "weather")
    [*_, last] = [answers.event(piece)["choices"][0] for piece in pieces("It is warm.")]
    assert (last["delta"], last["finish_reason"]) == ({"content": "It is warm."}, "stop")


def test_a_turn_that_gives_a_call_back_is_what_templates_take() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turn = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}).turn()
    assert turn["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    answer = Message.model_validate({"role": "tool", "content": "warm", "tool_call_id": "call_1"}).turn()
    assert answer == {"role": "tool", "content": "warm", "tool_call_id": "call_1"}


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[httpx.Client, ServedModel]]:
    with served_here(talker(WITH_TOOLS)) as (url, served), httpx.Client(base_url=url, timeout=120) as client:
        yield client, served


def chat(client: httpx.Client, **fields) -> httpx.Response:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 3, "tools": [WEATHER], **fields}
    return client.post("/v1/chat/completions", json=body)


def test_the_template_shows_the_tools_and_the_calls_given_back(here) -> None:
    client, _ = here

    def count(**fields) -> int:
        return chat(client, **fields).json()["usage"]["prompt_tokens"]

    plain = count(tools=None)
    assert count() == plain + len("<weather>")
    assert count(tool_choice="none") == plain
    assert count(tools=[]) == plain
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "warm", "tool_call_id": "call_1"}]
    # The newline of the template stands behind a block, where Jinja drops it.
    assert count(messages=turns) == plain + len("<weather>[assistant]weather:Rome[tool]warm")


def test_a_call_that_is_drawn_comes_as_one_whole_or_streamed(here, monkeypatch: pytest.MonkeyPatch) -> None:
    client, served = here

    def written(order: Order) -> Iterator[Begun | list[Piece]]:
        yield Begun(1)
        yield from ([piece] for piece in pieces(CALL))

    monkeypatch.setattr(served, "draw", written)
    [choice] = chat(client).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["city"] == "Rome"
    lines = [line.removeprefix("data: ") for line in chat(client, stream=True).text.split("\n\n") if line]
    opening, event = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert opening["delta"] == {"role": "assistant", "content": ""}
    assert event["finish_reason"] == "tool_calls"
    [choice] = chat(client, tools=None).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", 'tools.0.function: Field required; got {"type": "function"}'),
        (
            {"tools": [{"type": "retrieval", "function": {"name": "x"}}]},
            "tools",
            "tools.0.type: Input should be 'function'",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "none"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "city"}}]}
                ]
            },
            None,
            "JSON object",
        ),
    ],
)
def test_tools_that_are_none_are_refused(here, fields, param, words) -> None:
    response = chat(here[0], **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]


def test_a_template_without_a_place_for_tools_refuses_them() -> None:
    served = ServedModel("plain", talker(), engine=None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="plain: its chat template has no place for tools"):
        served.chat_prompt(ASKED, None, [WEATHER])
