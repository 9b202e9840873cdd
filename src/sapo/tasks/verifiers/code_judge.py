"""Run unit tests in a sandbox of their own, with stand-ins for what the program defines. Not imported by sapo.

code.py sends the text of code_wire.py and of this file to the sandbox's interpreter. The program runs in another
sandbox, at the other end of a socket. It is asked to call its functions, and never sees the tests. What it answers is
taken as a value of a built-in type, or as an opaque object that is equal to itself alone. So the tests' `==`, `abs`
and `len` are always Python's own.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
import types
from typing import Any

from sapo.tasks.verifiers.code_wire import Peer, allow_event_loops

# Modules whose functions tests may use without an import, where the program imports them.
LIBRARY = ("math", "cmath", "itertools", "functools", "collections", "statistics", "datetime", "copy", "decimal")
MODULES = (
    *LIBRARY,
    "asyncio",
    "re",
    "random",
    "string",
    "operator",
    "heapq",
    "bisect",
    "fractions",
    "json",
    "typing",
    "os",
    "sys",
)

# Operators that objects of a class which the tests name may bring along. Equality is never asked for, and order only
# between two such objects: a program could otherwise compare a result with the expected value itself.
OWN_OPERATORS = (
    *("__len__", "__iter__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__str__", "__repr__"),
    *("__enter__", "__exit__", "__neg__", "__abs__", "__mul__", "__rmul__", "__truediv__", "__matmul__"),
)
PAIR_OPERATORS = ("__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__", "__and__", "__or__", "__xor__")


class Ended(BaseException):
    """The program's process has ended."""


