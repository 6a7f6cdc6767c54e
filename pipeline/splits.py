"""Tool `splits`: how many tasks each split has, and how many any two of them share.

python -m pipeline splits tiny env=webshop env.webshop.splits=FOLDER

Beside the splits that are played stand the published lists they were made from, where the settings name some. This only
tells; `pipeline.jobs.check_disjoint` refuses to play splits that share a task.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from itertools import combinations

import envs
from pipeline import jobs, recipe
from pipeline.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("recipe", help="a name in pipeline/recipes, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ from the recipe")


def main(options: argparse.Namespace) -> int:
    """Print a table for each environment of a recipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 120
    config = recipe.load(options.recipe, options.overrides)
    for env in config.env.names:
        lists = task_lists(config, env)
        shared = overlaps(lists)
        table = Table("split", "tasks", *lists, title=f"{env}: tasks shared", title_justify="left", show_edge=False)
        for name, tasks in lists.items():
            cells = [str(shared.get((name, other), shared.get((other, name), "-"))) for other in lists]
            table.add_row(name, counted(tasks), *cells)
        console.print(table)
        for (one, other), count in shared.items():
            if {one, other} <= set(envs.SPLITS) and count:
                console.print(f"{one} and {other} share tasks ({count}): no stage will play them.")
    return 0


def task_lists(config: Config, name: str) -> dict[str, list[str]]:
    """The tasks of an environment's splits, then those of the published lists, as `published train`.

    Raises:
        ValueError: the environment lacks something here; says how to get it.
    """
    env = envs.load(name)
    settings = jobs.section(config, env)
    env.prepare(settings, config.workers.here)
    with contextlib.closing(env(settings)) as opened:
        played = {split: opened.tasks(split) for split in envs.SPLITS}
        if config.env.dev_tasks:
            played = jobs.with_dev(played, config.env.dev_tasks, opened.kind)
        return played | {f"published {split}": tasks for split, tasks in opened.published().items()}


def overlaps(lists: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], int]:
    """How many tasks any two lists have in common, a task that stands twice in one counted once."""
    return {(one, other): len(set(lists[one]) & set(lists[other])) for one, other in combinations(lists, 2)}


def counted(tasks: Sequence[str]) -> str:
    """The length of a list, and how many different tasks it has if some stand there twice."""
    different = len(set(tasks))
    return str(len(tasks)) if different == len(tasks) else f"{len(tasks)} ({different} different)"
