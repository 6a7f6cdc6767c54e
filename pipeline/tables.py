"""Tool `tables`: the episodes of several runs in one set of tables, as of seeds that were run on several machines.

python -m pipeline tables main-0 main-1 --to runs/main-both

A run is a folder, a name under runs/, or a file episodes.csv alone, a hundred kilobytes that travel where a whole run
does not. Writes episodes.csv, rewards.csv, rewards_by_kind.csv, differences.csv and the figure of rewards, and prints
the tables that `report` prints. With a config.yaml beside the episodes of each run the comparisons are its recipe's,
else, or with --baseline, those of every policy with one. Runs of one machine are better put together by `reuse=`, which
checks every stage.
"""

import argparse
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from envs import ENVIRONMENTS
from pipeline import recipe
from pipeline.compare import differing
from pipeline.config import Config
from pipeline.records import atomic_write

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.report import Compared

OWN = ("run", "reuse", "seed", "env.names")
"""What the recipes of runs differ in that belong together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, its name under runs/, or episodes.csv")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the tables are written")
    parser.add_argument("--baseline", metavar="POLICY", help="whom all others are compared with")


def main(options: argparse.Namespace) -> int:
    """Write and print the tables.

    Raises:
        ValueError: a run has no episodes.csv or another recipe, two hold the same seed, or the baseline is not there.
    """
    import pandas as pd

    from pipeline import figures, report, statistics

    files = [episodes_file(name) for name in options.runs]
    config = shared_recipe(files)
    episodes = statistics.episode_table(pd.concat(_of_new_seeds(files), ignore_index=True))
    policies = list(dict.fromkeys(episodes["method"]))
    if config is None or options.baseline is not None:
        compared = with_baseline(options.baseline or "sft", policies)
    else:
        compared = report.compared(config)
    tables = report.write_tables(options.to, episodes, *compared)
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


def shared_recipe(files: Sequence[Path]) -> Config | None:
    """The recipe of runs; None where a config.yaml is missing beside some of their episodes.

    Raises:
        ValueError: two recipes differ in more than seed, environments and the settings of those that not both play
            (names the first key), or one cannot be read.
    """
    recipes = [file.with_name("config.yaml") for file in files if file.with_name("config.yaml").is_file()]
    trees: list[dict[str, Any]] = [yaml.safe_load(path.read_text("utf-8")) for path in recipes]
    for (one, ours), (other, theirs) in itertools.combinations(zip(recipes, trees, strict=True), 2):
        both = {*ours["env"]["names"]} & {*theirs["env"]["names"]}
        for key, a, b in differing(_seen_by(both, ours), _seen_by(both, theirs)):
            if key not in OWN:
                raise ValueError(f"{key} is {a} in {one} and {b} in {other}: they are no seeds of one study.")
    return recipe.load(str(recipes[0])) if len(recipes) == len(files) else None


def _seen_by(envs: Collection[str], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what is of other environments."""
    shared = {key: value for key, value in tree["env"].items() if key not in ENVIRONMENTS or key in envs}
    tasks = tree["experts"]["tasks"]
    by_env = {env: tasks.get(env) if isinstance(tasks, Mapping) else tasks for env in envs}
    return {**tree, "env": shared, "experts": {**tree["experts"], "tasks": by_env}}


def with_baseline(baseline: str, policies: Sequence[str]) -> "Compared":
    """Every policy compared with one of them.

    Raises:
        ValueError: that one was not evaluated.
    """
    if baseline not in policies:
        raise ValueError(f"No policy {baseline!r} was evaluated; these were: {', '.join(policies)}.")
    others = [one for one in policies if one not in (baseline, "expert")]
    bounds = [one for one in others if one in ("random", "bon")]
    return {baseline: [one for one in others if one not in bounds]}, {baseline: bounds}, []


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
