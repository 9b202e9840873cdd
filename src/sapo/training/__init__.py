"""The update: groups to packed batches, packed batches to one step of the optimiser, and checkpoints."""
