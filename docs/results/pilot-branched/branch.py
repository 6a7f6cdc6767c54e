"""Pairs that share their beginning: what follows the first impossible step of a sample that failed.

    python docs/results/pilot-branched/branch.py docs/results/pilot-branched/config.yaml

takes the SFT policy and the exploration of a run (ALFWorld, seed 0), goes on five times from the first impossible step
of one failed sample a game, and writes as the run's stage `pairs` each continuation that won against one that did not.
`reference`, `train` and `evaluate` are then as ever.
"""

import asyncio
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

import envs
from pipeline import jobs, pairing, pairs, react, recipe, runs
from pipeline.config import Config
from pipeline.engines import load_engine
from pipeline.play import Episode, PolicyPlayer, play_episodes
from pipeline.records import JsonlAppender, Pair, Trajectory, read_jsonl, recover_jsonl, write_jsonl
from pipeline.rendering import Renderer

ENV, SEED, SAMPLES, TEMPERATURE, LATEST = "alfworld", 0, 5, 0.7, 25


def beginnings(explored: Iterable[Trajectory]) -> dict[str, tuple[str, ...]]:
    """Of each game the replies of its first failed sample up to and with an impossible step among its first 25."""
    found: dict[str, tuple[str, ...]] = {}
    for one in sorted(explored, key=lambda one: (one.id, one.sample)):
        step = next((place for place, turn in enumerate(one.turns) if not turn.valid), LATEST)
        if not one.success and step < LATEST:
            found.setdefault(one.id, tuple(turn.text for turn in one.turns[: step + 1]))
    return found


async def go_on(config: Config, checkpoint: Path, begun: dict[str, tuple[str, ...]], path: Path) -> None:
    """Play what `path` does not hold yet."""
    played = recover_jsonl(path, Trajectory)[0] if path.is_file() else []
    have = {(one.id, one.sample) for one in played}
    episodes = [
        Episode(task=task, kind="", split="train", policy="sft", seed=SEED, sample=sample, prefix=prefix)
        for task, prefix in begun.items()
        for sample in range(SAMPLES)
        if (task, sample) not in have
    ]
    renderer = Renderer(AutoTokenizer.from_pretrained(checkpoint))
    served = load_engine(config.engine, checkpoint, config.model.max_length, renderer.end_token_ids)
    with closing(served) as engine, JsonlAppender(path) as appender:
        async with jobs.open_pool(config, envs.load(ENV)) as pool:
            await play_episodes(
                pool,
                episodes,
                lambda _: PolicyPlayer(engine, renderer, config.play, TEMPERATURE, 1.0),
                config.play,
                appender,
                example=False,
                label="going on",
            )


def pair(won: Trajectory, lost: Trajectory) -> Pair:
    """What follows the shared turns, which are part of the prompt."""
    shared = won.begun_with
    return replace(
        pairing.pair(won, lost),
        prompt=[*react.zero_shot(won.prompt), *won.completion[: 2 * shared]],
        chosen=won.completion[2 * shared :],
        rejected=lost.completion[2 * shared :],
        chosen_token_ids=[turn.token_ids for turn in won.turns[shared:]],
        rejected_token_ids=[turn.token_ids for turn in lost.turns[shared:]],
        chosen_turns=len(won.turns) - shared,
        rejected_turns=len(lost.turns) - shared,
    )


def build(played: Iterable[Trajectory]) -> tuple[list[Pair], Counter[str]]:
    """Of each game as many pairs as both sides have; the shortest losers first."""
    by_game: dict[str, list[Trajectory]] = defaultdict(list)
    made, dropped = [], Counter[str]()
    for one in sorted(played, key=lambda one: (one.id, one.sample)):
        if one.status.is_error or len(one.turns) <= one.begun_with:
            dropped["nothing was played"] += 1
        else:
            by_game[one.id].append(one)
    for samples in by_game.values():
        won = [one for one in samples if one.success]
        lost = sorted((one for one in samples if not one.success), key=lambda one: len(one.turns))
        made += [pair(*both) for both in zip(won, lost, strict=False)]
        dropped["all alike, or beyond the other side's number"] += len(samples) - 2 * min(len(won), len(lost))
    return made, dropped


if __name__ == "__main__":
    config = recipe.load(sys.argv[1], sys.argv[2:])
    base = runs.seed_folder(config, ENV, SEED)
    path = config.folder / "going-on.jsonl"
    begun = beginnings(read_jsonl(base / "rollout" / jobs.EPISODES, Trajectory))
    asyncio.run(go_on(config, base / "sft" / "policy", begun, path))
    with runs.stage(base / "pairs", settings={"made by": "branch.py"}, inputs={"rollout": base / "rollout"}) as stage:
        made, dropped = build(read_jsonl(path, Trajectory))
        write_jsonl(stage.folder / pairs.PAIRS, made)
        stage.facts.update(pairing.facts(made, dropped))
