"""Episodes a second with 16 episodes at once against one at a time, and tokens a second against the engine alone.

All on one engine and one policy, in one process tree: the SFT policy of a finished run plays seen tasks greedily,

    one by one      one episode after the other
    at once         16 episodes over two environment workers
    engine alone    the requests of those episodes again, 16 conversations at once, and no environment

    python -m benchmarks.rollout_episodes runs/tiny/sciworld/seed0 [--tasks 32] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import yaml
from transformers import AutoTokenizer

import envs
from envs.pool import EnvPool
from pipeline import jobs
from pipeline.config import Config
from pipeline.engines import Completion, Engine, Sampling, load_engine
from pipeline.play import Episode, PolicyPlayer, play_episodes
from pipeline.records import JsonlAppender
from pipeline.rendering import Renderer

AT_ONCE = 16


class Recorder:
    """An engine that remembers what was asked of it."""

    def __init__(self, engine: Engine) -> None:
        self.max_length = engine.max_length
        self.requests: dict[str, list[tuple[Sequence[int], Sampling]]] = defaultdict(list)
        self.tokens = 0
        self._engine = engine

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """See `Engine.generate`."""
        self.requests[episode].append((prompt_ids, sampling))
        completion = await self._engine.generate(prompt_ids, sampling, episode)
        self.tokens += len(completion.token_ids)
        return completion

    def close(self) -> None:
        """See `Engine.close`."""


async def play(config: Config, engine: Engine, renderer: Renderer, tasks: list[str], sample: int, at_once: int) -> dict:
    """Play tasks; `sample` keeps the prefix caches of two measurements apart."""
    env = envs.load("sciworld")
    recorder = Recorder(engine)
    workers = min(2, at_once)
    episodes = [Episode(task=task, kind="", split="seen", policy="sft", seed=0, sample=sample) for task in tasks]
    async with EnvPool(env, config.env.sciworld, workers=workers, slots=at_once // workers) as pool:
        async with contextlib.AsyncExitStack() as stack:  # start the simulators before the clock
            for _ in range(at_once):
                await stack.enter_async_context(pool.session())
        with tempfile.TemporaryDirectory() as folder, JsonlAppender(Path(folder) / "episodes.jsonl") as appender:
            started = time.perf_counter()
            await play_episodes(
                pool, episodes, lambda _: PolicyPlayer(recorder, renderer, config.play, 0.0, 1.0), config.play,
                appender, example=False, label=f"{at_once} at once",
            )  # fmt: skip
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": recorder.tokens, "requests": recorder.requests}


async def alone(engine: Engine, requests: dict[str, list[tuple[Sequence[int], Sampling]]]) -> dict:
    """The same requests, each conversation in its order, `AT_ONCE` conversations at once, without an environment."""
    gate = asyncio.Semaphore(AT_ONCE)
    tokens = 0

    async def converse(name: str, asked: list[tuple[Sequence[int], Sampling]]) -> None:
        nonlocal tokens
        async with gate:
            for prompt_ids, sampling in asked:
                completion = await engine.generate(prompt_ids, sampling, f"alone/{name}")
                tokens += len(completion.token_ids)

    started = time.perf_counter()
    await asyncio.gather(*(converse(name, asked) for name, asked in requests.items()))
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


async def measure(folder: Path, count: int) -> list[dict]:
    """Rows of the table."""
    config = Config.model_validate(yaml.safe_load((folder.parents[1] / "config.yaml").read_text()))
    policy = folder / "sft" / "policy"
    renderer = Renderer(AutoTokenizer.from_pretrained(policy))
    engine = load_engine(config.engine, policy, config.model.max_length, renderer.end_token_ids)
    env = envs.load("sciworld")
    with contextlib.closing(engine):
        with env(config.env.sciworld) as one:
            tasks = jobs.spread(one.tasks("seen"), count, env.kind)
        await play(config, engine, renderer, tasks[:2], 9, 2)  # warm up
        single = await play(config, engine, renderer, tasks, 1, 1)
        many = await play(config, engine, renderer, tasks, 2, AT_ONCE)
        bare = await alone(engine, many["requests"])
    return [
        {
            "way": way,
            "episodes": len(tasks),
            "seconds": round(found["seconds"], 2),
            "episodes_per_second": round(len(tasks) / found["seconds"], 3),
            "tokens_per_second": round(found["tokens"] / found["seconds"], 1),
        }
        for way, found in (("one by one", single), (f"{AT_ONCE} at once", many), ("engine alone", bare))
    ]


def main() -> None:
    """Print the table and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run's ENV/seedK folder")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.folder, options.tasks))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    ratios = {
        "at_once_vs_one_by_one": round(rows[1]["episodes_per_second"] / rows[0]["episodes_per_second"], 2),
        "tokens_vs_engine_alone": round(rows[1]["tokens_per_second"] / rows[2]["tokens_per_second"], 2),
    }
    print(ratios)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
