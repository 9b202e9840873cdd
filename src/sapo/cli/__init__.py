"""The command line: `sapo` and `python -m sapo.cli`."""

from sapo.cli.app import app, main

__all__ = ["app", "main"]
