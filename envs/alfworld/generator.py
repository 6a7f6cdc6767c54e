"""ALFWorld games made from what the package's wheel carries: no download, no simulator, no planner.

The wheel has, for each of ALFRED's 120 rooms, the classes of things in it, poses in front of most receptacles, and the
points an agent can stand on (`alfworld/gen/layouts`), and the rules of what goes where (`gen/constants.py`) and what a
task asks (`gen/goal_library.py`). A game puts the room's things into its receptacles at random, as ALFRED's simulator
did, and asks for a task that ALFRED could have asked there. The engine that plays a game is the package's own.

Where a generated game differs from an official one:
* ids, places and poses of things and receptacles are drawn, only their classes and numbers follow the official games;
* constants that no fact uses are left out, and so is every thing that can be neither taken nor seen in a receptacle;
* mirrors, sinks and windows never lie in a receptacle (they do in 17 of 112 official rooms), nor does anything in two.
"""

import functools
import hashlib
import importlib.util
import json
import random
import runpy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {
    "pick": "pick_and_place_simple",
    "look": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "two": "pick_two_obj_and_place",
}
APPLIANCES = {TYPES["clean"]: "SinkBasin", TYPES["heat"]: "Microwave", TYPES["cool"]: "Fridge"}
ACTIONS = {TYPES["clean"]: "Cleanable", TYPES["heat"]: "Heatable", TYPES["cool"]: "Coolable"}

UNSEEN_ROOMS = frozenset({10, 219, 308, 424})
TEST_ROOMS = frozenset({9, 29, 215, 226, 315, 325, 404, 425})
"""ALFRED's test rooms, for which there are no official games; they are in no split."""
ROOMS = tuple(first + i for first in (1, 201, 301, 401) for i in range(30))

# fmt: off
MIX: dict[str, dict[str, dict[str, int]]] = {
    "train": {
        "pick": {"Kitchen": 79, "LivingRoom": 210, "Bedroom": 237, "Bathroom": 264},
        "look": {"LivingRoom": 51, "Bedroom": 257},
        "clean": {"Kitchen": 501, "Bathroom": 150},
        "heat": {"Kitchen": 459},
        "cool": {"Kitchen": 533},
        "two": {"Kitchen": 124, "LivingRoom": 216, "Bedroom": 240, "Bathroom": 233},
    },
    "seen": {
        "pick": {"Kitchen": 4, "LivingRoom": 10, "Bedroom": 8, "Bathroom": 13},
        "look": {"LivingRoom": 2, "Bedroom": 11},
        "clean": {"Kitchen": 19, "Bathroom": 8},
        "heat": {"Kitchen": 16},
        "cool": {"Kitchen": 25},
        "two": {"Kitchen": 4, "LivingRoom": 5, "Bedroom": 6, "Bathroom": 9},
    },
    "unseen": {
        "pick": {"Kitchen": 4, "LivingRoom": 7, "Bedroom": 5, "Bathroom": 8},
        "look": {"Bedroom": 18},
        "clean": {"Kitchen": 24, "Bathroom": 7},
        "heat": {"Kitchen": 23},
        "cool": {"Kitchen": 21},
        "two": {"Kitchen": 5, "LivingRoom": 4, "Bedroom": 4, "Bathroom": 4},
    },
}
"""Official games by type and kind of room. For unseen only both margins are known; the cells keep train's proportions
within them."""

MORE: dict[str, dict[int, int]] = {
    "Cabinet": {
        1: 1, 10: 3, 12: 4, 13: 9, 14: 4, 15: 3, 16: 6, 17: 11, 18: 3, 19: 8, 20: 2, 23: 4, 24: 2, 25: 5, 26: 5, 27: 3,
        28: 2, 412: 1,
    },
    "CounterTop": {7: 1, 422: 1},
    "Drawer": {
        1: 1, 2: 4, 3: 2, 11: 1, 13: 4, 17: 5, 19: 4, 22: 1, 23: 1, 24: 1, 28: 2, 203: 1, 209: 1, 224: 2, 301: 10,
        302: 1, 303: 2, 304: 2, 305: 2, 308: 3, 309: 1, 316: 1, 318: 3, 322: 2, 327: 1, 329: 2, 330: 2, 413: 3, 419: 1,
        421: 1, 422: 1, 426: 1,
    },
    "Dresser": {330: 1},
    "HandTowelHolder": {401: 1, 405: 1, 409: 1, 410: 1, 412: 1, 415: 1, 416: 1, 418: 1, 423: 3, 424: 1, 427: 1},
    "Shelf": {1: 1, 211: 1, 214: 1, 302: 2, 303: 2, 308: 1, 319: 1, 324: 4, 327: 1, 415: 1, 429: 1},
    "SideTable": {329: 1},
    "StoveBurner": {2: 2},
    "TowelHolder": {401: 1, 403: 1, 409: 1, 410: 1, 411: 1, 420: 1, 426: 1},
}
"""How many more receptacles a room has than its layout and the rule of `_missing` give: {class: {room: number}}.
Without this table 50 of the 112 official rooms have the right number of every class, with it all of them (the
calibration test counts)."""

