"""The runs behind research/evidence.md: which comparisons, how they are run, and their tables."""
