"""Episodes a second with 64 episodes at once against the official way, and tokens a second against the engine alone.

All on one engine and one policy, in one process tree: the SFT policy of a finished run plays seen tasks greedily,

    official way    one episode after the other, one request at a time, every prompt computed anew
    one by one      the same, but a conversation's past is kept
    at once         so many episodes over the environment's workers
    engine alone    the requests of those episodes again, as many conversations at once, and no environment

    python -m benchmarks.rollout_episodes runs/tiny/sciworld/seed0 [--at-once 64] [--tasks 128] [--json FILE]

The official way and one by one play an eighth of the tasks. Tasks that the split lacks are played again. Told beside
them: the processor time of this process (the engine's, and what drives it) and of the environments' workers; the share
of the engine's own rate that these leave possible on the machine's cores, were driving the episodes free; and how busy
the cores were.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import yaml
from transformers import AutoTokenizer

import envs
from benchmarks.process_tree import below, cpu_seconds
from envs.pool import EnvPool
from pipeline import jobs
from pipeline.config import Config
from pipeline.engines import Completion, Engine, Sampling, load_engine
from pipeline.play import Episode, Player, PolicyPlayer, play_episodes
from pipeline.records import JsonlAppender
from pipeline.rendering import Renderer

_SAMPLES = itertools.count()
"""An episode is a sample of its task that was never played: none finds another one's prefixes cached."""


class Recorder:
    """An engine that remembers what was asked of it; with `anew` each request finds no prefix of its own cached."""

    def __init__(self, engine: Engine, *, anew: bool = False) -> None:
        self.max_length, self.dtype = engine.max_length, engine.dtype
        self.requests: dict[str, list[tuple[Sequence[int], Sampling]]] = defaultdict(list)
        self.tokens = self.prompt_tokens = self.cached = 0
        self._engine, self._anew = engine, anew

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """See `Engine.generate`."""
        self.requests[episode].append((prompt_ids, sampling))
        cache = f"{episode} {len(self.requests[episode])}" if self._anew else episode
        completion = await self._engine.generate(prompt_ids, sampling, cache)
        self.prompt_tokens += len(prompt_ids)
        self.cached += completion.cached_tokens
        self.tokens += len(completion.token_ids)
        return completion

    def load(self, path: Path, end_token_ids: Sequence[int]) -> None:
        """See `Engine.load`."""
        self._engine.load(path, end_token_ids)

    def close(self) -> None:
        """See `Engine.close`; whoever opened the engine closes it."""


async def play(
    config: Config, name: str, player: Callable[[Recorder], Player], recorder: Recorder, tasks: list[str], at_once: int
) -> dict[str, Any]:
    """Play tasks, so many at once."""
    env = envs.load(name)
    workers = min(config.workers.processes, at_once)
    episodes = [
        Episode(task=task, kind="", split="seen", policy="sft", seed=0, sample=next(_SAMPLES)) for task in tasks
    ]
    settings = jobs.section(config, env)
    async with EnvPool(env, settings, workers=workers, slots=math.ceil(at_once / workers)) as pool:
        async with contextlib.AsyncExitStack() as stack:  # start the simulators before the clock
            for _ in range(at_once):
                await stack.enter_async_context(pool.session())
        with tempfile.TemporaryDirectory() as folder, JsonlAppender(Path(folder) / "episodes.jsonl") as appender:
            children = below(os.getpid())
            started, cpu, theirs = time.perf_counter(), time.process_time(), cpu_seconds(children)
            await play_episodes(
                pool, episodes, lambda _: player(recorder), config.play, appender, example=False, label=f"{at_once}"
            )
            seconds, ours = time.perf_counter() - started, time.process_time() - cpu
            theirs = cpu_seconds(children) - theirs
    return {
        "episodes": len(tasks),
        "seconds": seconds,
        "cpu_seconds": ours,
        "worker_cpu_seconds": theirs,
        "tokens": recorder.tokens,
        "cached": recorder.cached / recorder.prompt_tokens,
    }


