"""The private tests of LiveCodeBench, which come as base64 of zlib of a pickle of a JSON text.

A pickle is a program, and this one comes from the network. It is not run: its instructions are listed, and if they are
anything but "this one string" it is refused. So no class is ever looked up and nothing is ever called.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from sapo.errors import TaskError

# The largest tests of the data set are some hundred megabytes; a few bytes of zlib can claim to be a terabyte.
MAX_DECODED_BYTES = 512 * 2**20

_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
# What surrounds the string: the version, the frame, a note for later reference that nobody makes, the end.
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def decode_private_tests(text: str, *, max_bytes: int = MAX_DECODED_BYTES) -> list[dict[str, str]]:
    """The tests in a `private_test_cases` field: each a dict with `input`, `output` and `testtype`.

    Plain JSON, as `public_test_cases` and older rows have it, is read as it is.

    >>> decode_private_tests('[{"input": "1", "output": "2", "testtype": "stdin"}]')
    [{'input': '1', 'output': '2', 'testtype': 'stdin'}]

    Raises:
        TaskError: the text is none of that, a pickle of anything but a string, or larger than `max_bytes`.
    """
    if text.lstrip()[:1] in ("[", ""):
        return _read_tests(text)
    try:
        packed = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise TaskError(
            f"private tests must be JSON or base64; got {text[:40]!r} ({error}); check the column"
        ) from error
    return _read_tests(_only_string(_unpack(packed, max_bytes)))


def _unpack(packed: bytes, max_bytes: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, max_bytes)
    except zlib.error as error:
        raise TaskError(f"private tests must be compressed by zlib; got {error}; download the row again") from error
    if not stream.eof:
        more = len(content) >= max_bytes
        got = "more" if more else f"a stream cut off after {len(content)}"
        raise TaskError(
            f"private tests may have {max_bytes} bytes; got {got}; {'raise max_bytes' if more else 'reload'}"
        )
    return content


def _only_string(content: bytes) -> str:
    """The string that a pickle consists of, found without running it."""
    found: list[str] = []
    end = None
    try:
        for operation, argument, position in pickletools.genops(content):
            end = position
            if operation.name in _STRINGS:
                found.append(str(argument))
            elif operation.name not in _HARMLESS:
                raise TaskError(
                    f"private tests must be the pickle of one string; got its instruction {operation.name}, which "
                    "makes something else; do not load this file with pickle"
                )
    except TaskError:
        raise
    except Exception as error:  # pickletools raises what it comes across: ValueError, IndexError, UnicodeError, ...
        raise TaskError(f"private tests must be a whole pickle; got {error}; download the row again") from error
    if len(found) != 1 or end != len(content) - 1:
        got = f"{len(found)} strings" if len(found) != 1 else "further bytes behind its end"
        raise TaskError(f"private tests must be the pickle of one string; got {got}; do not load this file with pickle")
    return found[0]


def _read_tests(text: str) -> list[dict[str, str]]:
    try:
        tests: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"private tests must be a JSON list; got {text[:40]!r} ({error}); check the column") from error
    if not isinstance(tests, list):
        raise TaskError(f"private tests must be a JSON list; got {type(tests).__name__}; check the column")
    for number, test in enumerate(tests):
        fields = ("input", "output", "testtype")
        if not isinstance(test, dict) or not all(isinstance(test.get(field), str) for field in fields):
            raise TaskError(
                f"a test must have the strings {', '.join(fields)}; test {number} is {str(test)[:80]!r}; fix the row"
            )
    return tests
