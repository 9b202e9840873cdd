"""Carry values and calls between two Python processes that must not trust each other, as lines of JSON.

A program and its tests run in two sandboxes. Values of the built-in types and of a few library classes cross by value,
with their exact types: what arrives is rebuilt by the receiver and cannot lie. Any other object stays where it is, and
a reference to it crosses. Only the standard library is used: the text of this file is sent into the sandbox, whose
interpreter may be older than ours.
"""

from __future__ import annotations

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import functools
import json
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 150
PLAIN_INTEGERS = 2**53

# Library classes that cross as the arguments of their constructors.
TEMPORAL = {
    datetime.date: ("year", "month", "day"),
    datetime.datetime: ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    datetime.time: ("hour", "minute", "second", "microsecond"),
    datetime.timedelta: ("days", "seconds", "microseconds"),
}
SEQUENCES: dict[Any, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
MAPPINGS: dict[Any, str] = {
    dict: "d",
    collections.OrderedDict: "od",
    collections.Counter: "ct",
    collections.defaultdict: "dd",
}
TYPES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, dict, type(None))
}
VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# Bases whose content stands for an object of a subclass that inherits its equality.
BASES: tuple[Any, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    set,
    frozenset,
    dict,
    collections.deque,
)


def encode(value: Any, refer: Callable[[Any], Any], depth: int = 0) -> Any:
    """Return a value as JSON: scalars as they are, the rest as a list of a tag and the content.

    Args:
        value: any object.
        refer: called with an object that cannot cross by value; returns the JSON that stands for it.
        depth: of the value in what is sent.

    Raises:
        ValueError: the value is nested too deeply, or contains itself.
    """
    if depth > MAX_DEPTH:
        raise ValueError("a value is nested too deeply")

    def inner(items: Any) -> list[Any]:
        return [encode(item, refer, depth + 1) for item in items]

    kind: Any = type(value)
    if value is None or kind in (bool, str) or (kind is int and abs(value) < PLAIN_INTEGERS):
        return value
    if kind in SEQUENCES:
        return [SEQUENCES[kind], inner(value)]
    if kind in MAPPINGS:
        return [MAPPINGS[kind], inner([key for pair in value.items() for key in pair])]
    scalar = encode_scalar(kind, value)
    if scalar is not None:
        return scalar
    if kind is collections.deque:
        return ["q", inner(value), value.maxlen]
    if kind is range:
        return ["r", inner((value.start, value.stop, value.step))]
    if kind is slice:
        return ["sl", inner((value.start, value.stop, value.step))]
    if kind is array.array:
        return ["a", value.typecode, inner(value.tolist())]
    if kind in VIEWS:
        return ["v", VIEWS.index(kind), inner(value)]
    if kind.__module__ == "numpy" and callable(getattr(kind, "tolist", None)):
        return encode_numpy(value, refer, depth)
    if issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple) and kind.__eq__ is tuple.__eq__:
        return ["N", kind.__name__, list(kind._fields), inner(tuple.__iter__(value))]
    plain = as_base(kind, value)
    return encode(plain, refer, depth + 1) if plain is not None else refer(value)


def encode_numpy(value: Any, refer: Callable[[Any], Any], depth: int) -> Any:
    """Return the JSON of a number of numpy, which equals Python's, or of an array, which keeps its kind.

    An array without elements crosses as a list: all of them would equal whatever it is compared with.
    """
    held = value.tolist()
    content = encode(held, refer, depth + 1)
    return ["np", str(value.dtype), content] if isinstance(held, list) and value.size else content


