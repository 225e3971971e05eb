"""The recipes that come with the package, by name. Knows nothing of their content."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "movie_reviews"
REWARD_RECIPE = "movie_reviews_reward"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
