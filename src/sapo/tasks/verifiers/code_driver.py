"""Run a model's program inside the sandbox. sapo does not import this file.

code.py sends the text of code_wire.py and of this file, with a call of `main` at its end, to the sandbox's own
interpreter. That may be older than ours, so only the standard library is used. What the program prints is scored in
stdin tests, and is dropped otherwise. In unit tests it is asked for calls through a socket (code_judge.py), and in
functional tests it answers calls on the standard output with which it was started. No expected result comes here.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import sys
import types
from typing import Any, TextIO

from sapo.tasks.verifiers.code_wire import Peer, allow_event_loops

# The imports that LiveCodeBench puts before every program: its starter code uses List[int] without an import.
PREAMBLE = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
RECURSION_LIMIT = 50_000  # as in LiveCodeBench


def main(kind: str, program: str, descriptor: int = -1) -> None:
    """Run a program, and then, depending on `kind`, nothing ("stdin"), calls ("functional") or requests ("unit")."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    if hasattr(sys, "set_int_max_str_digits"):  # judges of competitions have no limit of 4,300 digits
        sys.set_int_max_str_digits(0)
    if kind == "stdin":
        load(program, "__main__", preamble=True)
        return
    order = json.loads(sys.stdin.read())
    report = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1):
        os.dup2(nowhere, target)
    if kind == "functional":
        answer_calls(report, program, order)
    else:
        report.close()
        answer_requests(program, descriptor)


def load(program: str, name: str, *, preamble: bool) -> types.ModuleType:
    """Run a program as a module and return it. A program may end itself early by SystemExit.

    Under another name than "__main__", what a program guards by `if __name__ == "__main__"` does not run.
    """
    allow_event_loops(program)
    code = compile(program, "program.py", "exec", dont_inherit=True)
    # It replaces the driver as __main__ too, for programs that look themselves up.
    module = sys.modules["__main__"] = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "/program.py"
    if preamble and lacks_names(program):
        for library in PREAMBLE:
            exec(f"from {library} import *\nimport {library}", module.__dict__)
    with contextlib.suppress(SystemExit):
        exec(code, module.__dict__)
    return module


