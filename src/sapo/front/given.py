"""Objects given in Python as settings of a recipe: models, rows, rewards, tasks.

A model object and rows are written to the cache of models, by the hash of their content, so that the run can be
resumed, its ranks can load them and a comparison's processes too. A reward function that a worker can import is named
`module:function`; any other stays in this process (tasks/verifiers/in_process.py).
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo.config import TaskConfig
from sapo.errors import ModelError, TaskError
from sapo.model.policy import Policy, no_progress_bars
from sapo.model.sources import cache_directory
from sapo.tasks import Task
from sapo.tasks.registry import keep_task
from sapo.tasks.rows.reading import is_rows_file
from sapo.tasks.verifiers import needs_answer
from sapo.tasks.verifiers.in_process import is_in_process, keep_function
from sapo.utils.files import new_directory, write_whole
from sapo.utils.text import first_line

Settings = dict[str, Any]
HELD_OUT_NAMES = ("test", "validation", "eval", "held_out")
"""Names of the split to evaluate on, in the order in which they are looked for."""

# --------------------------------------------------------------------------------------------------------------- model


def model_settings(model: Any, base: Mapping[str, Any]) -> Settings:
    """Return the section `model` of a recipe for a model that was given.

    Args:
        model: a path, a .gguf file or a hub id; a pair (model, tokenizer) of transformers; such a model alone, where
            the directory or repository it was loaded from has its tokenizer; a Policy; or the section as a dict.
        base: the section of the recipe, whose adapter and vision settings stay.

    Raises:
        ModelError: it is none of these, or cannot be written.
    """
    kept = {k: v for k, v in base.items() if k not in ("path", "revision", "coldstart", "trust_remote_code")}
    if isinstance(model, Mapping):
        replaced = {"path", "coldstart"} & set(model)
        return {**(kept if replaced else base), **{str(k): v for k, v in model.items()}}
    if isinstance(model, str | Path):
        return {**kept, "path": str(model)}
    directory, dtype = save_model(model)
    return {**kept, "path": str(directory), "dtype": dtype}


def save_model(model: Any) -> tuple[Path, str]:
    """Write a model object with its tokenizer to the cache, once, and return the directory and its precision.

    The object itself is not changed: a run trains a copy.

    Raises:
        ModelError: it is no model of transformers with a tokenizer, or of another precision than can be trained.
    """
    if isinstance(model, Policy):
        network, processor = model.adapter or model.model, model.tokenizer
    elif isinstance(model, tuple | list) and len(model) == 2:
        network, processor = model
    else:
        network, processor = model, None
    if not hasattr(network, "save_pretrained") or not hasattr(network, "state_dict"):
        raise ModelError(
            "a model must be a path, a hub id, a pair (model, tokenizer) of transformers, or a model of transformers; "
            f"got a {type(network).__name__}"
        )
    if processor is None:
        processor = _tokenizer_of(network)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"a model must be float32 or bfloat16 to be trained; got {dtype}; model.to(torch.bfloat16)")
    directory = cache_directory() / "models" / f"given-{_digest_of_model(network, processor)}"
    if not (directory / "config.json").is_file() and not (directory / "adapter_config.json").is_file():
        try:
            with new_directory(directory, shared=True) as aside, no_progress_bars():
                if isinstance(model, Policy):
                    model.save(aside)
                else:
                    network.save_pretrained(aside)
                    processor.save_pretrained(aside)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"the model object cannot be written to {directory}: {first_line(error)}") from error
    return directory, dtype


def _tokenizer_of(network: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(network, "name_or_path", "") or getattr(getattr(network, "config", None), "_name_or_path", "")
    try:
        if not name:
            raise OSError("the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"a model object needs its tokenizer; got one alone, and {first_line(error)}; give both: "
            "model=(model, tokenizer)"
        ) from error


_PARTS_OF_A_PROCESSOR = ("image_processor", "video_processor", "feature_extractor")
_OF_A_TOKENIZER = (
    *("special_tokens_map", "bos_token_id", "eos_token_id", "pad_token_id", "added_tokens_encoder"),
    *("add_bos_token", "add_eos_token", "padding_side", "truncation_side", "model_max_length"),
)
"""Attributes that are saved with a tokenizer and that its vocabulary does not show."""


def _settings_of(part: Any) -> Any:
    """Return the settings of a part of a model as they are saved with it; empty where it has none."""
    return part.to_dict() if callable(getattr(part, "to_dict", None)) else {}


def _in_words(value: Any) -> Any:
    """Return a value that JSON has not as one that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value) if type(value).__repr__ is not object.__repr__ else type(value).__qualname__


