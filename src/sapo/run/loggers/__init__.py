"""Loggers: views of metrics.jsonl in TensorBoard, Weights & Biases and trackio."""
