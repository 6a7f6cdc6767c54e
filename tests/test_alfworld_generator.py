import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from envs.alfworld import generator
from envs.alfworld.generator import ROOMS, TEST_ROOMS, TYPES, UNSEEN_ROOMS, Draft, draw, generate, load_room, tasks

SEEN_TYPES = {"pick": 35, "look": 13, "clean": 27, "heat": 16, "cool": 25, "two": 24}
UNSEEN_TYPES = {"pick": 24, "look": 18, "clean": 31, "heat": 23, "cool": 21, "two": 17}
NAMES = {name: short for short, name in TYPES.items()}


def digest(drafts: list[Draft]) -> str:
    return hashlib.sha256(repr(drafts).encode()).hexdigest()


def facts(draft: Draft) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in re.findall(r"\((\w+(?: [\w-]+)+)\)", draft.problem.partition("(:init")[2].partition("(:goal")[0]):
        predicate, *arguments = line.split()
        found.setdefault(predicate, []).append(tuple(arguments))
    return found


@pytest.fixture(scope="module")
def drafts() -> list[Draft]:
    return generate("train", 300, 5)


def test_another_process_makes_the_same_games():
    script = (
        "import hashlib, sys; from envs.alfworld.generator import generate;"
        "print(hashlib.sha256(repr(generate('seen', 40, 7)).encode()).hexdigest(), 'alfworld' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "99"}
    environment.pop("ALFWORLD_DATA", None)
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [digest(generate("seen", 40, 7)), "False"]
    assert digest(generate("seen", 40, 8)) != out.stdout.split()[0]


@pytest.mark.parametrize(("split", "wanted"), [("seen", SEEN_TYPES), ("unseen", UNSEEN_TYPES)])
def test_splits_of_official_size_have_the_official_numbers(split, wanted):
    games = generate(split, sum(wanted.values()), 0)
    assert Counter(NAMES[game.task_type] for game in games) == wanted
    kinds = Counter(load_room(game.scene).kind for game in games)
    if split == "unseen":
        assert {game.scene for game in games} == UNSEEN_ROOMS
        assert kinds == {"Kitchen": 77, "LivingRoom": 11, "Bedroom": 27, "Bathroom": 19}
    else:
        assert kinds == {"Kitchen": 68, "LivingRoom": 17, "Bedroom": 25, "Bathroom": 30}


def test_any_size_is_kept_and_six_games_are_of_six_types():
    assert [len(generate("train", size, 0)) for size in (0, 1, 5, 37)] == [0, 1, 5, 37]
    assert {game.task_type for game in generate("train", 6, 0)} == set(TYPES.values())
    assert generator.shares({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}


def test_rooms_of_splits_do_not_meet(drafts):
    assert len(ROOMS) == 120
    scenes = {game.scene for game in [*drafts, *generate("seen", 300, 5)]}
    assert not scenes & (UNSEEN_ROOMS | TEST_ROOMS)
    assert len(scenes) > 100


def test_games_are_distinct(drafts):
    games = [*drafts, *generate("seen", 100, 5), *generate("train", 100, 6)]
    assert len({game.digest for game in games}) == len({game.problem for game in games}) == len(games)


def test_more_games_are_the_same_games_and_some_more():
    digests = [{game.digest for game in generate("seen", size, 3)} for size in (20, 21, 60)]
    assert len(digests[0] & digests[1]) >= 19
    assert len(digests[0] & digests[2]) >= 18
    looking = {game.digest for game in generate("seen", 10, 3, [TYPES["look"]])}
    assert digests[2] & looking


def test_every_room_makes_each_of_its_types_and_every_kind_has_the_types_it_should(drafts):
    valid = generator._wheel("constants")["GOALS_VALID"]
    rng = generator.random.Random(0)
    for scene in ROOMS:
        possible = [name for name in TYPES.values() if tasks(name, scene)]
        kind = load_room(scene).kind
        assert all(kind in valid[name] for name in possible)
        assert TYPES["pick"] in possible
        assert TYPES["two"] in possible
        assert kind != "Kitchen" or len(possible) == 5
        for name in possible:
            check(draw(name, scene, 0, rng))
    with pytest.raises(ValueError, match=r"room 1 has no task of type look_at"):
        draw(TYPES["look"], 1, 0, rng)


def test_games_keep_the_rules(drafts):
    for game in drafts:
        check(game)


def check(game: Draft) -> None:
    """What holds in every official game."""
    known = facts(game)
    room = load_room(game.scene)
    kinds = {name: kind.removesuffix("Type") for name, kind in known["objectType"]}
    taken = {name for (name,) in known["pickupable"]}
    places = {name: kind.removesuffix("Type") for name, kind in known["receptacleType"]}
    inside = dict(known["inReceptacle"])
    target, parent = game.params["object_target"], game.params["parent_target"]
    assert {kinds[name] for name in taken} == set(room.things)
    assert Counter(places.values()) == Counter(receptacle.kind for receptacle in room.receptacles)
    targets = [name for name in taken if kinds[name] == target]
    assert len(targets) >= 1 + (game.task_type == TYPES["two"])
    starts = {places[inside[name]] for name in targets}
    barred = {"pick": parent, "two": parent, "clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge", "look": ""}
    assert barred[NAMES[game.task_type]] not in starts
    assert parent != generator.APPLIANCES.get(game.task_type)
    assert parent == "" or parent in places.values()
    if parent:
        assert (f"{parent}Type", f"{target}Type") in known["canContain"]
    if game.task_type == TYPES["look"]:
        assert any(kinds[name] == "DeskLamp" and name in inside for (name,) in known["toggleable"])
    in_fridge = {name for name in targets if places[inside[name]] == "Fridge"}
    assert {name for (name,) in known.get("isCool", [])} == in_fridge
    held = Counter(place for name, place in inside.items() if name in taken)
    assert all(held[name] <= 1 for name, kind in places.items() if kind in generator.SINGLE)
    ((_, start),) = known["atLocation"]
    assert start not in {location for _, location in known["receptacleAtLocation"]}
    assert all(inside[inner] == inside[outer] for inner, outer in known.get("inReceptacleObject", []))
    assert not known.keys() & {"opened", "isOn", "isHot", "isClean", "isSliced", "moveable"}
    assert game.problem.count("(") == game.problem.count(")")


def test_goals_are_sentences_of_the_goal_library_each_as_often(drafts):
    library = generator._wheel("goal_library")["gdict"]
    used = Counter()
    for game in drafts:
        words = {"obj": game.params["object_target"], "recep": game.params["parent_target"]}
        words |= {"toggle": game.params["toggle_target"], "mrecep": ""}
        templates = [
            t.format(**{k: str(v).lower() for k, v in words.items()}) for t in library[game.task_type]["templates"]
        ]
        used[game.task_type, templates.index(game.goal)] += 1
        assert not game.goal.endswith(".")
    assert all(abs(used[name, 0] - used[name, 1]) <= 1 for name in TYPES.values())


def test_unknown_splits_and_sizes_are_refused():
    with pytest.raises(ValueError, match="split 'valid_seen' is unknown; choose one of train, seen, unseen"):
        generate("valid_seen", 1, 0)
    with pytest.raises(ValueError, match="size is -1"):
        generate("train", -1, 0)


def game_file(draft: Draft) -> dict[str, object]:
    data = generator.wheel_folder() / "data"
    return {
        "pddl_domain": (data / "alfred.pddl").read_text(),
        "grammar": (data / "alfred.twl2").read_text().replace("UNKNOWN GOAL", draft.goal),
        "pddl_problem": draft.problem,
        "solvable": True,
        "walkthrough": None,
    }


def test_the_unmodified_engine_plays_a_game(drafts, monkeypatch):
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl import PddlEnv

    monkeypatch.setattr(sys, "argv", sys.argv[:])  # the engine's translator overwrites it
    draft = next(
        game for game in drafts if game.task_type == TYPES["pick"] and load_room(game.scene).kind == "Bathroom"
    )
    env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
    env.load(game_file(draft))
    state = env.reset()
    assert state.feedback.startswith("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room.")
    assert state.feedback.endswith(f"Your task is to: {draft.goal}.")
    counts = Counter(receptacle.kind.lower() for receptacle in load_room(draft.scene).receptacles)
    names = [f"{kind} {n}" for kind in sorted(counts) for n in range(counts[kind], 0, -1)]
    assert re.findall(r"\ba (\w+ \d+)", state.feedback) == names
    assert set(state.admissible_commands) == {*(f"go to {name}" for name in names), "help", "inventory", "look"}
    target, parent = str(draft.params["object_target"]).lower(), str(draft.params["parent_target"]).lower()
    state = act(env, find(env, state, names, rf"take {target} \d+ from .+"))
    goal = next(name for name in names if name.startswith(parent))
    state = act(env, f"go to {goal}") if f"go to {goal}" in state.admissible_commands else state
    state = act(env, f"open {goal}") if f"open {goal}" in state.admissible_commands else state
    state = act(env, next(c for c in state.admissible_commands if re.fullmatch(rf"move {target} \d+ to {goal}", c)))
    assert state.won


def act(env, command):
    return env.step(command)[0]


def find(env, state, names, pattern):
    """Goes from receptacle to receptacle, opening what is closed, until a command is there that fits the pattern."""
    for name in names:
        for command in (f"go to {name}", f"open {name}"):
            if command in state.admissible_commands:
                state = act(env, command)
        for command in state.admissible_commands:
            if re.fullmatch(pattern, command):
                return command
    raise AssertionError(pattern)


def test_the_package_collects_a_tree_of_games(drafts, tmp_path):
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    for i, draft in enumerate(drafts[:3]):
        folder = tmp_path / f"game{i}" / "trial"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(json.dumps(game_file(draft)))
        (folder / "traj_data.json").write_text(json.dumps({"task_type": draft.task_type, "pddl_params": draft.params}))
    config = {
        "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"data_path": str(tmp_path), "num_train_games": -1},
    }
    assert len(AlfredTWEnv(config).game_files) == 3