WEIGHTS: dict[str, dict[str, float]] = {
    "Kitchen": {
        "Cabinet": 0.59, "CoffeeMachine": 8.4, "CounterTop": 3.3, "DiningTable": 6.1, "Drawer": 0.56, "Fridge": 4.6,
        "GarbageCan": 1.6, "Microwave": 1.5, "Shelf": 1.2, "SideTable": 2.4, "SinkBasin": 1.5, "StoveBurner": 25.0,
    },
    "LivingRoom": {
        "ArmChair": 2.4, "Cabinet": 1.5, "CoffeeTable": 11.0, "Desk": 13.0, "DiningTable": 13.0, "Drawer": 1.2,
        "Dresser": 10.0, "GarbageCan": 0.75, "Ottoman": 4.6, "Safe": 0.1, "Shelf": 2.7, "SideTable": 3.3, "Sofa": 7.4,
        "TVStand": 7.6,
    },
    "Bedroom": {
        "ArmChair": 0.67, "Bed": 4.9, "Cabinet": 0.43, "CounterTop": 1.8, "Desk": 1.5, "DiningTable": 2.5,
        "Drawer": 0.23, "Dresser": 1.3, "GarbageCan": 0.22, "LaundryHamper": 0.01, "Safe": 0.89, "Shelf": 0.27,
        "SideTable": 0.7,
    },
    "Bathroom": {
        "BathtubBasin": 3.2, "Cabinet": 0.58, "Cart": 2.2, "CounterTop": 1.9, "Drawer": 0.22, "Dresser": 3.6,
        "GarbageCan": 0.39, "HandTowelHolder": 300.0, "Shelf": 1.0, "SideTable": 0.75, "SinkBasin": 0.73,
        "Toilet": 1.3, "ToiletPaperHanger": 0.8,
    },
}
"""How readily a thing goes into one receptacle of a class, 1 where nothing is said. Fitted so that the mean number of
things in a receptacle, by class and kind of room, is that of the official train games: each weight times official over
generated mean, again and again (`python -m tests.test_alfworld_calibration` prints a fresh table)."""

NUMBERS: dict[str, tuple[int, ...]] = {
    "AlarmClock": (50, 32, 18), "BaseballBat": (94, 6), "Book": (48, 32, 20), "Bowl": (39, 33, 28), "Box": (83, 14, 3),
    "Bread": (55, 32, 13), "CellPhone": (34, 34, 32), "HandTowel": (83, 17), "Kettle": (44, 37, 19),
    "Laptop": (58, 32, 10), "Lettuce": (42, 35, 23), "Newspaper": (46, 32, 22), "Pan": (70, 26, 4),
    "Pillow": (60, 33, 7), "Plate": (42, 34, 24), "Pot": (53, 37, 10), "TissueBox": (39, 32, 29),
    "ToiletPaper": (0, 70, 30), "Towel": (86, 14), "Vase": (9, 40, 42, 6, 0, 3), "WateringCan": (94, 4, 2),
    "BasketBall": (1,), "Boots": (1,), "Footstool": (1,), "PaperTowelRoll": (1,), "Plunger": (1,), "ScrubBrush": (1,),
    "TeddyBear": (1,), "TennisRacket": (1,),
}
"""Shares of one, two, three... things of a class in official games that are not about it; large things came up less
often because the simulator found no room for them. All other classes: one, two or three, each as often."""

