"""The directory of a comparison: its files, and what is needed to resume it.

comparisons/NAME/comparison.yaml   the resolved plan: `sapo compare comparisons/NAME` resumes it
                 runs/             ARM-lrRATE-seedK/: ordinary run directories; failure.json in one that stopped itself
                 logs/             ARM-lrRATE-seedK.txt: what the process of a run wrote to standard error
                 results.json      every run and every figure; the clock only in "timing"
                 table.md          the same to be read
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sapo.errors import ConfigError, Interrupted
from sapo.evaluation.store import differing
from sapo.run.machine import resolve_device, resolve_dtype
from sapo.utils.files import DirectoryLock, lock_directory, write_whole
from sapo.workflows.comparing.config import load_comparison
from sapo.workflows.comparing.plan import ComparisonPlan

COMPARISON_FILE = "comparison.yaml"


class ComparisonDirectory:
    """The files of one comparison. Made by `open`; holds a lock, so that no two processes run one comparison.

    Args:
        path: an existing directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = lock_directory(path)
        self.runs_lock: DirectoryLock | None = None
        """Lock that the processes of the runs inherit: no other process can have it while one of them lives."""

    @classmethod
    def open(cls, path: Path, plan: ComparisonPlan) -> ComparisonDirectory:
        """Make the directory of a comparison, or open one that holds it or a part of it.

        Raises:
            ConfigError: it holds something else, or another process is at it.
        """
        check_directory(path, plan)
        path.mkdir(parents=True, exist_ok=True)
        directory = cls(path)
        try:
            check_directory(path, plan)  # again, under the lock: another process may have added to it
        except ConfigError:
            directory.close()
            raise
        for part in ("runs", "logs"):
            (path / part).mkdir(exist_ok=True)
        if not (path / COMPARISON_FILE).exists() or _plain(load_comparison(path)) != _plain(plan):
            directory._write_plan(plan)
        return directory

    def _write_plan(self, plan: ComparisonPlan) -> None:
        """Write comparison.yaml; delete the figures of a smaller comparison, which would pass for those of this one."""
        for stale in ("results.json", "table.md"):
            (self.path / stale).unlink(missing_ok=True)
        header = f"# sapo compare {self.path}   resumes this comparison, or shows its table\n"
        settings = yaml.safe_dump(plan.to_json(), sort_keys=False, allow_unicode=True)
        write_whole(self.path / COMPARISON_FILE, header + settings)

    def wait_for_runs(self, should_stop: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Wait until the processes that a killed comparison left behind have saved their runs.

        Raises:
            Interrupted: when `should_stop` says so.
        """
        told = False
        while self.runs_lock is None:
            try:
                self.runs_lock = lock_directory(self.path / "runs")
            except ConfigError:
                if not told:
                    report("waiting until the runs of an earlier process, which was killed, have saved their state")
                told = True
                if should_stop():
                    raise Interrupted from None
                time.sleep(0.1)

    def write_results(self, results: Mapping[str, Any], table: str) -> None:
        """Write results.json and table.md, each whole."""
        write_whole(self.path / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_whole(self.path / "table.md", table)

    def close(self) -> None:
        """Release the locks."""
        if self.runs_lock is not None:
            self.runs_lock.close()
        self._lock.close()


def check_directory(path: Path, plan: ComparisonPlan) -> None:
    """Refuse a directory that holds anything but this comparison, or one that this one only adds to.

    Runs are independent of each other, so more arms, learning rates or seeds leave those that are there as they are.

    Raises:
        ConfigError: naming what it holds.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; name a directory with --out")
    if not (path / COMPARISON_FILE).is_file():
        strangers = sorted(p.name for p in path.iterdir() if p.name not in (".lock", "runs", "logs"))
        if strangers or any(p.name != ".lock" for p in (path / "runs").glob("*")):
            raise ConfigError(f"{path} holds no comparison but {(strangers or ['runs'])[0]}; name another with --out")
        return
    for key, (a, b) in _changes(_plain(load_comparison(path)), _plain(plan)):
        raise ConfigError(
            f"{path} holds another comparison, with {key}={a} where this one has {b}; `sapo compare {path}` resumes "
            "it, --out DIR starts another"
        )


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """List where `here` does more than add arms, learning rates and seeds to `there`; as `differing`."""
    kept = {**here, "arms": {arm: settings for arm, settings in here["arms"].items() if arm in there["arms"]}}
    for key in ("learning_rates", "seeds"):
        if set(there[key]) <= set(here[key]):
            kept[key] = there[key]
    return differing(there, kept)


def _plain(plan: ComparisonPlan) -> dict[str, Any]:
    """Return the plan as it would be read from a file, with the precision that this machine gives to its recipe.

    An earlier version wrote that down where no recipe had named it.
    """
    settings: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    with suppress(ConfigError):  # the recipe's GPU is not here
        settings["recipe"]["model"]["dtype"] = resolve_dtype(plan.base, resolve_device(plan.base.device))
    return settings
