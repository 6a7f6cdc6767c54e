"""ScienceWorld: elementary-school science experiments in a house of ten rooms, played by text commands.

Wang et al. 2022, https://arxiv.org/abs/2203.07540. `simulator` runs the real, unmodified simulator and says what it
leaves to chance; `expert` makes its solutions ones that an agent can follow; here is the environment on top.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from envs import MALFORMED_OBSERVATION, SPLITS, ExpertStep, Info, NoSolutionError, TextEnv, comma_list
from envs.sciworld.expert import as_shown, plans, think
from envs.sciworld.simulator import JVM_MB, SIMPLIFICATIONS, WORLD_MB, Jvm, Server, jar_hash
from envs.sciworld.splits import digest, leak_free, published

STEP_LIMITS = {
    "boil": 100,
    "change-the-state-of-matter-of": 80,
    "chemistry-mix": 60,
    "chemistry-mix-paint-secondary-color": 15,
    "chemistry-mix-paint-tertiary-color": 30,
    "find-animal": 15,
    "find-living-thing": 15,
    "find-non-living-thing": 15,
    "find-plant": 15,
    "freeze": 80,
    "grow-fruit": 60,
    "grow-plant": 30,
    "identify-life-stages-1": 30,
    "identify-life-stages-2": 30,
    "lifespan-longest-lived": 10,
    "lifespan-longest-lived-then-shortest-lived": 12,
    "lifespan-shortest-lived": 10,
    "measure-melting-point-known-substance": 120,
    "melt": 80,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 30,
    "test-conductivity": 30,
    "test-conductivity-of-unknown-substances": 30,
    "use-thermometer": 30,
}
"""The 24 tasks in use and their step limits, as the official repositories of ETO and DMPO have them."""

TASKS = tuple(STEP_LIMITS)

OFFICIAL_TASKS = (
    "boil",
    "change-the-state-of-matter-of",
    "freeze",
    "melt",
    "measure-melting-point-known-substance",
    "",
    "use-thermometer",
    "power-component",
    "power-component-renewable-vs-nonrenewable-energy",
    "test-conductivity",
    "test-conductivity-of-unknown-substances",
    "find-animal",
    "find-living-thing",
    "find-non-living-thing",
    "find-plant",
    "grow-fruit",
    "grow-plant",
    "chemistry-mix",
    "chemistry-mix-paint-secondary-color",
    "chemistry-mix-paint-tertiary-color",
    "lifespan-longest-lived",
    "lifespan-longest-lived-then-shortest-lived",
    "lifespan-shortest-lived",
    "identify-life-stages-1",
    "identify-life-stages-2",
)
"""The tasks by their numbers in ETO's data (eval_agent/data/sciworld/taskname2id.json); empty: not in use."""

NOT_UNDERSTOOD = ("No known action matches", "Unknown action. ")
"""How the answer begins to an action, or to a choice among ambiguous ones, that was not understood."""

VERBS = {
    *("activate", "close", "connect", "consume", "deactivate", "disconnect", "drop", "dunk", "eat", "examine", "flush"),
    *("focus", "get", "go", "help", "inventory", "look", "mix", "move", "objects", "open", "pick", "pour", "put"),
    *("read", "reset", "stir", "take", "task", "teleport", "turn", "use", "wait", "wait1", "walk"),
}
"""First words of the actions in the simulator's grammar."""

INSTRUCTION = """\
You do science experiments in a house by text commands. Answer every message with a thought and one command:
Thought: why you act
Action: the command

Commands (OBJ: an object, LOC: a room): teleport to LOC, look around, look at OBJ, look in OBJ, examine OBJ, \
inventory, task, open OBJ, close OBJ, pick up OBJ, drop OBJ, move OBJ to OBJ, pour OBJ into OBJ, dunk OBJ into OBJ, \
mix OBJ, focus on OBJ, activate OBJ, deactivate OBJ, use OBJ on OBJ, read OBJ, eat OBJ, flush OBJ, wait (10 steps), \
wait1 (1 step); with electricity also connect OBJ to OBJ, disconnect OBJ.
Rooms: kitchen, foundry, workshop, bathroom, outside, living room, bedroom, greenhouse, art studio, hallway.
Doors are open. Focus only on what the task names: a wrong focus ends the experiment. To an ambiguous request, the \
command is the number you choose."""

EXAMPLE_TASK = "sciworld:find-living-thing:140"
"""What `EXAMPLE` solves; it is in no split."""

