"""ALFWorld: household tasks in text, on TextWorld's engine (Shridhar et al. 2021, https://arxiv.org/abs/2010.03768).

    engine      TextWorld with memories: the same transcripts, faster
    games       trees of games: official ones read, our own made and checked
    generator   draws the games that are our own
    expert      who solves them, and why

The packages are unmodified: alfworld 0.4.2, textworld 1.7.0. What follows the official ETO wrapper: room and task are
the first observation, without the engine's welcome; an observation loses its `You arrive at ...` sentence; 40 steps;
reward 1 when the goal is reached. Ours: the instruction and the worked example are in our own words, and replies that
are spelled otherwise than the engine wants are mended (`spellings`).
"""

import contextlib
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from envs import MALFORMED_OBSERVATION, SPLITS, ExpertStep, Info, NoSolutionError, TextEnv, comma_list
from envs.alfworld import games
from envs.alfworld.games import TASK_TYPES, Dialect, Recipe, TaskType

STEP_LIMITS = {"eto": 40, "react": 49}
"""Most actions of an episode: ETO's wrapper, and ReAct's prompt script, which counts from 1 to 49."""

SIZES = {"train": 300, "seen": 140, "unseen": 134}
"""Games that are generated where nothing else is said; of seen and unseen as many as there are official ones."""

VERBS = {
    *("clean", "close", "cool", "examine", "go", "heat", "help", "inventory", "look", "move", "open", "put", "slice"),
    *("take", "use"),
}
"""First words of the commands in the grammars of both dialects."""

_ARRIVAL = re.compile(r"^You arrive at [^.]*\. ")
_PUTTING = re.compile(r"(?:put|place|move) (.+?) (?:in/on|into|in|on|to) (.+)")

INSTRUCTION = """\
You do a household task in a room by text commands. Answer every message with a thought and one command:
Thought: why you act
Action: the command

Commands (OBJ: an object with its number, REC: a place with its number): go to REC, open REC, close REC, \
take OBJ from REC, {put}, clean OBJ with REC, heat OBJ with REC, cool OBJ with REC, use OBJ (switches a lamp), \
examine REC, examine OBJ, inventory, look.
You carry one thing at a time and see what a place holds when you are there and it is open. Clean with a sinkbasin, \
heat with a microwave, cool with a fridge. What is not understood or not possible is answered by: Nothing happens."""

PUT = {"move": "move OBJ to REC", "put": "put OBJ in/on REC"}

# A game of another seed than 0, in a training room; its drawer was opened in vain.
EXAMPLE = [
    (
        "You are in the middle of a room. Looking quickly around you, you see a countertop 1, a drawer 2, a drawer 1, "
        "a garbagecan 1, a handtowelholder 2, a handtowelholder 1, a sinkbasin 2, a sinkbasin 1, a toilet 1, "
        "a toiletpaperhanger 1, and a towelholder 1.\nYour task is to: put a clean cloth in countertop.",
        "Thought: To put a clean cloth in countertop, I look for a cloth. I try a drawer 1.\nAction: go to drawer 1",
    ),
    ("Observation: The drawer 1 is closed.", "Thought: The drawer 1 is closed, so I open it.\nAction: open drawer 1"),
    (
        "Observation: You open the drawer 1. The drawer 1 is open. In it, you see nothing.",
        "Thought: I see a cloth nowhere, so I try a toilet 1.\nAction: go to toilet 1",
    ),
    (
        "Observation: On the toilet 1, you see a cloth 1, a spraybottle 1, and a toiletpaper 2.",
        "Thought: I see a cloth 1. To put a clean cloth in countertop, I take it.\nAction: take cloth 1 from toilet 1",
    ),
    (
        "Observation: You pick up the cloth 1 from the toilet 1.",
        "Thought: I have the cloth 1. To clean it, I go to a sinkbasin 1.\nAction: go to sinkbasin 1",
    ),
    (
        "Observation: On the sinkbasin 1, you see nothing.",
        "Thought: Here I can clean the cloth 1.\nAction: clean cloth 1 with sinkbasin 1",
    ),
    (
        "Observation: You clean the cloth 1 using the sinkbasin 1.",
        "Thought: I have the cloth 1. To put a clean cloth in countertop, I go to a countertop 1.\n"
        "Action: go to countertop 1",
    ),
    (
        "Observation: On the countertop 1, you see a candle 1, and a toiletpaper 1.",
        "Thought: To put a clean cloth in countertop, I leave the cloth 1 here.\nAction: move cloth 1 to countertop 1",
    ),
]