def lacks_names(program: str) -> bool:
    """Return whether a program uses a name that it neither defines nor imports, and so needs the preamble."""
    import symtable

    used: set[str] = set()
    defined = {*dir(builtins), "__name__", "__file__", "__doc__", "__builtins__", "__annotations__"}
    todo = [symtable.symtable(program, "program.py", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                (defined if symbol.is_assigned() or symbol.is_imported() else used).add(symbol.get_name())
    return bool(used - defined)


# ------------------------------------------------------------------------------------------------------------- calls


def answer_calls(report: TextIO, program: str, order: dict[str, Any]) -> None:
    """Call the function with each list of arguments and report what it returns, one JSON object a line."""

    def out_of_time(number: int, frame: object) -> None:
        write_report(report, error="timed out")
        os._exit(0)

    signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, order["seconds"])
    try:
        builtins.ListNode, builtins.TreeNode = ListNode, TreeNode  # type: ignore[attr-defined]
        module = load(program, "program", preamble=True)
        owner = module.Solution() if hasattr(module, "Solution") else module
        function = getattr(owner, order["function"])
        shapes, shape = annotations_of(function)
        nodes = is_node(shape) or (not shape and any(map(is_node, shapes)))
    except BaseException as error:
        write_report(report, load=brief(error))
        return
    for arguments in order["calls"]:
        signal.setitimer(signal.ITIMER_PROF, order["seconds"])
        try:
            given = [from_json(value, shape, module) for value, shape in zip(arguments, [*shapes, *[""] * 99])]  # noqa: B905
            value = function(*given)
            # None is the empty list or tree too; which of them was expected is for the reader of the report.
            empty = {"empty": True} if value is None and nodes else {}
            line = json.dumps({"value": to_json(value, empty=is_node(shape)), **empty})
        except BaseException as error:
            write_report(report, error=brief(error))
        else:
            report.write(line + "\n")
            report.flush()


class ListNode:
    """LeetCode's node of a linked list, for programs that use it without a definition."""

    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val, self.next = val, next


class TreeNode:
    """LeetCode's node of a binary tree, for programs that use it without a definition."""

    def __init__(self, val: Any = 0, left: Any = None, right: Any = None) -> None:
        self.val, self.left, self.right = val, left, right


def annotations_of(function: Any) -> tuple[list[str], str]:
    """Return the annotation of each parameter, and that of the result, as text."""
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return [], ""
    *shapes, result = [
        "" if annotation is inspect.Parameter.empty else str(annotation)
        for annotation in (*(p.annotation for p in signature.parameters.values()), signature.return_annotation)
    ]
    return shapes, result


def is_node(shape: str) -> bool:
    """Return whether an annotation is of a linked list or a tree, or of a list of such."""
    return "ListNode" in shape or "TreeNode" in shape


def from_json(value: Any, shape: str, module: types.ModuleType) -> Any:
    """Return an argument, as a linked list or a tree where the annotation says so, or as a list of such."""
    for name, make in (("ListNode", make_list), ("TreeNode", make_tree)):
        if name in shape and (value is None or isinstance(value, list)):
            kind = getattr(module, name, None) or getattr(builtins, name)
            several = "List[" in shape.replace("Optional[ListNode]", "") or "list[" in shape
            return [make(item, kind) for item in value] if several and value is not None else make(value, kind)
    return value


def make_list(values: Any, kind: Any) -> Any:
    """Return the linked list of values."""
    head = None
    for value in reversed(values or []):
        node = kind(value)
        node.next, head = head, node
    return head


def make_tree(values: Any, kind: Any) -> Any:
    """Return the binary tree of values in level order, as LeetCode writes it: null stands for a missing child."""
    nodes = [None if value is None else kind(value) for value in values or []]
    children = iter(nodes[1:])
    for node in nodes:
        if node is not None:
            node.left, node.right = next(children, None), next(children, None)
    return nodes[0] if nodes else None


def to_json(value: Any, depth: int = 0, empty: bool = False) -> Any:
    """Return a result with linked lists and trees as lists, and None among several of them as [] where `empty`."""
    if isinstance(value, (list, tuple)) and depth < 3:
        return [[] if empty and item is None else to_json(item, depth + 1) for item in value]
    if hasattr(value, "val") and hasattr(value, "next"):
        found: list[Any] = []
        while value is not None and len(found) < 10**6:
            found.append(value.val)
            value = value.next
        return found
    if hasattr(value, "val") and hasattr(value, "left"):
        return levels_of(value)
    return value


def levels_of(root: Any) -> list[Any]:
    """Return the values of a binary tree in level order, without the nulls at its end."""
    found: list[Any] = []
    row = [root]
    while row and len(found) < 10**6:
        found += [None if node is None else node.val for node in row]
        row = [child for node in row if node is not None for child in (node.left, node.right)]
    while found and found[-1] is None:
        found.pop()
    return found


# ---------------------------------------------------------------------------------------------------------- requests


class Theirs:
    """An object of the tests, which stays in their process."""

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_peer", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._peer.value("get", o=self._number, n=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.value("set", o=self._number, n=name, v=self._peer.pack(value))

    def __call__(self, *args: Any) -> Any:
        return self._peer.value("call", o=self._number, a=[self._peer.pack(value) for value in args])

    def __next__(self) -> Any:
        return self._peer.value("next", o=self._number)

    def __iter__(self) -> Any:
        return self

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._peer.special(self, "__eq__", other))


def _operator(name: str) -> Any:
    return lambda self, *args: self._peer.special(self, name, *args)


for _name in ("__len__", "__getitem__", "__contains__", "__lt__", "__gt__", "__add__", "__sub__", "__str__"):
    setattr(Theirs, _name, _operator(_name))


