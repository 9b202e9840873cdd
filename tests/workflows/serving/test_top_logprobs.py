"""The likeliest tokens beside each drawn one: those of the distribution that it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch

from sapo.rollout.engine import Capabilities
from sapo.rollout.local.rows import own_attention
from sapo.workflows.serving.served import ServedModel
from support.served import chat, complete, events, served_here, talker

WAYS = [
    {"temperature": 1.0},
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.8, "top_k": 9},
]


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[httpx.Client, ServedModel]]:
    with served_here(talker()) as (url, served), httpx.Client(base_url=url, timeout=60) as client:
        yield client, served


def distribution(served: ServedModel, ids, way: dict):
    """Log-probabilities of every next token after a plain forward, by the distribution that is sampled from."""
    with own_attention(served.policy):
        logits = served.policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    if way["temperature"]:
        logits = logits / way["temperature"]
    kept = torch.ones_like(logits, dtype=torch.bool)
    if "top_k" in way:  # of these the likeliest, until they reach top_p together
        top = logits.topk(way["top_k"])
        before = top.values.softmax(0).cumsum(0) - top.values.softmax(0)
        kept[:] = False
        kept[top.indices[before < way["top_p"]]] = True
    return logits.masked_fill(~kept, float("-inf")).log_softmax(0)


def after(served: ServedModel, prompt: str, texts: list[str], way: dict) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each drawn token with the four likeliest in its place, of those that can be drawn."""
    ids = list(served.policy.encode(prompt))
    for text in texts:
        top = distribution(served, ids, way).topk(4)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        yield text, {served.policy.show((token,)): p for token, p in pairs if p > float("-inf")}
        ids += served.policy.encode(text)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_the_distribution_sampled_from(here, way) -> None:
    client, served = here
    asked = {"max_tokens": 5, "seed": 2, **way}
    chosen = complete(client, logprobs=4, **asked).json()["choices"][0]["logprobs"]
    for at, (text, likeliest) in enumerate(after(served, "1+1=", chosen["tokens"], way)):
        shown = chosen["top_logprobs"][at]
        logprob = chosen["token_logprobs"][at]
        assert shown == pytest.approx({**likeliest, text: logprob}, abs=1e-4)
        assert shown[text] == logprob
        assert list(shown.values()) == sorted(shown.values(), reverse=True)
    content = chat(client, logprobs=True, top_logprobs=4, **asked).json()["choices"][0]["logprobs"]["content"]
    prompt = "[system]Be brief.\n[user]Hello?\n[assistant]"
    for at, (_, likeliest) in enumerate(after(served, prompt, [c["token"] for c in content], way)):
        shown = content[at]["top_logprobs"]
        assert [e["token"] for e in shown] == list(likeliest)
        assert [e["logprob"] for e in shown] == pytest.approx(list(likeliest.values()), abs=1e-4)
        assert shown[0]["bytes"] == list(shown[0]["token"].encode())


def test_a_stream_shows_the_likeliest_tokens_of_the_whole_answer(here) -> None:
    client, _ = here
    asked = {"seed": 4, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **asked).json()["choices"][0]["logprobs"]["content"]
    pieces = [c for p in events(chat(client, **asked, stream=True)) for c in p["choices"]]
    streamed = [e for c in pieces if c["logprobs"] for e in c["logprobs"]["content"]]
    assert [[o["token"] for o in e["top_logprobs"]] for e in streamed] == [
        [o["token"] for o in e["top_logprobs"]] for e in whole
    ]
    assert all(len(e["top_logprobs"]) == 2 for e in whole)
    assert all(
        e["top_logprobs"] == []
        for e in chat(client, max_tokens=3, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    )


def test_an_engine_that_knows_the_drawn_token_alone_refuses_to_show_others(here, monkeypatch) -> None:
    client, served = here
    monkeypatch.setattr(served.engine, "capabilities", Capabilities(), raising=False)
    for response in (complete(client, logprobs=1), chat(client, logprobs=True, top_logprobs=1)):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
        assert "drawn token alone" in error["message"]
    assert complete(client, logprobs=0).status_code == 200
    error = complete(client, top_logprobs=2).json()["error"]
    assert "write logprobs" in error["message"]
