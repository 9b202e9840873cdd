"""Tasksets of verifiers 0.4, played in verifiers' own Python against a loopback endpoint of ours.

verifiers encodes what the model reads, by its renderers; the model is given the ids as they come, and what it draws
goes back as ids. What a history shares with what the model has seen stays, so that the tokens drawn carry loss whatever
verifiers makes of their text; a history that was rendered anew is a branch of the same sequence.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sapo.data import Prompt, Score
from sapo.environments.base import Ask, Drawing, TokenAsk
from sapo.environments.failures import EpisodeError
from sapo.environments.verifiers.endpoint import MODEL, TokenEndpoint
from sapo.environments.verifiers.process import VerifiersProcess
from sapo.environments.wrapping import SamePrompt, Wrapped
from sapo.errors import TaskError
from sapo.utils.hashing import hashed_integer

MOST_TASKS = 100_000
"""Tasks of a taskset that are used where the recipe does not say; one without end would never be loaded."""

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class _Settings:
    """What tells one worker from another."""

    python: str
    config: str
    """As JSON."""
    most: int
    path: tuple[str, ...]
    env: tuple[str, ...]
    renderer: str
    """As JSON."""


class Theatre:
    """A worker and an endpoint of this process, for all that is played of one taskset.

    Args:
        settings: of the recipe.
    """

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        load = {"config": json.loads(settings.config), "most": settings.most}
        self._process = VerifiersProcess(settings.python, load, settings.path, settings.env)
        self._endpoint: TokenEndpoint | None = None
        self._ready: tuple[Any, ...] | None = None
        self._lock = threading.Lock()
        self._directory = ""
        self.tasks: list[dict[str, Any]] = []

    def load(self) -> None:
        """Start the worker where it does not live.

        Raises:
            TaskError: it cannot load the taskset.
        """
        with self._lock:
            self._load()

    def _load(self) -> None:
        if not self._process.lives:
            self._ready = None
            self._process.close()
            self.tasks = self._process.start()

    def prepare(self, drawing: Drawing) -> None:
        """Give the worker the tokenizer, and the address of the endpoint.

        Raises:
            TaskError: it cannot use them.
        """
        with self._lock:
            self._load()
            wanted = (drawing.temperature, drawing.stop_token_ids)
            if self._ready == wanted:
                return
            if self._endpoint is None:
                # Without max_length: a client that knew it would refuse what is too long by itself, as a failure, where
                # the driver ends the episode as truncated.
                self._endpoint = TokenEndpoint()
                self._endpoint.start()
            if not self._directory:
                self._directory = tempfile.mkdtemp(prefix="sapo-tokenizer-")
                drawing.save_tokenizer(self._directory)
                _give_unknown_token(Path(self._directory, "tokenizer.json"))
            self._process.prepare(
                {
                    "url": self._endpoint.url,
                    "token": self._endpoint.token,
                    "name": MODEL,
                    "tokenizer": self._directory,
                    "renderer": json.loads(self._settings.renderer),
                    "temperature": drawing.temperature,
                    "stops": drawing.stop_token_ids,
                }
            )
            self._ready = wanted

    async def play(self, task: int, ask: TokenAsk) -> dict[str, Any]:
        """Play an episode and return what the worker says of it."""
        assert self._endpoint is not None, "it is prepared before anything is played"
        with self._endpoint.seat(ask) as number:
            return await self._process.play(task, number, ask.seed)

    def close(self) -> None:
        """End worker and endpoint. They are started again when they are needed."""
        self._process.close()
        if self._endpoint is not None:
            self._endpoint.close()
        self._endpoint, self._ready = None, None
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""


class VerifiersEnvironment(Wrapped):
    """A taskset of verifiers. Its tasks are the prompts, in a new seeded order every epoch.

    Args:
        task: `same_prompt`, for its name and seed; its text is the prompt of tasks that have none.
        theatre: plays it.
        held_out: how many of its tasks are held out: the last ones.
    """

    prefers_chat = True

    def __init__(self, task: SamePrompt, theatre: Theatre, held_out: int | None = None) -> None:
        super().__init__(task)
        self._theatre = theatre
        theatre.load()
        number = len(theatre.tasks)
        held = round(HELD_OUT_SHARE * number) or min(1, number - 1) if held_out is None else held_out
        if not 0 <= held < number:
            raise TaskError(
                f"held_out must leave tasks to train on; got {held} of the taskset's {number} tasks; choose fewer"
            )
        self._num_train = number - held
        self._order: tuple[int, list[int]] = (-1, [])

    @classmethod
    def named(
        cls,
        name: str,
        task: Any,
        python: str | None = None,
        options: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        tasks: int = MOST_TASKS,
        held_out: int | None = None,
        renderer: Any = None,
        path: str | Sequence[str] = (),
        env: Sequence[str] = (),
    ) -> VerifiersEnvironment:
        """Make one of a taskset's id.

        Args:
            name: id of the taskset, a module that verifiers' Python can import.
            python: interpreter of the environment that verifiers is installed in.
            options: of the taskset.
            config: of verifiers' environment: `agent` with `harness`, `max_turns` and so on, `timeout`.
            tasks: most tasks that are used.
            held_out: how many are held out, the last ones; null: a tenth.
            renderer: name, or settings, of the renderer; null: as verifiers finds it for the tokenizer.
            path: directories in which verifiers' Python finds modules of yours.
            env: names of environment variables that the worker is given.

        Raises:
            TaskError: it cannot be loaded, or a setting is wrong.
        """
        spec = f"environment verifiers:{name}"
        if python is None:
            raise TaskError(
                f"{spec} needs the interpreter of an environment with verifiers 0.4; got none; write "
                "python: /path/to/venv/bin/python"
            )
        if not isinstance(task, SamePrompt):
            raise TaskError(
                f"{spec} brings its own prompts; got those of task {getattr(task, 'name', task)!r}; write "
                "name: same_prompt"
            )
        if not (type(tasks) is int and tasks >= 1):
            raise TaskError(f"{spec}: tasks must be a whole number of 1 or more; got {tasks!r:.40}")
        if held_out is not None and type(held_out) is not int:
            raise TaskError(f"{spec}: held_out must be a whole number; got {held_out!r:.40}")
        whole = {**dict(config or {}), "taskset": {**dict(options or {}), "id": name}}
        paths = (path,) if isinstance(path, str) else tuple(map(str, path))
        try:
            settings = _Settings(
                os.path.expanduser(str(python)),
                json.dumps(whole, sort_keys=True),
                tasks,
                tuple(os.path.abspath(p) for p in paths),
                tuple(map(str, env)),
                json.dumps(renderer, sort_keys=True),
            )
        except TypeError as error:
            raise TaskError(f"{spec}: options and config must be what JSON can hold: {error}") from error
        return cls(task, theatre_of(settings), held_out)

    @property
    def num_train(self) -> int:
        """Return the number of training tasks: the length of an epoch."""
        return self._num_train

    def train_row(self, index: int) -> int:
        """Return which of the taskset's tasks is `train_prompt(index)`."""
        epoch, position = divmod(index, self._num_train)
        if self._order[0] != epoch:
            seed = self.source.seed
            rows = sorted(range(self._num_train), key=lambda row: (hashed_integer("verifiers", seed, epoch, row), row))
            self._order = epoch, rows
        return self._order[1][position]

    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of an index."""
        if index < 0:
            raise TaskError(f"the index of a prompt must be 0 or more; got {index}")
        return self._prompt(index, self.train_row(index))

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first of the tasks that are held out."""
        rows = range(self._num_train, len(self._theatre.tasks))
        return [self._prompt(index, row) for index, row in enumerate(rows[:count])]

    def prepare(self, drawing: Drawing) -> None:
        """Give verifiers the model's tokenizer and address; see `TokenEnvironment`."""
        self._theatre.prepare(drawing)

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        """Let verifiers play one episode, and take its reward.

        Raises:
            EpisodeError: verifiers says that it failed.
        """
        said = await self._theatre.play(prompt.metadata["task"], cast(TokenAsk, ask))
        if not said.get("ok"):
            raise EpisodeError(f"verifiers: {said.get('error') or 'the episode is not ok, and says nothing'}")
        return Score(said["reward"], figures=said["figures"])

    def _prompt(self, index: int, row: int) -> Prompt:
        """Return a task as a prompt: as far as it is known, what verifiers will say first."""
        task = self._theatre.tasks[row]
        said = task.get("prompt")
        system = [{"role": "system", "content": task["system"]}] if task.get("system") else []
        user = said if isinstance(said, list) else [{"role": "user", "content": said or self.source.text}]
        text = "\n".join(str(m["content"]) for m in (*system, *user))
        return Prompt(index, self.name, text, metadata={"task": row, "messages": [*system, *user]})


_theatres: dict[tuple[int, _Settings], Theatre] = {}


def theatre_of(settings: _Settings) -> Theatre:
    """Return the worker and endpoint of this process for the settings."""
    key = (os.getpid(), settings)  # a forked process has its own
    if key not in _theatres:
        if not _theatres:
            atexit.register(close_theatres)
        _theatres[key] = Theatre(settings)
    return _theatres[key]


def close_theatres() -> None:
    """End all workers and endpoints of this process, at the end of a run."""
    for owner, settings in list(_theatres):
        theatre = _theatres.pop((owner, settings))
        if owner == os.getpid():
            theatre.close()


def _give_unknown_token(file: Path) -> None:
    """Give a tokenizer without a token for unknown characters one in this copy: renderers look words up in it."""
    if not file.exists():
        return
    content = json.loads(file.read_text())
    model = content.get("model") or {}
    if model.get("type") == "WordLevel" and model.get("unk_token") not in model.get("vocab", {}):
        special = [t["content"] for t in content.get("added_tokens", ()) if t.get("special")]
        model["unk_token"] = (special or list(model["vocab"]))[-1]
        file.write_text(json.dumps(content))