EXAMPLE = [
    (
        "Your task is to find a(n) living thing. First, focus on the thing. Then, move it to the blue box in the "
        "bedroom.",
        "Thought: To find a living thing, I should start outside.\nAction: teleport to outside",
    ),
    (
        "Observation: You teleport to the outside.",
        "Thought: This is the outside; I see what it holds.\nAction: look around",
    ),
    (
        "Observation: This outside location is called the outside. Here you see: \n\tthe agent\n"
        "\ta substance called air\n\tan axe\n\ta dove egg\n\ta fire pit (containing nothing)\n"
        "\ta fountain (containing a substance called water)\n\ta giant tortoise egg\n\tthe ground\n"
        "\ta butterfly egg\n\ta substance called wood\nYou also see:\n\tA door to the foundry (that is open)\n"
        "\tA door to the greenhouse (that is open)\n\tA door to the kitchen (that is open)",
        "Thought: I see the dove, which is a living thing, so I focus on it.\nAction: focus on dove",
    ),
    (
        "Observation: You focus on the dove egg.",
        "Thought: I need the dove for my task, so I pick it up.\nAction: pick up dove",
    ),
    (
        "Observation: You move the dove to the inventory.",
        "Thought: I have the dove. Now I take it to the bedroom.\nAction: teleport to bedroom",
    ),
    (
        "Observation: You teleport to the bedroom.",
        "Thought: The task wants a living thing in the blue box, so I move it there.\n"
        "Action: move egg dove egg in inventory to blue box",
    ),
]


