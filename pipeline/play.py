"""Episodes: many at once, each on its own way, over a pool of environment workers.

Who plays is a `Player`: a policy behind an engine, an expert who replays a solution, or chance. An episode waits for
its player and its environment only, never for another episode.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

import envs
from envs import ExpertStep, NoSolutionError
from envs.pool import EnvironmentFailure, EnvironmentTimeout, EnvPool, Session
from pipeline import react
from pipeline.config import PlayConfig
from pipeline.engines import Engine, Sampling
from pipeline.records import EpisodeStatus, JsonlAppender, Message, Trajectory, Turn

if TYPE_CHECKING:  # at run time it brings transformers with it, and a stage that has nothing to do must be quick
    from pipeline.rendering import Renderer


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """What is to be played."""

    task: str
    """Content id."""
    kind: str
    """The kind of the task."""
    split: str
    policy: str
    """Name of who plays, for the record."""
    seed: int
    sample: int = 0
    """Number of the attempt at this task."""
    prefix: tuple[str, ...] = ()
    """Replies that the policy does not give itself: the episode begins with them."""

    def draw(self, *what: object) -> int:
        """A seed for one random choice of this episode: the same whenever and beside whatever it is played."""
        text = f"{self.seed} {self.task} {self.sample} {what}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One reply of a player."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    engine_seconds: float = 0.0
    """How long the engine took for it, if one was asked."""
    prompt_tokens: int = 0
    """How many tokens the engine was given."""
    cached_tokens: int = 0
    """How many of them it took from its prefix cache."""


class Player(Protocol):
    """Plays one episode."""

    @property
    def note(self) -> str | None:
        """What the record should say of the episode, if anything."""

    async def prepare(self, episode: Episode, env: Session) -> None:
        """Hear what is to be played and in which environment, before that is reset."""

    def begin(self, prompt: list[Message]) -> None:
        """Hear what the episode begins with."""

    async def reply(self) -> Reply | EpisodeStatus:
        """The next reply, or why there is none."""

    def observe(self, message: Message) -> None:
        """Hear what the environment answered."""


class PolicyPlayer:
    """A policy behind an engine. Its token ids only ever grow, so the engine's prefix cache serves every turn.

    The replies that an episode begins with are part of its prompt.
    """

    note = None

    def __init__(
        self, engine: Engine, renderer: "Renderer", play: PlayConfig, temperature: float, top_p: float
    ) -> None:
        self._engine, self._renderer, self._play = engine, renderer, play
        self._temperature, self._top_p = temperature, top_p

    async def prepare(self, episode: Episode, env: Session) -> None:
        """See `Player`."""
        self._episode = episode
        self._name = f"{episode.split}/{episode.task}/{episode.sample}"

    def begin(self, prompt: list[Message]) -> None:
        """See `Player`."""
        self._messages = list(prompt)
        self._ids = [] if self._episode.prefix else self._renderer.prompt_ids(prompt)
        self._turn = 0

    async def reply(self) -> Reply | EpisodeStatus:
        """See `Player`. The context is full when a reply of full length would not fit."""
        if self._turn < len(self._episode.prefix):
            text = self._episode.prefix[self._turn]
            self._turn += 1
            self._messages.append(react.assistant(text))
            return Reply(text=text)
        if len(self._ids) + self._play.max_tokens > self._engine.max_length:
            return EpisodeStatus.CONTEXT_FULL
        sampling = Sampling(
            max_tokens=self._play.max_tokens,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=self._episode.draw("reply", self._turn),
        )
        asked = time.perf_counter()
        completion = await self._engine.generate(self._ids, sampling, self._name)
        seconds, prompt_tokens = time.perf_counter() - asked, len(self._ids)
        text = self._renderer.reply_text(completion.token_ids)
        self._turn += 1
        self._ids = [*self._ids, *completion.token_ids]
        self._messages.append(react.assistant(text))
        return Reply(
            text=text,
            token_ids=completion.token_ids,
            engine_seconds=seconds,
            prompt_tokens=prompt_tokens,
            cached_tokens=completion.cached_tokens,
        )

    def observe(self, message: Message) -> None:
        """See `Player`."""
        self._messages.append(message)
        if self._turn < len(self._episode.prefix):
            return
        if not self._ids:  # the prefix ends here
            self._ids = self._renderer.prompt_ids(self._messages)
        else:
            self._ids = [*self._ids, *self._renderer.observation_ids(self._messages, self._ids)]


class ExpertPlayer:
    """Replays the environment's own solution of a task, and notes where it is told something else than before."""

    def __init__(self, *, thoughts: bool = True) -> None:
        self._thoughts = thoughts
        self.note: str | None = None

    async def prepare(self, episode: Episode, env: Session) -> None:
        """See `Player`."""
        self._solution: list[ExpertStep] = await env.call("expert", episode.task)

    def begin(self, prompt: list[Message]) -> None:
        """See `Player`."""
        self._played = 0

    async def reply(self) -> Reply | EpisodeStatus:
        """See `Player`. A solution that is used up before the task is over has failed."""
        if self._played == len(self._solution):
            self.note = "the solution ended before the task did"
            return EpisodeStatus.MAX_STEPS
        step = self._solution[self._played]
        return Reply(text=react.reply(step.thought if self._thoughts else "", step.action))

    def observe(self, message: Message) -> None:
        """See `Player`."""
        if self.note is None and message != react.observation(self._solution[self._played].observation):
            self.note = f"replay differs after turn {self._played}"
        self._played += 1


