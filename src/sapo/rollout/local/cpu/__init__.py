"""Kernels for CPUs: C sources, their compilation, decoding on packed weights. Only the local engine knows of them."""
