"""Compiled kernels for caches of tests: with an empty one every process would compile them anew, for ten seconds."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest

from sapo.model.sources import cache_directory
from sapo.rollout.local.cpu import native

OUTSIDE = str(cache_directory())
"""The cache that was set when the tests were collected."""


def fresh_cache(directory: Path) -> str:
    """Make a cache that holds nothing but the kernels compiled for this machine, and return its path."""
    made = _made()
    if made is not None and not (directory / "kernels").exists():
        shutil.copytree(made, directory / "kernels")
    return str(directory)


@functools.cache
def _made() -> Path | None:
    """Compile them once, unless they are there or there is no compiler."""
    compiler = native._compiler()
    if compiler is None or os.environ.get("SAPO_NATIVE") == "0":
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPO_CACHE", OUTSIDE)
        native._kept(compiler, native._name(compiler))
    return Path(OUTSIDE) / "kernels"
