"""What is to be played by whom, and the process that plays it.

A `Job` is all episodes of one policy on one split; its folder is a stage of its own, with a manifest. One engine
process plays all jobs whose policies have one shape, one environment after the other and one policy after the other: a
job ends before the next policy is loaded into the engine, and plays as in an engine of its own (tests/test_engines.py).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import envs
from envs.pool import EnvPool, Session
from envs.processes import fresh_processes
from pipeline import runs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.engines import Engine, load_engine
from pipeline.methods import Method
from pipeline.play import Episode, ExpertPlayer, Player, PolicyPlayer, RandomPlayer, play_episodes
from pipeline.records import JsonlAppender, Trajectory, read_jsonl, recover_jsonl, write_jsonl

if TYPE_CHECKING:
    from pipeline.rendering import Renderer

EPISODES = runs.EPISODES
BASELINES = ("random", "expert")
"""Who plays beside the policies: chance, and the environment's own solutions."""
OF_JOB = ("seed", "policy", "split", "temperature", "top_p", "samples", "limit", "from_steps")
"""What of a job its episodes depend on."""
SPREAD = "by their ids"
"""How `spread` takes tasks, for the keys of stages: earlier runs, which took the first of each kind, are not reused."""
LEARNT = ("train", "dev")
"""Splits that are made of the environment's training tasks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Episodes of one policy on one split."""

    config: Config
    """What it is played under."""
    folder: Path
    env: str
    seed: int
    policy: str
    """`random`, `expert`, or the name of a trained policy."""
    checkpoint: Path | None = None
    """The stage whose `policy/` plays; None for `random` and `expert`, which need no engine."""
    made_by: str = ""
    """The name of that stage on the command line."""
    split: str
    """`train`, `seen`, `unseen`, or `dev`, the training tasks that are set aside."""
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    """Episodes for each task."""
    limit: int | None = None
    """Only this many tasks: spread over the kinds (`spread`), or drawn by the seed where a policy explores."""
    explores: bool = False
    """Whether it is played to learn from, not to be judged."""
    only: Path | None = None
    """Only tasks that this file of trajectories has."""
    from_steps: bool = False
    """Whether `samples` episodes begin after none, one, ... all but the last turn of each of those trajectories."""


def trajectories(folders: Iterable[Path]) -> list[Trajectory]:
    """The episodes of finished jobs, one job after the other."""
    return [one for folder in folders for one in read_jsonl(folder / EPISODES, Trajectory)]


def settings(job: Job) -> dict[str, Any]:
    """What a job's episodes depend on besides the policy."""
    env, config = envs.load(job.env), job.config
    served = job.policy not in BASELINES
    return runs.settings_of(
        *([config.play] if served else []),
        env=env_settings(config, env, job.split),
        dev_tasks=config.env.dev_tasks if job.split in LEARNT else 0,
        example=config.env.example and served,
        max_length=config.model.max_length if served else None,
        engine=config.engine.model_dump(include={"name", "dtype", "threads", "eager"}) if served else None,
        **{name: getattr(job, name) for name in OF_JOB},
        **({"spread": SPREAD} if job.limit and not job.explores else {}),
    )


def section(config: Config, env: type[envs.TextEnv]) -> BaseModel:
    """The settings of one environment."""
    found: BaseModel = getattr(config.env, env.name)
    return found


def env_settings(config: Config, env: type[envs.TextEnv], split: str) -> dict[str, Any]:
    """What the episodes of a split depend on of their environment: settings, version and data."""
    settings = section(config, env)
    split = "train" if split in LEARNT else split
    return env.relevant(settings, split) | {"fingerprint": env.fingerprint(settings)}


def open_pool(config: Config, env: type[envs.TextEnv]) -> EnvPool:
    """The workers of an environment, once it has what it needs."""
    workers = config.workers
    settings = section(config, env)
    env.prepare(settings, workers.here)
    return EnvPool(
        env,
        settings,
        workers=workers.processes,
        slots=workers.slots,
        timeout=workers.timeout,
        backend=workers.backend,
    )


