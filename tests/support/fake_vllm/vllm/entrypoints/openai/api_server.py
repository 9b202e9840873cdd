"""The endpoints of vLLM's server that sapo speaks to, in a process of their own, with faults on order.

Each request is drawn on its own, so that its bits depend on nothing but its weights and its noise: a run that loses
servers can then be held against one that does not. What is to go wrong is the body of POST /fake, or in the environment
variable FAKE_VLLM as JSON: {"*": {...}} for all servers, {"1": {...}} for the run's server 1, {"1#0": {...}} for its
first start. Keys:

    slow                seconds before each answer            version     of vLLM that it says
    die_at              request (0, 1, ...) it dies within    config      entries of the model's config that it says
    fail, garbage       requests answered by 500, by garbage  describe    entries of what it says it serves
    hang_at             request from which it answers none    label       of the weights, whatever was set
    freeze_at           request at which the process stops    transfer    "hang", "fail" or "die"
    start_fails         true                                  ignore_weights  true
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import string
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.data import Completion, Prompt
from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.servers.description import PROTOCOL
from sapo.rollout.servers.guard import Guard
from sapo.rollout.servers.transfer import SERVER, Link, LinkInfo

FOR_EVER = 3600.0


def knobs() -> dict[str, Any]:
    """Return what is to go wrong with this server."""
    every = json.loads(os.environ.get("FAKE_VLLM", "{}"))
    log = re.fullmatch(r"(\d\d)\.log", os.path.basename(os.readlink("/proc/self/fd/1")))
    number = str(int(log[1])) if log else "*"
    start = 0
    if log:
        with open("/proc/self/fd/1") as lines:
            start = sum(line.startswith("fake server") for line in lines)
    return {**every.get("*", {}), **every.get(number, {}), **every.get(f"{number}#{start}", {})}


class Fake:
    """The model and what is known of it."""

    def __init__(self, options: argparse.Namespace, wrong: dict[str, Any]) -> None:
        self.wrong, self.options = wrong, options
        config = AutoConfig.from_pretrained(options.model)
        self.said = config.to_dict()
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, options.dtype))
        letters = (string.printable + "".join(map(chr, range(0x100, 0x800))))[: config.vocab_size - 2]
        self.policy = prepare_policy(model, character_tokenizer(letters))
        self.engine = LocalEngine(self.policy)
        self.lock = threading.Lock()
        self.requests = 0
        self.label = "default"
        self.updating = False
        self.link: Link | None = None

    def describe(self) -> dict[str, Any]:
        length = self.options.max_model_len
        return {
            "protocol": PROTOCOL,
            "config": {**self.said, **self.wrong.get("config", {})},
            "dtype": self.options.dtype,
            "max_length": self.policy.max_length if length < 0 else length,
            "logprobs_mode": "processed_logprobs",
            "tensor_parallel": 1,
            **self.wrong.get("describe", {}),
        }

    @torch.no_grad()
    def update(self, info: dict[str, Any]) -> None:
        assert self.updating, "start_weight_update must be called before update_weights"
        assert self.link is not None, "no connection"
        own = dict(self.policy.weights())
        for name, tensor in self.link.receive(info).tensors():
            if not self.wrong.get("ignore_weights"):
                own[name].copy_(tensor)

    def draw(self, body: dict[str, Any]) -> Completion:
        fields = body["sampling_params"]
        params = SamplingParams(
            max_new_tokens=fields["max_tokens"],
            temperature=fields["temperature"],
            top_p=fields["top_p"],
            top_k=max(0, fields["top_k"]),
            min_p=fields["min_p"],
            seed=fields["seed"],
            stop_token_ids=frozenset(fields["stop_token_ids"]),
        )
        with self.lock:
            self.engine.set_weights(self.policy.weights(), 0)
            prompt = Prompt(id=0, task="", text="", token_ids=tuple(body["token_ids"]))
            [[completion]] = self.engine.generate([Request(prompt, 1)], params)
        return completion


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    fake: Fake

    def do_GET(self) -> None:
        if self._guarded():
            self._answer({"/version": {"version": self.fake.wrong.get("version", "0.32.0")}}.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._guarded():
            return
        transfer = self.fake.wrong.get("transfer")
        if self.path == "/update_weights" and transfer is not None:
            if transfer == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(FOR_EVER if transfer == "hang" else 0)
            self._answer({"error": "out of memory"}, 500)
            return
        try:
            self._post(body)
        except (AssertionError, RuntimeError) as error:
            self._answer({"error": str(error)}, 500)

    def _post(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if self.path == "/fake":  # other faults from now on
            self._answer({"requests": fake.requests})
            fake.wrong, fake.requests = body, 0
            return
        if self.path == "/inference/v1/generate":
            self._generate(body)
            return
        found: dict[str, Any] = {}
        if self.path == "/collective_rpc":
            name = body["method"]
            assert name in ("sapo_describe", "sapo_forget_update"), name
            fake.updating = False if name == "sapo_forget_update" else fake.updating
            found = {"results": [fake.describe() if name == "sapo_describe" else None]}
        elif self.path == "/init_weight_transfer_engine":
            fake.link = None
            fake.link = Link(LinkInfo(**body["init_info"]), SERVER)
        elif self.path == "/start_weight_update":
            assert not fake.updating, "start_weight_update called while a weight update is already active"
            fake.updating = True
        elif self.path == "/update_weights":
            fake.update(body["update_info"])
        elif self.path == "/finish_weight_update":
            fake.updating, fake.label = False, fake.wrong.get("label", body["weight_version"])
        else:
            assert self.path == "/reset_prefix_cache", self.path
        self._answer(found)

    def _generate(self, body: dict[str, Any]) -> None:
        fake, wrong = self.fake, self.fake.wrong
        number, fake.requests = fake.requests, fake.requests + 1
        time.sleep(wrong.get("slow", 0))
        if number >= wrong.get("hang_at", FOR_EVER):
            time.sleep(FOR_EVER)
        if number == wrong.get("freeze_at"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if number in wrong.get("fail", []):
            self._answer({"error": "out of memory"}, 500)
            return
        if number in wrong.get("garbage", []):
            kinds: list[Any] = [{}, {"choices": []}, {"choices": [{"token_ids": [1], "finish_reason": "length"}]}, 7]
            self._answer(kinds[number % 4])
            return
        parts = _parts(fake.draw(body), fake.label, streamed=body.get("stream", False))
        if number == wrong.get("die_at"):
            text = json.dumps(parts[0]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2])
            self.wfile.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if not body.get("stream"):
            self._answer(parts[0])
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for line in [*(json.dumps(part) for part in parts), "[DONE]"]:
            text = f"data: {line}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.write(b"0\r\n\r\n")

    def _guarded(self) -> bool:
        headers = [(k.lower().encode(), v.encode()) for k, v in self.headers.items()]
        guard = Guard(None)
        if guard._expected is None or guard._allowed({"headers": headers}):
            return True
        self._answer({"error": "Unauthorized"}, 401)
        return False

    def _answer(self, body: Any, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True


def _parts(completion: Completion, label: str, streamed: bool) -> list[dict[str, Any]]:
    """Return the completion as vLLM's answer has it: whole, or token by token."""
    tokens, logprobs = completion.token_ids.tolist(), completion.logprobs.tolist()
    content = [{"token_id": t, "logprob": p} for t, p in zip(tokens, logprobs, strict=True)]
    versions = [{"version": label, "start": 0, "end": len(tokens)}]
    last = {"finish_reason": completion.finish_reason, "weight_versions": versions}
    if not streamed:
        return [{"choices": [{"token_ids": tokens, "logprobs": {"content": content}, **last}]}]
    choices = [
        {"token_ids": [t], "logprobs": {"content": [c]}, "finish_reason": None, "weight_versions": None}
        for t, c in zip(tokens, content, strict=True)
    ]
    choices[-1] |= last
    return [{"choices": [choice]} for choice in choices]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=-1)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    wrong = knobs()
    print("fake server", os.getpid(), wrong, flush=True)
    if wrong.get("start_fails"):
        sys.exit("ValueError: no room for the cache")
    Handler.fake = Fake(options, wrong)
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    server.daemon_threads = True
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
