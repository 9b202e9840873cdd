"""Episodes of several turns: environments on one side, an engine on the other, turn by turn in waves.

`driver.py` plays them, `wave.py` is one call of it: `asking.py` what an environment asks, `barrier.py` when a wave may
begin, `turns.py` what the engine draws then. `joining.py` and `bridge.py` encode what is said between two turns.
"""