class RandomPlayer:
    """Draws uniformly from the actions that the environment would understand."""

    note = None

    async def prepare(self, episode: Episode, env: Session) -> None:
        """See `Player`."""
        self._env = env
        self._random = random.Random(episode.draw("random"))

    def begin(self, prompt: list[Message]) -> None:
        """See `Player`."""

    async def reply(self) -> Reply | EpisodeStatus:
        """See `Player`."""
        return Reply(text=react.reply("", self._random.choice(await self._env.call("valid_actions"))))

    def observe(self, message: Message) -> None:
        """See `Player`."""


async def play_episode(
    pool: EnvPool, env: Session, player: Player, episode: Episode, play: PlayConfig, *, example: bool
) -> Trajectory:
    """Play one episode to its end, in a session of the pool.

    Raises:
        EnvironmentFailure: the environment broke or gave no answer.
    """
    await player.prepare(episode, env)
    task, info = await env.reset(episode.task)
    messages = react.prompt(pool.env, pool.settings, task, example=example)
    prompt_length = len(messages)
    player.begin(messages)
    turns: list[Turn] = []
    replies: list[Reply] = []
    status = None
    malformed = invalid = 0
    while status is None:
        reply = await player.reply()
        if isinstance(reply, EpisodeStatus):
            status = reply
            continue
        replies.append(reply)
        action = react.action_of(reply.text)
        malformed = malformed + 1 if action == envs.MALFORMED else 0
        answer, _, terminated, truncated, info = await env.step(action)
        invalid = 0 if info["valid"] else invalid + 1
        if turns:
            messages.append(react.observation(turns[-1].observation))
        messages.append(react.assistant(reply.text))
        turns.append(
            Turn(
                text=reply.text,
                action=action,
                observation=answer,
                reward=info["reward"],
                valid=info["valid"],
                token_ids=reply.token_ids,
            )
        )
        player.observe(react.observation(answer))
        if terminated:
            status = EpisodeStatus.COMPLETED
        elif truncated:
            status = EpisodeStatus.MAX_STEPS
        elif play.max_malformed is not None and malformed >= play.max_malformed:
            status = EpisodeStatus.PARSE_ERROR
        elif play.max_invalid is not None and invalid >= play.max_invalid:
            status = EpisodeStatus.STUCK
    return Trajectory(
        id=episode.task,
        env=pool.env.name,
        split=episode.split,
        kind=episode.kind,
        policy=episode.policy,
        seed=episode.seed,
        sample=episode.sample,
        begun_with=len(episode.prefix),
        messages=messages,
        prompt_length=prompt_length,
        turns=turns,
        reward=info["reward"],
        success=info["success"],
        status=status,
        env_seconds=round(env.seconds, 6),
        engine_seconds=round(sum(reply.engine_seconds for reply in replies), 6),
        queue_seconds=round(env.waited, 6),
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        cached_tokens=sum(reply.cached_tokens for reply in replies),
        note=player.note,
    )


async def play_episodes(
    pool: EnvPool,
    episodes: Sequence[Episode],
    make_player: Callable[[Episode], Player],
    play: PlayConfig,
    appender: JsonlAppender,
    *,
    example: bool,
    label: str,
) -> None:
    """Play many episodes and append each to the file as it ends.

    An episode whose machine is lost under it is played again from its start. One whose environment breaks is, too, on a
    worker of its own; if that breaks again, it is recorded as an error with reward 0, so that it is counted and not
    lost. So is one whose expert knows no solution, as an episode that came to nothing. Whatever else goes wrong in one
    episode (a full disk, a dead engine) ends all of them and is raised as it is.
    """
    bar = tqdm(total=len(episodes), desc=label, unit="episode", disable=None)

    async def attempt(episode: Episode, *, alone: bool = False) -> Trajectory:
        return await pool.run(
            lambda env: play_episode(pool, env, make_player(episode), episode, play, example=example), alone=alone
        )

    async def play_one(episode: Episode) -> None:
        try:
            try:
                trajectory = await attempt(episode)
            except EnvironmentFailure:
                trajectory = await attempt(episode, alone=True)
        except EnvironmentTimeout as error:
            trajectory = _unplayed(pool.env, episode, EpisodeStatus.TIMEOUT, str(error))
        except EnvironmentFailure as error:
            trajectory = _unplayed(pool.env, episode, EpisodeStatus.ENV_ERROR, str(error))
        except NoSolutionError as error:
            trajectory = _unplayed(pool.env, episode, EpisodeStatus.MAX_STEPS, str(error))
        appender.append(trajectory)
        bar.update()

    try:
        async with asyncio.TaskGroup() as group:
            for episode in episodes:
                group.create_task(play_one(episode))
    except* Exception as errors:
        raise errors.exceptions[0] from None
    bar.close()


def _unplayed(env_class: type[envs.TextEnv], episode: Episode, status: EpisodeStatus, note: str) -> Trajectory:
    """The record of an episode without a turn."""
    return Trajectory(
        id=episode.task,
        env=env_class.name,
        split=episode.split,
        kind=episode.kind,
        policy=episode.policy,
        seed=episode.seed,
        sample=episode.sample,
        begun_with=len(episode.prefix),
        messages=[],
        prompt_length=0,
        turns=[],
        reward=0.0,
        success=False,
        status=status,
        note=note,
    )
