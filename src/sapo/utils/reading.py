"""Read files that we wrote and that something else may have changed: one line of refusal in place of a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from sapo.errors import ConfigError, UserError

_QUICK_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_keys(root: yaml.Node | None) -> None:
    """Refuse a key that stands twice in a mapping: PyYAML takes the last, and what stood before is lost.

    The tree is looked at as it was written: as values are made, `<<` writes what it merges into the mapping's node, and
    a mapping that is merged into several others is then seen with keys that it overrides.
    """
    waiting: list[Any] = [root]
    checked: set[int] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in checked:
            continue
        checked.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_mapping(node)
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value
        waiting += reversed(inner)  # so that the first in the file is the one that is named


def _check_mapping(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, key.value))


class _Loader(yaml.SafeLoader):
    """Reads `3e-4` as a number, as YAML 1.2 does; in 1.1, PyYAML's, it is a text. Each key may stand once."""

    def get_single_node(self) -> Any:
        """Return the tree of the one document, its keys checked."""
        node = super().get_single_node()
        _check_keys(node)
        return node


class _QuickLoader(_QUICK_BASE):
    """The same in C, of what we wrote: keys that stand twice are not looked for."""


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
for _made in (_Loader, _QuickLoader):
    _made.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))

MOST_VALUES, MOST_DEEP = 1_000_000, 64
"""Largest number of values and of levels of a YAML file, aliases counted each time."""


@contextmanager
def interpreting(file: Path, what: str, error: type[UserError] = ConfigError, way_out: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read and its values are taken apart into one line that names it.

    Args:
        file: the file, or a directory.
        what: what it should be, as in "the state of a run".
        error: the class of error to raise.
        way_out: what to do, added at the end.

    Raises:
        UserError: of the class given.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as failure:
        raise error(_line(file, what, failure.strerror or str(failure), way_out)) from failure
    except KeyError as failure:
        raise error(_line(file, what, f"there is no {failure}", way_out)) from failure
    except RecursionError as failure:
        raise error(_line(file, what, "values that contain themselves or lie too deep", way_out)) from failure
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, yaml.YAMLError) as failure:
        raise error(_line(file, what, str(failure) or type(failure).__name__, way_out)) from failure


def read_json(file: Path, what: str, error: type[UserError] = ConfigError, way_out: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: of the class given: it cannot be read, or holds something else.
    """
    with interpreting(file, what, error, way_out):
        value = json.loads(file.read_bytes().decode("utf-8"))
    if not isinstance(value, dict):
        raise error(_line(file, what, f"it is {kind_of(value)}", way_out))
    return value


def read_yaml(
    file: Path, holds: str = "a mapping of settings", error: type[UserError] = ConfigError, *, quick: bool = False
) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        holds: what it must hold, for the message.
        quick: use the loader in C, where it was built: ten times as fast, and stricter about braces than YAML is. For
            files that we wrote.

    Raises:
        UserError: of the class given: it cannot be read, holds something else, or a value that contains itself.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(f"{file} is not valid YAML: {reason}") from failure
    try:
        value = parse_yaml(text, quick=quick)
    except ValueError as failure:
        raise error(f"{file} is not valid YAML: {failure}") from failure
    if not isinstance(value, dict):
        raise error(f"{file} must hold {holds}; got {type(value).__name__}")
    return value


def parse_yaml(text: str, *, quick: bool = False) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: it is none, contains itself, or is deeper or larger than any recipe; one line.
    """
    try:
        value = yaml.load(text, Loader=_QuickLoader if quick else _Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as failure:
        raise ValueError(" ".join(str(failure).split())) from failure
    except RecursionError as failure:
        raise ValueError("it is nested too deep") from failure
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Refuse values that contain themselves, and texts of a few lines whose aliases stand for billions of values."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        inner, depth = waiting.pop()
        seen += 1
        if depth > MOST_DEEP or seen > MOST_VALUES:
            raise ValueError(
                f"a value must not contain itself, nor hold more than {MOST_VALUES:,} values or {MOST_DEEP} levels"
            )
        if isinstance(inner, dict):
            waiting += [(v, depth + 1) for v in inner.values()]
        elif isinstance(inner, list | set | tuple):
            waiting += [(v, depth + 1) for v in inner]


def check_kinds(directory: Path, files: Collection[str], directories: Collection[str]) -> None:
    """Refuse a directory in which one of ours is a file where a directory should be, or the reverse.

    Raises:
        ConfigError: naming it.
    """
    for names, good, wanted in ((files, Path.is_file, "a file"), (directories, Path.is_dir, "a directory")):
        for name in names:
            path = directory / name
            if path.exists() and not good(path):
                got = "a directory" if path.is_dir() else "a file"
                got = got if got != wanted else "neither file nor directory"
                raise ConfigError(f"{path} must be {wanted}; got {got}; move it away")


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words.

    >>> kind_of([]), kind_of(None), kind_of(True)
    ('a list', 'null', 'a truth value')
    """
    names = {list: "a list", dict: "an object", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")


def is_whole(value: Any, least: int = 0) -> bool:
    """Tell whether a JSON value is a whole number, which a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _line(file: Path, what: str, got: str, way_out: str) -> str:
    return f"{file} is not {what}: {' '.join(got.split())}" + (f"; {way_out}" if way_out else "")
