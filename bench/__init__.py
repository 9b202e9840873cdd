"""Measurements beside peers, in the same process and the same minute. `python -m bench` runs them all."""
