"""What a run was started from, and what has changed of it when the run is resumed.

RUN/inputs.json holds the settings as the run last wrote them to config.yaml, and a fingerprint of every file that the
run reads: rows and their pictures, models, an adapter's base, modules of the user's own. A resume that would go on with
other inputs is refused, one line naming what changed, until the change is accepted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sapo.config import RunConfig, TaskConfig
from sapo.config.recipes import RESUMABLE_KEYS, parse_recipe
from sapo.environments.adapters import ADAPTERS
from sapo.environments.wrapping import source_of
from sapo.errors import ConfigError, UserError
from sapo.model.adapters import ADAPTER_FILE, adapter_base
from sapo.model.policy import Policy
from sapo.model.sources import model_directory
from sapo.tasks import Task
from sapo.tasks.rows.task import RowTask
from sapo.tasks.verifiers.in_process import PREFIX, fingerprint_of, is_in_process, shown
from sapo.utils.files import write_whole
from sapo.utils.fingerprints import fingerprint_file, fingerprint_files
from sapo.utils.names import nearest

INPUTS_FILE = "inputs.json"
CHECKPOINT_KEY = "checkpoint.path"
"""What `--accept-changes` calls a checkpoint that another run has written."""
_NOT_COMPARED = ("run_dir", "provenance")
_PATHS_OF_A_TASK = ("path", "held_out_path")
_MODULE = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
# Of a directory with a model: not what a checkpoint holds beside it, nor the record of a cold start, which has a clock.
_OF_A_MODEL = re.compile(
    r"(?!optimizer|batches\.)(.+\.(safetensors|bin|model|py|jinja)|.*(config|tokenizer|vocab|tokens|index|map).*\.json"
    r"|merges\.txt|vocab\.txt)"
)


@dataclass(frozen=True)
class InputRecord:
    """Content of inputs.json."""

    run: str
    """Name of this run: a hash of what it was started with. Its checkpoints carry it."""
    model: str
    """Hash of names and shapes of the weights."""
    settings: dict[str, Any]
    """Settings as config.yaml has them."""
    settings_before: dict[str, Any] | None
    """While config.yaml is written anew: the settings that a kill may have left in it."""
    inputs: dict[str, dict[str, str]]
    """Key of the recipe -> path and fingerprint of what it names."""
    accepted: list[str]
    """Keys whose changes were accepted."""

    @classmethod
    def of(cls, config: RunConfig, policy: Policy, tasks: list[Task], coldstart: Path | None = None) -> InputRecord:
        """Take the fingerprints of a run that is about to begin; see `inputs_of`."""
        settings, inputs = _settings(config), inputs_of(config, tasks, coldstart=coldstart)
        return cls(_hash([settings, inputs]), shapes_of(policy), settings, None, inputs, [])

    @classmethod
    def read(cls, run: Path) -> InputRecord | None:
        """Read the record of a run; None where it has none, as runs of earlier versions.

        Raises:
            ConfigError: it is not what a run writes.
        """
        file = run / INPUTS_FILE
        if not os.path.lexists(file):
            return None
        try:
            record = cls(**json.loads(file.read_text(encoding="utf-8")))
            kinds = {"run": str, "model": str, "settings": dict, "inputs": dict, "accepted": list}
            if not all(isinstance(getattr(record, name), kind) for name, kind in kinds.items()):
                raise TypeError("a value of another type")
            if not all(
                isinstance(found, dict) and {"path", "digest"} <= set(found) for found in record.inputs.values()
            ):
                raise TypeError("an input without path and digest")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{file} must be the record that the run wrote of its inputs; got {reason}; delete it to go on without "
                "comparing them"
            ) from error
        return record

    def write(self, run: Path) -> None:
        """Write inputs.json, aside and renamed."""
        write_whole(run / INPUTS_FILE, json.dumps(asdict(self), indent=1) + "\n")

    def changed_settings(self, config: RunConfig) -> list[str]:
        """Return the keys in which config.yaml is not as the run wrote it."""
        now = _flat(_settings(config))
        candidates = [self.settings] if self.settings_before is None else [self.settings, self.settings_before]
        found = [_differing(_flat(_completed(candidate)), now) for candidate in candidates]
        return min(found, key=len)

    def changed_inputs(self, inputs: Mapping[str, dict[str, str]]) -> dict[str, str]:
        """Return key -> what happened to it, for files that are not those the run began with."""
        changed = {}
        for key, before in self.inputs.items():
            now = inputs.get(key)
            if now is not None and now["digest"] != before["digest"]:
                what = "is gone" if now["digest"] == "missing" else "has other content"
                place = before["path"] if now["path"] == before["path"] else f"{before['path']}, now {now['path']},"
                changed[key] = f"{place} {what}"
        return changed


def check_unchanged(
    record: InputRecord,
    config: RunConfig,
    inputs: Mapping[str, dict[str, str]],
    *,
    overridden: Collection[str],
    accepted: Collection[str],
    warn: Callable[[str], None],
) -> None:
    """Refuse to resume a run whose settings or files have changed, but for what is overridden or accepted.

    Args:
        config: as config.yaml has it.
        inputs: from `inputs_of`.
        overridden: keys that the resume sets.
        accepted: keys, or sections, that may have changed.
        warn: told of what was accepted.

    Raises:
        ConfigError: naming what changed, or a key that cannot change.
    """
    before, now = _flat(record.settings), _flat(_settings(config))
    known = {*before, *now, *record.inputs, *inputs, CHECKPOINT_KEY}
    for key in accepted:
        if not any(_within(name, key) for name in known):
            raise ConfigError(f"--accept-changes takes keys of the recipe; got {key!r}{nearest(key, known)}")
    changes = {
        key: f"{_brief(before.get(key))} in the run, {_brief(now.get(key))} in config.yaml"
        for key in record.changed_settings(config)
        if not any(_within(key, name) for name in overridden)
    } | record.changed_inputs(inputs)
    refused = {key: what for key, what in changes.items() if not any(_within(key, name) for name in accepted)}
    if refused:
        raise ConfigError(refusal(refused, str(config.run_dir)))
    if changes:
        warn(f"changed since the run began, and accepted: {_listed(changes)}")


def refusal(changes: Mapping[str, str], run: str) -> str:
    """Return the line that refuses a resume: what changed, and both ways out."""
    keys = ",".join(changes)
    resumable = [key for key in changes if key != CHECKPOINT_KEY and any(_within(key, name) for name in RESUMABLE_KEYS)]
    override = f"; `sapo resume {run} {resumable[0]}=...` sets {resumable[0]}" if resumable else ""
    return (
        f"a run must be resumed with what it began with; changed: {_listed(changes)}; put it back, or "
        f"`sapo resume {run} --accept-changes {keys}` goes on with it{override}"
    )


def inputs_of(
    config: RunConfig, tasks: list[Task], *, start: bool = True, coldstart: Path | None = None
) -> dict[str, dict[str, str]]:
    """Return path and fingerprint of every file that a recipe names, by its key.

    Args:
        tasks: made of the recipe; pictures, and rows that no file of the user's holds, are known by these.
        start: also the model that the run starts from.
        coldstart: where the cold start of the recipe is, if it has one.
    """
    found: dict[str, dict[str, str]] = {}
    if start:
        found |= _model_inputs("model.path", config)
        if coldstart is not None:
            found["model.coldstart"] = _of_model(str(coldstart), None)
    if config.objective.kl is not None and config.objective.kl.reference is not None:
        found["objective.kl.reference"] = _of_model(config.objective.kl.reference, None)
    for place, task in enumerate(config.tasks):
        for option in _PATHS_OF_A_TASK:
            if isinstance(path := task.options.get(option), str):
                found[f"tasks.{place}.{option}"] = _of_rows(Path(path))
        found |= modules_of(task, f"tasks.{place}")
        for spec in filter(is_in_process, _texts(task.options.get("verifier"))):
            found[f"tasks.{place}.verifier.{spec.removeprefix(PREFIX)}"] = {
                "path": f"the reward function {shown(spec)}",
                "digest": fingerprint_of(spec),
            }
        if isinstance(made := source_of(tasks[place]), RowTask):
            if "path" not in task.options:
                key = f"tasks.{place}.name"
                # A class of the user's own may have rows: its module has the key then.
                key = f"{key}.rows" if key in found else key
                found[key] = {"path": task.name, "digest": made.content_digest()}
            if (digest := made.picture_digest()) is not None:
                rows = task.options.get("path", task.name)
                found[f"tasks.{place}.pictures"] = {"path": f"a picture of {rows}", "digest": digest}
    for key, name in (
        ("objective.name", config.objective.name),
        ("rollout.engine", config.rollout.engine),
        ("train.optimizer", config.train.optimizer),
    ):
        found |= _modules(key, name)
    return found


def absolute_paths(config: RunConfig) -> RunConfig:
    """Return the recipe with the local files it names by their absolute paths: a run may be resumed from anywhere."""
    settings = config.model_dump(mode="json")
    places = [(settings["model"], "path")]
    if settings["objective"]["kl"]:
        places.append((settings["objective"]["kl"], "reference"))
    places += [(task, option) for task in settings["tasks"] for option in _PATHS_OF_A_TASK]
    changed = False
    for section, key in places:
        path = section.get(key)
        if isinstance(path, str) and path and not os.path.isabs(path) and os.path.exists(path):
            section[key], changed = os.path.abspath(path), True
    return parse_recipe(settings) if changed else config


def needs_start(config: RunConfig, has_checkpoint: bool) -> bool:
    """Tell whether a resume reads the model that the run started from: as base, as reference, or to begin anew."""
    kl = config.objective.kl
    return not has_checkpoint or config.model.lora is not None or (kl is not None and kl.reference is None)


def shapes_of(policy: Policy) -> str:
    """Return a hash of the names and shapes of a policy's weights."""
    return _hash(sorted((name, list(tensor.shape)) for name, tensor in policy.model.named_parameters()))


