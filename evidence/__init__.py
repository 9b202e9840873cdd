"""The runs behind docs/evidence.md: which comparisons, how they are run, and their tables."""
