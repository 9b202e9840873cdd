"""Engines in other processes: what they are told, who answers, and the engine that a run sees."""
