"""Trees that the fused attention of a GPU is tried on."""

from __future__ import annotations

from support.tree_cases import chain

# A preamble, two prompts, responses of several lengths: four blocks of tokens, some seen whole and some not at all.
WIDE = chain([150, 90, 40, 7, 60, 30, 20], [-1, 0, 1, 1, 0, 4, 4])


TREE = chain([9, 5, 1, 12, 4, 8], [-1, 0, 1, 1, 0, -1])