class Program(Peer):
    """The program's end of the channel: does what it is asked."""

    def __init__(self, reader: Any, writer: Any, module: types.ModuleType) -> None:
        super().__init__(reader, writer)
        self.module = module
        self.theirs: dict[int, Theirs] = {}
        self.loop: Any = None

    def value(self, op: str, **fields: Any) -> Any:
        """Ask the tests for a value."""
        return self.unpack(self.ask(op, **fields)["v"])

    def special(self, target: Theirs, name: str, *args: Any) -> Any:
        """Call a special method of an object of the tests."""
        return self.value("special", o=target._number, n=name, a=[self.pack(value) for value in args])

    def perform(self, request: Any) -> Any:
        """See `Peer.perform`."""
        op, name = request["op"], request.get("n", "")
        if op == "names":
            known = vars(self.module)
            return {"v": {name: self.pack(known[name]) for name in request["names"] if name in known}}
        target = self.kept[request["o"]]
        if op == "call":
            return self.call(target, request)
        if op == "get":
            return {"v": self.pack(getattr(target, name))}
        if op == "set":
            setattr(target, name, self.unpack(request["v"]))
            return {"v": None}
        if op == "next":
            return {"v": self.pack(next(target))}
        if op == "state":
            return {"v": self.pack(state_of(target))}
        if op == "await":
            return {"v": self.pack(self.wait_for(target))}
        if name == "__iter__":
            return {"v": self.pack(iter(target))}
        if name == "__bool__":
            return {"v": bool(target)}
        args = [self.unpack(item) for item in request["a"]]
        return {"v": self.pack(getattr(target, name)(*(args if name != "__exit__" else (None, None, None))))}

    def call(self, function: Any, request: Any) -> Any:
        """Call a function of the program; the answer also has what it changed of its arguments."""
        args = [self.unpack(item) for item in request["a"]]
        value = function(*args, **{name: self.unpack(item) for name, item in request["k"].items()})
        after = {}
        for index, (before, arg) in enumerate(zip(request["a"], args)):  # noqa: B905
            if isinstance(arg, (list, dict, set, bytearray)) and (now := self.pack(arg)) != before:
                after[index] = now
        return {"v": self.pack(value), "after": after}

    def wait_for(self, coroutine: Any) -> Any:
        """Return what a coroutine returns, from the one event loop of all coroutines of the program."""
        if self.loop is None:
            import asyncio

            allow_event_loops("asyncio")
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        return self.loop.run_until_complete(coroutine)

    def about(self, value: Any) -> Any:
        """See `Peer.about`."""
        if isinstance(value, types.CoroutineType):
            return {"kind": "coroutine", "name": value.__name__}
        if isinstance(value, types.ModuleType):
            return {"kind": "module", "name": value.__name__}
        if isinstance(value, type):
            bases = [kind.__name__ for kind in value.__mro__[1:]] if issubclass(value, BaseException) else []
            return {"kind": "class", "name": value.__name__, "bases": bases}
        kind = type(value)
        mine = [base for base in kind.__mro__ if base.__module__ == self.module.__name__]
        classes = [self.refer(base)[1] for base in mine]
        what = "iterator" if hasattr(value, "__next__") else "object"
        truth = hasattr(kind, "__bool__") or hasattr(kind, "__len__")
        about = {"kind": what, "name": kind.__name__, "classes": classes, "truth": truth and bool(classes)}
        return {**about, "class": classes[0]} if classes else about

    def stand_in(self, number: int, about: Any) -> Any:
        """See `Peer.stand_in`."""
        return self.theirs.setdefault(number, Theirs(self, number))

    def failure(self, about: Any) -> BaseException:
        """See `Peer.failure`."""
        kind = getattr(builtins, about["names"][0], Exception)
        return kind(about["text"])

    def number_of_theirs(self, value: Any) -> int | None:
        """See `Peer.number_of_theirs`."""
        return value._number if type(value) is Theirs else None


def state_of(value: Any) -> dict[str, Any]:
    """Return the fields of an object."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def answer_requests(program: str, descriptor: int) -> None:
    """Load a program and do what its tests ask for, until they end."""
    # Not a socket object: Landlock's filter allows reading and writing alone.
    reader, writer = os.fdopen(descriptor, "r"), os.fdopen(os.dup(descriptor), "w")
    try:
        module = load(program, "program", preamble=False)
    except BaseException as error:
        write_report(writer, load=brief(error))
        return
    peer = Program(reader, writer, module)
    peer.send({"ready": True})
    with contextlib.suppress(EOFError):
        while True:
            peer.answer(peer.receive())


# ------------------------------------------------------------------------------------------------------------ shared


def write_report(report: TextIO, **what: Any) -> None:
    """Write one line of the report and flush it, since the next test may end the process."""
    report.write(json.dumps(what) + "\n")
    report.flush()


def brief(error: BaseException) -> str:
    """Return an exception as one short line."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an exception of the program may raise another when it is printed
        text = ""
    return (type(error).__name__ + (f": {text}" if text else ""))[:200]
