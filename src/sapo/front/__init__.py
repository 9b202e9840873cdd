"""The Python front door: what `sapo.train` and its neighbours take and give, and how they show progress.

A call of `sapo.train` becomes a recipe that a file could have held, so that a run made in Python is resumed, evaluated,
compared and reported like any other; only functions and tasks that cannot be imported stay in this process.
"""
