"""Steps a second of environment workers that are actors of a Ray cluster, against local worker processes.

    python -m benchmarks.ray_steps [--env sciworld,webshop] [--tasks 8] [--workers 2] [--slots 4] [--rounds 3]
        [--json FILE]

Both pools live in this process and replay the same solutions, all at once, by turns, as often as there are rounds; a
pool's figure is its best round. What is timed are resets and steps. The row `no work` asks an environment for the kind
of a task, which costs it nothing: what is left is the way there and back. The cluster is the one of RAY_ADDRESS, or
one that is started here; on one machine the figures say what Ray costs, not what more machines bring.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import envs
from envs.pool import EnvPool, Session
from pipeline import jobs, recipe

CALLS = 200
"""Calls of each task in the row `no work`."""


def main() -> None:
    """Replay, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="sciworld,webshop", help="environments, as in the recipe `tiny`")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of each, whose solutions are replayed")
    parser.add_argument("--workers", type=int, default=2, help="workers of a pool")
    parser.add_argument("--slots", type=int, default=4, help="episodes that take turns in one")
    parser.add_argument("--rounds", type=int, default=3, help="replays of each pool")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    rows = []
    for name in args.env.split(","):
        rows += asyncio.run(_compare(name, args))
    print(f"{'environment':<14}{'what':<10}{'calls':>8}{'local /s':>10}{'Ray /s':>10}{'ratio':>8}")
    for row in rows:
        print("{env:<14}{what:<10}{calls:>8}{local:>10.0f}{ray:>10.0f}{ratio:>8.2f}".format(**row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


async def _compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one environment."""
    size = [f"workers.processes={args.workers}", f"workers.slots={args.slots}"]
    local, ray = (recipe.load("tiny", [f"env={name}", f"workers={backend}", *size]) for backend in ("local", "ray"))
    env = envs.load(name)
    async with jobs.open_pool(local, env) as here, jobs.open_pool(ray, env) as there:
        async with here.session() as session:
            tasks = (await session.call("tasks", "train"))[: args.tasks]
            paths = {task: [step.action for step in await session.call("expert", task)] for task in tasks}

        async def play(session: Session, task: str) -> int:
            await session.reset(task)
            for action in paths[task]:
                await session.step(action)
            return len(paths[task])

        async def ask(session: Session, task: str) -> int:
            for _ in range(CALLS):
                await session.call("kind", task)
            return CALLS

        return [
            {"env": name, "what": what} | await _by_turns(here, there, tasks, visit, args.rounds)
            for what, visit in (("steps", play), ("no work", ask))
        ]


async def _by_turns(
    here: EnvPool, there: EnvPool, tasks: list[str], visit: Callable[[Session, str], Awaitable[int]], rounds: int
) -> dict[str, float]:
    """Calls a second of both pools, after a round that is not timed."""
    best: dict[EnvPool, float] = {here: 0.0, there: 0.0}
    for turn in range(rounds + 1):
        for pool in best:
            began = time.perf_counter()
            counts = await asyncio.gather(*(_visit(pool, task, visit) for task in tasks))
            if turn:
                best[pool] = max(best[pool], sum(counts) / (time.perf_counter() - began))
    return {"calls": sum(counts), "local": best[here], "ray": best[there], "ratio": best[there] / best[here]}


async def _visit(pool: EnvPool, task: str, visit: Callable[[Session, str], Awaitable[int]]) -> int:
    async with pool.session() as session:
        return await visit(session, task)


if __name__ == "__main__":
    main()
