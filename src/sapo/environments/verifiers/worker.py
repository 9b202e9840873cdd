"""Play episodes of a verifiers taskset. Runs in verifiers' own Python, without sapo. Parent: process.py.

Lines of JSON come in on standard input and go out on standard output:

    {"config": ..., "most": 1000}                            {"tasks": [{"system": ..., "prompt": ...}, ...]}
    {"model": {"url": ..., "token": ..., "tokenizer": ...}}  {"ready": true}
    {"play": 7, "task": 2, "seat": 123, "seed": 5}           {"began": 7}
                                                             {"played": 7, "reward": 1.0, "ok": true, ...}
    {"cancel": 7}

An order that cannot be carried out is answered with {"refused": why}. What an environment prints goes to standard
error. Each episode is played in a process of its own, which is forked from the one that has loaded everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import logging
import os
import random
import select
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TextIO

MAX_DETAIL = 500
GRACE = 1.0
PR_SET_PDEATHSIG = 1
HARNESS = "sapo_chat"
BEGAN = b"began\n"


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # an environment that prints must not speak on the wire
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]
    orders = Lines(0)
    order = orders.wait()
    if order is None:
        return
    try:
        stage = Stage(order["config"], order["most"])
    except BaseException as error:
        say(out, refused=describe_failure(error))
        return
    say(out, tasks=[told(task) for task in stage.tasks])
    Host(stage, orders, out).run()


def say(out: TextIO, **message: Any) -> None:
    """Write one line."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def describe_failure(error: BaseException) -> str:
    """Return what was raised."""
    return f"{type(error).__name__}: {error}"[:MAX_DETAIL]


class Lines:
    """Lines of JSON of a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._incoming, self.ended = descriptor, bytearray(), False

    def read(self) -> list[dict[str, Any]]:
        """Read what is there, and return the lines that are whole."""
        chunk = os.read(self.descriptor, 1 << 16)
        self.ended = not chunk
        self._incoming += chunk
        *whole, rest = bytes(self._incoming).split(b"\n")
        self._incoming[:] = rest
        return [json.loads(line) for line in whole if line.strip()]

    def wait(self) -> dict[str, Any] | None:
        """Return the next line, which comes alone; None at the end."""
        while not self.ended:
            if found := self.read():
                return found[0]
        return None


def told(task: Any) -> dict[str, Any]:
    """Return what the run may know of a task: what it says first."""
    data = task.data
    prompt = data.prompt
    if prompt is not None and not isinstance(prompt, str):
        prompt = [{"role": m.role, "content": m.content if isinstance(m.content, str) else ""} for m in prompt]
    return {"system": data.system_prompt, "prompt": prompt, "name": data.name or data.id}


class Stage:
    """A taskset and its environment, as loaded."""

    def __init__(self, config: dict[str, Any], most: int) -> None:
        logging.disable(logging.WARNING)
        vf: Any = importlib.import_module("verifiers.v1")
        loaders: Any = importlib.import_module("verifiers.v1.utils.loaders")

        self._vf = vf
        _define_harness(vf)
        config = dict(config)
        taskset = config["taskset"]["id"]
        if "agent" in loaders.env_config_type(taskset, config.get("id") or "").model_fields:
            agent: dict[str, Any] = {"runtime": {"type": "subprocess"}, "network_notice": False}
            if loaders.default_harness_id(taskset) == "bash":  # the taskset has none of its own
                agent["harness"] = {"id": HARNESS}
            config["agent"] = {**agent, **(config.get("agent") or {})}
        self.environment = loaders.load_environment(loaders.resolve_env_config(config))
        self.tasks = list(itertools.islice(self.environment.taskset, most))
        if not self.tasks:
            raise ValueError("the taskset has no tasks")
        self._context: Any = None

    def prepare(self, model: dict[str, Any]) -> None:
        """Make the renderer of a tokenizer, and note where the model answers."""
        vf = self._vf
        renderer = model.get("renderer")
        client = vf.TrainClientConfig(
            base_url=model["url"] + "/v1",
            api_key_var="SAPO_NO_SUCH_VARIABLE",
            headers={"Authorization": f"Bearer {model['token']}"},
            renderer_model_name=model["tokenizer"],
            renderer={"name": renderer} if isinstance(renderer, str) else renderer,
        )
        renderers: Any = importlib.import_module("verifiers.v1.clients.train")
        pool = renderers.ElasticRendererPool(client.renderer_model_name, client.renderer, multiplex=client.multiplex)
        slot = asyncio.run(pool.grow())  # before the forks, which share it
        stops = set(slot.renderer.get_stop_token_ids())
        if unknown := sorted(stops - set(model["stops"])):
            raise ValueError(
                f"the renderer ends turns at the tokens {unknown}, and the run does not; add them to "
                "rollout.stop_token_ids"
            )
        sampling = vf.types.SamplingConfig(temperature=model["temperature"])
        self._context = vf.ModelContext(model=model["name"], client=client, sampling=sampling)

    def context(self, seat: int) -> Any:
        """Return the model's address for one episode: its number is the seed of the requests."""
        sampling = self._context.sampling.model_copy(update={"seed": seat})
        return replace(self._context, sampling=sampling)

    async def play(self, order: dict[str, Any], begin: Callable[[], Any]) -> dict[str, Any]:
        """Play one episode and return what became of it."""
        task = self.tasks[order["task"]]
        async with self.environment.serving():
            begin()
            episode = await self.environment.run_episode(task, self.context(order["seat"]))
        return result(episode)


