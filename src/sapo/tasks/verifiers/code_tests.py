"""The tests of a program: one schema for LiveCodeBench, HumanEval and MBPP, with a form in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sapo.errors import TaskError
from sapo.tasks.verifiers.private_tests import decode_private_tests
from sapo.utils.names import did_you_mean

KINDS = ("stdin", "functional", "unit")


@dataclass(frozen=True)
class CodeTests:
    """The tests of one programming question, of one of three kinds.

    stdin: the program reads an input and prints an output, once for each case.
    functional: a function, or a method of class Solution, is called with the lines of an input, each an argument in
        JSON. It must return the output, which is JSON too.
    unit: Python statements that raise an exception when the program is wrong. Each runs after the program, in its
        namespace.

    >>> tests = CodeTests("stdin", cases=(("1 2\\n", "3\\n"),))
    >>> CodeTests.from_json(tests.to_json()) == tests
    True
    """

    kind: Literal["stdin", "functional", "unit"]
    cases: tuple[tuple[str, str], ...] = ()
    """Pairs (input, expected output) of stdin and functional tests."""
    function: str = ""
    """Name of the function that functional tests call, or that a completion must define for unit tests."""
    prefix: str = ""
    """Source that a completion continues, up to the body of a function. It also precedes a whole program."""
    statements: tuple[str, ...] = ()
    """Statements of the unit tests."""
    setup: str = ""
    """Source that runs after the program and before the unit tests."""
    cpu_seconds: int = 6
    """CPU time of each stdin run, of each call, or of all unit tests together. LiveCodeBench gives 6 seconds."""
    memory_mb: int = 1024
    """Memory of the program in MiB."""
    partial: bool = True
    """Whether to run all stdin tests after a failure, to measure the share that pass. False saves time."""
    float_tolerance: float = 0.0
    """Error that a number in the output may have: absolute below 1, relative above. 0: exact, as LiveCodeBench."""
    checker: str = ""
    """Python source that defines check(given, got, expected) and returns whether an output is right, for questions with
    several right outputs. It runs in the sandbox, apart from the program. Stdin and functional tests only."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(
                f"tests are {', '.join(KINDS)}; got kind={self.kind!r}{did_you_mean(str(self.kind), KINDS)}"
            )
        given = self.statements if self.kind == "unit" else self.cases
        if not given:
            field = "statements" if self.kind == "unit" else "cases"
            raise TaskError(f"{self.kind} tests need {field}; got none; add them, or leave the row out")
        if self.kind == "functional" and not self.function:
            raise TaskError("functional tests call a function; got no name; set function, or func_name in the metadata")
        if self.float_tolerance < 0 or (self.checker and self.kind == "unit"):
            raise TaskError(
                "float_tolerance must be 0 or more, and a checker belongs to stdin or functional tests; "
                f"got float_tolerance={self.float_tolerance}, a checker for {self.kind} tests; change the row"
                if self.checker
                else f"float_tolerance must be 0 or more; got {self.float_tolerance}; 0 compares exactly"
            )
        if self.cpu_seconds < 1 or self.memory_mb < 64:
            raise TaskError(
                f"a program needs at least 1 s and 64 MB; got cpu_seconds={self.cpu_seconds}, "
                f"memory_mb={self.memory_mb}; raise them"
            )

    def __len__(self) -> int:
        return len(self.statements if self.kind == "unit" else self.cases)

    def to_json(self) -> dict[str, Any]:
        """Return the tests as plain JSON, for `Prompt.metadata["tests"]`."""
        return {
            **asdict(self),
            "cases": [list(case) for case in self.cases],
            "statements": list(self.statements),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CodeTests:
        """Make tests from the JSON of `to_json`. Fields may be left out.

        Raises:
            TaskError: a field is unknown or has the wrong type.
        """
        known = cls.__dataclass_fields__
        for name in value:
            if name not in known:
                raise TaskError(f"tests have the fields {', '.join(known)}; got {name!r}{did_you_mean(name, known)}")
        fields = dict(value)
        try:
            fields["cases"] = tuple((str(given), str(expected)) for given, expected in fields.get("cases", ()))
            fields["statements"] = tuple(map(str, fields.get("statements", ())))
            return cls(**fields)
        except TypeError as error:
            raise TaskError(
                f"tests must be as CodeTests.to_json gives them; got {str(value)[:80]} ({error})"
            ) from error
        except ValueError as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(f"cases must be pairs of input and output; got {str(value)[:80]}; fix the row") from error

    @classmethod
    def from_livecodebench(
        cls, public: str, private: str | None = None, metadata: str | Mapping[str, Any] | None = None, **options: Any
    ) -> CodeTests:
        """Make tests from the columns public_test_cases, private_test_cases and metadata.

        >>> CodeTests.from_livecodebench('[{"input": "1", "output": "2", "testtype": "stdin"}]').cases
        (('1', '2'),)

        Raises:
            TaskError: a column cannot be read, or the tests are of two types.
        """
        tests = decode_private_tests(public) + (decode_private_tests(private) if private else [])
        kinds = sorted({test["testtype"] for test in tests})
        if len(kinds) != 1 or kinds[0] not in ("stdin", "functional"):
            raise TaskError(f"a row's tests must be all stdin or all functional; got {', '.join(kinds) or 'no tests'}")
        name = _function_name(metadata) if kinds[0] == "functional" else ""
        cases = tuple((test["input"], test["output"]) for test in tests)
        return cls("stdin" if kinds[0] == "stdin" else "functional", cases=cases, function=name, **options)

    @classmethod
    def from_humaneval(cls, prompt: str, test: str, entry_point: str, **options: Any) -> CodeTests:
        """Make tests from the columns prompt, test and entry_point. The completion continues the prompt."""
        check = f"{test}\n\ncheck({entry_point})\n"
        return cls("unit", prefix=prompt, function=entry_point, statements=(check,), **options)

    @classmethod
    def from_mbpp(
        cls, test_list: Sequence[str], setup: str = "", imports: Sequence[str] = (), **options: Any
    ) -> CodeTests:
        """Make tests from the columns test_list, test_setup_code and, in the sanitized form, test_imports.

        >>> CodeTests.from_mbpp(["assert add(1, 2) == 3"]).statements
        ('assert add(1, 2) == 3',)
        """
        return cls("unit", statements=tuple(test_list), setup="\n".join([*imports, setup]).strip(), **options)


def _function_name(metadata: str | Mapping[str, Any] | None) -> str:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise TaskError(f"metadata must be JSON; got {str(metadata)[:40]!r} ({error}); check the column") from error
    return str(metadata.get("func_name") or "") if isinstance(metadata, Mapping) else ""
