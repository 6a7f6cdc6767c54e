"""Memory and speed of many episodes of one environment at once, in the pool that rollouts play in.

    python -m benchmarks.concurrent_episodes --env alfworld [--episodes 1 16 64 256] [--processes 2] [--json FILE]

For each number so many sessions of an `EnvPool` are open together. Each begins a task of its own (as far as the expert
solves so many) and takes the first `--steps` actions of its solution; no session takes its next action before all took
this one, so that all are alive. Then each begins another task, `--rounds` times in all.

    MiB        what the workers and their children (the JVM) hold at last; what they share counts once (PSS)
    MiB each   what each episode more than in the row before added, where both rows have all processes
    grown      MiB that came after the first round: what a longer run would add to
    steps/s    by the clock, and per second of the workers' and children's processor time; without the resets
    answered   sessions whose every observation was the one that the expert got when it played alone

There is no second side: the packages give each episode a simulator of its own (a JVM, a process of TextWorld), whose
memory and speed `benchmarks.environment_steps` sets beside ours. What bounds the figures is the row of one episode (256
can take no more steps per CPU second), the machine's memory (MiB each times episodes), and its processors.
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

import envs
from benchmarks.environment_steps import settings_of
from benchmarks.process_tree import below, cpu_seconds, resident_mib
from envs.pool import EnvironmentFailure, EnvPool, Session
from envs.processes import fresh_processes

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds by which the system counts processor time; a rate over fewer than twenty of them is left out."""

Plans = dict[str, list[tuple[str, str]]]
"""Of each task the first actions of its solution, with what they were answered."""


def main() -> None:
    """Play so many at once, print the table, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=envs.ENVIRONMENTS, required=True, help="the environment")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1, 16, 64, 256], help="how many at once")
    parser.add_argument("--processes", type=int, default=2, help="worker processes they share")
    parser.add_argument("--steps", type=int, default=5, help="actions of each episode")
    parser.add_argument("--rounds", type=int, default=2, help="episodes that each session plays")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of the environment's section")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    most = max(args.episodes)
    settings = settings_of(args.env, most, **dict(setting.split("=", 1) for setting in args.settings))
    plans = _plans(args.env, settings, most, args.processes, args.steps)
    print(
        f"{'episodes':>8}{'MiB':>9}{'MiB each':>10}{'grown':>8}{'steps/s':>9}{'per CPU s':>11}{'answered':>10}",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for number in args.episodes:
        try:
            row = asyncio.run(_measure(args.env, settings, plans, number, args.processes, args.rounds))
        except EnvironmentFailure as failure:
            print(f"{number:>8}  {failure}", flush=True)
            continue
        if rows and number > rows[-1]["episodes"] >= args.processes:
            row["MiB each"] = (row["MiB"] - rows[-1]["MiB"]) / (number - rows[-1]["episodes"])
        rows.append(row)
        each = f"{row['MiB each']:.2f}" if "MiB each" in row else ""
        each_cpu = f"{row['per CPU s']:.1f}" if row["per CPU s"] else ""
        print(
            f"{number:>8}{row['MiB']:>9,.0f}{each:>10}{row['grown']:>8.0f}{row['steps/s']:>9.1f}"
            f"{each_cpu:>11}{row['answered']:>10}",
            *row["failures"],
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _plans(name: str, settings: BaseModel, episodes: int, processes: int, steps: int) -> Plans:
    """The beginnings of solutions, of as many tasks as episodes, less those without one."""
    with fresh_processes(1) as process:
        tasks = process.submit(_tasks, name, settings, episodes, processes).result()
    with fresh_processes(processes) as pool:
        parts = [tasks[place::processes] for place in range(processes)]
        jobs = [pool.submit(_solve, name, settings, part, steps) for part in parts]
        return {task: plan for job in jobs for task, plan in job.result().items()}


def _tasks(name: str, settings: BaseModel, number: int, processes: int) -> list[str]:
    from pipeline.jobs import spread

    envs.load(name).prepare(settings, processes)
    with contextlib.closing(envs.load(name)(settings)) as env:
        return spread(env.tasks("train"), number, env.kind)


def _solve(name: str, settings: BaseModel, tasks: Iterable[str], steps: int) -> Plans:
    plans: Plans = {}
    with envs.load(name)(settings) as env:
        for task in tasks:
            with contextlib.suppress(envs.NoSolutionError):
                plans[task] = [(step.action, step.observation) for step in env.expert(task)[:steps]]
    return plans


async def _measure(
    name: str, settings: BaseModel, plans: Plans, episodes: int, processes: int, rounds: int
) -> dict[str, Any]:
    """The row of so many episodes."""
    env, workers, tasks = envs.load(name), min(processes, episodes), list(plans)
    played, memory = [], []
    async with (
        EnvPool(env, settings, workers=workers, slots=-(-episodes // workers)) as pool,
        contextlib.AsyncExitStack() as stack,
    ):
        sessions = [await stack.enter_async_context(pool.session()) for _ in range(episodes)]
        children = below(os.getpid())
        for number in range(rounds):
            chosen = [tasks[(place + number) % len(tasks)] for place in range(episodes)]
            played.append(await _play(sessions, chosen, plans, children))
            memory.append(resident_mib(children))
    steps, cpu = sum(one.steps for one in played), sum(one.cpu for one in played)
    return {
        "episodes": episodes,
        "MiB": memory[-1],
        "grown": memory[-1] - memory[0],
        "steps/s": steps / sum(one.seconds for one in played),
        "per CPU s": steps / cpu if cpu > 20 * TICK else None,
        "answered": sum(all(right) for right in zip(*(one.right for one in played), strict=True)),
        "failures": sorted({failure for one in played for failure in one.failures}),
    }


class _Played(NamedTuple):
    """One episode of each session."""

    steps: int
    seconds: float
    """Of the steps, by the clock."""
    cpu: float
    """And of processor time."""
    right: list[bool]
    """Of each session, whether it answered as the expert was answered."""
    failures: set[str]


async def _play(sessions: list[Session], tasks: list[str], plans: Plans, children: list[int]) -> _Played:
    """An episode of each session, all of them taking their steps together."""
    failures: set[str] = set()
    begun = await _all(failures, (session.reset(task) for session, task in zip(sessions, tasks, strict=True)))
    right, steps = [answer is not None for answer in begun], 0
    began, spent = time.perf_counter(), cpu_seconds(children)
    for number in range(max(map(len, plans.values()))):
        going = [place for place, task in enumerate(tasks) if right[place] and number < len(plans[task])]
        turns = [(place, *plans[tasks[place]][number]) for place in going]
        answers = await _all(failures, (sessions[place].step(action) for place, action, _ in turns))
        for (place, _, observation), answer in zip(turns, answers, strict=True):
            right[place] = answer is not None and answer[0] == observation
        steps += len(turns)
    return _Played(steps, time.perf_counter() - began, cpu_seconds(children) - spent, right, failures)


async def _all(failures: set[str], calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The answers to calls made at once; None, and a line in `failures`, for one whose environment broke."""

    async def ask(call: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await call
        except EnvironmentFailure as failure:
            failures.add(str(failure))
            return None

    return await asyncio.gather(*(ask(call) for call in calls))


if __name__ == "__main__":
    main()