def encode_scalar(kind: type, value: Any) -> Any:
    """Return the JSON of a number, of bytes, of a date or of a built-in type, or None for another value."""
    if kind is int:
        return ["i", hex(value)]
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind in (bytes, bytearray):
        return ["b" if kind is bytes else "B", value.hex()]
    if kind is decimal.Decimal:
        return ["n", str(value)]
    if kind is fractions.Fraction:
        return ["/", hex(value.numerator), hex(value.denominator)]
    if kind in TEMPORAL and getattr(value, "tzinfo", None) is None:
        return ["w", kind.__name__, [getattr(value, name) for name in TEMPORAL[kind]]]
    if value is Ellipsis:
        return ["e"]
    if kind is type and TYPES.get(getattr(value, "__name__", "")) is value:
        return ["T", getattr(value, "__name__", "")]
    return None


def as_base(kind: type, value: Any) -> Any:
    """Return an object of a subclass of a built-in class as that class, or None where it has its own equality."""
    for base in BASES:
        if issubclass(kind, base) and kind.__eq__ is base.__eq__:
            if base is int:
                return int.__add__(value, 0)
            if base in (float, complex):
                return base.__add__(value, 0)
            if base is str:
                return "".join(str.__iter__(value))
            if base is dict:
                return dict(dict.items(value))
            return base(base.__iter__(value))
    return None


