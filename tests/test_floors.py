"""The architecture, enforced: a module imports only from lower floors, or from its neighbours to the left."""

import ast
from pathlib import Path

import pytest

import sapo

SOURCE = Path(sapo.__file__).parent

FLOORS = (
    (
        "objectives",
        "data",
        "config_section",
        "model_config",
        "rollout_config",
        "diagnostics_config",
        "config",
        "files",
        "heap",
        "recipe",
        "spans",
        "untrusted",
        "processor",
    ),
    ("sandbox", "tasks", "model", "conformance"),
    ("prompting", "batch", "rollout", "shaping", "curriculum", "selection"),
    ("training", "evaluation", "diagnostics", "run_state", "run_directory", "loggers", "profiling"),
    ("integrations",),
    (
        "replay_choice",
        "sampler_sentences",
        "preflight",
        "coldstart",
        "memory",
        "listener",
        "self_check",
        "routing_replay",
        "sampler",
        "diagnosis",
        "watch",
        "loop",
        "dry_run",
        "session",
        "export",
        "evaluation_order",
        "evaluation_plan",
        "comparing",
        "diagnose",
        "generation",
        "doctor",
        "progress",
        "tables",
        "report",
    ),
    ("completion", "commands", "cli"),
)
ORDER = {station: (floor, place) for floor, row in enumerate(FLOORS) for place, station in enumerate(row)}

# Beside the order: the mathematics and the sandbox need nothing of ours, and tasks and models know nothing of each
# other or of config.
ALLOWED = {
    "objectives": set(),
    "data": set(),
    "spans": set(),
    "config_section": set(),
    "model_config": {"config_section"},
    "rollout_config": {"config_section"},
    "diagnostics_config": {"objectives", "config_section"},
    "config": {"objectives", "config_section", "model_config", "rollout_config", "diagnostics_config"},
    "recipe": {"objectives", "config"},
    "untrusted": set(),
    "processor": set(),
    "sandbox": set(),
    "tasks": {"data", "sandbox"},
    "model": {"data"},
    "conformance": {"objectives", "config"},
}


def imported_stations(source: str) -> set[str]:
    """Stations of sapo that a module's text imports anywhere, in functions and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be read without knowing where one is"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sapo" and len(parts) > 1 and parts[1] in ORDER:
                found.add(parts[1])
    return found


def violations(station: str, source: str) -> list[str]:
    """What a module of a station may not import."""
    others = imported_stations(source) - {station}
    upward = [other for other in others if ORDER[other] > ORDER[station]]
    unlisted = [other for other in others if station in ALLOWED and other not in ALLOWED[station]]
    return sorted({*upward, *unlisted})


def station_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_imports_from_lower_floors_only(path: Path) -> None:
    if path == SOURCE / "__init__.py":  # the front door names everything, and loads it when asked
        return
    assert station_of(path) in ORDER, f"{path.name} has no floor: add it to FLOORS"
    assert violations(station_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("station", "source", "expected"),
    [
        ("objectives", "from sapo.config import RunConfig", ["config"]),
        ("objectives", "import sapo.data", ["data"]),
        ("model", "def late():\n    from sapo.rollout.local import LocalEngine", ["rollout"]),
        ("tasks", "from sapo.model.policy import Policy", ["model"]),
        ("batch", "from sapo import loop", ["loop"]),
        ("training", "from sapo.diagnostics import update_metrics", ["diagnostics"]),
        ("loop", "from sapo.training.trainer import Trainer\nimport sapo.data", []),
    ],
)
def test_an_upward_import_is_found(station: str, source: str, expected: list[str]) -> None:
    assert violations(station, source) == expected


def test_the_front_door_loads_nothing_but_itself() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    at_import_time = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {getattr(n, "module", None) or n.names[0].name for n in at_import_time}
    assert modules <= {"__future__", "importlib", "os", "typing"}