TARGET_NUMBERS: dict[str, tuple[int, ...]] = {
    TYPES["pick"]: (38, 28, 21, 13),
    TYPES["look"]: (35, 28, 21, 16),
    TYPES["clean"]: (31, 31, 21, 17),
    TYPES["heat"]: (27, 27, 25, 21),
    TYPES["cool"]: (44, 29, 18, 9),
    TYPES["two"]: (0, 43, 33, 24),
}
"""The same for the things a task asks for, by the task's type."""

FLOOR: dict[str, float] = {
    "BaseballBat": 1.0, "BasketBall": 1.0, "Boots": 1.0, "Box": 0.38, "ButterKnife": 0.03, "CD": 0.15, "Candle": 0.1,
    "Cloth": 0.17, "Fork": 0.04, "Footstool": 1.0, "KeyChain": 0.12, "Knife": 0.05, "Ladle": 0.04, "Mug": 0.05,
    "Plate": 0.06, "Plunger": 1.0, "RemoteControl": 0.07, "ScrubBrush": 1.0, "SoapBar": 0.07, "SoapBottle": 0.04,
    "Spoon": 0.04, "TeddyBear": 0.24, "TennisRacket": 1.0, "ToiletPaper": 0.16, "Vase": 0.04, "WateringCan": 0.75,
}
"""Share of a class's things that were in no receptacle (on the floor, say), where text cannot reach them."""
# fmt: on

