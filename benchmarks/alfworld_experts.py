"""Who wins ALFWorld's generated games within 40 steps, and in how many: both experts, by type of task.

    python -m benchmarks.alfworld_experts [--games 300] [--json FILE]

The games are those of the recipes' default settings, made if they are not there yet; every shipped game was won by the
plan when it was made, and the ones that were left out are counted. Ratios are the handcoded expert's figure over the
plan's; steps are those of the games that each of them won.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from envs import NoSolutionError
from envs.alfworld import AlfWorld, Settings, tree


def main() -> None:
    """Solve, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=300, help="training games")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for expert in ("handcoded", "plan"):
        settings = Settings(train_games=args.games, expert=expert)
        AlfWorld.prepare(settings, processes=2)
        with AlfWorld(settings) as env:
            steps: dict[str, list[int | None]] = defaultdict(list)
            for task in tqdm(env.tasks("train"), desc=expert, disable=None):
                try:
                    solved: int | None = len(env.expert(task))
                except NoSolutionError:
                    solved = None
                for kind in (env.kind(task), "all"):
                    steps[kind].append(solved)
        for kind, found in sorted(steps.items(), key=lambda item: (item[0] == "all", item[0])):
            won = [one for one in found if one is not None]
            rows[kind] |= {"games": len(found), f"{expert}_won": len(won), f"{expert}_steps": mean(won or [0])}
    for row in rows.values():
        row |= {f"{what}_ratio": row[f"handcoded_{what}"] / row[f"plan_{what}"] for what in ("won", "steps")}
    _, index = tree(settings)

    heads = f"{'handcoded won':>15}{'steps':>7}{'plan won':>10}{'steps':>7}{'won x':>8}{'steps x':>9}"
    print(f"{'type':<34}{'games':>6}{heads}")
    for kind, row in rows.items():
        print(
            f"{kind:<34}{row['games']:>6}{row['handcoded_won']:>15}{row['handcoded_steps']:>7.1f}"
            f"{row['plan_won']:>10}{row['plan_steps']:>7.1f}{row['won_ratio']:>8.2f}{row['steps_ratio']:>9.2f}"
        )
    sizes = {split: len(found) for split, found in index.games.items()}
    print(f"games of all splits: {sizes}, left out: {index.skipped}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
