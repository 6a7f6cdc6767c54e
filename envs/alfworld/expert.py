"""Who solves ALFWorld's games: the package's handcoded expert, mended, and a plan that knows where everything is.

The handcoded expert (alfworld/agents/expert/handcoded_expert.py) searches as an agent must, by what it has seen. In
0.4.2 its bookkeeping still waits for `put` (`update_state_tracking`, line 178: `elif "put" in last_action`) although
the command has become `move`: its inventory never empties, and of the tasks that place two objects it solves half. It
is mended from outside: its bookkeeping is told `put X in/on Y` for `move X to Y`. And where it searches a room from the
end of the list that tells of it, here it begins at the front (a deviation): where to look next is what the list names
next, which a small model can copy.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.alfworld.engine import NOTHING_HAPPENS, Engine, Translations
from envs.alfworld.games import STORE, Dialect, dialect_of

APPLIANCES = {
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
}
"""What is done to the object before it is placed, and with what."""

LOOK_AT, PICK_TWO = "look_at_obj_in_light", "pick_two_obj_and_place"

_MOVE = re.compile(r"move (.+) to (.+)")
_PUT = re.compile(r"put (.+) in/on (.+)")


class UnwinnableError(Exception):
    """A game that a solver does not win; says why."""


def spoken(command: str, dialect: Dialect) -> str:
    """A command in a dialect, whichever it was in."""
    if dialect == "put":
        return _MOVE.sub(r"put \1 in/on \2", command) if _MOVE.fullmatch(command) else command
    return _PUT.sub(r"move \1 to \2", command) if _PUT.fullmatch(command) else command


def win(game: Mapping[str, Any], task_type: str, params: Mapping[str, Any]) -> list[str]:
    """The commands of a privileged plan that wins a game on the real engine.

    Raises:
        UnwinnableError: there is no plan, or it does not win.
    """
    engine = Engine.acquire()
    try:
        engine.load(game, Translations(STORE / "translations"))
        engine.reset()
        commands = privileged_plan(engine.facts(), task_type, params)
        dialect = dialect_of(game)
        for command in (spoken(command, dialect) for command in commands):
            if engine.step(command) == NOTHING_HAPPENS:
                raise UnwinnableError("a step of the plan is not understood")
        if not engine.won:
            raise UnwinnableError("the plan does not reach the goal")
        return [spoken(command, dialect) for command in commands]
    finally:
        engine.release()


def privileged_plan(facts: Iterable[Sequence[str]], task_type: str, params: Mapping[str, Any]) -> list[str]:
    """A shortest sequence of commands that solves a task for one who knows where everything is.

    Args:
        facts: what is true at the start (`Engine.facts`).
        task_type: one of ALFWorld's six.
        params: the `pddl_params` of the task.

    Returns:
        Commands in the `move` dialect.

    Raises:
        UnwinnableError: an object, a receptacle or an appliance that the task needs is not there.
    """
    room = _Room(facts)
    target, parent = (str(params[key]).lower() for key in ("object_target", "parent_target"))
    objects = room.of_class(target, room.held_by)
    if task_type == LOOK_AT:
        lamps = room.of_class(str(params["toggle_target"]).lower(), room.held_by)
        options = (room.plan([("take", one), ("use", lamp)]) for one in objects for lamp in lamps)
    elif task_type == PICK_TWO:
        parents = room.of_class(parent, room.location)
        options = (
            room.plan([("take", first), ("move", first, goal), ("take", second), ("move", second, goal)])
            for first, second in itertools.permutations(objects, 2)
            for goal in parents
        )
    else:
        verb, kind = APPLIANCES.get(task_type, ("", ""))
        parents = room.of_class(parent, room.location)
        appliances = room.of_class(kind, room.location) if verb else [""]
        options = (
            room.plan([("take", one), *([(verb, one, machine)] if verb else []), ("move", one, goal)])
            for one in objects
            for machine in appliances
            for goal in parents
        )
    shortest = min(options, key=len, default=None)
    if shortest is None:
        raise UnwinnableError("something that the task needs is not in the room")
    return shortest


class _Room:
    """Where things are at the start."""

    def __init__(self, facts: Iterable[Sequence[str]]) -> None:
        self.held_by: dict[str, str] = {}
        """Receptacle of each object that can be seen."""
        self.location: dict[str, str] = {}
        """Location of each receptacle."""
        self.openable: set[str] = set()
        self.here = ""
        for predicate, *args in facts:
            match predicate:
                case "inreceptacle":
                    self.held_by[args[0]] = args[1]
                case "receptacleatlocation":
                    self.location[args[0]] = args[1]
                case "openable":
                    self.openable.add(args[0])
                case "atlocation":
                    self.here = args[1]

    def of_class(self, kind: str, among: Iterable[str]) -> list[str]:
        """The things of a class, by their numbers."""
        found = [name for name in among if name.split()[0] == kind]
        return sorted(found, key=lambda name: int(name.split()[1]))

    def plan(self, goals: Sequence[tuple[str, ...]]) -> list[str]:
        """The commands that do one thing after the other, with the ways and the doors between."""
        here, opened, commands = self.here, set(), []
        for verb, thing, *place in goals:
            receptacle = place[0] if place else self.held_by[thing]
            if self.location[receptacle] != here:  # else `go to` is not understood
                commands.append(f"go to {receptacle}")
                here = self.location[receptacle]
            if verb in ("take", "move", "use") and receptacle in self.openable and receptacle not in opened:
                commands.append(f"open {receptacle}")
                opened.add(receptacle)
            match verb:
                case "take":
                    commands.append(f"take {thing} from {receptacle}")
                case "move":
                    commands.append(f"move {thing} to {receptacle}")
                case "use":
                    commands.append(f"use {thing}")
                case _:
                    commands.append(f"{verb} {thing} with {receptacle}")
        return commands


def handcoded(engine: Engine, file: Path, dialect: Dialect, limit: int) -> Iterator[str]:
    """The commands of the package's expert on the game that the engine has loaded, each to be stepped before the next.

    The package's own wrapper begins every episode with `look`, which tells nothing new; here the expert begins with
    what comes after it.

    Args:
        engine: has loaded the game.
        file: the game's `game.tw-pddl`, which lies beside its `traj_data.json`.
        dialect: of the game.
        limit: most commands.

    Raises:
        UnwinnableError: the expert gives up or needs more commands.
    """
    from alfworld.agents.expert.handcoded_expert_tw import HandCodedTWAgent

    agent = HandCodedTWAgent(max_steps=200)
    agent.reset(str(file))
    tracking = agent.policy.update_state_tracking
    agent.policy.update_state_tracking = lambda state, last: tracking(state, spoken(last, "put"))
    listed = agent.policy.get_objects_and_classes
    agent.policy.get_objects_and_classes = lambda text: dict(reversed(listed(text).items()))  # it takes from the end
    agent.observe(engine.reset(facts=True))
    chance = random.Random(f"{file.parent.parent.name}/{file.parent.name}")
    command = "look"
    for _ in range(limit):
        state = dict(engine.state)
        state["admissible_commands"] = [spoken(one, "move") for one in engine.admissible]
        command = _next(agent, state, command, chance)
        yield spoken(command, dialect)
        if engine.won:
            return
    raise UnwinnableError(f"the handcoded expert needs more than {limit} steps")


def _next(agent: Any, state: Mapping[str, Any], last: str, chance: random.Random) -> str:
    """What the agent does next. It draws from the global generator, which is put back."""
    before = random.getstate()
    random.setstate(chance.getstate())
    try:
        command: str = agent.act(state, 0, state["won"], last)
    except Exception as error:  # its two own exceptions are NameErrors, and it can run into an IndexError
        raise UnwinnableError(f"the handcoded expert gives up ({type(error).__name__})") from None
    finally:
        chance.setstate(random.getstate())
        random.setstate(before)
    return command if command in state["admissible_commands"] else "look"


class Thinker:
    """Says in a sentence or two why an expert's next command follows from the task and from what was observed.

    Each thought begins with what decides: is the thing that is looked for in sight? A policy that has to name the thing
    there finds the answer where the observation names it too.
    """

    def __init__(self, goal: str, task_type: str, params: Mapping[str, Any]) -> None:
        """Begin with the sentence of the goal, without its full stop."""
        self._goal = goal
        self._target, self._parent = (str(params[key]).lower() for key in ("object_target", "parent_target"))
        self._lamp = str(params["toggle_target"]).lower()
        self._verb = APPLIANCES.get(task_type, ("", ""))[0]
        self._seen: dict[str, str] = {}
        """Places of the objects of the target's class that were seen and not taken."""
        self._searching = False
        self._holding = ""
        self._treated = False
        self._placed = 0

    def think(self, command: str) -> str:
        """The thought before a command, in either dialect."""
        verb, *rest = spoken(command, "move").split()
        thing = " ".join(rest[:2])
        match verb:
            case "go":
                return self._go(" ".join(rest[1:]))
            case "open":
                return f"The {thing} is closed, so I open it."
            case "close":
                return f"{self._sight()}, so I close the {thing} again."
            case "take":
                return f"I see a {thing}. To {self._goal}, I take it."
            case "move":
                return f"To {self._goal}, I leave the {thing} here."
            case "clean" | "heat" | "cool":
                return f"Here I can {verb} the {thing}."
            case "use":
                return f"I see a {thing}. To {self._goal}, I turn it on."
            case "examine":
                return f"I look closer at the {thing}."
            case _:
                return "I look around."

    def _sight(self) -> str:
        """What the expert has, or does not see."""
        return f"I have the {self._holding}" if self._holding else f"I see a {self._target} nowhere"

    def _go(self, place: str) -> str:
        if self._holding and self._lamp:
            return f"I have the {self._holding}. I see a {self._lamp} nowhere, so I try a {place}."
        if self._holding and self._verb and not self._treated:
            return f"I have the {self._holding}. To {self._verb} it, I go to a {place}."
        if self._holding:
            return f"I have the {self._holding}. To {self._goal}, I go to a {place}."
        if known := next((name for name, where in self._seen.items() if where == place), None):
            return f"I see a {self._target} nowhere, but I saw the {known} at the {place}."
        if self._searching:
            return f"{self._sight()}, so I try a {place}."
        self._searching = True
        wanted = f"{'another' if self._placed else 'a'} {self._target}"
        return f"To {self._goal}, I look for {wanted}. I try a {place}."

    def observe(self, command: str, observation: str) -> None:
        """Hear what came of a command."""
        verb, *rest = spoken(command, "move").split()
        if observation == NOTHING_HAPPENS:
            return
        match verb:
            case "take":
                self._holding = " ".join(rest[:2])
                self._seen.pop(self._holding, None)
            case "move":
                self._placed += rest[0] == self._target and rest[3] == self._parent
                self._holding, self._treated, self._searching = "", False, False
            case "clean" | "heat" | "cool":
                self._treated = True
            case "go" | "open" | "examine":
                place = " ".join(rest[-2:])
                for name in re.findall(rf"\ba ({self._target} \d+)", observation):
                    self._seen[name] = place