class Settings(BaseModel):
    """The `env.alfworld` section of a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    data: str | None = None
    """Folder of official games (with `train`, `valid_seen` and `valid_unseen`, or with `json_2.1.*` folders that have
    them); `official`: where `alfworld-download` puts them ($ALFWORLD_DATA or ~/.cache/alfworld). Empty: games made
    here, calibrated to the official ones."""
    train_games: int | None = Field(None, ge=1)
    """Games of the train split, in the 108 rooms that ALFRED trains on. Empty: 300 generated ones, or all official."""
    seen_games: int | None = Field(None, ge=1)
    """Games of the seen split: other games in the training rooms. Empty: 140 generated ones, or all official."""
    unseen_games: int | None = Field(None, ge=1)
    """Games of the unseen split, in ALFRED's four unseen rooms. Empty: 134 generated ones, or all official."""
    task_types: Annotated[list[TaskType], BeforeValidator(comma_list), Field(min_length=1)] = list(TASK_TYPES)
    """The types of tasks to play."""
    games_seed: int = Field(0, ge=0)
    """Another seed generates other games."""
    dialect: Dialect | None = None
    """How generated games want things put down: `move X to Y` (alfworld 0.4 and later; the default) or
    `put X in/on Y` (json_2.1.1, ETO's data). Official games say it themselves."""
    translate: bool = False
    """Whether published expert data in the other dialect are translated (and counted), or else refused."""
    expert: Literal["handcoded", "plan"] = "handcoded"
    """Who solves the games: the package's handcoded expert, which searches, or a `plan` that knows where things are."""
    profile: Literal["eto", "react"] = "eto"
    """`eto`: 40 steps. `react`: 49 steps, and an action `think: ...` is answered by `OK.`, as in ReAct's prompts."""
    spellings: Annotated[list[Literal["case", "stop", "toggle", "put"]], BeforeValidator(comma_list)] = [
        *("case", "stop", "toggle")
    ]
    """What is mended in an action that the engine does not understand as it stands: `case` capitals, `stop` a full stop
    or quotation marks, `toggle` for `use`, `put` any way to put something down."""

    @model_validator(mode="after")
    def _only_for_generated_games(self) -> Self:
        for key in ("games_seed", "dialect"):
            if self.data is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for generated games and has no effect beside data={self.data}")
        return self

    def most(self, split: str) -> int | None:
        """How many games of a split are wanted, if that is said."""
        wanted: int | None = getattr(self, f"{split}_games")
        return wanted

    @property
    def recipe(self) -> Recipe:
        """What generated games are made by."""
        return Recipe(
            sizes={split: self.most(split) or SIZES[split] for split in SPLITS},
            task_types=self.task_types,
            seed=self.games_seed,
            dialect=self.dialect or "move",
        )


_Settings = Settings  # by this name where a class has an attribute `Settings`


def tree(settings: Settings, processes: int = 1) -> tuple[Path, games.Index]:
    """The folder and the index of the games that the settings name; generated ones are made if they are not there.

    Raises:
        ValueError: the official games are not there, or not whole.
    """
    if settings.data is not None:
        return _official(settings.data)
    return games.generated_index(settings.recipe, processes)


@lru_cache(maxsize=1)
def _official(data: str) -> tuple[Path, games.Index]:
    root = games.official_root(data)
    return root, games.index_of(root)


def dialect(settings: Settings) -> Dialect:
    """How the games of the settings want things put down."""
    return settings.dialect or "move" if settings.data is None else tree(settings)[1].dialect