def evaluation(arm: Arm, env: str, seed: int, player: Arm | None = None) -> list[Job]:
    """The jobs that evaluate an arm: greedy, one episode a task.

    `bon` plays as many at a temperature as it chooses from.

    Args:
        arm: gives the name, the folder, and what is played and how.
        env: the environment.
        seed: the seed.
        player: the candidate that stands for an arm with `choose`.
    """
    return [_evaluating(arm, env, seed, split, player or arm) for split in arm.config.evaluate.splits]


def on_dev(candidate: Arm, env: str, seed: int) -> Job:
    """The job by which a candidate is compared with the others: on the training tasks that are set aside."""
    return _evaluating(candidate, env, seed, "dev", candidate)


def _evaluating(arm: Arm, env: str, seed: int, split: str, player: Arm) -> Job:
    config = arm.config if split in LEARNT else arm.config.when_evaluated
    several = arm.method == Method.BON
    return Job(
        config=config,
        folder=arm.folder(env, seed, "evaluate") / split,
        env=env,
        seed=seed,
        policy=arm.name,
        checkpoint=player.policy(env, seed),
        made_by=player.made_by(),
        split=split,
        limit=config.evaluate.tasks,
        temperature=config.bon.temperature if several else 0.0,
        samples=config.bon.samples if several else 1,
    )


def baseline(config: Config, env: str, seed: int, name: str) -> list[Job]:
    """The jobs of one of the baselines on the splits of a recipe."""
    folder, limit = runs.seed_folder(config, env, seed) / "evaluate" / name, config.evaluate.tasks
    return [
        Job(config=config, folder=folder / split, env=env, seed=seed, policy=name, split=split, limit=limit)
        for split in config.evaluate.splits
    ]


def run(jobs: Sequence[Job]) -> None:
    """Play what is not played yet.

    Raises:
        ValueError: the checkpoint of a job is not there.
        RuntimeError: the engine process died.
    """
    with contextlib.ExitStack() as stack:
        waiting: dict[str, list[tuple[Job, runs.Stage]]] = defaultdict(list)
        for job in jobs:
            inputs = {job.made_by: job.checkpoint} if job.checkpoint else {}
            if job.only:
                inputs["experts"] = job.only.parent
            work = stack.enter_context(runs.stage(job.folder, settings=settings(job), inputs=inputs))
            if not work.done:
                waiting[_engine_key(job)].append((job, work))
        for together in waiting.values():
            facts = _in_own_process(_play, [job for job, _ in together])
            for job, work in together:
                work.facts.update(facts[job.folder])


def _engine_key(job: Job) -> str:
    """The same for jobs that one engine can play, and for all that need none."""
    if job.checkpoint is None:
        return ""
    shape = (job.checkpoint / "policy" / "config.json").read_text("utf-8")
    return runs.digest([job.config.engine.model_dump(), job.config.model.max_length, shape])


def _pool_key(job: Job) -> str:
    """The same for jobs that can share an environment's workers."""
    settings = section(job.config, envs.load(job.env)).model_dump(mode="json")
    return runs.digest([job.env, settings, job.config.workers.model_dump()])


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, which takes its engine and its workers with it when it ends."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's CPU build tells of its memory binding at every start
    with fresh_processes(1) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "The engine process died; was it out of memory? Lower engine.kv_cache_gib or workers.slots, and run "
                "the same command again: finished episodes are kept."
            ) from None


def _play(jobs: Sequence[Job]) -> dict[Path, dict[str, Any]]:
    """Play jobs that can share an engine, in this process; returns what the manifest of each folder is to say."""
    return asyncio.run(_play_jobs(jobs))


