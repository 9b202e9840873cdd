"""Decode the private tests of LiveCodeBench, which are base64 of zlib of a pickle of a JSON text.

A pickle is a program, and this one comes from the network, so it is not run. Its instructions are listed, and it is
refused unless they make one string and nothing else. No class is looked up and no function called.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from sapo.errors import TaskError

# The largest tests of the data set have some hundred megabytes. A few bytes of zlib can expand to a terabyte.
MAX_DECODED_BYTES = 512 * 2**20

_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
# Instructions around the string: version, frame, memo entries and the end.
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def decode_private_tests(text: str, *, max_bytes: int = MAX_DECODED_BYTES) -> list[dict[str, str]]:
    """Return the tests in a `private_test_cases` field, each a dict with `input`, `output` and `testtype`.

    Plain JSON, as in `public_test_cases` and in older rows, is read as well.

    >>> decode_private_tests('[{"input": "1", "output": "2", "testtype": "stdin"}]')
    [{'input': '1', 'output': '2', 'testtype': 'stdin'}]

    Raises:
        TaskError: the text is neither, or a pickle of anything but a string, or larger than `max_bytes`.
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
    """Return the string that a pickle consists of, without running it."""
    found: list[str] = []
    end = None
    try:
        for operation, argument, position in pickletools.genops(content):
            end = position
            if operation.name in _STRINGS:
                found.append(str(argument))
            elif operation.name not in _HARMLESS:
                raise TaskError(
                    f"private tests must be the pickle of one string; got the instruction {operation.name}, which "
                    "makes something else; do not load this file with pickle"
                )
    except TaskError:
        raise
    except Exception as error:  # pickletools raises many kinds: ValueError, IndexError, UnicodeError, ...
        raise TaskError(f"private tests must be a whole pickle; got {error}; download the row again") from error
    if len(found) != 1 or end != len(content) - 1:
        got = f"{len(found)} strings" if len(found) != 1 else "further bytes after its end"
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
