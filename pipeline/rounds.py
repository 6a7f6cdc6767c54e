"""`python -m pipeline rounds RECIPE`: how many rounds of rollout, pairs, reference and train a recipe takes."""

import argparse
import sys

from pipeline import arms, recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, as the stages take it."""
    parser.add_argument("recipe", help="a name in pipeline/recipes, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ from the recipe")


def main(options: argparse.Namespace) -> None:
    """Print the most rounds that an arm takes."""
    config = recipe.load(options.recipe, options.overrides)
    sys.stdout.write(f"{max(arm.rounds for arm in arms.of(config))}\n")
