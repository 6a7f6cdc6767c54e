"""The sample of official ALFWorld games that lies beside some checkouts; it is no part of the project."""

import json
import lzma
from pathlib import Path
from typing import Any

from envs.alfworld import games

SAMPLE = Path(__file__).parents[2] / "shared" / "alfworld" / "games.jsonl.xz"


def official_games(every: int = 1) -> list[dict[str, Any]]:
    """One of every so many games of the sample, and always some of each split."""
    with lzma.open(SAMPLE, "rt") as file:
        found = [json.loads(line) for line in file]
    return [game for place, game in enumerate(found) if place % every == 0 or place in (3600, 3700)]


def game_data(game: dict[str, Any]) -> dict[str, Any]:
    """The contents of the `game.tw-pddl` of json_2.1.1."""
    return {
        "pddl_domain": games.packaged("alfred.pddl"),
        "grammar": games.grammar_of("put").replace("UNKNOWN GOAL", game["task"].removesuffix(".")),
        "pddl_problem": game["pddl_problem"],
        "solvable": True,
    }


def write_tree(root: Path, chosen: list[dict[str, Any]]) -> Path:
    """The games as `alfworld-download` lays them out."""
    for game in chosen:
        games.write(root / game["id"] / games.GAME, json.dumps(game_data(game)))
        traj = {"task_type": game["task_type"], "pddl_params": game["pddl_params"], "task_id": game["id"]}
        games.write(root / game["id"] / games.TRAJECTORY, json.dumps(traj))
    return root
