"""Stage `experts`: expert trajectories in ReAct form, from the environment's own solutions or from official data.

The environment solves each of its training tasks; the solution is then replayed through the same episode loop that
policies play in, and kept if it reaches `experts.min_reward`, by default the full reward. A replay that reads other
observations than the solution did comes from a simulator that is not deterministic: the trajectory is kept as it was
replayed, and the manifest names it.
"""

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

import envs
from envs.pool import Session
from pipeline import arms, jobs, react, runs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.play import Episode, ExpertPlayer, play_episodes
from pipeline.records import (
    EpisodeStatus,
    JsonlAppender,
    ShareGpt,
    Trajectory,
    Turn,
    read_jsonl,
    recover_jsonl,
    write_jsonl,
)
from pipeline.replay import replayed

REPLAYS = "replays.jsonl"


def main(config: Config) -> None:
    """Write the expert trajectories of each environment and seed; several where arms differ in the environment."""
    places = [(name, seed) for name in config.env.names for seed in config.seed]
    for others in (False, True):  # those of other environments are put together when these have theirs
        for name, seed in places:
            for arm in arms.sharing(config, name, seed, "experts"):
                if arm.config.env.others == others:
                    (_gather if others else _stage)(arm, name, seed)


def _stage(arm: Arm, name: str, seed: int) -> None:
    config, env = arm.config, envs.load(name)
    source = config.experts.source_of(name)
    if source and not source.is_file():
        raise ValueError(
            f"experts.source: {source} is no file; `python -m pipeline fetch {name}-experts` puts ETO's into data/."
        )
    section = jobs.section(config, env)
    settings = runs.settings_of(
        config.experts.model_copy(update={"tasks": config.experts.tasks_of(name)}),
        env=jobs.env_settings(config, env, "train"),
        dev_tasks=config.env.dev_tasks,
        **({"spread": jobs.SPREAD} if config.experts.tasks_of(name) else {}),
    )
    folder = arm.folder(name, seed, "experts")
    inputs = {"experts.source": source} if source else {}
    with runs.stage(folder, settings=settings, inputs=inputs, keep=(REPLAYS,)) as stage:
        if stage.done:
            return
        if source:
            published, translated = read_official(env, section, source, thoughts=config.experts.thoughts)
            trajectories, facts = asyncio.run(keep_training_tasks(config, env, published))
            facts["translated_actions"] = translated
        else:
            trajectories, facts = asyncio.run(solve(config, env, seed, folder / REPLAYS))
        if not trajectories:
            raise ValueError(f"{name}: no expert trajectory reaches experts.min_reward: {facts}.")
        write_jsonl(folder / jobs.EPISODES, trajectories)
        stage.facts.update(facts | jobs.summary(trajectories) | {"notes": env.notes(section)})


def _gather(arm: Arm, name: str, seed: int) -> None:
    """The experts of the run's other environments, one after the other."""
    inputs = {f"experts of {one}": runs.seed_folder(arm.config, one, seed) / "experts" for one in arm.sources(name)}
    with runs.stage(arm.folder(name, seed, "experts"), settings={}, inputs=inputs) as stage:
        if not stage.done:
            trajectories = jobs.trajectories(inputs.values())
            write_jsonl(stage.folder / jobs.EPISODES, trajectories)
            stage.facts.update(jobs.summary(trajectories))


async def solve(
    config: Config, env: type[envs.TextEnv], seed: int, replays: Path
) -> tuple[list[Trajectory], dict[str, Any]]:
    """Replay the environment's solutions of its training tasks.

    Returns:
        The trajectories that are good enough, in the order of the tasks, and what the manifest says of the rest.
    """
    job = jobs.Job(
        config=config,
        folder=replays.parent,
        env=env.name,
        seed=seed,
        policy="expert",
        split="train",
        limit=config.experts.tasks_of(env.name),
    )
    async with jobs.open_pool(config, env) as pool:
        tasks = await jobs.chosen_tasks(job, pool, env, config.env.dev_tasks)
        earlier, half_written = recover_jsonl(replays, Trajectory) if replays.is_file() else ([], 0)
        done = {one.id for one in earlier}
        episodes = [
            Episode(task=task, kind=kind, split="train", policy="expert", seed=seed)
            for task, kind in tasks.items()
            if task not in done
        ]
        with JsonlAppender(replays) as appender:
            await play_episodes(
                pool,
                episodes,
                lambda _: ExpertPlayer(thoughts=config.experts.thoughts),
                config.play,
                appender,
                example=False,
                label=f"{env.name} experts",
            )
    place = {task: position for position, task in enumerate(tasks)}
    played = sorted(read_jsonl(replays, Trajectory), key=lambda one: place[one.id])
    least = config.experts.min_reward
    kept = [one for one in played if one.reward >= least]
    dropped = [one for one in played if one.reward < least]
    reasons = Counter(one.note or f"reward below {least:g} ({one.status})" for one in dropped)
    return kept, {
        "dropped": dict(reasons),
        "dropped_ids": [one.id for one in dropped],
        "replays_that_differ": [one.id for one in kept if one.note],
        "half_written_lines_dropped": half_written,
    }