def _model_inputs(key: str, config: RunConfig) -> dict[str, dict[str, str]]:
    if config.model.path is None:
        return {}
    found = {key: _of_model(config.model.path, config.model.revision)}
    directory = Path(config.model.path)
    if (directory / ADAPTER_FILE).is_file():
        try:
            base, revision = adapter_base(directory)
        except (UserError, ValueError, OSError):
            return found  # loading it says why
        found["model.base"] = _of_model(base, revision)
    return found


def _of_model(source: str, revision: str | None) -> dict[str, str]:
    try:
        directory = model_directory(source, revision)
        files = [file for file in directory.iterdir() if file.is_file() and _OF_A_MODEL.fullmatch(file.name)]
        digest = fingerprint_files(directory, files, sampled=True)
    except (UserError, OSError):
        digest = "missing"
    return {"path": source, "digest": digest}


def _of_rows(path: Path) -> dict[str, str]:
    try:
        digest = (
            fingerprint_files(path, [file for file in path.rglob("*") if file.is_file()])
            if path.is_dir()
            else fingerprint_file(path)
        )
    except OSError:
        digest = "missing"
    return {"path": str(path), "digest": digest}


def modules_of(section: TaskConfig, key: str) -> dict[str, dict[str, str]]:
    """Return path and fingerprint of the user's own modules that a task names, by their keys.

    They may be its class, its verifier, its tools, its environment, or an option that only its class knows.

    Args:
        key: that of the task in the recipe, as in tasks.0.
    """
    found: dict[str, dict[str, str]] = {}
    for option, value in {**section.options, "name": section.name}.items():
        found |= _modules(f"{key}.{option}", value)
    return found


