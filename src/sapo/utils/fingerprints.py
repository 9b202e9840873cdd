"""Fingerprints of files and functions: names of their content, by which a resumed run knows its inputs again.

Of a name and a time of change neither says what is in a file: copies have other times, and files are replaced in place.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import os
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

READ_IN_FULL = 64 * 2**20
"""Bytes up to which a file of weights is read in full."""
_STRIDE, _BLOCK = 2**20, 4096


def fingerprint_file(file: Path, *, sampled: bool = False) -> str:
    """Return a hash of a file's content.

    Args:
        sampled: of a file above READ_IN_FULL, read its size, its first MiB, its last and 4 KiB of every MiB between.
            This is for weights: training changes nearly all of them, and the first MiB has the header with names and
            shapes, so that two models are told apart by 0.4 % of their bytes. A change of single weights by hand is not
            seen. Rows of data are always read in full.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if not sampled or size <= READ_IN_FULL:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        digest.update(f"{size}\n".encode())
        for offset in range(0, size, _STRIDE):
            stream.seek(offset)
            digest.update(stream.read(_STRIDE if offset in (0, size // _STRIDE * _STRIDE) else _BLOCK))
    return digest.hexdigest()[:16]


def fingerprint_files(root: Path, files: Iterable[Path], *, sampled: bool = False) -> str:
    """Return one hash of several files below a directory: their names in it and their contents.

    Raises:
        OSError: one cannot be read.
    """
    lines = sorted(f"{file.relative_to(root)} {fingerprint_file(file, sampled=sampled)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def fingerprint_function(function: Callable[..., Any]) -> str:
    """Return a hash of what a function does, as far as that can be told.

    It covers the bytecode, defaults, and the functions and plain values (texts, numbers, lists, dicts) that the code
    reads from closures and globals; of a bound method or an object that is called, its class and plain attributes. Of
    any other object it covers the type alone. Another version of Python compiles to other bytecode.

    >>> fingerprint_function(lambda text: text.upper()) == fingerprint_function(lambda text: text.lower())
    False
    """
    digest = hashlib.sha256()
    for part in _parts(function, set(), outermost=True):
        digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()[:16]


def _parts(value: Any, seen: set[int], *, outermost: bool = False) -> Iterator[bytes]:
    kind = type(value)
    yield kind.__qualname__.encode()
    if value is None or isinstance(value, str | bytes | bool | int | float | complex):
        yield repr(value).encode("utf-8", "surrogatepass")
        return
    if not isinstance(value, tuple | frozenset | types.CodeType):  # constants, which the compiler may share
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, set | frozenset):  # whose order is another in every process
        yield from sorted(b" ".join(_parts(item, set(seen))) for item in value)
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, dict):
        yield str(len(value)).encode()
        for key, item in value.items():
            yield from _parts(key, seen)
            yield from _parts(item, seen)
    elif isinstance(value, types.CodeType):
        yield value.co_code + value.co_exceptiontable
        for names in (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars):
            yield " ".join(names).encode()
        for constant in value.co_consts:
            yield from _parts(constant, seen)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, types.MethodType):
        yield from _parts(value.__func__, seen)
        yield from _of_object(value.__self__, seen)
    elif isinstance(value, functools.partial):
        for item in (value.func, value.args, value.keywords):
            yield from _parts(item, seen)
    elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}".encode()
    elif outermost:
        yield from _of_object(value, seen)


def _of_function(function: types.FunctionType, seen: set[int]) -> Iterator[bytes]:
    yield from _parts(function.__code__, seen)
    for value in (function.__defaults__, function.__kwdefaults__):
        yield from _parts(value, seen)
    for cell in function.__closure__ or ():
        try:
            yield from _parts(cell.cell_contents, seen)
        except ValueError:  # not set yet
            yield b"empty"
    for name in sorted(_names_in(function.__code__)):
        if name in function.__globals__ and not hasattr(builtins, name):
            yield name.encode()
            yield from _parts(function.__globals__[name], seen)


def _names_in(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _of_object(value: Any, seen: set[int]) -> Iterator[bytes]:
    """Yield an object's class, the methods that were written for it, and its attributes."""
    for kind in type(value).__mro__[:-1]:
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        for name, method in sorted(vars(kind).items()):
            if isinstance(method, types.FunctionType):
                yield name.encode()
                yield from _parts(method.__code__, seen)
    for name, item in sorted(getattr(value, "__dict__", {}).items()):
        yield name.encode()
        yield from _parts(item, seen)
