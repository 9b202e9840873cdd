"""Sampling: prompts to scored groups.

`engine.py` is what every engine answers to, `registry.py` finds one by name, `local/` is the engine that samples with
the trainer's own weights, `vllm/` is vLLM with a copy of them. Around it: prompt formats, the choice of prompts,
curricula, reward shaping and staleness.
"""