def _digest_of_model(network: Any, processor: Any) -> str:
    import torch

    digest = hashlib.sha256(str(getattr(network, "config", "")).encode())
    adapters = getattr(network, "peft_config", None) or {}
    settings = {
        "generation": _settings_of(getattr(network, "generation_config", None)),
        "adapters": {str(name): _settings_of(adapter) for name, adapter in adapters.items()},
        "active": str(getattr(network, "active_adapter", "")) if adapters else "",
        "chat_template": str(getattr(processor, "chat_template", "")),
    }
    parts = {"": processor} | {name: getattr(processor, name, None) for name in _PARTS_OF_A_PROCESSOR}
    settings["parts"] = {name: _settings_of(part) for name, part in parts.items() if part is not None}
    vocabulary = getattr(processor, "tokenizer", processor)
    if hasattr(vocabulary, "get_vocab"):
        digest.update(json.dumps(sorted(vocabulary.get_vocab().items())).encode())
        digest.update(str(getattr(vocabulary, "chat_template", "")).encode())
        settings["tokens"] = {name: getattr(vocabulary, name, None) for name in _OF_A_TOKENIZER}
        backend = getattr(vocabulary, "backend_tokenizer", None)
        written = {} if backend is None else json.loads(backend.to_str())
        # The last call of a tokenizer has set these two; a call sets them anew.
        settings["tokenizer"] = {k: v for k, v in written.items() if k not in ("padding", "truncation")}
    digest.update(json.dumps(settings, sort_keys=True, default=_in_words).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- rows


def rows_settings(rows: Any, options: Mapping[str, Any], *, all_held_out: bool = False) -> Settings:
    """Return the settings of a task whose prompts are rows that were given.

    Args:
        rows: a list of dicts, a datasets.Dataset, a pandas DataFrame; a mapping of splits, of which `train` is trained
            on and one of HELD_OUT_NAMES evaluated; a file; or a hub id.
        options: further options of the task.
        all_held_out: hold all rows out, as for an evaluation.

    Raises:
        TaskError: they are none of these, or a value is of a kind that a file of rows cannot hold.
    """
    sides: Settings
    if isinstance(rows, str | Path):
        local = is_rows_file(rows)
        sides = {"name": "file", "path": str(rows)} if local else {"name": "dataset", "dataset": str(rows)}
    elif isinstance(rows, Mapping):
        held_out = next((name for name in HELD_OUT_NAMES if name in rows), None)
        if "train" not in rows and held_out is None:
            raise TaskError(
                f"rows by splits must have train, and may have one of {', '.join(HELD_OUT_NAMES)}; got "
                f"{', '.join(map(str, rows))}; give a list of rows, or name the splits so"
            )
        sides = {"name": "file", "path": str(write_rows(rows[held_out if "train" not in rows else "train"]))}
        if held_out is not None and "train" in rows:
            sides["path" if all_held_out else "held_out_path"] = str(write_rows(rows[held_out]))
    else:
        sides = {"name": "file", "path": str(write_rows(rows))}
    if not isinstance(rows, str | Path):
        sides |= {"label": "rows", **_columns(Path(sides["path"]), options)}
    if all_held_out and "held_out_path" not in options:
        sides["held_out_fraction"] = 1.0
    return {**sides, **options}


def _columns(file: Path, options: Mapping[str, Any]) -> Settings:
    """Name the columns of rows that have a prompt, so that no layout is looked for."""
    with file.open(encoding="utf-8") as stream:
        first = json.loads(stream.readline())
    chosen = {"layout", "prompt_field", "answer_field"} & set(options)
    if chosen or "prompt" not in first or ("answer" not in first and needs_answer(options.get("verifier", "exact"))):
        return {}
    return {"prompt_field": "prompt", "answer_field": "answer" if "answer" in first else None}


def write_rows(rows: Any) -> Path:
    """Write rows to the cache as JSON Lines, once, and return the file; its name is the hash of its content.

    Raises:
        TaskError: they are no rows, or a value is of a kind that JSON cannot hold.
    """
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in map(_row, _numbered(rows))]
    if not lines:
        raise TaskError("rows must have at least one row; got none; add rows")
    text = "\n".join(lines) + "\n"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    file = cache_directory() / "rows" / f"rows-{digest}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return file


