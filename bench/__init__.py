"""Measurements beside peers, in turn and in the same minutes. `python -m bench` runs them all; see bench/README.md."""