class AlfWorld(TextEnv):
    """ALFWorld's six types of household tasks.

    ## Description
    A kitchen, living room, bedroom or bathroom of AI2-THOR as text: some ten to fifty receptacles, which hold objects
    and may be closed. A task (`alfworld:pick_heat_then_place_in_recep-Egg-None-Fridge-12/trial_...`) is to find an
    object of a class, or two, sometimes to clean, heat or cool it, and to put it into a receptacle of a class; or to
    look at it under a lamp.

    ## Actions
    The game's commands, see `instruction`; what is admissible depends on where the agent is. Spellings that the engine
    does not know are mended as `Settings.spellings` says.

    ## Observations
    The engine's text without its welcome and without `You arrive at ...`. The first one is the room and the task.

    ## Rewards
    1 when the goal is reached, else 0.

    ## Episode end
    Terminated when the goal is reached (`success`). Truncated at `STEP_LIMITS`.

    ## Info
    `reward`, `success`, `valid` (the action was admissible, after mending).

    ## Arguments
    `settings`: see `Settings`. The engine leaves nothing to chance, so `reset(seed=...)` changes nothing.

    ## Version history
    1: alfworld 0.4.2, textworld 1.7.0.
    """

    name = "alfworld"
    Settings = Settings

    def __init__(self, settings: _Settings | None = None) -> None:
        from envs.alfworld.engine import Engine, Translations

        self._settings = settings or _Settings()
        self._root, self._index = tree(self._settings)
        self._translations = Translations(games.STORE / "translations")
        self._engine: Engine | None = Engine.acquire()
        self._names = {split: frozenset(names) for split, names in self._index.games.items()}
        self._loaded: Path | None = None
        self._limit = STEP_LIMITS[self._settings.profile]
        self._steps = 0
        self._over = True
        self._won = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:  # type: ignore[override]
        """Begin the game whose content id is `options["task"]`; the observation is the room and the task.

        Raises:
            ValueError: no such game, or its file is not whole.
        """
        text = self._begin(self._load(str((options or {}).get("task", ""))))
        self._steps, self._over, self._won = 0, False, False
        return _opening(text), self._info(valid=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:  # type: ignore[override]
        """Take one action; returns observation, reward, terminated, truncated, info.

        Raises:
            ValueError: no episode is going on.
        """
        if self._over or self._engine is None:
            raise ValueError("The episode is over: call reset before the next step.")
        self._steps += 1
        command = self._mended(action.strip())
        valid = command in self._engine.admissible
        if not action.strip():
            observation = MALFORMED_OBSERVATION
        elif self._settings.profile == "react" and action.strip().startswith("think:"):
            observation, valid = "OK.", True
        else:
            observation = _ARRIVAL.sub("", self._engine.step(command))
        self._won = self._won or self._engine.won
        truncated = not self._won and self._steps >= self._limit
        self._over = self._won or truncated
        return observation, float(self._won), self._won, truncated, self._info(valid=valid)

    def tasks(self, split: str) -> list[str]:
        """Content ids of a split's games: task folder and trial.

        Raises:
            ValueError: unknown split, or the unseen games share a room with the training games.
        """
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; known: {', '.join(SPLITS)}.")
        games.check_rooms(self._index.games)
        chosen = [game for game in self._index.games[split] if game.split("-")[0] in self._settings.task_types]
        fair = sorted(chosen, key=lambda game: hashlib.sha256(game.encode()).digest())
        kept = set(fair[: self._settings.most(split)])
        return [f"{self.name}:{game}" for game in chosen if game in kept]

    def valid_actions(self) -> list[str]:
        """The commands that the engine understands now, sorted."""
        assert self._engine is not None
        return self._engine.admissible

    def expert(self, task: str) -> list[ExpertStep]:
        """A solution of the game by the expert of the settings, within the step limit.

        Raises:
            NoSolutionError: the expert does not win within the limit; says why.
            ValueError: no such game, or its file is not whole.
        """
        from envs.alfworld.expert import Thinker, UnwinnableError, handcoded, privileged_plan, spoken

        file = self._load(task)
        assert self._engine is not None
        self._over = True
        task_type, params = games.task_of(file)
        goal = self._begin(file).rpartition("Your task is to: ")[2].rstrip(".")
        thinker, steps = Thinker(goal, task_type, params), []
        try:
            if self._settings.expert == "plan":
                plan = privileged_plan(self._engine.facts(), task_type, params)
                commands = iter([spoken(command, self._index.dialect) for command in plan])
            else:
                commands = handcoded(self._engine, file, self._index.dialect, self._limit)
            for command in commands:
                thought = thinker.think(command)
                observation = _ARRIVAL.sub("", self._engine.step(command))
                thinker.observe(command, observation)
                steps.append(ExpertStep(thought, command, observation))
        except UnwinnableError as error:
            raise NoSolutionError(str(error)) from None
        if not self._engine.won or len(steps) > self._limit:
            raise NoSolutionError("the expert's commands do not win the game within its step limit")
        return steps

    @classmethod
    def prepare(cls, settings: Any, processes: int) -> None:
        """Read the official tree, or generate the games, where that was not done before."""
        tree(settings, processes)

    @classmethod
    def instruction(cls, settings: Any) -> str:
        """See `TextEnv`; in the dialect of the games."""
        return INSTRUCTION.format(put=PUT[dialect(settings)])

    @classmethod
    def example(cls, settings: Any) -> list[tuple[str, str]]:
        """See `TextEnv`; in the dialect of the games."""
        return list(_example(dialect(settings)))

    @classmethod
    def kind(cls, task: str) -> str:
        """The type of a task (`pick_and_place_simple`, ...)."""
        return task.split(":")[1].split("-")[0]

    @classmethod
    def fingerprint(cls, settings: Any) -> str:
        """Package versions, and the games: what generates them, or the hash of the official ones."""
        versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("alfworld", "textworld"))
        if settings.data is None:
            return f"{versions} generated {games.generated_root(settings.recipe).name}"
        _, index = tree(settings)
        return f"{versions} official {index.digest} skipped {index.skipped}"

    @classmethod
    def relevant(cls, settings: Any, split: str) -> dict[str, Any]:
        """All but the sizes of other splits and the place of the games, whose hash is in the fingerprint."""
        others = {f"{other}_games" for other in SPLITS if other != split}
        found: dict[str, Any] = settings.model_dump(mode="json", exclude={"data", "translate", *others})
        return found

    @classmethod
    def official_turn(cls, action: str, observation: str, settings: Any) -> tuple[str, str]:
        """A published action and the answer to it, in the dialect of the games.

        Raises:
            ValueError: a verb that is in no dialect, or the other dialect where `translate` is off.
        """
        verb = next(iter(action.split()), "")
        if _spelled(verb, settings.spellings) not in VERBS:
            raise ValueError(f"alfworld knows no action {action!r} (verb {verb!r})")
        wanted = dialect(settings)
        command = _put_down(action, wanted)
        if command == action:
            return action, observation
        if not settings.translate:
            raise ValueError(
                f"the action {action!r} is of another dialect than the games, which want {PUT[wanted]!r}: set "
                "env.alfworld.translate=true, or play games of its dialect (env.alfworld.dialect="
                f"{'put' if wanted == 'move' else 'move'})"
            )
        return command, _said(observation, wanted)

    @classmethod
    def official_id(cls, item: dict[str, Any], settings: Any) -> str:
        """Task folder and trial of a published trajectory's `game_file`.

        Raises:
            ValueError: there is no such field, or it names no game.
        """
        match = re.search(r"([a-z_]+-\w+-\w+-\w+-\d+/trial_\w+)", str(item.get("game_file") or item.get("id")))
        if not match:
            raise ValueError(
                f"item {item.get('id')!r}: no `game_file` with a folder like "
                "pick_and_place_simple-Mug-None-Shelf-5/trial_T20190909_1."
            )
        return f"{cls.name}:{match[1]}"

    @classmethod
    def official_task(cls, text: str) -> str:
        """The room and the task, one newline between them."""
        return _opening(text)

    def close(self) -> None:
        """Hand the engine on; may be called twice."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    def _info(self, *, valid: bool) -> Info:
        return Info(reward=float(self._won), success=self._won, valid=valid)

    def _load(self, task: str) -> Path:
        """Have the engine load a game; returns its file."""
        name = task.removeprefix(f"{self.name}:")
        split = next((split for split in SPLITS if name in self._names[split]), None) if task != name else None
        if split is None or self._engine is None:
            raise ValueError(
                f"No such ALFWorld game: {task!r} (wanted: {self.name}:TASK-FOLDER/TRIAL, of {self._root})."
            )
        file = self._root / games.FOLDERS[split] / name / games.GAME
        if file != self._loaded:
            self._loaded = None  # until it is whole
            game = games.read_game(file)
            with _named(file):
                self._engine.load(game, self._translations)
            self._loaded = file
        return file

    def _begin(self, file: Path) -> str:
        """Have the engine begin the loaded game anew; returns its first text."""
        assert self._engine is not None
        with _named(file):
            return self._engine.reset()

    def _mended(self, action: str) -> str:
        """An action as the engine spells it, as far as the settings allow."""
        assert self._engine is not None
        admissible = self._engine.admissible
        for kind in self._settings.spellings:
            if action not in admissible:
                action = _put_down(action, self._index.dialect) if kind == "put" else _spelled(action, [kind])
        return action


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Say which file it is that an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _opening(text: str) -> str:
    """The first observation: what comes after the welcome, room and task on a line each."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    return "\n".join(part for part in paragraphs if not part.startswith("-= Welcome"))