def result(episode: Any) -> dict[str, Any]:
    """Return what became of an episode, in numbers and words."""
    errors = [f"{e.type}: {e.message}" for e in episode.errors]
    traces = list(episode.traces)
    errors += [f"{t.last_error.type}: {t.last_error.message}" for t in traces if t.last_error is not None]
    if len(traces) > 1:
        errors.append(f"the episode has {len(traces)} traces; one agent is trained, and plays alone")
    ok = bool(episode.ok) and len(traces) == 1 and all(t.ok for t in traces)
    return {
        "ok": ok,
        "reward": traces[0].reward if traces else None,
        "figures": numbers(traces[0]) if traces else {},
        "error": "; ".join(errors)[:MAX_DETAIL],
    }


def numbers(trace: Any) -> dict[str, float]:
    """Return the metrics of a trace, and its rewards where they are several."""
    found = {f"metric/{name}": value for name, value in dict(trace.metrics).items()}
    if len(trace.rewards) > 1:
        found.update({f"reward/{name}": r.value for name, r in trace.rewards.items() if r is not None})
    found["branches"] = trace.num_branches
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _define_harness(vf: Any) -> None:
    """Make known a harness that holds its chat in this process: no program is started for a turn."""
    import httpx

    message_to_wire: Any = importlib.import_module("verifiers.v1.dialects.chat").message_to_wire

    class SapoChatConfig(vf.HarnessConfig):
        pass

    class SapoChat(vf.Harness[SapoChatConfig]):
        APPENDS_SYSTEM_PROMPT = True
        SUPPORTS_RESUME = True
        EXECUTES_CODE = False
        NEEDS_CONTAINER = False

        async def launch(  # its arguments are verifiers'
            self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any, **_: Any
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            messages = [{"role": "system", "content": system}] if system else []
            if isinstance(prompt, str):
                messages.append({"role": "user", "content": prompt})
            else:
                messages += [message_to_wire(m) for m in prompt or []]
            async with httpx.AsyncClient(timeout=None, trust_env=False) as http:
                answer = await http.post(
                    f"{endpoint}/chat/completions",
                    headers={"Authorization": f"Bearer {secret}"},
                    json={"model": ctx.model, "messages": messages},
                )
            fine = answer.status_code == 200 or trace.stop_condition
            return vf.ProgramResult(0 if fine else 1, "", answer.text[-500:])

    module = types.ModuleType(HARNESS)
    vars(module).update(SapoChat=SapoChat, SapoChatConfig=SapoChatConfig, __all__=["SapoChat", "SapoChatConfig"])
    SapoChat.__module__ = SapoChatConfig.__module__ = HARNESS
    sys.modules[HARNESS] = module


@dataclass
class Player:
    """The process of one episode."""

    number: int
    pid: int
    said: bytearray = field(default_factory=bytearray)
    until: float | None = None
    """When it is killed, once nobody waits for it."""


class Host:
    """Forks a player for every order, and hands on what it says."""

    def __init__(self, stage: Stage, orders: Lines, out: TextIO) -> None:
        self._stage, self._orders, self._out = stage, orders, out
        self._players: dict[int, Player] = {}  # by the descriptors of their pipes

    def run(self) -> None:
        """Serve until there are no orders any more."""
        poll = select.poll()
        poll.register(self._orders.descriptor, select.POLLIN)
        while not self._orders.ended:
            for descriptor, _ in poll.poll(1000 * self._patience()):
                if descriptor == self._orders.descriptor:
                    for order in self._orders.read():
                        self._carry_out(order, poll)
                else:
                    self._hear(descriptor, poll)
            self._kill_late()
        for player in self._players.values():
            kill(player.pid, signal.SIGKILL)

    def _patience(self) -> float:
        late = [player.until for player in self._players.values() if player.until]
        return max(0.0, min(late) - time.monotonic()) if late else 60.0

    def _carry_out(self, order: dict[str, Any], poll: Any) -> None:
        if "model" in order:
            try:
                self._stage.prepare(order["model"])
            except BaseException as error:
                say(self._out, refused=describe_failure(error))
                return
            gc.collect()
            gc.freeze()  # pages that the collector writes to are copied in every player
            say(self._out, ready=True)
        elif "play" in order:
            self._fork(order, poll)
        elif "cancel" in order:
            for player in self._players.values():
                if player.number == order["cancel"] and player.until is None:
                    kill(player.pid, signal.SIGTERM)
                    player.until = time.monotonic() + GRACE

    def _fork(self, order: dict[str, Any], poll: Any) -> None:
        read, write = os.pipe()
        me = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pid = os.fork()
            except OSError as error:
                os.close(read)
                os.close(write)
                say(self._out, played=order["play"], ok=False, error=f"no process could be started: {error}")
                return
        if pid == 0:
            self._become_player(order, write, me)
        os.close(write)
        self._players[read] = Player(order["play"], pid)
        poll.register(read, select.POLLIN)

    def _become_player(self, order: dict[str, Any], write: int, parent: int) -> NoReturn:
        try:
            os.setsid()
            if sys.platform == "linux":
                ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(self._out.fileno())
            for descriptor in self._players:
                os.close(descriptor)
            play_one(self._stage, order, write)
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(0)  # no way back into the loop of the host

    def _hear(self, descriptor: int, poll: Any) -> None:
        player = self._players[descriptor]
        if chunk := os.read(descriptor, 1 << 16):
            player.said += chunk
            if player.said.startswith(BEGAN):
                del player.said[: len(BEGAN)]
                say(self._out, began=player.number)
            return
        poll.unregister(descriptor)
        os.close(descriptor)
        del self._players[descriptor]
        kill(player.pid, signal.SIGKILL)  # it may have closed its pipe only; and what it has started
        _, status = os.waitpid(player.pid, 0)
        try:
            message = json.loads(player.said)
        except ValueError:
            code = os.waitstatus_to_exitcode(status)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            message = {"ok": False, "error": f"the process of the episode {how}"}
        if player.until is None:
            say(self._out, played=player.number, **message)

    def _kill_late(self) -> None:
        for player in self._players.values():
            if player.until and time.monotonic() >= player.until:
                kill(player.pid, signal.SIGKILL)
                player.until = time.monotonic() + 60


def kill(pid: int, number: int) -> None:
    """Send a signal to a player and all of its session."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, number)


def play_one(stage: Stage, order: dict[str, Any], write: int) -> None:
    """Play an episode and write what became of it."""
    random.seed(order["seed"])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(order["seed"] % 2**32)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    playing = loop.create_task(stage.play(order, lambda: os.write(write, BEGAN)))
    loop.add_signal_handler(signal.SIGTERM, playing.cancel)
    try:
        message = loop.run_until_complete(playing)
    except asyncio.CancelledError:
        return
    except BaseException as error:
        message = {"ok": False, "error": describe_failure(error)}
    said = json.dumps(message).encode()
    while said:
        said = said[os.write(write, said) :]


if __name__ == "__main__":
    main()
