"""The local engine: continuous decoding with the trainer's own weights."""
