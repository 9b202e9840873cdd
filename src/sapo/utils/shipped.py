"""Find the recipes and suites that ship with the package, by name; loads no other part of the package."""

from __future__ import annotations

from pathlib import Path

SUITES = "suites"
"""Folder of the suites of benchmarks within that of the recipes."""


def recipe_directories() -> list[Path]:
    """Return where recipes are found by name: inside the installed package, and beside a source checkout."""
    package = Path(__file__).resolve().parents[1]
    return [d for d in (package / "recipes", package.parents[1] / "recipes") if d.is_dir()]


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of every shipped recipe, those of studies in their folder included."""
    directories = reversed(recipe_directories())
    return {f.stem: f for d in directories for f in sorted(d.rglob("*.yaml")) if f.parent != d / SUITES}


def shipped_suites() -> dict[str, Path]:
    """Return name -> file of every shipped suite of benchmarks."""
    return {f.stem: f for d in reversed(recipe_directories()) for f in sorted((d / SUITES).glob("*.yaml"))}
