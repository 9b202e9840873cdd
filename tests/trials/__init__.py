"""Trials of faults: damaged files, absurd settings, wrong calls, hostile reward functions.

`make trials` runs them in full, `make test` a seeded part.

Each case calls the command line as a user does. It holds where the call does what it says, or refuses in lines of
`sapo: ...` with exit code 2 (1 for a run that failed), and leaves nothing behind. A traceback, a hang, or a file that
was changed by a refused call breaks it.
"""
