"""One file for each verb of the front door: train, evaluate, compare, generate, export and diagnose."""