def _spelled(action: str, spellings: Sequence[str]) -> str:
    """An action with some spellings mended, all but `put`; see `Settings.spellings`."""
    if "stop" in spellings:
        action = action.strip("\"'`. ")
    if "case" in spellings:
        action = action.lower()
    return re.sub(r"^toggle\b", "use", action) if "toggle" in spellings else action


def _put_down(action: str, wanted: Dialect) -> str:
    """An action in a dialect, if it puts something down, however that is said."""
    from envs.alfworld.expert import spoken

    found = _PUTTING.fullmatch(action)
    return spoken(f"move {found[1]} to {found[2]}", wanted) if found else action


def _said(observation: str, wanted: Dialect) -> str:
    """What the engine says to something being put down, in a dialect."""
    if wanted == "move":
        return re.sub(r"^You put the (.+) in/on the (.+)\.$", r"You move the \1 to the \2.", observation)
    return re.sub(r"^You move the (.+) to the (.+)\.$", r"You put the \1 in/on the \2.", observation)


@lru_cache(maxsize=2)
def _example(wanted: Dialect) -> tuple[tuple[str, str], ...]:
    from envs.alfworld.expert import spoken

    lines = []
    for question, answer in EXAMPLE:
        head, _, action = answer.rpartition("Action: ")
        prefix, _, text = question.partition("Observation: ")
        lines.append(
            (
                f"{prefix}Observation: {_said(text, wanted)}" if text else question,
                f"{head}Action: {spoken(action, wanted)}",
            )
        )
    return tuple(lines)