async def keep_training_tasks(
    config: Config, env: type[envs.TextEnv], published: list[Trajectory]
) -> tuple[list[Trajectory], dict[str, Any]]:
    """Published trajectories of training tasks alone; the published lists overlap with the tasks of the other splits.

    Those that are kept are replayed. Where the environment answers otherwise than it did when they were recorded they
    are kept as they were published, and the manifest names them.

    Returns:
        The trajectories that are kept, and what the manifest says of the rest.
    """

    async def look(session: Session) -> tuple[dict[str, str], dict[str, str]]:
        splits = await jobs.tasks_by_split(session, config.env.dev_tasks)
        split_of = {task: split for split, tasks in splits.items() for task in tasks}
        training = [one.id for one in published if split_of.get(one.id) == "train"]
        return split_of, {task: await session.call("kind", task) for task in training}

    async with jobs.open_pool(config, env) as pool:
        split_of, kind_of = await pool.run(look)
        kept = [one for one in published if one.id in kind_of]
        for one in kept:
            one.kind = kind_of[one.id]
        wanted = set(jobs.spread([*kind_of], config.experts.tasks_of(env.name), kind_of.__getitem__))
        kept, beyond = [one for one in kept if one.id in wanted], len(kind_of) - len(wanted)
        differences = await replayed(pool, kept, published=True)
    others = [one.id for one in published if split_of.get(one.id) != "train"]
    reasons = Counter(f"in the {split_of[one]} split" if one in split_of else "in no split" for one in others)
    reasons["beyond experts.tasks"] = beyond
    return kept, {
        "dropped": dict(+reasons),
        "dropped_ids": others,
        "replays_that_differ": [one.id for one, difference in zip(kept, differences, strict=True) if difference],
    }


def read_official(
    env: type[envs.TextEnv], settings: BaseModel, path: Path, *, thoughts: bool = True
) -> tuple[list[Trajectory], int]:
    """Read expert data as published with ETO: a JSON list of ShareGPT conversations, or the same as JSON lines.

    The instruction is replaced by the environment's own, which is what rollouts carry; ids become content ids.

    Returns:
        The trajectories, and how many actions were translated into the grammar of the environment's settings.

    Raises:
        ValueError: an item that is no conversation of the expected form, or whose actions are not of the environment's
            grammar; names the item.
    """
    found = [
        _official_trajectory(env, settings, item, f"{path}, item {number}", thoughts=thoughts)
        for number, item in enumerate(_items(path), 1)
    ]
    return [one for one, _ in found], sum(translated for _, translated in found)


def _items(path: Path) -> list[ShareGpt]:
    if path.suffix == ".jsonl":
        return read_jsonl(path, ShareGpt)
    try:
        return TypeAdapter(list[ShareGpt]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        number, *field = first["loc"] or ("?",)
        item = f", item {number + 1}" if isinstance(number, int) else ""
        where = f" (field {'.'.join(map(str, field))})" if field else ""
        raise ValueError(f"{path}{item}: not a ShareGPT conversation{where}: {first['msg']}.") from None


def _official_trajectory(
    env: type[envs.TextEnv], settings: BaseModel, item: ShareGpt, where: str, *, thoughts: bool
) -> tuple[Trajectory, int]:
    """One published conversation: instruction, OK, task, then reply and observation in turn; what was translated."""
    speakers = [line.speaker for line in item.conversations]
    if (
        speakers[:3] != ["human", "gpt", "human"]
        or "gpt" not in speakers[3:]
        or any(speaker != ("gpt" if place % 2 else "human") for place, speaker in enumerate(speakers))
    ):
        raise ValueError(
            f"{where}: the speakers must be human and gpt in turn: instruction, OK, task, then replies and answers."
        )
    values = [line.value for line in item.conversations]
    replies, answers = values[3::2], [re.sub(r"^Observation:\s", "", value) for value in values[4::2]]
    answers += [""] * (len(replies) - len(answers))
    reward = 1.0 if item.reward is None else item.reward
    turns = [_official_turn(env, settings, *pair, where) for pair in zip(replies, answers, strict=True)]
    translated = sum(react.action_of(text) != turn.action for text, turn in zip(replies, turns, strict=True))
    for turn in turns if not thoughts else ():
        turn.text = react.reply("", turn.action)
    turns[-1].reward = reward
    messages = react.prompt(env, settings, env.official_task(values[2]), example=False)
    prompt_length = len(messages)
    for turn in turns:
        messages += [react.assistant(turn.text), react.observation(turn.observation)]
    trajectory = Trajectory(
        id=env.official_id(item.model_dump(by_alias=True), settings),
        env=env.name,
        split="train",
        policy="expert",
        seed=0,
        messages=messages[:-1],
        prompt_length=prompt_length,
        turns=turns,
        reward=reward,
        success=reward == 1.0,
        status=EpisodeStatus.COMPLETED,
    )
    return trajectory, translated


def _official_turn(env: type[envs.TextEnv], settings: BaseModel, text: str, answer: str, where: str) -> Turn:
    action = react.action_of(text)
    if action == envs.MALFORMED:
        raise ValueError(f"{where}: a reply without an `Action:` line: {json.dumps(text[:80])}.")
    try:
        command, answer = env.official_turn(action, answer, settings)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}. The data are of another version of the environment's grammar, and a policy trained on "
            "them would score 0."
        ) from None
    if command != action:
        before, mark, after = text.partition("Action:")
        text = before + mark + after.replace(action, command, 1)
    return Turn(text=text, action=command, observation=answer, reward=0.0, valid=True)