class Settings(BaseModel):
    """The `env.sciworld` section of a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    tasks: Annotated[list[str], BeforeValidator(comma_list), Field(min_length=1)] = list(TASKS)
    """Names of the tasks to play."""
    train_variations: int = Field(default=120, ge=1)
    """Most variations of a task in the train split, evenly spaced: neighbours are alike."""
    eval_variations: int = Field(default=10, ge=1)
    """Most variations of a task in the seen split, and in the unseen split, evenly spaced."""
    splits: Path | None = None
    """Folder with train_indices.json, dev_indices.json and test_indices.json as published with ETO: their tasks are
    played, seen from dev and unseen from test, and train loses what is tested. Empty: the simulator's own splits."""
    simplification: str = "easy"
    """The simulator's simplifications, comma-separated; `easy` stands for teleporting, open doors, self-watering flower
    pots and, in tasks without electricity, no electrical actions."""
    heap_mb: int = Field(default=1024, ge=128)
    """Most memory, in MB, for the objects of the JVM that all environments of a process share: room for 48 of them. It
    uses what it needs, some 20 MB more for each (310 MB resident with 8 of them, 830 with 32)."""

    def check_heap(self, environments: int) -> None:
        """Refuse a heap that does not hold the worlds of so many environments in a process.

        Raises:
            ValueError: it does not; says what would.
        """
        if self.heap_mb < (needed := JVM_MB + WORLD_MB * environments):
            raise ValueError(
                f"env.sciworld.heap_mb={self.heap_mb} is too little for {environments} environments in a process; set "
                f"it to {needed} or more"
            )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ValueError(f"unknown ScienceWorld task {unknown[0]!r}; known: {', '.join(TASKS)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError("a ScienceWorld task is named twice")
        return tasks

    @field_validator("simplification")
    @classmethod
    def _possible(cls, simplification: str) -> str:
        parts = simplification.split(",") if simplification not in ("", "easy") else []
        if unknown := [part for part in parts if part not in SIMPLIFICATIONS]:
            known = f"easy, or a list of {', '.join(SIMPLIFICATIONS)}"
            raise ValueError(f"unknown ScienceWorld simplification {unknown[0]!r}; known: {known}")
        return simplification


def _evenly(tasks: list[str], most: int) -> list[str]:
    """At most so many of them, as far apart as can be."""
    return [tasks[place * len(tasks) // most] for place in range(most)] if most < len(tasks) else tasks


def _of_kind(lists: dict[str, list[str]], task: str) -> dict[str, list[str]]:
    return {name: [one for one in tasks if one.split(":")[1] == task] for name, tasks in lists.items()}


_Settings = Settings  # by this name where a class has an attribute `Settings`


class ScienceWorld(TextEnv):
    """ScienceWorld, 24 of its 30 tasks.

    ## Description
    A house with ten rooms, about 200 kinds of objects, and heat, electricity, chemistry, plants and animals that behave
    as an elementary-school book says. A task (`sciworld:boil:3`) is a kind of experiment and a variation of it, which
    changes the substance, the objects' places and the room to start in. Left out, as in the official split: the tasks
    with inclined planes, with Mendelian genetics, and `measure-melting-point-unknown-substance`.

    ## Actions
    The simulator's commands, see `instruction`. An ambiguous command is answered by a numbered list, and the next
    action should be a number of it.

    ## Observations
    The simulator's text, unchanged. The first one is the task's text and nothing else, as in the official wrapper.

    ## Rewards
    The episode's reward is the best score so far, which the simulator gives for the task's steps; 1 is the task done.
    A score below 0 counts as 0.

    ## Episode end
    Terminated when the simulator says so: the task is done (`success`), or it is lost by focusing on the wrong thing.
    Truncated at the task's step limit (`STEP_LIMITS`).

    ## Info
    `reward`, `success` (score 1 was reached), `valid` (the action was understood, even if it had no effect; a request
    that was ambiguous was understood).

    ## Arguments
    `settings`: see `Settings`. `reset(seed=...)` decides what animals and pollen do, not the task; None is seed 0.

    ## Version history
    1: scienceworld 1.2.3, ordered sets and seeded steps (see the module).
    """

    name = "sciworld"
    Settings = Settings

    def __init__(self, settings: _Settings | None = None) -> None:
        self._settings = settings or _Settings()
        self._jvm: Jvm | None = Jvm.acquire(self._settings.heap_mb)
        try:
            self._server = Server(self._jvm)
        except BaseException:
            self.close()
            raise
        self._splits: dict[str, list[str]] = {}
        self._task = ""
        self._limit = self._steps = 0
        self._reward = 0.0
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:  # type: ignore[override]
        """Begin the task whose content id is `options["task"]`; the observation is the task's text.

        Raises:
            ValueError: no such task.
        """
        name, variation = self._parse((options or {}).get("task", ""))
        self._server.load(name, variation, self._settings.simplification, seed=seed or 0)
        self._limit, self._steps, self._reward, self._over = STEP_LIMITS[name], 0, 0.0, False
        return self._server.description(), self._info(valid=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:  # type: ignore[override]
        """Take one action; returns observation, reward, terminated, truncated, info."""
        if self._over:
            raise ValueError("The episode is over: call reset before the next step.")
        self._steps += 1
        observation, score, terminated, valid = MALFORMED_OBSERVATION, 0.0, False, False
        if action.strip():
            observation, score, terminated = self._server.step(action.strip(), self._steps)
            valid = not observation.startswith(NOT_UNDERSTOOD)
        before = self._reward
        self._reward = max(before, round(score, 2))
        terminated = terminated or score < 0
        truncated = not terminated and self._steps >= self._limit
        self._over = terminated or truncated
        return observation, self._reward - before, terminated, truncated, self._info(valid=valid)

    def tasks(self, split: str) -> list[str]:
        """Content ids of a split's tasks, kind by kind: of the simulator's train, dev or test variations.

        They are evenly spaced: thirty variations of find-animal in a row have the same three animals, so that the first
        of a split would all be played in one world.
        Of the published lists, where the settings name them.

        Raises:
            ValueError: no such split, or the published lists are not what they should be.
        """
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; known: {', '.join(SPLITS)}.")
        if not self._splits:
            self._splits = {name: [] for name in SPLITS}
            lists = leak_free(self.published()) if self._settings.splits else None
            for task in self._settings.tasks:
                for name, found in (_of_kind(lists, task) if lists else self._variations(task)).items():
                    most = self._settings.train_variations if name == "train" else self._settings.eval_variations
                    self._splits[name] += _evenly([one for one in found if one != EXAMPLE_TASK], most)
        return list(self._splits[split])

    def published(self) -> dict[str, list[str]]:
        """ETO's lists as the files of `Settings.splits` have them."""
        return published(self._settings.splits, TASKS) if self._settings.splits else {}

    def _variations(self, task: str) -> dict[str, list[str]]:
        """The simulator's own splits of a task."""
        splits = self._server.variations(task).items()
        return {name: [f"{self.name}:{task}:{number}" for number in numbers] for name, numbers in splits}

    def valid_actions(self) -> list[str]:
        """Every action that the simulator lists as valid now and lets one do, sorted, without `reset task`.

        While a request is ambiguous these are its numbers. The list has each object under one of its names, while the
        simulator understands them all. Takes 50 to 150 ms.
        """
        return sorted(set(self._server.valid_actions()) - {"reset task"})

    def expert(self, task: str) -> list[ExpertStep]:
        """A solution of the task: the simulator's gold path, without its detours if it still solves the task.

        Up to five plans (`envs.sciworld.expert.plans`) are played, until one solves it within its step limit; then that
        once more, with things called as they were shown.

        Raises:
            NoSolutionError: the simulator gave no gold path.
        """
        name, variation = self._parse(task)
        self._server.load(name, variation, self._settings.simplification, gold=True)
        gold, description = self._server.gold(), self._server.description()
        if not gold or any("ERROR" in action for action in gold):
            raise NoSolutionError(f"ScienceWorld has no gold path for {task}.")
        best: list[ExpertStep] = []
        reward = -1.0
        tried: list[list[str]] = []
        for plan in plans(gold, description):
            if plan in tried:
                continue
            tried.append(plan)
            steps, info = self._rehearse(task, plan)
            if info["reward"] > reward:
                best, reward = steps, info["reward"]
            if info["success"]:
                return self._as_shown(task, steps)
        return best

    def _as_shown(self, task: str, solution: list[ExpertStep]) -> list[ExpertStep]:
        """A solution with things called as they were shown, if it still is one."""
        plan = as_shown((step.action, step.observation) for step in solution)
        if plan == [step.action for step in solution]:
            return solution
        steps, info = self._rehearse(task, plan)
        return steps if info["success"] else solution

    def _rehearse(self, task: str, plan: list[str]) -> tuple[list[ExpertStep], Info]:
        """Play a plan until the episode ends, with a thought for each action."""
        description, info = self.reset(options={"task": task})
        history: list[tuple[str, str]] = []
        steps = []
        for action in plan:
            thought = think(description, history, action)
            observation, _, terminated, truncated, info = self.step(action)
            history.append((action, observation))
            steps.append(ExpertStep(thought, action, observation))
            if terminated or truncated:
                break
        return steps, info

    @classmethod
    def instruction(cls, settings: Any) -> str:
        """See `TextEnv`."""
        return INSTRUCTION

    @classmethod
    def example(cls, settings: Any) -> list[tuple[str, str]]:
        """See `TextEnv`."""
        return EXAMPLE

    @classmethod
    def kind(cls, task: str) -> str:
        """The kind of a task (`sciworld:boil:3` -> `boil`)."""
        return task.split(":")[1]

    @classmethod
    def fingerprint(cls, settings: Any) -> str:
        """Package version, hash of the simulator, and the simplifications."""
        return f"scienceworld {importlib.metadata.version('scienceworld')} {jar_hash()} {settings.simplification}"

    @classmethod
    def relevant(cls, settings: Any, split: str) -> dict[str, Any]:
        """All but the memory, and how many variations the other splits have; which of them are taken, too."""
        other = "eval_variations" if split == "train" else "train_variations"
        found: dict[str, Any] = settings.model_dump(mode="json", exclude={"heap_mb", "splits", other})
        found["variations"] = "evenly spaced"  # what runs of before did not have, which took the first
        if settings.splits:
            found["splits"] = digest(published(settings.splits, TASKS))
        return found

    @classmethod
    def official_turn(cls, action: str, observation: str, settings: Any) -> tuple[str, str]:
        """Both as they are.

        Raises:
            ValueError: the action does not begin as the simulator's grammar has it.
        """
        verb = next(iter(action.lower().split()), "")
        if verb and verb not in VERBS and not verb.isdigit():
            raise ValueError(f"{cls.name} knows no action {action!r} (verb {verb!r})")
        return action, observation

    @classmethod
    def official_id(cls, item: dict[str, Any], settings: Any) -> str:
        """`4_17` of the published trajectories is variation 17 of task 4 of `OFFICIAL_TASKS`.

        Raises:
            ValueError: the item's `id` is no such pair.
        """
        match = re.fullmatch(r"(\d+)_(\d+)", str(item.get("id")))
        task = "".join(OFFICIAL_TASKS[int(match[1]) : int(match[1]) + 1]) if match else ""
        if not match or not task:
            raise ValueError(f"id {item.get('id')!r} is no ScienceWorld task of ETO's (wanted: NUMBER_VARIATION).")
        return f"{cls.name}:{task}:{int(match[2])}"

    @classmethod
    def official_task(cls, text: str) -> str:
        """The task's text without the heading that the official wrapper puts before it."""
        return text.removeprefix("Task Description:\n").strip()

    def close(self) -> None:
        """Give the simulator back; may be called twice."""
        if self._jvm is not None:
            jvm, self._jvm = self._jvm, None
            jvm.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    def _info(self, *, valid: bool) -> Info:
        return Info(reward=self._reward, success=self._reward >= 1, valid=valid)

    def _parse(self, task: str) -> tuple[str, int]:
        """Name and variation of a content id."""
        match = re.fullmatch(rf"{self.name}:([a-z0-9-]+):(\d+)", task)
        if not match or match[1] not in STEP_LIMITS:
            raise ValueError(f"No such ScienceWorld task: {task!r} (wanted: {self.name}:TASK:VARIATION).")
        if int(match[2]) >= (count := self._server.variation_count(match[1])):
            raise ValueError(f"No such ScienceWorld task: {task!r} ({match[1]} has variations 0 to {count - 1}).")
        return match[1], int(match[2])