async def alone(
    engine: Engine, asked: Mapping[str, Sequence[tuple[Sequence[int], Sampling]]], at_once: int
) -> dict[str, Any]:
    """The same requests, each conversation in its order, `at_once` conversations at once, without an environment."""
    gate, recorder = asyncio.Semaphore(at_once), Recorder(engine)

    async def converse(name: str, requests: Sequence[tuple[Sequence[int], Sampling]]) -> None:
        async with gate:
            for prompt_ids, sampling in requests:
                await recorder.generate(prompt_ids, sampling, f"alone/{name}")

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(converse(name, requests) for name, requests in asked.items()))
    return {
        "episodes": len(asked),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "worker_cpu_seconds": 0.0,
        "tokens": recorder.tokens,
        "cached": recorder.cached / recorder.prompt_tokens,
    }


async def measure(folder: Path, count: int, at_once: int) -> dict[str, dict[str, Any]]:
    """What each way took."""
    config = Config.model_validate(yaml.safe_load((folder.parents[1] / "config.yaml").read_text()))
    name, policy = folder.parent.name, folder / "sft" / "policy"
    renderer = Renderer(AutoTokenizer.from_pretrained(policy))
    engine = load_engine(config.engine, policy, config.model.max_length, renderer.end_token_ids)

    def player(recorder: Recorder) -> Player:
        return PolicyPlayer(recorder, renderer, config.play, 0.0, 1.0)

    with contextlib.closing(engine):
        with envs.load(name)(jobs.section(config, envs.load(name))) as one:
            found = jobs.spread(one.tasks("seen"), count, one.kind)
            few = jobs.spread(found, max(2, count // 8), one.kind)
        tasks = list(itertools.islice(itertools.cycle(found), count))
        await play(config, name, player, Recorder(engine), few[:2], 2)  # warm up
        many = Recorder(engine)
        return {
            "official way": await play(config, name, player, Recorder(engine, anew=True), few, 1),
            "one by one": await play(config, name, player, Recorder(engine), few, 1),
            f"{at_once} at once": await play(config, name, player, many, tasks, at_once),
            "engine alone": await alone(engine, many.requests, at_once),
        }


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run's ENV/seedK folder")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = asyncio.run(measure(options.folder, options.tasks, options.at_once))
    titles = f"{'':14}{'episodes':>9}{'seconds':>9}{'episodes/s':>12}{'tokens/s':>10}{'per CPU s':>11}"
    print(f"{titles}{'CPU s':>7}{'workers':>9}{'cached':>8}")
    for way, one in found.items():
        print(
            f"{way:14}{one['episodes']:9}{one['seconds']:9.1f}{one['episodes'] / one['seconds']:12.3f}"
            f"{one['tokens'] / one['seconds']:10.0f}{one['tokens'] / one['cpu_seconds']:11.0f}{one['cpu_seconds']:7.1f}"
            f"{one['worker_cpu_seconds']:9.1f}{one['cached']:8.0%}"
        )
    official, _, many, bare = found.values()
    cores = len(os.sched_getaffinity(0))
    shortest = max(bare["seconds"], (bare["cpu_seconds"] + many["worker_cpu_seconds"]) / cores)
    ratios = {
        "episodes_vs_official_way": _rate(many, "episodes") / _rate(official, "episodes"),
        "tokens_vs_engine_alone": _rate(many, "tokens") / _rate(bare, "tokens"),
        "which_the_cores_allow": bare["seconds"] / shortest,
        "cores_busy": (many["cpu_seconds"] + many["worker_cpu_seconds"]) / (cores * many["seconds"]),
    }
    print("  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    if options.json:
        options.json.write_text(json.dumps({"ways": found, "ratios": ratios}, indent=1) + "\n")


def _rate(found: Mapping[str, Any], what: str) -> float:
    return float(found[what] / found["seconds"])


if __name__ == "__main__":
    main()
