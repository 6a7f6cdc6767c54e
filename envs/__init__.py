"""Text environments in Gymnasium's vocabulary.

    sciworld   ScienceWorld, the unmodified simulator, one server object an environment
    alfworld   ALFWorld on TextWorld's engine, with games of our own or the official ones
    webshop    WebShop without Java, Flask's server or spaCy, with a catalogue of our own or the official files
    pool       worker processes that host environments and are asked from asyncio

An environment is one module or package with one subclass of `TextEnv`; `load` names it.
"""

import importlib
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, TypedDict

import gymnasium
from pydantic import BaseModel

MALFORMED = ""
"""The action that stands for a reply holding no action at all."""

MALFORMED_OBSERVATION = "Your reply holds no action. End it with a line that starts with 'Action:'."
"""What every environment answers to `MALFORMED`."""

SPLITS = ("train", "seen", "unseen")
"""train: the policy learns from them; seen: new tasks of known kinds or rooms; unseen: the hardest shift on offer."""


def comma_list(value: Any) -> Any:
    """`a,b` and a bare number as lists, as the command line writes them; nothing as an empty list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [] if value is None else [value] if type(value) is int else value


class Info(TypedDict):
    """The info dict of `TextEnv.reset` and `TextEnv.step`."""

    reward: float
    """The episode's reward so far, in [0, 1]: the sum of the step rewards."""
    success: bool
    """Whether the task is solved; each environment's docstring says what that means."""
    valid: bool
    """Whether the last action was understood."""


class NoSolutionError(Exception):
    """The environment knows no solution of a task; says why."""


class ExpertStep(NamedTuple):
    """One step of an expert's solution."""

    thought: str
    """Why this action, in a sentence."""
    action: str
    observation: str
    """What the environment answered when the solution was found; a replay may be told something else."""


class TextEnv(gymnasium.Env[str, str]):
    """A text environment: Gymnasium's contract, with a task chosen at `reset`.

    Observations and actions are strings. A step's reward is what it added to the episode's reward, so rewards add up
    to the episode's. `terminated` says that the task is over, `truncated` that its step limit is reached. The empty
    action (`MALFORMED`) costs a step, leaves the world and the reward alone and is answered by `MALFORMED_OBSERVATION`.

    One environment is used by one caller at a time. `close` may be called twice.
    """

    name: ClassVar[str]
    """Name of the environment in ids and on the command line."""
    Settings: ClassVar[type[BaseModel]]
    """The `env.<name>` section of a recipe."""
    completed: ClassVar[str] = ""
    """What it means that an episode is over before its limit, if tables should tell that share beside the success."""

    @abstractmethod
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:  # type: ignore[override]
        """Begin the task whose content id is `options["task"]`; the observation is the task's text.

        Raises:
            ValueError: no such task.
        """

    @abstractmethod
    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:  # type: ignore[override]
        """Take one action; returns observation, reward, terminated, truncated, info."""

    @abstractmethod
    def tasks(self, split: str) -> list[str]:
        """Content ids of a split's tasks (`SPLITS`), in a fixed order."""

    def published(self) -> dict[str, list[str]]:
        """The split lists as published, overlaps and all, where the settings name them and `tasks` is not the same."""
        return {}

    @abstractmethod
    def __init__(self, settings: Any) -> None:
        """An environment with its section of a recipe (an instance of its `Settings`)."""

    @abstractmethod
    def valid_actions(self) -> list[str]:
        """Every action that the environment would understand now, sorted; may be slow."""

    @abstractmethod
    def expert(self, task: str) -> list[ExpertStep]:
        """A solution of the task from the environment's own knowledge.

        Plays the task in this environment, so that thoughts follow from what was observed; the next call must be
        `reset`. A solution is not promised to reach the full reward: whoever keeps it replays it first.

        Raises:
            NoSolutionError: the environment knows no solution; says why.
        """

    @abstractmethod
    def kind(self, task: str) -> str:
        """The kind of a task, which tables are broken down by (`sciworld:boil:3` -> `boil`)."""

    @classmethod
    def prepare(cls, settings: Any, processes: int) -> None:
        """Make what the environment needs on this machine and does not ship; fast when it is there.

        Args:
            settings: the `env.<name>` section.
            processes: how many may work at it side by side.

        Raises:
            ValueError: something is not there and cannot be made here; says how to get it.
        """

    @classmethod
    @abstractmethod
    def instruction(cls, settings: Any) -> str:
        """First message of every episode: the rules, the actions and the reply's form."""

    @classmethod
    @abstractmethod
    def example(cls, settings: Any) -> list[tuple[str, str]]:
        """One worked example as (user, assistant) message pairs, for prompts that carry one."""

    @classmethod
    @abstractmethod
    def fingerprint(cls, settings: Any) -> str:
        """What the episodes depend on besides the task: package version and data, hashed. Fast: starts nothing."""

    @classmethod
    def notes(cls, settings: Any) -> list[str]:
        """What a reader of the report should know of this environment beyond its settings, in sentences."""
        return []

    @classmethod
    def relevant(cls, settings: Any, split: str) -> dict[str, Any]:
        """The settings that the tasks and episodes of a split depend on: all, unless the environment says less."""
        found: dict[str, Any] = settings.model_dump(mode="json")
        return found

    @classmethod
    @abstractmethod
    def official_turn(cls, action: str, observation: str, settings: Any) -> tuple[str, str]:
        """An action published with ETO and the answer to it, as this environment has them.

        Raises:
            ValueError: the action is of another version of the environment's grammar; says which word, and what to do.
        """

    @classmethod
    @abstractmethod
    def official_id(cls, item: dict[str, Any], settings: Any) -> str:
        """The content id of a trajectory published with ETO, from the item's fields (`id`, `game_file`, ...).

        Raises:
            ValueError: the fields name no task of this environment.
        """

    @classmethod
    @abstractmethod
    def official_task(cls, text: str) -> str:
        """A published trajectory's task message as `reset` would write it."""


ENVIRONMENTS = {"alfworld": "AlfWorld", "sciworld": "ScienceWorld", "webshop": "WebShop"}
"""The class of each environment, in the module or package of this folder that has its name."""


def load(name: str) -> type[TextEnv]:
    """The environment class called `name`.

    Raises:
        ValueError: unknown name.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(ENVIRONMENTS)}")
    env: type[TextEnv] = getattr(importlib.import_module(f"envs.{name}"), ENVIRONMENTS[name])
    return env
