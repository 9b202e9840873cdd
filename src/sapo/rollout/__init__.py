"""Sampling: prompts to scored groups.

`engine.py` is what every engine answers to, `registry.py` finds one by name, `drawing.py` draws from it and checks what
it gives. `local/` is the engine that samples with the own weights of the trainer, `vllm/` is vLLM with a copy. Around
it: prompt formats, the choice of prompts, curricula, reward shaping and staleness.
"""
