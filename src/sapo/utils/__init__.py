"""Helpers that know nothing of reinforcement learning: files, names, text, random numbers, the machine."""