def _modules(key: str, value: Any) -> dict[str, dict[str, str]]:
    """Return the file of a user's own module; of a value with several, the first has the key and others a number."""
    found: dict[str, dict[str, str]] = {}
    for spec in dict.fromkeys(_texts(value)):
        adapter, _, adapted = spec.partition(":")
        if (match := _MODULE.fullmatch(adapted if adapter in ADAPTERS else spec)) is None:
            continue
        if os.getcwd() not in sys.path:  # as import_named does
            sys.path.append(os.getcwd())
        try:
            origin = getattr(importlib.util.find_spec(match[1]), "origin", None)
        except Exception:  # a package may raise anything as it is imported; loading the function says what
            continue
        if origin is not None and Path(origin).is_file():
            name = key if not found else f"{key}.{len(found)}"
            found[name] = {"path": origin, "digest": fingerprint_file(Path(origin))}
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in (*value.keys(), *value.values()):
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.resolved_settings(exclude=_NOT_COMPARED)


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of settings that an earlier version wrote without keys of this one."""
    try:
        return _settings(parse_recipe(dict(settings), recorded=True))
    except ConfigError:
        return settings


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys; items of lists under their numbers."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    absent = object()
    return [key for key in dict.fromkeys((*before, *now)) if before.get(key, absent) != now.get(key, absent)]


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")


def _listed(changes: Mapping[str, str]) -> str:
    return ", ".join(f"{key} ({what})" for key, what in changes.items())


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def accepted_record(
    record: InputRecord, config: RunConfig, inputs: Mapping[str, dict[str, str]], accepted: Collection[str]
) -> InputRecord:
    """Return the record to write when a resume goes on with other settings or inputs."""
    return replace(
        record,
        settings=_settings(config),
        settings_before=record.settings,
        inputs={**record.inputs, **inputs},
        accepted=list(dict.fromkeys([*record.accepted, *accepted])),
    )