def _numbered(rows: Any) -> Iterable[tuple[int, Any]]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict("records")
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise TaskError(
            "rows must be a list of dicts, a datasets.Dataset, a pandas DataFrame, a file or a hub id; got a "
            f"{type(rows).__name__}"
        )
    return enumerate(rows, start=1)


def _row(numbered: tuple[int, Any]) -> Settings:
    number, row = numbered
    if not isinstance(row, Mapping):
        raise TaskError(f"row {number}: a row must be a dict of columns; got a {type(row).__name__}; write {{...}}")
    return {str(name): _value(value, f"row {number}, column {name!r}") for name, value in row.items()}


def _value(value: Any, where: str) -> Any:
    """Return a value as JSON can hold it: pictures as data URIs, missing numbers as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is not None:  # a picture of datasets
            return _data_uri(value["bytes"])
        return {str(k): _value(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_value(v, where) for v in value]
    if isinstance(value, bytes):
        return _data_uri(value)
    if isinstance(value, Path | decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "save") and hasattr(value, "convert"):  # a picture of PIL
        stream = io.BytesIO()
        value.save(stream, "PNG")
        return _data_uri(stream.getvalue())
    if hasattr(value, "tolist"):  # of numpy and torch
        return _value(value.tolist(), where)
    if type(value).__name__ in ("NaTType", "NAType"):  # of pandas
        return None
    raise TaskError(
        f"{where}: a value must be text, a number, a list, a dict or a picture; got a {type(value).__name__}; leave "
        "the column out, or make text of it"
    )


def _data_uri(data: bytes) -> str:
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ------------------------------------------------------------------------------------------------------------- rewards


def verifier_settings(rewards: Any) -> Any:
    """Return the setting `verifier` of a task for rewards that were given.

    Args:
        rewards: a function, a verifier's name or its settings; or several, as a list of these or of pairs with weights,
            or as a mapping of these to weights. The weight is 1 where none is given.

    Raises:
        TaskError: they are none of these.

    >>> verifier_settings([("math", 0.9), ({"name": "length", "limit": 100}, 0.1)])
    [{'name': 'math', 'weight': 0.9}, {'name': 'length', 'limit': 100, 'weight': 0.1}]
    """
    if isinstance(rewards, Mapping) and "name" not in rewards:
        rewards = list(rewards.items())
    if callable(rewards) or isinstance(rewards, str | Mapping):
        return _term(rewards, [])
    if not isinstance(rewards, Sequence) or not rewards:
        raise TaskError(
            "rewards must be a function, a verifier's name, a list of these or of pairs (reward, weight), or a dict of "
            f"rewards with weights; got {rewards!r:.80}"
        )
    terms: list[Settings] = []
    for item in rewards:
        pair = isinstance(item, tuple) and len(item) == 2
        reward, weight = item if pair else (item, 1.0)
        if isinstance(reward, Mapping) and "weight" in reward:
            reward, weight = {k: v for k, v in reward.items() if k != "weight"}, reward["weight"]
        term = _term(reward, [term["name"] for term in terms])
        terms.append({**({"name": term} if isinstance(term, str) else term), "weight": weight})
    return terms


def _term(reward: Any, taken: Sequence[str]) -> Any:
    if isinstance(reward, Mapping):
        return {**reward, "name": _term(reward["name"], taken)}
    if isinstance(reward, str):
        return reward
    if not callable(reward):
        raise TaskError(
            f"a reward must be a function, a verifier's name or its settings; got {reward!r:.80}; a weight stands "
            "beside it: (reward, 0.5)"
        )
    return importable_name(reward) or keep_function(reward, taken)


def importable_name(function: Callable[..., Any]) -> str | None:
    """Return `module:function` of a function that a worker process can import, None of any other.

    >>> importable_name(json.dumps), importable_name(lambda: 0)
    ('json:dumps', None)
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not str(name).isidentifier():
        return None
    loaded = sys.modules.get(str(module))
    if loaded is None or getattr(loaded, str(name), None) is not function:
        return None
    file = getattr(loaded, "__file__", None)
    if file is None or not _found_anew(str(module), Path(file).absolute()):
        return None
    return f"{module}:{name}"


