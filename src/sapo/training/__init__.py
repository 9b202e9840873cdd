"""The update: groups to packed batches, packed batches to one step of the optimizer, and checkpoints."""
