"""Tasksets of verifiers 0.4, in its own Python.

environment.py   the task of a recipe: prompts and episodes
process.py       the side of the run: one process for each taskset
worker.py        that process; runs without sapo
endpoint.py      where it asks the model for turns
"""