def decode(data: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """Return the value of what `encode` made. `resolve` gets a list whose tag is of no value."""
    if not isinstance(data, list):
        if data is None or type(data) in (bool, str, int):
            return data
        raise ValueError("no value")
    tag, rest = data[0], data[1:]
    for kind, name in SEQUENCES.items():
        if tag == name:
            return kind(decode(item, resolve) for item in rest[0])
    for kind, name in MAPPINGS.items():
        if tag == name:
            flat = [decode(item, resolve) for item in rest[0]]
            made = kind()
            # Counter.update would count the pairs.
            dict.update(made, zip(flat[::2], flat[1::2]))  # noqa: B905  the interpreter may be older
            return made
    if tag in SCALARS:
        return SCALARS[tag](*rest)
    if tag in ("r", "sl", "v", "N", "q", "a", "np"):
        return decode_library(tag, rest, resolve)
    return resolve(data)


def decode_library(tag: str, rest: list[Any], resolve: Callable[[list[Any]], Any]) -> Any:
    """Return the value of what `encode` made of a range, slice, view, named tuple, deque or array.

    Where the receiver has no numpy, an array of it is a list. One without elements is a list too, whatever the sender,
    which may be a program under test, has made of it.
    """
    if tag == "np":
        held = decode(rest[1], resolve)
        try:
            import numpy
        except ImportError:
            return held
        made = numpy.array(held, dtype=str(rest[0]))
        return made if made.size else held
    if tag in ("r", "sl"):
        return (range if tag == "r" else slice)(*(decode(item, resolve) for item in rest[0]))
    if tag == "q":
        return collections.deque([decode(item, resolve) for item in rest[0]], rest[1])
    if tag == "v":
        items = [decode(item, resolve) for item in rest[1]]
        views = (dict.fromkeys(items).keys, dict(enumerate(items)).values, dict(items if rest[0] == 2 else ()).items)
        return views[rest[0]]()
    if tag == "N":
        return tuple_class(str(rest[0]), tuple(map(str, rest[1])))._make(decode(item, resolve) for item in rest[2])
    return array.array(rest[0], [decode(item, resolve) for item in rest[1]])


@functools.cache
def tuple_class(name: str, fields: tuple[str, ...]) -> Any:
    """Return the class of named tuples of a name and fields, which collections checks."""
    return collections.namedtuple(name, fields)


SCALARS: dict[str, Callable[..., Any]] = {
    "i": lambda text: int(text, 16),
    "f": float.fromhex,
    "c": lambda real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "n": decimal.Decimal,
    "/": lambda above, below: fractions.Fraction(int(above, 16), int(below, 16)),
    "w": lambda name, fields: getattr(datetime, name)(*fields) if name in WHEN else None,
    "e": lambda: Ellipsis,
    "T": lambda name: TYPES[name],
}
WHEN: tuple[str, ...] = tuple(kind.__name__ for kind in TEMPORAL)


def allow_event_loops(source: str) -> None:
    """Let asyncio run where a sandbox has no sockets, by which its event loops are woken from other threads.

    Args:
        source: a program or tests; nothing is done unless they name asyncio, since loading it takes a while.
    """
    if "asyncio" not in source:
        return
    import asyncio
    import selectors
    import socket

    with contextlib.suppress(OSError):
        for end in socket.socketpair():
            end.close()
        return

    class Loop(asyncio.SelectorEventLoop):
        def __init__(self) -> None:
            super().__init__(selectors.SelectSelector())

        def _make_self_pipe(self) -> None:
            self._ssock = self._csock = None

        def _close_self_pipe(self) -> None:
            pass

    class Policy(asyncio.DefaultEventLoopPolicy):
        _loop_factory = Loop

    asyncio.set_event_loop_policy(Policy())


class Peer:
    """One end of a channel over which each side may ask the other, also while it answers.

    A request is an object with "op"; an answer has "v", a value, or "x", an exception. Subclasses say what they do
    for a request (`perform`), how they make an exception of "x" (`failure`), and what stands for a reference of the
    other side (`stand_in`). An object of this side that was sent is kept under its number.
    """

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def send(self, message: Any) -> None:
        """Write one message."""
        self.writer.write(json.dumps(message) + "\n")
        self.writer.flush()

    def receive(self) -> Any:
        """Read one message; EOFError where the other side has ended."""
        line = self.reader.readline()
        if not line.endswith("\n"):
            raise EOFError("the other side has ended")
        return json.loads(line)

    def ask(self, op: str, **fields: Any) -> Any:
        """Ask the other side, and answer what it asks meanwhile. Returns its whole answer."""
        self.send({"op": op, **fields})
        while True:
            message = self.receive()
            if "op" not in message:
                if "x" in message:
                    raise self.failure(message["x"])
                return message
            self.answer(message)

    def answer(self, request: Any) -> None:
        """Answer one request of the other side."""
        try:
            reply = self.perform(request)
        except EOFError:
            raise
        except BaseException as error:
            reply = {"x": self.describe(error)}
        self.send(reply)

    def pack(self, value: Any) -> Any:
        """Return a value as JSON."""
        return encode(value, self.refer)

    def unpack(self, data: Any) -> Any:
        """Return the value of JSON from the other side."""
        return decode(data, self.resolve)

    def refer(self, value: Any) -> Any:
        """Return the reference to an object of this side, or of the other side's where it came from there."""
        theirs = self.number_of_theirs(value)
        if theirs is not None:
            return ["p", theirs]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return ["o", self.numbers[id(value)], self.about(value)]

    def resolve(self, data: list[Any]) -> Any:
        """Return the object that a reference stands for."""
        if data[0] == "p" and type(data[1]) is int and 0 <= data[1] < len(self.kept):
            return self.kept[data[1]]
        if data[0] == "o" and type(data[1]) is int:
            return self.stand_in(data[1], data[2])
        raise ValueError("an unknown value")

    def perform(self, request: Any) -> Any:
        """Return the answer to a request."""
        raise NotImplementedError

    def failure(self, about: Any) -> BaseException:
        """Return the exception to raise for one of the other side."""
        raise NotImplementedError

    def describe(self, error: BaseException) -> Any:
        """Return the JSON of an exception of this side."""
        try:
            text = "".join(str(error))[:2000]
        except BaseException:  # an exception of the program may raise another when it is printed
            text = ""
        names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BaseException)]
        return {"names": names[:20], "text": text}

    def about(self, value: Any) -> Any:
        """Return what the other side is told of an object."""
        raise NotImplementedError

    def stand_in(self, number: int, about: Any) -> Any:
        """Return the object that stands for one of the other side."""
        raise NotImplementedError

    def number_of_theirs(self, value: Any) -> int | None:
        """Return the other side's number of a stand-in, or None for an object of this side."""
        raise NotImplementedError
