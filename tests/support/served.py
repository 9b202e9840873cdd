"""A tiny model that chats, saved to a directory, and a server of it in this process."""

from __future__ import annotations

import json
import string
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.workflows.serving.application import application, refusal
from sapo.workflows.serving.served import ServedModel, serving_engine
from sapo.workflows.serving.web import Guard, bound, serve
from sapo.workflows.serving.worker import Worker

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}!{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PATIENCE = 120.0
"""Seconds; a limit for a hung process, not a measurement."""
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


def talker(template: str | None = TEMPLATE, gain: float = 5.0, **options: Any) -> Policy:
    """Make a tiny policy over printable ASCII; its answers are noise, and depend on every token."""
    import torch

    tokenizer = character_tokenizer(string.printable)
    tokenizer.chat_template = template
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model("qwen3", len(tokenizer), seed=0, **ids, **{"hidden_size": 32, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(gain)
    return prepare_policy(model, tokenizer)


@contextmanager
def in_a_thread(application: Any, taken: Any, on_stop: Callable[[], object]) -> Iterator[None]:
    """Serve an application on a bound socket from a thread of this process, until the end of the block."""
    stop, ready = threading.Event(), threading.Event()
    ends = {"should_stop": stop.is_set, "on_ready": ready.set, "on_stop": on_stop}
    thread = threading.Thread(target=lambda: serve(application, taken, **ends))
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a server ends when it is asked to, though pages are open"


@contextmanager
def served_here(
    policy: Policy, *, host: str = "127.0.0.1", name: str = "tiny", worker: Worker | None = None
) -> Iterator[tuple[str, ServedModel]]:
    """Serve a policy from a thread of this process; give its address and what is served."""
    with bound(host, 0) as (taken, address), serving_engine(policy, "local") as engine:
        served = ServedModel(name, policy, engine, max_new_tokens=24)
        worker = worker or Worker(8)
        app = Guard(application(served, worker), address, refusal)
        with in_a_thread(app, taken, worker.close):
            yield address.url, served


def save(policy: Policy, directory: Path) -> Path:
    """Save a policy as a model directory."""
    directory.mkdir()
    policy.save(directory)
    return directory


def endless():
    """Make a model whose completions do not end by themselves."""
    policy = talker(max_length=4096)
    policy.unused_tokens = [policy.tokenizer.eos_token_id]
    return policy


def chat(client: httpx.Client, **fields):
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **fields})


def complete(client: httpx.Client, **fields):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "1+1=", **fields})


def events(response: httpx.Response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
