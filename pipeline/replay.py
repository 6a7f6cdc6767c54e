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
from envs.pool import EnvironmentFailure, EnvPool, Session
from pipeline import jobs, recipe
from pipeline.config import Config
from pipeline.records import EpisodeStatus, Trajectory, recover_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("file", type=Path, help="episodes.jsonl of a run")
    parser.add_argument("--id", help="replay this task alone")
    parser.add_argument("--limit", type=_positive, help="replay only the first so many")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it has to be 1 or more")
    return number


def main(options: argparse.Namespace) -> int:
    """Replay a file's episodes; exit code 1 where one of them differs."""
    trajectories = [
        one for one in recover_jsonl(options.file, Trajectory)[0] if options.id in (None, one.id) and one.turns
    ]
    if not trajectories:
        raise ValueError(f"{options.file}: no episode{f' of {options.id}' if options.id else ''} to replay.")
    differences = asyncio.run(_replay(recipe.beside(options.file), trajectories[: options.limit]))
    console = Console()
    for line in filter(None, differences):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    differing = sum(bool(line) for line in differences)
    console.print(f"{len(differences) - differing} of {len(differences)} episodes replay exactly.")
    return int(differing > 0)


async def _replay(config: Config, trajectories: list[Trajectory]) -> list[str | None]:
    env = envs.load(trajectories[0].env)
    async with jobs.open_pool(config, env) as pool:
        return await replayed(pool, trajectories)


async def replayed(pool: EnvPool, trajectories: Sequence[Trajectory], *, published: bool = False) -> list[str | None]:
    """Where the environment answers otherwise than recorded, or None, for each trajectory.

    Args:
        pool: of the trajectories' environment.
        trajectories: with at least a turn each.
        published: whether they come from data that record actions and observations alone, not rewards and ends.
    """
    bar = tqdm(total=len(trajectories), desc="replay", unit="episode", disable=None)

    async def one(trajectory: Trajectory) -> str | None:
        try:
            difference = await pool.run(lambda env: _first_difference(env, trajectory, published=published))
        except EnvironmentFailure as error:
            difference = f"{trajectory.id}: {error}"
        bar.update()
        return difference

    differences = await asyncio.gather(*map(one, trajectories))
    bar.close()
    return differences


async def _first_difference(env: Session, trajectory: Trajectory, *, published: bool) -> str | None:
    task, info = await env.reset(trajectory.id)
    if task != trajectory.prompt[-1]["content"]:
        return f"{trajectory.id}: the task was {trajectory.prompt[-1]['content']!r} and is now {task!r}"
    over = False
    for number, turn in enumerate(trajectory.turns):
        place = f"{trajectory.id}, turn {number} ({turn.action})"
        if over:
            return f"{place}: the episode is over before it"
        observation, _, terminated, truncated, info = await env.step(turn.action)
        over = terminated or truncated
        if observation != turn.observation and (turn.observation or not published):  # the last one is not published
            return f"{place}: {turn.observation!r} is now {observation!r}"
        if not published and (info["reward"], info["valid"]) != (turn.reward, turn.valid):
            was = f"reward {turn.reward}, {_told(turn.valid)}"
            return f"{place}: {was} is now reward {info['reward']}, {_told(info['valid'])}"
    if published:
        return None
    before, now = (trajectory.reward, trajectory.success), (info["reward"], info["success"])
    if before != now:
        return f"{trajectory.id}: reward and success were {before} and are now {now}"
    if trajectory.status == EpisodeStatus.COMPLETED and not over:
        return f"{trajectory.id}: the episode was over and goes on now"
    return None


def _told(valid: bool) -> str:
    return "valid" if valid else "invalid"
