"""Tasks whose prompts are rows: files, data sets, presets of benchmarks."""
