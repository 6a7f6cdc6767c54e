"""Tool `replay`: recorded episodes through their environment again; says where an observation or a reward differs.

python -m pipeline replay runs/tiny/sciworld/seed0/experts/episodes.jsonl
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

import envs
from envs.pool import EnvPool
from pipeline import config as configuration
from pipeline import jobs
from pipeline.config import Config
from pipeline.records import Trajectory, read_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("file", type=Path, help="episodes.jsonl of a run")
    parser.add_argument("--id", help="replay this task alone")
    parser.add_argument("--limit", type=int, help="replay only the first so many")


def main(options: argparse.Namespace) -> int:
    """Replay a file's episodes; exit code 1 where one of them differs."""
    trajectories = [
        one for one in read_jsonl(options.file, Trajectory)[0] if options.id in (None, one.id) and one.turns
    ]
    if not trajectories:
        raise ValueError(f"{options.file}: no episode{f' of {options.id}' if options.id else ''} to replay.")
    differences = asyncio.run(_replay(configuration.beside(options.file), trajectories[: options.limit]))
    console = Console()
    for line in filter(None, differences):
        console.print(line, highlight=False, markup=False)
    differing = sum(bool(line) for line in differences)
    console.print(f"{len(differences) - differing} of {len(differences)} episodes replay exactly.")
    return int(differing > 0)


async def _replay(config: Config, trajectories: list[Trajectory]) -> list[str | None]:
    env = envs.load(trajectories[0].env)
    async with jobs.open_pool(config, env) as pool:
        return await replayed(pool, trajectories)


async def replayed(pool: EnvPool, trajectories: Sequence[Trajectory], *, rewards: bool = True) -> list[str | None]:
    """Where the environment answers otherwise than recorded, or None, for each trajectory; with or without rewards."""
    bar = tqdm(total=len(trajectories), desc="replay", unit="episode", disable=None)

    async def one(trajectory: Trajectory) -> str | None:
        difference = await _first_difference(pool, trajectory, rewards=rewards)
        bar.update()
        return difference

    differences = await asyncio.gather(*map(one, trajectories))
    bar.close()
    return differences


async def _first_difference(pool: EnvPool, trajectory: Trajectory, *, rewards: bool) -> str | None:
    async with pool.session() as env:
        await env.reset(trajectory.id)
        for number, turn in enumerate(trajectory.turns):
            observation, _, _, _, info = await env.step(turn.action)
            if observation != turn.observation:
                return f"{trajectory.id}, turn {number} ({turn.action}): {turn.observation!r} is now {observation!r}"
            if rewards and info["reward"] != turn.reward:
                return f"{trajectory.id}, turn {number} ({turn.action}): reward {turn.reward} is now {info['reward']}"
    return None