class StandIn:
    """An object of the program, which stays in its process."""

    def __init__(self, judge: Judge, number: int, about: dict[str, Any]) -> None:
        self._judge, self._number, self._about = judge, number, about
        self._given: tuple[Any, ...] = ()
        self.__name__ = str(about.get("name"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._judge.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._judge.value(self._judge.ask("get", o=self._number, n=name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._judge.ask("set", o=self._number, n=name, v=self._judge.pack(value))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, StandIn) and self._judge.same_state(self, other))

    def __hash__(self) -> int:
        return hash(self._about.get("class"))

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, StandIn) and self._number in value._about.get("classes", ())

    def __bool__(self) -> bool:
        return not self._about.get("truth") or bool(self._judge.special(self, "__bool__", ()))

    def __next__(self) -> Any:
        return self._judge.value(self._judge.ask("next", o=self._number))


def _operator(name: str) -> Any:
    def apply(self: StandIn, *args: Any) -> Any:
        if name in ("__str__", "__repr__") and not self._judge.is_named(self):
            return object.__repr__(self)
        if name in ("__enter__", "__exit__"):
            args = ()
        if name == "__iter__" and self._about.get("kind") == "iterator":
            return self
        if name in PAIR_OPERATORS and not all(isinstance(other, StandIn) for other in args):
            return NotImplemented
        return self._judge.special(self, name, args)

    return apply


for _name in (*OWN_OPERATORS, *PAIR_OPERATORS):
    setattr(StandIn, _name, _operator(_name))


class Judge(Peer):
    """The tests' end of the channel. It trusts nothing that arrives."""

    def __init__(self, reader: Any, writer: Any) -> None:
        super().__init__(reader, writer)
        self.stand_ins: dict[int, Any] = {}
        self.named: set[int] = set()
        self.errors: dict[str, type] = {}
        self.classes: set[type] = set()

    def receive(self) -> Any:
        """See `Peer.receive`.

        Raises:
            Ended: the program has ended.
        """
        try:
            return super().receive()
        except (EOFError, OSError) as error:
            raise Ended("it ended before the tests") from error

    def value(self, answer: Any) -> Any:
        """Return the value of an answer."""
        return self.unpack(answer["v"])

    def call(self, function: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the program. Lists and dicts that it changed are changed here too."""
        packed = [self.pack(value) for value in args]
        named = {name: self.pack(value) for name, value in kwargs.items()}
        answer = self.ask("call", o=function._number, a=packed, k=named)
        for index, after in answer.get("after", {}).items():
            update(args[int(index)], self.unpack(after))
        result = self.value(answer)
        if isinstance(result, StandIn) and function._about.get("kind") == "class":
            result._given = (*args, *kwargs.values())
        return result

    def special(self, target: StandIn, name: str, args: tuple[Any, ...]) -> Any:
        """Ask for an operator of an object of the program, where the tests name its class."""
        if not self.is_named(target):
            raise TypeError(f"the result is of class {target.__name__}, which the tests do not know")
        packed = [self.pack(value) for value in args]
        try:
            return self.value(self.ask("special", o=target._number, n=name, a=packed))
        except AttributeError:
            raise TypeError(f"an object of class {target.__name__} has no {name}") from None

    def is_named(self, target: StandIn) -> bool:
        """Return whether the tests name the class of an object."""
        return target._about.get("kind") == "iterator" or bool(
            self.named.intersection(target._about.get("classes", ()))
        )

    def same_state(self, left: StandIn, right: StandIn) -> bool:
        """Return whether two objects are of one class with equal fields, which hold what the tests made them of."""
        if left._about.get("class") is None or left._about.get("class") != right._about.get("class"):
            return False
        states = [self.value(self.ask("state", o=side._number)) for side in (left, right)]
        if not states[0] or states[0] != states[1]:
            return False
        held = list(states[0].values())
        return all(given in held for given in (*left._given, *right._given))

    def perform(self, request: Any) -> Any:
        """Answer the program: call a function of the tests, or read a field of an object that they made."""
        target = self.kept[request["o"]]
        mine = type(target) in self.classes
        name = str(request.get("n"))
        args = [self.unpack(item) for item in request.get("a", ())]
        if request["op"] == "call":
            return {"v": self.pack(target(*args))}
        if request["op"] == "next" and hasattr(target, "__next__"):
            return {"v": self.pack(next(target))}
        if mine and request["op"] == "get" and not name.startswith("_"):
            return {"v": self.pack(getattr(target, name))}
        if mine and request["op"] == "set" and not name.startswith("_"):
            setattr(target, name, self.unpack(request["v"]))
            return {"v": None}
        if mine and request["op"] == "special" and name in (*OWN_OPERATORS, *PAIR_OPERATORS, "__eq__"):
            return {"v": self.pack(getattr(target, name)(*args))}
        raise TypeError("the tests do not allow this")

    def about(self, value: Any) -> Any:
        """Describe an object of the tests that is passed to the program, or refuse to pass it."""
        kind = type(value)
        callables = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
        if isinstance(value, callables) or (kind is type and value in self.classes):
            return {"kind": "function", "name": getattr(value, "__name__", "")}
        if kind in self.classes:
            return {"kind": "object", "name": kind.__name__}
        if hasattr(value, "__next__"):
            return {"kind": "iterator", "name": kind.__name__}
        raise TypeError(f"the tests pass an object of class {kind.__name__}, which cannot leave them")

    def stand_in(self, number: int, about: Any) -> Any:
        """See `Peer.stand_in`."""
        if number not in self.stand_ins:
            self.stand_ins[number] = self.make(number, about)
        return self.stand_ins[number]

    def make(self, number: int, about: Any) -> Any:
        """Make what stands here for an object of the program: its own module or exception class where Python has it."""
        name, kind = str(about.get("name")), about.get("kind")
        if kind == "module" and name in MODULES:
            return importlib.import_module(name)
        if kind == "coroutine":
            return self.coroutine(number)
        if kind == "class" and about.get("bases"):
            return self.error_class([name, *about["bases"]])
        return StandIn(self, number, about)

    async def coroutine(self, number: int) -> Any:
        """Wait for a coroutine of the program, which runs there."""
        return self.value(self.ask("await", o=number))

    def error_class(self, names: list[Any]) -> type:
        """Return the exception class of the first name that Python has, under the name of the first."""
        known = [getattr(builtins, str(name), None) for name in names]
        base = next((k for k in known if isinstance(k, type) and issubclass(k, BaseException)), Exception)
        first = str(names[0]) if names else "Exception"
        if base.__name__ == first:
            return base
        if first not in self.errors:
            self.errors[first] = type(first, (base,), {})
        return self.errors[first]

    def failure(self, about: Any) -> BaseException:
        """See `Peer.failure`."""
        kind, text = self.error_class(list(about["names"])), str(about["text"])
        try:
            made = kind(text)
        except TypeError:  # such as UnicodeDecodeError, which takes five arguments
            return Exception(text)
        return made if isinstance(made, BaseException) else Exception(text)

    def number_of_theirs(self, value: Any) -> int | None:
        """See `Peer.number_of_theirs`."""
        return value._number if isinstance(value, StandIn) and value._judge is self else None


def update(old: Any, new: Any) -> None:
    """Give a list, dict, set or the like the content that the program left in it."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        old.update(new) if isinstance(old, (dict, set)) else old.extend(new)


# ------------------------------------------------------------------------------------------- which names are whose


def names_of_the_program(trees: list[ast.AST], defined: set[str], function: str) -> tuple[set[str], set[str]]:
    """Return the names in tests that mean the program's objects, and those that mean the library's where it has them.

    A name that Python has, such as sum, means the program's own where the tests call nothing else, and then where it is
    called on no result of another call. A name of the mathematical library, such as isclose or gcd, means the program's
    where it is called on values alone, and the library's where it is called on the results of the program.
    """
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} - defined
    built_in, library = set(dir(builtins)), library_names()
    free = used - built_in - set(library) - {function}
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    on_values = {call.func.id for call in calls if is_on_values(call)} - {function}  # type: ignore[attr-defined]
    own = free | (on_values & used & (set(library) - built_in)) | ({function} if function else set())
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    if not called & own:
        own |= {call.func.id for call in calls if is_innermost(call) and call.func.id in used}  # type: ignore[attr-defined]
    return own, (used & set(library)) - built_in - own


def is_innermost(call: ast.Call) -> bool:
    """Return whether a call is of a plain name and has no other call of a plain name among its arguments."""
    inside = [node for node in ast.walk(call) if node is not call and isinstance(node, ast.Call)]
    return isinstance(call.func, ast.Name) and not any(isinstance(node.func, ast.Name) for node in inside)


def is_on_values(call: ast.Call) -> bool:
    """Return whether a call is of a plain name and its arguments hold no call and no variable."""
    inside = [node for node in ast.walk(call) if node not in (call, call.func)]
    return isinstance(call.func, ast.Name) and not any(isinstance(node, (ast.Call, ast.Name)) for node in inside)


def library_names() -> dict[str, Any]:
    """Return the public names of the modules in LIBRARY with what they mean."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, LIBRARY):
        for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
            found.setdefault(name, getattr(module, name))
    return found


def defined_in(trees: list[ast.AST]) -> set[str]:
    """Return the names that tests bind themselves, anywhere."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


# ------------------------------------------------------------------------------------------------------------ tests


def namespace_of(judge: Judge, order: dict[str, Any]) -> dict[str, Any]:
    """Return the names that the tests see: those of the prefix, of the library, and stand-ins for the program's."""
    sources = [order["setup"], *order["tests"]]
    trees: list[ast.AST] = [ast.parse(source) for source in sources if source]
    space: dict[str, Any] = {"__name__": "tests"}
    with contextlib.suppress(BaseException):  # a prefix that is no whole program brings no names
        exec(compile(order["prefix"], "prefix.py", "exec", dont_inherit=True), space)
    space.pop(order["function"], None)
    defined = defined_in(trees)
    wanted, of_library = names_of_the_program(trees, defined | set(space), order["function"])
    answer = judge.ask("names", names=sorted(wanted | of_library))["v"]
    known = library_names()
    for name in wanted.intersection(answer):
        space[name] = judge.unpack(answer[name])
        if isinstance(space[name], StandIn):
            judge.named.add(space[name]._number)
    # The program must have the name, as where it imports isclose, but the tests get Python's own.
    space.update({name: known[name] for name in of_library.intersection(answer)})
    return space


def run_tests(judge: Judge, order: dict[str, Any]) -> None:
    """Run each test and print its number, with the error where it fails."""
    loaded = judge.receive()
    if "load" in loaded:
        print(json.dumps({"load": str(loaded["load"])}))
        return
    space = namespace_of(judge, order) | known_classes(judge)
    for number, test in enumerate(order["tests"]):
        source = f"{order['setup']}\n{test}" if order["setup"] else test
        error = ""
        try:
            exec(compile(source, f"test{number}.py", "exec", dont_inherit=True), space)
        except Ended:
            return
        except BaseException as caught:
            error = brief(caught)
        print(json.dumps({"number": number, **({"error": error} if error else {"passed": True})}), flush=True)


def known_classes(judge: Judge) -> dict[str, Any]:
    """Note the classes that the tests define, whose objects may be shown to the program."""
    build = builtins.__build_class__

    def build_class(*args: Any, **kwargs: Any) -> Any:
        made = build(*args, **kwargs)
        judge.classes.add(made)
        return made

    return {"__builtins__": {**vars(builtins), "__build_class__": build_class}}


def brief(error: BaseException) -> str:
    """Return an exception as one short line."""
    text = " ".join(str(error).split())
    return (type(error).__name__ + (f": {text}" if text else ""))[:200]


def main(descriptor: int) -> None:
    """Run the tests on standard input against the program at the other end of a socket."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(10_000)
    order = json.loads(sys.stdin.read())
    allow_event_loops("\n".join([order["setup"], *order["tests"]]))
    # Not a socket object: Landlock's filter allows reading and writing alone.
    judge = Judge(os.fdopen(descriptor, "r"), os.fdopen(os.dup(descriptor), "w"))
    run_tests(judge, order)
    sys.stdout.flush()
    os._exit(0)
