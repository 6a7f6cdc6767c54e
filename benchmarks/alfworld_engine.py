"""Loads, resets and steps of ALFWorld's games: our engine against the unmodified one, on the same games and commands.

    python -m benchmarks.alfworld_engine [--games 12] [--episodes 300] [--json FILE]

Each engine plays in a process of its own under this one, game by game in turns; what is timed is CPU time inside it.
`load` reads translations from the disk, as every load of a game but its first does; `first load` makes them. A reset of
an official episode loads its game, too, so the unmodified reset is the sum of both. Then ours plays `--episodes` games
in one process, whose memory is printed.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from envs.alfworld import games
from envs.alfworld.generator import generate

STEPS = 20


def main() -> None:
    """Play, print the tables, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=12, help="games to compare on")
    parser.add_argument("--episodes", type=int, default=300, help="games to play in one process")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    chosen = [games.game_of(draft, "move", []) for draft in generate("train", args.games, 0)]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        for name in ("ours", "unmodified"):
            mine, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, name == "ours", folder), daemon=True).start()
            workers[name] = mine
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for number, game in enumerate(chosen):
            for name, worker in workers.items():
                worker.send((number, game))
                rows[name].append(worker.recv())
        assert [row["text"] for row in rows["ours"]] == [row["text"] for row in rows["unmodified"]], (
            "transcripts differ"
        )
        result: dict[str, Any] = {}
        print(f"{'CPU ms':<12}{'ours':>10}{'unmodified':>12}{'ratio':>8}")
        for key in ("first load", "load", "reset", "step"):
            ours, official = (1000 * sum(row[key] for row in rows[name]) / len(chosen) for name in workers)
            result[key] = {"ours_ms": ours, "unmodified_ms": official, "ratio": official / ours}
            print(f"{key:<12}{ours:>10.1f}{official:>12.1f}{official / ours:>8.1f}")
        workers["ours"].send(("memory", args.episodes))
        result["resident_mb"] = workers["ours"].recv()
        for worker in workers.values():
            worker.send((None, None))
    print("resident MB after so many episodes in one process: ", end="")
    print(", ".join(f"{episodes}: {size:.0f}" for episodes, size in result["resident_mb"].items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def serve(asked: Connection, ours: bool, folder: str) -> None:
    """Play what is asked for, in one engine."""
    env: Any
    if ours:
        from envs.alfworld.engine import Engine, Translations

        env, store = Engine.acquire(), Translations(Path(folder))
    else:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs.pddl import PddlEnv

        env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
    while (message := asked.recv())[0] is not None:
        number, game = message
        if number == "memory":
            asked.send(memory(env, store, game))
            continue
        load = (env.load, game, store) if ours else (env.load, game)
        row: dict[str, Any] = {"first load": timed(*load), "load": timed(*load), "reset": timed(env.reset)}
        row["step"] = 0.0
        state, text = env.state, []
        chance = random.Random(number)
        for _ in range(STEPS):
            text += [state["feedback"], state["admissible_commands"]]
            command = chance.choice(state["admissible_commands"])
            row["step"] += timed(env.step, command) / STEPS
            state = env.state
        asked.send(row | {"text": text})


def timed(function: Any, *args: Any) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def memory(env: Any, store: Any, episodes: int) -> dict[int, float]:
    """Resident megabytes after the first episode, and after every fifty."""
    found = {}
    for number, draft in enumerate(generate("train", episodes, 1), 1):
        env.load(games.game_of(draft, "move", []), store)
        env.reset()
        for step in range(5):
            env.step(env.admissible[step % len(env.admissible)])
        if number == 1 or number % 50 == 0:
            found[number] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    return found


if __name__ == "__main__":
    main()
