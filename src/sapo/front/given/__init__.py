"""Objects given in Python as settings of a recipe: models, rows, rewards, tasks."""
