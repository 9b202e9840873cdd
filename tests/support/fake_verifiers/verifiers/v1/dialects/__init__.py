"""A stand-in for verifiers 0.4, with as much of it as our worker calls."""
