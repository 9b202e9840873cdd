"""Tasks whose prompts are generated: arithmetic, sums, reasoning-gym."""
