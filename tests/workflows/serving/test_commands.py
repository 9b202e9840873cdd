"""`sapo serve` and `sapo chat` as one runs them, and `sapo generate` on a terminal."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sapo.cli.chat import DIM, PLAIN, dimmed, talk
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.utils.text import visible
from sapo.workflows.chat import Conversation
from sapo.workflows.generate import generate
from sapo.workflows.serving.served import Order, ServedModel
from sapo.workflows.serving.web import Address
from support.commands import call
from support.served import PATIENCE, save, served_here, talker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(talker(), tmp_path_factory.mktemp("served") / "tiny")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_and_ends_clean_while_an_answer_is_under_way(
    model: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, statuses = [], []
    monkeypatch.setattr("sapo.cli.serve.say", printed.append)

    def visit() -> None:
        try:
            deadline = time.monotonic() + PATIENCE
            while not printed:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            url = printed[0].split()[3]
            statuses.append(httpx.get(f"{url}/models", timeout=60).status_code)
            body = {"model": "tiny", "prompt": "1", "max_tokens": 400, "stream": True}
            with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                assert next(lines).startswith("data: {")
                statuses.append(response.status_code)
        finally:
            os.kill(os.getpid(), number)

    visitor = threading.Thread(target=visit)
    visitor.start()
    code = call("serve", str(model), "--port", "0")
    visitor.join(PATIENCE)
    assert (code, statuses) == (0, [200, 200])
    assert printed[0].startswith("serving tiny at http://127.0.0.1:")
    assert printed[-1] == "stopped after 1 request"


@pytest.mark.parametrize(
    ("given", "host", "shown"),
    [("secret-of-mine", "127.0.0.1", "token: that of SAPO_SERVER_TOKEN"), (None, "0.0.0.0", None), (None, "::1", "")],
)
def test_serve_prints_a_token_that_it_made_and_no_other(
    model: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, host: str, shown: str | None
) -> None:
    printed: list[str] = []
    monkeypatch.setattr("sapo.cli.serve.say", printed.append)

    def ready_at_once(app: object, taken: object, *, on_ready, **ends: object) -> None:
        on_ready()

    monkeypatch.setattr("sapo.workflows.serving.web.serve", ready_at_once)
    monkeypatch.delenv("SAPO_SERVER_TOKEN", raising=False)
    if given is not None:
        monkeypatch.setenv("SAPO_SERVER_TOKEN", given)
    address = Address.of(host, 0)
    assert address.made == (shown is None)
    assert call("serve", str(model), "--port", "0", "--host", host) == 0
    tokens = [line for line in printed if line.startswith("token: ")]
    if shown is None:
        assert len(tokens[0]) > len("token: ") + 30
    else:
        assert tokens == [shown] * bool(shown)
    assert "secret" not in " ".join(printed)


def test_a_port_in_use_is_one_line_and_code_2_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert call("serve", "no/such/model", "--port", str(port)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--port must be free; got 127.0.0.1 {port}" in err


def test_openais_own_client_is_answered() -> None:
    openai = pytest.importorskip("openai")
    with served_here(talker(), name="mine") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == ["mine"]
        asked = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "seed": 1}
        whole = client.chat.completions.create(**asked, logprobs=True)
        [choice] = whole.choices
        assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        text = client.completions.create(model="mine", prompt=["a", "b"], max_tokens=3, logprobs=0)
        assert [c.index for c in text.choices] == [0, 1]
        with pytest.raises(openai.NotFoundError, match="the one served is 'mine'"):
            client.completions.create(model="gpt", prompt="a")
        shown = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs.content
        assert [len(token.top_logprobs) for token in shown] == [3] * len(shown)
        text = client.completions.create(model="mine", prompt="a", max_tokens=3, logprobs=2).choices[0].logprobs
        assert [text.tokens[i] in of for i, of in enumerate(text.top_logprobs)] == [True] * len(text.tokens)
        with pytest.raises(openai.BadRequestError, match="less than or equal to 20") as refused:
            client.chat.completions.create(**asked, logprobs=True, top_logprobs=30)
        assert refused.value.param == "top_logprobs"


def conversation(policy, **options) -> Conversation:
    engine = LocalEngine(policy)
    engine.set_weights(policy.weights(), version=0)
    served = ServedModel("tiny", policy, engine, max_new_tokens=options.pop("max_new_tokens", 6))
    return Conversation(served, Order(prompts=lambda _: [], max_new_tokens=None), **options)


def test_a_conversation_remembers_its_turns_until_it_is_reset() -> None:
    policy = talker()
    talking = conversation(policy, seed=5)
    first = "".join(talking.say("Hello"))
    seen = []
    inner = talking.served.chat_prompt
    talking.served.chat_prompt = lambda turns, thinking: seen.append(turns) or inner(turns, thinking)
    second = "".join(talking.say("And?"))
    turns = [("user", "Hello"), ("assistant", first), ("user", "And?")]
    assert [(t["role"], t["content"]) for t in seen[-1]] == turns
    half = talking.say("What?")
    next(half)
    half.close()  # left in the middle: neither message nor answer stays
    list(talking.say("So?"))
    assert [(t["role"], t["content"]) for t in seen[-1]] == [*turns, ("assistant", second), ("user", "So?")]
    talking.reset()
    talking.system = "Be kind."
    list(talking.say("Hello"))
    assert [t["content"] for t in seen[-1]] == ["Be kind.", "Hello"]
    expected = generate(policy, "Hello", SamplingParams(max_new_tokens=6, seed=5), style="chat")
    assert first == expected.completions[0].text


def test_talk_takes_commands_and_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    talking = conversation(talker(max_length=64), seed=1)
    talk(talking, ["", "/system Be brief.", "/sytem x", "x" * 80, "Hi", "/reset", "/exit", "never"], dim=False)
    out, err = capsys.readouterr()
    assert talking.system == "Be brief."
    assert "there is no command /sytem" in out
    assert "64 positions" in err
    answer = "".join(conversation(talker(max_length=64), seed=1, system="Be brief.").say("Hi"))
    assert out.splitlines()[-2:] == [answer.splitlines()[-1] if answer else "", "forgotten"]


def test_a_system_message_taken_back_says_which_holds_then(capsys: pytest.CaptureFixture[str]) -> None:
    talking = conversation(talker(), seed=1)
    talk(talking, ["/system Be brief.", "/system"], dim=False)
    assert talking.system is None
    talking.served.form = replace(talking.served.form, system="Be \x1bkind.")
    talk(talking, ["/system"], dim=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["system message set", "no system message"]
    assert lines[2] == "the run's own system message holds again: Be \\x1bkind."


def test_what_only_a_chat_template_takes_is_refused_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = talker(None)
    talking = conversation(plain)
    talk(talking, ["/system Be brief."], dim=False)
    assert talking.system is None
    assert "needs a chat template" in capsys.readouterr().out
    directory = save(plain, tmp_path / "plain")
    for option in (["--system", "Be brief."], ["--thinking"], ["--no-thinking"]):
        assert call("chat", str(directory), *option) == 2
        assert f"{option[0]} needs a model with a chat template; plain has none" in capsys.readouterr().err


def test_thoughts_are_dim_and_nothing_steers_the_terminal() -> None:
    pieces = ["a<", "think>hm", "</thi", "nk>b\x1b[2J", "<thin"]
    assert "".join(dimmed(pieces)) == f"a{DIM}<think>hm</think>{PLAIN}b\\x1b[2J<thin"
    assert list(dimmed(["a", "b"])) == ["a", "b"]


def test_chat_reads_lines_where_there_is_no_terminal(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/reset\nHi\n"))
    assert call("chat", str(model), "--temperature", "0", "--max-new-tokens", "8") == 0
    first, _, again = capsys.readouterr().out.partition("forgotten\n")
    assert first == again
    assert first.strip()


def test_chat_checks_its_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chat", str(model), "--top-p", "2") == 2
    assert "--top-p must lie in (0, 1]" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A terminal that keeps what was written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_generate_streams_on_a_terminal_what_it_prints_elsewhere(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(model), "Hi", "--temperature", "0", "--max-new-tokens", "30"]
    assert call(*words) == 0
    plain = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call(*words) == 0
    assert "".join(terminal.writes) == visible(plain)
    assert len(terminal.writes) > 5, "it came piece by piece"