SINGLE = frozenset({"StoveBurner", "CoffeeMachine", "HandTowelHolder", "TowelHolder", "ToiletPaperHanger"})
"""Receptacles that hold one thing."""
OPENABLE = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})
NEVER_ASKED = frozenset(
    {"BathtubBasin", "HandTowelHolder", "LaundryHamper", "SinkBasin", "TVStand", "Toaster", "TowelHolder"}
)
"""Receptacles that official games do not ask to put a thing into (one of 3,714 does, into a bathtub's)."""
CONTAINERS = frozenset({"Bowl", "Box", "Cup", "Mug", "Pan", "Plate", "Pot"})
FIXTURES = {
    "DeskLamp": (1.0, ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable")),
    "HousePlant": (0.85, ("CounterTop", "SideTable", "DiningTable", "Shelf", "CoffeeTable", "Dresser", "Desk")),
    "Television": (0.64, ("TVStand", "Dresser", "CoffeeTable", "SideTable")),
}
"""What stands in a receptacle and cannot be taken: the share of rooms where it does, and on what."""
NAMED_BY_DOMAIN = (
    "KnifeType - otype",
    "ButterKnifeType - otype",
    *(f"{name}Type - rtype" for name in sorted(APPLIANCES.values())),
)
"""Constants that alfred.pddl uses without declaring them: each problem has to."""
TUCKED_SHARE = 0.45
"""Share of kitchens with a thing inside another (a knife in a mug) that stands in the same receptacle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A game before it is dressed for the engine."""

    task_type: str
    """ALFRED's name of the task's type, such as `pick_heat_then_place_in_recep`."""
    params: dict[str, str | bool]
    """`pddl_params`: object_target, parent_target, toggle_target and mrecep_target, "" for none; object_sliced."""
    scene: int
    """The floor plan's number."""
    goal: str
    """The task's sentence without its full stop."""
    problem: str
    """The initial state and the goal, `(define (problem plan) (:domain alfred) ...)`."""

    @property
    def digest(self) -> str:
        """Hash of the sentence, the state and the goal: what makes it this game and no other."""
        return hashlib.sha256(f"{self.goal}\0{self.problem}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Receptacle:
    """A place for things, the same in all games of its room."""

    name: str
    kind: str
    location: str
    openable: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What all games of a floor plan share."""

    kind: str
    """Kitchen, LivingRoom, Bedroom or Bathroom."""
    things: tuple[str, ...]
    """Classes of things that can be picked up."""
    receptacles: tuple[Receptacle, ...]
    fixtures: tuple[tuple[str, str, int], ...]
    """(id, class, number of its receptacle)."""
    points: tuple[tuple[int, int], ...]
    """Where an agent can stand, in steps of 0.25 m."""


def generate(split: str, size: int, seed: int, types: Sequence[str] = tuple(TYPES.values())) -> list[Draft]:
    """Games of a split, the same for the same arguments in any process, in the order of their contents' hashes.

    Types, and kinds of rooms within a type, come in the official split's shares; rooms of a kind take turns. Another
    size, or other types, give the same games and more of them, or fewer.

    Args:
        split: train, seen (the same 108 rooms, other games) or unseen (rooms 10, 219, 308 and 424).
        size: how many games.
        seed: another seed gives other games.
        types: only tasks of these types.

    Raises:
        ValueError: for an unknown split or a negative size.
    """
    if split not in MIX:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(MIX)}")
    if size < 0:
        raise ValueError(f"size is {size}; it counts games and cannot be negative")
    drafts: list[Draft] = []
    by_type = shares({name: sum(kinds.values()) for name, kinds in MIX[split].items() if TYPES[name] in types}, size)
    for name, number in by_type.items():
        for place, (kind, count) in enumerate(shares(MIX[split][name], number).items()):
            rng = random.Random(f"alfworld {split} {seed} {name} {kind}")
            rooms = _rooms_for(TYPES[name], kind, split)
            order = rng.sample(rooms, len(rooms))
            drafts += [draw(TYPES[name], order[i % len(order)], (place + i) % 2, rng) for i in range(count)]
    return sorted(drafts, key=lambda draft: draft.digest)


def draw(task_type: str, scene: int, wording: int, rng: random.Random) -> Draft:
    """One game of a type in a room.

    Args:
        task_type: ALFRED's name of the type.
        scene: the floor plan's number; one of `ROOMS`.
        wording: 0 or 1, which of the type's two sentences states the goal.
        rng: decides everything else.

    Raises:
        ValueError: if the room has no task of this type.
    """
    if not tasks(task_type, scene):
        raise ValueError(f"room {scene} has no task of type {task_type}; `tasks` says which it has")
    room = load_room(scene)
    target = rng.choice(list(tasks(task_type, scene)))
    parents = tasks(task_type, scene)[target]
    parent = rng.choices(parents, [1 / _rooms_with()[parent] for parent in parents])[0]
    placed = _place(scene, _things(room, task_type, target, rng), target, _barred(task_type, parent), rng)
    toggle = "DeskLamp" if task_type == TYPES["look"] else ""
    words = {"obj": target, "recep": parent, "toggle": toggle, "mrecep": ""}
    goal = _wheel("goal_library")["gdict"][task_type]
    facts = [*_room_facts(scene), *_thing_facts(scene, placed, target, rng), _start(room, rng)]
    return Draft(
        task_type=task_type,
        params={
            "object_target": target,
            "parent_target": parent,
            "toggle_target": toggle,
            "mrecep_target": "",
            "object_sliced": False,
        },
        scene=scene,
        goal=goal["templates"][wording].format(**{key: word.lower() for key, word in words.items()}),
        problem=_problem(facts, goal["pddl"].format(**words)),
    )


@functools.cache
def tasks(task_type: str, scene: int) -> dict[str, tuple[str, ...]]:
    """What a room can be asked: {class of the thing: classes of receptacles to bring it to, or "" to look at it}.

    There is always another place for the thing to start in. These rules cover all that official games ask
    but one (see `NEVER_ASKED`).
    """
    room = load_room(scene)
    here = sorted({receptacle.kind for receptacle in room.receptacles})
    appliance, action = APPLIANCES.get(task_type), ACTIONS.get(task_type)
    lacks_lamp = task_type == TYPES["look"] and "DeskLamp" not in {kind for _, kind, _ in room.fixtures}
    if lacks_lamp or (appliance and appliance not in here):
        return {}
    found = {}
    for thing in room.things:
        fitting = [kind for kind in here if thing in _fits()[kind]]
        if FLOOR.get(thing) == 1 or (action and thing not in _wheel("constants")["VAL_ACTION_OBJECTS"][action]):
            continue
        parents = [""] if task_type == TYPES["look"] else [kind for kind in fitting if kind not in NEVER_ASKED]
        if task_type == TYPES["two"]:
            parents = [kind for kind in parents if kind not in SINGLE]
        parents = [p for p in parents if p != appliance and set(fitting) - _barred(task_type, p)]
        if parents:
            found[thing] = tuple(parents)
    return found


@functools.cache
def _rooms_with() -> Counter[str]:
    """How many rooms have each class of receptacle. ALFRED asked for rare ones more often than a fair draw would."""
    return Counter(kind for scene in ROOMS for kind in {"", *(r.kind for r in load_room(scene).receptacles)})


@functools.cache
def load_room(scene: int) -> Room:
    """A room from the wheel's layout, with what the layout misses; its own numbers decide where that stands."""
    layouts = wheel_folder() / "gen" / "layouts"
    classes = frozenset(json.loads((layouts / f"FloorPlan{scene}-objects.json").read_text()))
    poses: dict[str, list[float]] = json.loads((layouts / f"FloorPlan{scene}-openable.json").read_text())
    points = {(round(4 * x), round(4 * z)) for x, z in np.load(layouts / f"FloorPlan{scene}-layout.npy").tolist()}
    kind = next(kind for kind, scenes in _wheel("constants")["SCENE_TYPE"].items() if scene in scenes)
    rng = random.Random(f"room {scene}")
    receptacles = [
        Receptacle(fix(name), _class(name), _location(4 * x, 4 * z, turn / 90, tilt), _class(name) in OPENABLE)
        for name, (x, z, turn, tilt) in sorted(poses.items())
    ]
    for name in _missing(scene, classes, Counter(receptacle.kind for receptacle in receptacles)):
        x, z = rng.choice(sorted(points))
        location = _location(x, z, rng.randrange(4), 30)
        alike = [r for r in receptacles if r.kind in (name, "CounterTop")]
        if kind == "Kitchen" and alike and rng.random() < 0.2:
            location = alike[-1].location  # receptacles side by side are reached from one place, most often in kitchens
        spot = _point(name.removesuffix("Basin"), x / 4, rng.uniform(0, 1.5), z / 4)
        spot = fix(f"{spot}|{name}" if name.endswith("Basin") else spot)
        receptacles.append(Receptacle(spot, name, location, False))
    return Room(
        kind=kind,
        things=tuple(sorted(classes & _pickupable())),
        receptacles=tuple(receptacles),
        fixtures=tuple(_fixtures(classes, receptacles, rng)),
        points=tuple(sorted(points)),
    )


def _missing(scene: int, classes: frozenset[str], found: Mapping[str, int]) -> list[str]:
    """Classes of receptacles to add: every listed class has one at least, stoves four burners."""
    missing = [name for name in sorted(classes & _fits().keys() - CONTAINERS) if not found.get(name)]
    return (
        missing
        + ["StoveBurner"] * (3 if "StoveBurner" in missing else 0)
        + [name for name, rooms in MORE.items() for _ in range(rooms.get(scene, 0))]
    )


def _fixtures(
    classes: frozenset[str], receptacles: list[Receptacle], rng: random.Random
) -> Iterable[tuple[str, str, int]]:
    for name, (share, kinds) in FIXTURES.items():
        places = [i for i, receptacle in enumerate(receptacles) if receptacle.kind in kinds]
        if name in classes and places and rng.random() < share:
            first = min(kinds.index(receptacles[i].kind) for i in places)
            i = rng.choice([i for i in places if receptacles[i].kind == kinds[first]])
            yield fix(_point(name, rng.uniform(-4, 4), 1, rng.uniform(-4, 4))), name, i


def _things(room: Room, task_type: str, target: str, rng: random.Random) -> list[str]:
    """The classes of a game's things, those the task asks for first, with as many entries as there are things."""
    found = rng.choices([target], k=_number(TARGET_NUMBERS[task_type], rng))
    others = [name for name in room.things if name != target for _ in range(_number(NUMBERS.get(name, (1, 1, 1)), rng))]
    rng.shuffle(others)
    return found + others


def _number(weights: tuple[int, ...], rng: random.Random) -> int:
    return rng.choices(range(1, len(weights) + 1), weights)[0]


def _barred(task_type: str, parent: str) -> set[str]:
    """Where the things a task asks for do not start: never where they should go, nor where they are treated."""
    if task_type in (TYPES["pick"], TYPES["two"]):
        return {parent}
    return {APPLIANCES[task_type]} if task_type in APPLIANCES else set()


def _place(
    scene: int, things: list[str], target: str, barred: set[str], rng: random.Random
) -> list[tuple[str, int | None]]:
    """(class, number of its receptacle or None for the floor) of each thing."""
    receptacles = load_room(scene).receptacles
    full: set[int] = set()
    placed: list[tuple[str, int | None]] = []
    for thing in things:
        places = _places(scene, thing) if thing == target or rng.random() >= FLOOR.get(thing, 0) else {}
        kept = barred if thing == target else set()
        free = [i for i in places if i not in full and receptacles[i].kind not in kept]
        place = rng.choices(free, [places[i] for i in free])[0] if free else None
        if place is not None and receptacles[place].kind in SINGLE:
            full.add(place)
        placed.append((thing, place))
    return placed


@functools.cache
def _places(scene: int, thing: str) -> dict[int, float]:
    """Weights of the receptacles that a thing may start in, by number.

    In official games television stands hold what dressers do, although nothing can be put back there; paper-towel rolls
    stand where paper towels may, and teddy bears lie in bed.
    """
    room = load_room(scene)
    may = {kind for kind, fitting in _fits().items() if thing in fitting}
    may |= {kind for kind, fitting in _fits().items() if thing == "PaperTowelRoll" and "PaperTowel" in fitting}
    may |= ({"TVStand"} if "Dresser" in may else set()) | ({"Bed"} if thing == "TeddyBear" else set())
    return {i: WEIGHTS[room.kind].get(r.kind, 1.0) for i, r in enumerate(room.receptacles) if r.kind in may}


Fact = tuple[str, ...]
"""A predicate and its arguments."""

SIGNATURES = {
    "atLocation": ("agent", "location"),
    "receptacleAtLocation": ("receptacle", "location"),
    "objectAtLocation": ("object", "location"),
    "receptacleType": ("receptacle", "rtype"),
    "objectType": ("object", "otype"),
    "canContain": ("rtype", "otype"),
    "inReceptacle": ("object", "receptacle"),
    "inReceptacleObject": ("object", "object"),
    "openable": ("receptacle",),
    **dict.fromkeys(
        ("pickupable", "cleanable", "heatable", "coolable", "sliceable", "toggleable", "isReceptacleObject", "isCool"),
        ("object",),
    ),
}
"""alfred.pddl's types of the arguments of what an initial state says."""


@functools.cache
def _room_facts(scene: int) -> tuple[Fact, ...]:
    """What holds in every game of a room."""
    room = load_room(scene)
    here = room.receptacles
    facts: list[Fact] = [("receptacleType", r.name, f"{r.kind}Type") for r in here]
    facts += [("receptacleAtLocation", r.name, r.location) for r in here]
    facts += [("openable", r.name) for r in here if r.openable]
    facts += [
        ("canContain", f"{kind}Type", f"{thing}Type")
        for kind in sorted({r.kind for r in here})
        for thing in room.things
        if thing in _fits()[kind]
    ]
    for name, kind, i in room.fixtures:
        facts += [("objectType", name, f"{kind}Type"), ("inReceptacle", name, here[i].name)]
        facts += [("objectAtLocation", name, here[i].location)]
        facts += [("toggleable", name)] if kind == "DeskLamp" else []
    return tuple(facts)


def _thing_facts(scene: int, placed: list[tuple[str, int | None]], target: str, rng: random.Random) -> Iterable[Fact]:
    """What a game's things are and where; those a task asks for are cool if they start in the fridge."""
    receptacles = load_room(scene).receptacles
    names: dict[str, tuple[str, int | None]] = {}
    for kind, place in placed:
        name = _thing_name(kind, rng)
        while name in names:
            name = _thing_name(kind, rng)
        names[name] = kind, place
        yield "objectType", name, f"{kind}Type"
        yield from ((predicate, name) for predicate in _properties(kind))
        spot = receptacles[rng.randrange(len(receptacles)) if place is None else place]
        yield "objectAtLocation", name, spot.location
        if place is not None:
            yield "inReceptacle", name, spot.name
            if kind == target and spot.kind == "Fridge":
                yield "isCool", name
    yield from _tucked(scene, names, rng)


def _tucked(scene: int, names: dict[str, tuple[str, int | None]], rng: random.Random) -> Iterable[Fact]:
    """Perhaps one thing inside another that stands in the same receptacle: text shows both there, one also in it."""
    if load_room(scene).kind != "Kitchen" or rng.random() >= TUCKED_SHARE:
        return
    pairs = [
        (inner, outer)
        for outer, (container, place) in names.items()
        if container in CONTAINERS and place is not None
        for inner, (thing, where) in names.items()
        if where == place and thing in _fits()[container]
    ]
    if pairs:
        yield "inReceptacleObject", *rng.choice(pairs)


@functools.cache
def _properties(kind: str) -> tuple[str, ...]:
    """Predicates that hold of every thing of a class."""
    actions = _wheel("constants")["VAL_ACTION_OBJECTS"]
    found = [action.lower() for action in ("Cleanable", "Heatable", "Coolable", "Sliceable") if kind in actions[action]]
    return ("pickupable", *found, *(["isReceptacleObject"] if kind in CONTAINERS else []))


def _thing_name(kind: str, rng: random.Random) -> str:
    return fix(_point(kind, rng.uniform(-4, 4), rng.uniform(0, 2), rng.uniform(-4, 4)))


def _start(room: Room, rng: random.Random) -> Fact:
    """Where the agent starts: in front of no receptacle, so that it sees the whole room."""
    taken = {receptacle.location for receptacle in room.receptacles}
    while True:
        location = _location(*rng.choice(room.points), rng.randrange(4), 30)
        if location not in taken:
            return "atLocation", "agent1", location


def _problem(facts: Iterable[Fact], goal: str) -> str:
    """A PDDL problem; its objects are what its facts speak of, and what alfred.pddl takes for granted."""
    facts = list(facts)
    objects = {f"{word} - {kind}" for fact in facts for word, kind in zip(fact[1:], SIGNATURES[fact[0]], strict=True)}
    declared = "\n".join(sorted(objects.union(NAMED_BY_DOMAIN)))
    init = "\n".join(f"({' '.join(fact)})" for fact in facts)
    goal = goal.replace("#", "-").strip()  # it ends with the bracket that closes the problem
    return f"(define (problem plan)\n(:domain alfred)\n(:objects\n{declared}\n)\n(:init\n{init}\n)\n{goal}\n"


def shares(weights: Mapping[str, int], size: int) -> dict[str, int]:
    """`size` split in proportion to weights, by largest remainder; of equal remainders the first named wins."""
    total = sum(weights.values())
    parts = {name: size * weight // total for name, weight in weights.items()}
    for name in sorted(weights, key=lambda name: -(size * weights[name] % total))[: size - sum(parts.values())]:
        parts[name] += 1
    return parts


def _rooms_for(task_type: str, kind: str, split: str) -> list[int]:
    """Rooms of a kind in a split that have a task of a type."""
    rooms = UNSEEN_ROOMS if split == "unseen" else set(ROOMS) - UNSEEN_ROOMS - TEST_ROOMS
    return [scene for scene in sorted(rooms) if load_room(scene).kind == kind and tasks(task_type, scene)]


def fix(name: str) -> str:
    """A simulator's id as PDDL can write it, in ALFWorld's way: `Mug|-00.88` is `Mug_bar__minus_00_dot_88`."""
    for mark, word in (("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_"), ("|", "_bar_")):
        name = name.replace(mark, word)
    return name


def _point(kind: str, x: float, y: float, z: float) -> str:
    return f"{kind}|{x:+06.2f}|{y:+06.2f}|{z:+06.2f}"


def _location(x: float, z: float, turns: float, tilt: float) -> str:
    return fix(f"loc|{round(x)}|{round(z)}|{round(turns)}|{round(tilt)}")


def _class(name: str) -> str:
    """The class of a receptacle: `Sink|-01.90|+00.97|-01.50|SinkBasin` is a SinkBasin."""
    last = name.rpartition("|")[2]
    return last if last.endswith("Basin") else name.partition("|")[0]


@functools.cache
def _fits() -> dict[str, frozenset[str]]:
    """{class of receptacle: classes of things that can be put into it}."""
    return {kind: frozenset(things) for kind, things in _wheel("constants")["VAL_RECEPTACLE_OBJECTS"].items()}


@functools.cache
def _pickupable() -> frozenset[str]:
    """Classes of things that can be picked up: what fits somewhere, and what is only ever found lying about."""
    return frozenset().union(*_fits().values(), FLOOR, NUMBERS)


@functools.cache
def _wheel(module: str) -> dict[str, Any]:
    """The names of a module of `alfworld.gen`, run from its file.

    Importing it would run `alfworld/__init__.py`, which makes a folder in the user's cache and sets ALFWORLD_DATA.
    """
    return runpy.run_path(str(wheel_folder() / "gen" / f"{module}.py"))


@functools.cache
def wheel_folder() -> Path:
    """The folder of the installed package `alfworld`, which is not imported.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package alfworld is not installed; ALFWorld's games are made from its files")
    return Path(spec.origin).parent
