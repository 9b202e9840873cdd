"""The architecture, enforced: packages import from lower floors only, and no modules in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sapo

SOURCE = Path(sapo.__file__).parent
ROOT = Path(__file__).resolve().parents[1]

# From the ground up. Neighbours on one floor know nothing of each other.
FLOORS = (
    {"errors"},
    {"utils", "sandbox"},
    {"objectives", "data"},
    {"environments"},
    {"conformance", "config", "model", "tasks"},
    {"rollout", "training"},
    {"evaluation", "diagnostics"},
    {"run", "integrations"},
    {"workflows"},
    {"report"},
    {"front"},
    {"cli"},
)
FLOOR_OF = {package: number for number, floor in enumerate(FLOORS) for package in floor}

LONGEST = 400
"""Lines that a file may have."""

LONGER = {
    "src/sapo/model/attention.py": "one attention for any decoder, its layout and its ways to compute",
    "src/sapo/rollout/local/engine.py": "the decoding loop and what it keeps between two of its steps",
    "src/sapo/rollout/local/layouts.py": "how tokens find their keys in prefill and in a decode step",
    "tests/report/test_report_data.py": "the figures of one run, which a fixture makes once",
    "tests/report/test_report_in_browser.py": "one browser, and one page that it looks at",
    "tests/report/test_watch.py": "one page that is looked at while its run goes on",
    "tests/tasks/test_code.py": "the judge of programs, by programs",
    "tests/tasks/test_pool.py": "the pool of judges, by judges that fail in every way",
}
"""Files that are one thing and longer, and why."""

# The front door names everything, and loads it when asked; `python -m sapo` is the command line.
DOORS = {"__init__", "__main__"}

# Beside the order: what untrusted programs run in needs nothing of ours.
NOTHING_OF_OURS = {"errors", "sandbox"}


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported_modules(tree: ast.AST, at_import_time: bool = False) -> set[str]:
    """Return the modules of sapo that a syntax tree imports, in functions and for type checking too.

    Args:
        at_import_time: leave out what is imported in functions or for type checking only.
    """
    if at_import_time:
        hidden = (ast.FunctionDef, ast.AsyncFunctionDef)
        for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        inside = {id(x) for n in ast.walk(tree) if isinstance(n, hidden) for x in ast.walk(n)}
        inside |= {id(x) for n in for_types for x in ast.walk(n)}
    else:
        inside = set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "sapo"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be read without knowing where one is"
            if node.module is not None and node.module.split(".")[0] == "sapo":
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in MODULES or node.module == "sapo" else node.module for name in named}
    return found


def violations(package: str, source: str) -> list[str]:
    """Return the packages that a file of a package imports and may not."""
    others = {name.split(".")[1] for name in imported_modules(ast.parse(source)) if "." in name} - {package}
    lower = {p for p, floor in FLOOR_OF.items() if floor < FLOOR_OF[package] and package not in NOTHING_OF_OURS}
    return sorted(others & set(FLOOR_OF) - lower)


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_every_module_imports_from_lower_floors_only(path: Path) -> None:
    if path.parent == SOURCE and path.stem in DOORS:
        return
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert package in FLOOR_OF, f"{path.name} has no floor: a new module belongs into one of {sorted(FLOOR_OF)}"
    assert violations(package, path.read_text()) == []


def test_no_module_lies_loose_beside_the_packages() -> None:
    assert {p.stem for p in SOURCE.glob("*.py")} == {*DOORS, "errors"}
    packages = {p.parent.name for p in SOURCE.glob("*/__init__.py")}
    assert packages | {"errors"} == set(FLOOR_OF)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: imported_modules(ast.parse(path.read_text()), at_import_time=True) & set(MODULES) - {name}
        for name, path in MODULES.items()
        if path.name != "__init__.py"  # a face imports the files behind it
    }
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("objectives", "from sapo.config import RunConfig", ["config"]),
        ("objectives", "import sapo.data", ["data"]),
        ("model", "def late():\n    from sapo.rollout.local.engine import LocalEngine", ["rollout"]),
        ("tasks", "from sapo.model.policy import Policy", ["model"]),
        ("environments", "from sapo.tasks import Task", ["tasks"]),
        ("training", "from sapo.rollout.engine import Request", ["rollout"]),
        ("training", "from sapo import run", ["run"]),
        ("sandbox", "from sapo.errors import UserError", ["errors"]),
        ("run", "from sapo.training.trainer import Trainer\nimport sapo.data", []),
    ],
)
def test_an_upward_import_is_found(package: str, source: str, expected: list[str]) -> None:
    assert violations(package, source) == expected


def test_no_file_has_grown_too_long() -> None:
    """A file has at most 400 lines, unless it is listed with a reason; and the list has no other."""
    files = [path for root in ("src", "tests") for path in (ROOT / root).rglob("*.py")]
    long = {str(p.relative_to(ROOT)) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > LONGEST}
    assert long - set(LONGER) == set(), f"more than {LONGEST} lines: cut where one thing ends and another begins"
    assert set(LONGER) - long == set(), "these are listed as long and are not"


def test_the_front_door_loads_nothing_but_itself() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    at_import_time = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {getattr(n, "module", None) or n.names[0].name for n in at_import_time}
    assert modules <= {"__future__", "importlib", "logging", "os", "typing"}
