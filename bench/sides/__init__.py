"""The processes that do the work: one module for each engine or trainer, told by bench/contest.py when to run."""
