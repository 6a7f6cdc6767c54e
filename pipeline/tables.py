"""Tool `tables`: the episodes of several runs in one set of tables, as of seeds that were run on several machines.

python -m pipeline tables main-0 main-1 --to runs/main-both

A run is a folder, a name under runs/, or a file episodes.csv alone, a hundred kilobytes that travel where a whole run
does not. Writes episodes.csv, rewards.csv, rewards_by_kind.csv, differences.csv and the figure of rewards, and prints
the tables that `report` prints. Runs of one machine are better put together by `reuse=`, which checks every stage.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pipeline.compare import differing
from pipeline.records import atomic_write

if TYPE_CHECKING:
    import pandas as pd

OWN = ("run", "reuse", "seed")
"""What the recipes of runs differ in that belong together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, its name under runs/, or episodes.csv")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the tables are written")
    parser.add_argument("--baseline", default="sft", metavar="POLICY", help="whom the others are compared with (sft)")


def main(options: argparse.Namespace) -> int:
    """Write and print the tables.

    Raises:
        ValueError: a run has no episodes.csv or another recipe, two hold the same seed, or the baseline is not there.
    """
    import pandas as pd

    from pipeline import figures, report, statistics

    files = [episodes_file(name) for name in options.runs]
    same_recipe(files)
    episodes = statistics.episode_table(pd.concat(_of_new_seeds(files), ignore_index=True))
    policies = list(dict.fromkeys(episodes["method"]))
    if options.baseline not in policies:
        raise ValueError(f"No policy {options.baseline!r} was evaluated; these were: {', '.join(policies)}.")
    others = [one for one in policies if one not in (options.baseline, "expert")]
    bounds = [one for one in others if one in ("random", "bon")]
    trained = [one for one in others if one not in bounds]
    tables = report.write_tables(options.to, episodes, {options.baseline: trained}, {options.baseline: bounds})
    learnt = [one for one in policies if one not in ("random", "sft", "expert")]
    for env in dict.fromkeys(episodes["env"]):
        rewards, by_seed = ([row for row in tables[name] if row["env"] == env] for name in ("rewards", "by_seed"))
        for name, figure in figures.draw(env, rewards, by_seed, {}, learnt, None).items():
            for suffix in ("pdf", "svg"):
                with atomic_write(options.to / "figures" / f"{name}.{suffix}", "wb") as file:
                    file.write(figures.save(figure, suffix, name))
    report.print_tables(tables)
    return 0


def episodes_file(name: str) -> Path:
    """The episodes.csv of a run.

    Raises:
        ValueError: there is none.
    """
    for path in (Path("runs") / name, Path(name)):
        if (file := path / "episodes.csv" if path.is_dir() else path).is_file():
            return file
    raise ValueError(f"{name}: no episodes.csv there or in runs/{name}; the stage `evaluate` of a run writes it.")


def same_recipe(files: Sequence[Path]) -> None:
    """Refuse runs whose recipes differ in more than the seed, where a config.yaml lies beside their episodes.

    Raises:
        ValueError: two do; names the first key.
    """
    recipes = {
        file: {key: value for key, value in yaml.safe_load(recipe.read_text("utf-8")).items() if key not in OWN}
        for file in files
        if (recipe := file.with_name("config.yaml")).is_file()
    }
    for one, other in itertools.pairwise(recipes):
        for key, ours, theirs in differing(recipes[one], recipes[other]):
            raise ValueError(f"{key} is {ours} in {one} and {theirs} in {other}: they are no seeds of one study.")


def _of_new_seeds(files: Sequence[Path]) -> "Iterator[pd.DataFrame]":
    """The tables of files, no environment and seed in two of them."""
    import pandas as pd

    from pipeline.statistics import EPISODE

    seen: dict[tuple[str, int], Path] = {}
    for file in files:
        table = pd.read_csv(file, keep_default_na=False, na_values={"reward": [""]})
        if missing := [column for column in EPISODE if column not in table]:
            raise ValueError(f"{file} has no column {missing[0]}; `evaluate` writes such a file as episodes.csv.")
        for env, seed in table[["env", "seed"]].drop_duplicates().itertuples(index=False):
            if (env, seed) in seen:
                raise ValueError(f"{seen[env, seed]} and {file} both hold seed {seed} of {env}; leave one out.")
            seen[env, seed] = file
        yield table
