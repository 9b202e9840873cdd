"""A package by vLLM's name, whose server draws with sapo's local engine. First on PYTHONPATH it stands in for vLLM."""
