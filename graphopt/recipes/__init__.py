"""Recipes: what the user wants done, as a list of passes with parameters. They compose, and ``--set`` overrides."""

from graphopt.recipes.recipe import Recipe, load_recipe, load_recipes, passes_of, recipe_names

__all__ = ["Recipe", "load_recipe", "load_recipes", "passes_of", "recipe_names"]
