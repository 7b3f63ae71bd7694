"""What a run is: the recipe's keys, reading a recipe, and the checks across keys."""
