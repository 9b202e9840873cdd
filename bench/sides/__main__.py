"""Start one side: `python -m bench.sides NAME SETTINGS.json`, as bench/contest.py does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from bench.sides.serve import Commands

if __name__ == "__main__":
    name, settings = sys.argv[1:]
    commands = Commands(Path(settings))  # before the side's module, which imports what prints
    importlib.import_module(f"bench.sides.{name}").main(commands)
