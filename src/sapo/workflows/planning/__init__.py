"""What a run needs of GPUs and time, computed from its recipe and the config of its model: no weights are made."""
