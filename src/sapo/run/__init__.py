"""One run: the loop, its state, its files and its loggers.

`loop.py` reads like the algorithm. What surrounds it - starting, resuming, the first policy - is in `sapo.workflows`.
"""
