"""One file for each thing that a user can ask for: train, evaluate, compare, generate, export, diagnose and so on."""