def _found_anew(module: str, file: Path) -> bool:
    """Return whether an import by another process finds the file: a test or a notebook may have loaded it otherwise."""
    for entry in (*sys.path, ""):
        base = Path(entry or ".").absolute().joinpath(*module.split("."))
        if file in (base.with_suffix(".py"), base / "__init__.py"):
            return True
    return False


# --------------------------------------------------------------------------------------------------------------- tasks


def tasks_settings(tasks: Any) -> list[Settings]:
    """Return the section `tasks` of a recipe for tasks that were given.

    Args:
        tasks: a task's name, its settings, an object with the methods of `sapo.tasks.Task`, or a list of these or of
            pairs with weights.

    Raises:
        TaskError: they are none of these.

    >>> tasks_settings(["gsm8k", ({"name": "arithmetic", "digits": 3}, 0.5)])
    [{'name': 'gsm8k'}, {'name': 'arithmetic', 'digits': 3, 'weight': 0.5}]
    """
    if isinstance(tasks, str | Mapping | TaskConfig) or not isinstance(tasks, Sequence):
        tasks = [tasks]
    found = []
    for item in tasks:
        pair = isinstance(item, tuple) and len(item) == 2
        task, weight = item if pair else (item, None)
        settings = _task(task)
        found.append(settings if weight is None else {**settings, "weight": weight})
    return found


def _task(task: Any) -> Settings:
    if isinstance(task, str):
        return {"name": task}
    if isinstance(task, TaskConfig):
        return task.model_dump(mode="json", exclude_unset=True)
    if isinstance(task, Mapping):
        return {str(k): v for k, v in task.items()}
    return {"name": keep_task(task)}


def keep_rewards(rewards: Any) -> list[str]:
    """Make functions known in this process to a run that is resumed, and return how a recipe names them."""
    return in_process_names(verifier_settings(rewards))


def in_process_names(verifier: Any) -> list[str]:
    """Return the names of functions of this process in a setting `verifier`."""
    terms = verifier if isinstance(verifier, list | tuple) else [verifier]
    names = [term.get("name") if isinstance(term, Mapping) else term for term in terms]
    return [name for name in names if isinstance(name, str) and is_in_process(name)]


def keep_tasks(tasks: Any) -> None:
    """Make task objects known in this process to a run that is resumed and names them."""
    tasks_settings([t for t in (tasks if isinstance(tasks, Sequence) else [tasks]) if isinstance(t, Task)])