async def _play_jobs(jobs: Sequence[Job]) -> dict[Path, dict[str, Any]]:
    by_pool: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_pool[_pool_key(job)].append(job)
    facts = {}
    with (jobs[0].config.folder / ".playing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a killed run may take a moment to notice that it is alone
        # What an environment misses is said before the engine starts; workers start when they are first asked.
        pools = [(open_pool(group[0].config, envs.load(group[0].env)), group) for group in by_pool.values()]
        with _engine(jobs[0]) as engine:
            dtype = {"engine_dtype": engine.dtype} if engine else {}
            for job in jobs:
                if engine:
                    runs.compute_in(job.folder, engine.dtype)
            for pool, group in pools:
                async with pool:
                    for job in group:
                        facts[job.folder] = await _play_job(job, pool, _players(job, engine)) | dtype
    return facts


@contextlib.contextmanager
def _engine(job: Job) -> Iterator[Engine | None]:
    """The engine that plays a job, and after it others; none where no policy plays."""
    if job.checkpoint is None:
        yield None
        return
    checkpoint = job.checkpoint / "policy"
    with contextlib.closing(
        load_engine(job.config.engine, checkpoint, job.config.model.max_length, _renderer(checkpoint).end_token_ids)
    ) as engine:
        yield engine


def _players(job: Job, engine: Engine | None) -> Callable[[], Player]:
    """What makes a job's players, once the engine serves its policy."""
    if engine is None or job.checkpoint is None:
        return {"random": RandomPlayer, "expert": ExpertPlayer}[job.policy]
    renderer = _renderer(job.checkpoint / "policy")
    engine.load(job.checkpoint / "policy", renderer.end_token_ids)
    return lambda: PolicyPlayer(engine, renderer, job.config.play, job.temperature, job.top_p)


def _renderer(checkpoint: Path) -> "Renderer":
    from transformers import AutoTokenizer

    from pipeline.rendering import Renderer

    return Renderer(AutoTokenizer.from_pretrained(checkpoint))


async def _play_job(job: Job, pool: EnvPool, make_player: Callable[[], Player]) -> dict[str, Any]:
    """Play the episodes of one job that its file does not hold yet."""
    began, config = time.monotonic(), job.config
    path = job.folder / EPISODES
    done, dropped = recover_jsonl(path, Trajectory) if path.is_file() else ([], 0)
    have = {(trajectory.id, trajectory.sample) for trajectory in done}
    tasks = await chosen_tasks(job, pool, pool.env, config.env.dev_tasks)
    episodes = [
        Episode(
            task=task,
            kind=tasks[task],
            split=job.split,
            policy=job.policy,
            seed=job.seed,
            sample=sample,
            prefix=prefix,
        )
        for task, prefixes in _prefixes(job, tasks).items()
        for sample, prefix in enumerate(prefix for prefix in prefixes for _ in range(job.samples))
        if (task, sample) not in have
    ]
    with JsonlAppender(path) as appender:
        await play_episodes(
            pool,
            episodes,
            lambda _: make_player(),
            config.play,
            appender,
            example=config.env.example and job.policy not in BASELINES,
            label=f"{job.env} {job.policy} {job.split}",
        )
    order = {task: position for position, task in enumerate(tasks)}
    trajectories = sorted(read_jsonl(path, Trajectory), key=lambda one: (order[one.id], one.sample))
    if trajectories and all(one.status.is_error for one in trajectories):
        raise RuntimeError(
            f"{job.env}: all {len(trajectories)} episodes of {job.policy} on {job.split} broke the environment, the "
            f"first so: {trajectories[0].note} Mend that, delete {path}, and run the same command again."
        )
    write_jsonl(path, trajectories)
    return summary(trajectories) | {
        "half_written_lines_dropped": dropped,
        "already_played": len(have),
        "seconds": round(time.monotonic() - began, 2),
        "seconds_are_of": f"the last process, which played {len(episodes)} of {len(trajectories)} episodes",
    }


def _prefixes(job: Job, tasks: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """What the episodes of each task begin with."""
    if not (job.from_steps and job.only):
        return {task: [()] for task in tasks}
    replies = {one.id: tuple(turn.text for turn in one.turns) for one in read_jsonl(job.only, Trajectory)}
    return {task: [replies[task][:turns] for turns in range(len(replies[task]))] for task in tasks}


async def chosen_tasks(job: Job, pool: EnvPool, env: type[envs.TextEnv], dev_tasks: int = 0) -> dict[str, str]:
    """The tasks of a job with their kinds, in a fixed order; `dev_tasks` of the training tasks are set aside.

    Raises:
        ValueError: the splits of the environment share a task, or the job's has none.
    """

    async def look(session: Session) -> dict[str, str]:
        tasks = (await tasks_by_split(session, dev_tasks))[job.split]
        return {task: await session.call("kind", task) for task in tasks}

    kinds = await pool.run(look)
    tasks = list(kinds)
    if not tasks:
        raise ValueError(f"{job.env} has no tasks in the split {job.split}; is a part of its data missing?")
    if job.only:
        wanted = {trajectory.id for trajectory in read_jsonl(job.only, Trajectory)}
        tasks = [task for task in tasks if task in wanted]
    limited = _drawn(tasks, job.limit, job.seed) if job.explores else spread(tasks, job.limit, kinds.__getitem__)
    return {task: kinds[task] for task in limited}


async def tasks_by_split(session: Session, dev_tasks: int) -> dict[str, list[str]]:
    """The tasks of train, dev, seen and unseen; `dev_tasks` of the environment's training tasks are dev's.

    Raises:
        ValueError: the splits of the environment share a task.
    """
    splits = {split: await session.call("tasks", split) for split in envs.SPLITS}
    check_disjoint(splits)
    kinds = {task: await session.call("kind", task) for task in splits["train"]} if dev_tasks else {}
    return with_dev(splits, dev_tasks, kinds.__getitem__)


def with_dev(splits: Mapping[str, Sequence[str]], dev_tasks: int, kind: Callable[[str], str]) -> dict[str, list[str]]:
    """The splits of an environment, `dev_tasks` of its training tasks in a split of their own."""
    dev = set(spread(splits["train"], dev_tasks, kind)) if dev_tasks else set()
    parts = {split: [task for task in splits["train"] if (task in dev) == (split == "dev")] for split in LEARNT}
    return parts | {split: list(splits[split]) for split in splits if split not in LEARNT}


def check_disjoint(splits: dict[str, list[str]]) -> None:
    """Refuse splits that share a task.

    Raises:
        ValueError: names the two splits and one shared task.
    """
    owner: dict[str, str] = {}
    for split, tasks in splits.items():
        for task in tasks:
            if owner.setdefault(task, split) != split:
                raise ValueError(
                    f"Task {task} is in both {owner[task]} and {split}; a policy would be tested on it twice."
                )


def _drawn(tasks: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """At most `limit` tasks, drawn by the seed, in the order given."""
    if limit is None or limit >= len(tasks):
        return list(tasks)
    drawn = set(random.Random(seed).sample(tasks, limit))
    return [task for task in tasks if task in drawn]


def spread(tasks: Sequence[str], limit: int | None, kind: Callable[[str], str]) -> list[str]:
    """At most `limit` tasks, taken from every kind in turn, in the order given.

    Which tasks of a kind depends on their ids alone, the same for every seed: neighbours may be played in one world, so
    the first of a kind are not a sample of it. What a smaller `limit` takes is taken by a larger one, too.
    """
    if limit is None or limit >= len(tasks):
        return list(tasks)
    shuffled = sorted(tasks, key=lambda task: hashlib.sha256(task.encode()).digest())
    by_kind: dict[str, list[str]] = defaultdict(list)
    for task in shuffled:
        by_kind[kind(task)].append(task)
    rank = {task: place for group in by_kind.values() for place, task in enumerate(group)}
    kept = set(sorted(shuffled, key=rank.__getitem__)[:limit])
    return [task for task in tasks if task in kept]


def summary(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Counts and times of some episodes, for a manifest.

    `env_seconds`, `engine_seconds` and `queue_seconds` add up what episodes that were played at once waited for, in
    every process that had a part in them; `prefix_cache_hit_rate` is there where an engine played.
    """
    prompt_tokens, cached_tokens = (
        sum(getattr(one, name) for one in trajectories) for name in ("prompt_tokens", "cached_tokens")
    )
    times = ("env_seconds", "engine_seconds", "queue_seconds")
    return {
        "episodes": len(trajectories),
        "statuses": dict(Counter(trajectory.status.value for trajectory in trajectories)),
        "turns": sum(len(trajectory.turns) for trajectory in trajectories),
        "tokens": sum(len(turn.token_ids) for trajectory in trajectories for turn in trajectory.turns),
        **{name: round(sum(getattr(one, name) for one in trajectories), 2) for name in times},
        **({"prefix_cache_hit_rate": round(cached_tokens / prompt_tokens, 4)} if prompt_tokens else {}),
    }
