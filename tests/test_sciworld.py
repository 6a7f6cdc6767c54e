import asyncio
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

import envs
from envs import MALFORMED, SPLITS
from envs.pool import EnvironmentFailure, EnvPool
from envs.sciworld import (
    EXAMPLE,
    INSTRUCTION,
    STEP_LIMITS,
    TASKS,
    VERBS,
    ScienceWorld,
    Settings,
)
from envs.sciworld.expert import RULES, as_shown, plans, think
from envs.sciworld.simulator import DOORS, Jvm, _room_walks
from envs.sciworld.splits import published
from pipeline.splits import overlaps
from tests.env_checker import check_class, check_env
from tests.test_pool import descendants, killed_parent, wait_gone

SOLVED = {
    "boil": 2,
    "change-the-state-of-matter-of": 0,
    "chemistry-mix": 16,
    "chemistry-mix-paint-secondary-color": 4,
    "chemistry-mix-paint-tertiary-color": 3,
    "find-animal": 7,
    "find-living-thing": 151,
    "find-non-living-thing": 226,
    "find-plant": 2,
    "freeze": 0,
    "grow-fruit": 0,
    "grow-plant": 0,
    "identify-life-stages-1": 1,
    "identify-life-stages-2": 0,
    "lifespan-longest-lived": 3,
    "lifespan-longest-lived-then-shortest-lived": 62,
    "lifespan-shortest-lived": 124,
    "measure-melting-point-known-substance": 0,
    "melt": 14,
    "power-component": 10,
    "power-component-renewable-vs-nonrenewable-energy": 19,
    "test-conductivity": 450,
    "test-conductivity-of-unknown-substances": 599,
    "use-thermometer": 1,
}
"""A variation of each task whose solution reaches the full reward."""

Step = tuple[str, float, bool, bool, envs.Info]


@pytest.fixture(scope="module")
def env():
    with ScienceWorld() as env:
        yield env


@pytest.fixture(scope="module")
def solutions(env):
    return {
        f"sciworld:{task}:{variation}": env.expert(f"sciworld:{task}:{variation}") for task, variation in SOLVED.items()
    }


@pytest.fixture(scope="module")
def alone(env, solutions):
    return {task: play(env, task, [step.action for step in solution]) for task, solution in solutions.items()}


def play(env: ScienceWorld, task: str, actions: list[str]) -> list[Step]:
    env.reset(options={"task": task})
    return [env.step(action) for action in actions]


class TestWithoutJava:
    def test_class(self):
        check_class(ScienceWorld)
        assert envs.load("sciworld") is ScienceWorld
        assert "1.2.3" in ScienceWorld.fingerprint(Settings())
        assert ScienceWorld.fingerprint(Settings()) != ScienceWorld.fingerprint(Settings(simplification="openDoors"))

    def test_the_instruction_is_short_and_names_every_room(self):
        assert len(TASKS) == 24
        assert len(INSTRUCTION.split()) < 150
        assert all(room in INSTRUCTION for room in DOORS)

    def test_settings(self):
        assert Settings().tasks == list(TASKS)
        with pytest.raises(ValidationError, match="unknown ScienceWorld task 'bake'; known: boil, change-the-state"):
            Settings(tasks=["boil", "bake"])
        with pytest.raises(ValidationError, match="named twice"):
            Settings(tasks=["boil", "boil"])
        with pytest.raises(ValidationError, match="unknown ScienceWorld simplification 'hard'"):
            Settings(simplification="openDoors,hard")
        with pytest.raises(ValidationError, match="extra"):
            Settings(levels=3)
        assert all(field.description for field in Settings.model_fields.values())

    def test_official_ids(self):
        assert ScienceWorld.official_id({"id": "0_3"}, None) == "sciworld:boil:3"
        assert ScienceWorld.official_id({"id": "6_12"}, None) == "sciworld:use-thermometer:12"
        assert ScienceWorld.official_id({"id": "24_1"}, None) == "sciworld:identify-life-stages-2:1"
        for wrong in ({"id": "5_1"}, {"id": "25_1"}, {"id": "boil"}, {}):
            with pytest.raises(ValueError, match="no ScienceWorld task"):
                ScienceWorld.official_id(wrong, None)
        assert (
            ScienceWorld.official_task("Task Description:\nYour task is to boil water.")
            == "Your task is to boil water."
        )

    def test_verbs(self):
        for known in ("put apple in oven", "Turn on stove", "12"):
            assert ScienceWorld.official_turn(known, "so", Settings()) == (known, "so")
        with pytest.raises(ValueError, match=r"no action 'heat apple with oven' \(verb 'heat'\)"):
            ScienceWorld.official_turn("heat apple with oven", "so", Settings())

    def test_room_walks_go_through_doors_to_every_room(self):
        for start, walk in _room_walks().items():
            assert {start, *walk} == set(DOORS)
            assert all(there in DOORS[here] for here, there in zip([start, *walk], walk, strict=False))
        assert all(here in DOORS[there] for here, doors in DOORS.items() for there in doors)

    def test_no_java(self, monkeypatch, tmp_path):
        monkeypatch.setattr(Jvm, "_shared", None)
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=r"needs Java 8 or later, and no `java` is on the path: install"):
            ScienceWorld()
        (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "java").chmod(0o755)
        with pytest.raises(ValueError, match=r"`.*java` did not start the simulator: install"):
            ScienceWorld()


class TestExpert:
    TASK = "Your task is to find a(n) animal. First, focus on the thing. Then, move it to the red box in the kitchen."
    GOLD = (
        "open door to greenhouse|go to greenhouse|open door to outside|go to outside|look around|focus on butterfly"
        "|pick up butterfly|open door to kitchen|go to kitchen|move egg butterfly egg in inventory to red box"
    )

    def test_plans_teleport_and_look_where_they_must(self):
        first, *_, last = plans(self.GOLD.split("|"), self.TASK)
        assert first == [
            "teleport to outside",
            "look around",
            "focus on butterfly",
            "pick up butterfly",
            "teleport to kitchen",
            "move butterfly egg to red box",
        ]
        assert last == self.GOLD.split("|")

    def test_plans_look_before_they_touch_what_nobody_named(self):
        first = next(plans(["go to outside", "focus on baby baby brown bear"], "Focus on the oldest animal."))
        assert first == ["teleport to outside", "look around", "focus on baby brown bear"]

    def test_plans_name_eggs_as_rooms_do(self):
        gold = ["focus on egg turtle", "pick up egg turtle", "move egg turtle egg in inventory to red box"]
        assert next(plans(gold, "")) == ["focus on turtle egg", "pick up turtle egg", "move turtle egg to red box"]

    def test_plans_keep_time_and_wait_long(self):
        gold = ["open door to hallway", "go to hallway", *["wait1"] * 8, "focus on cat", "pour cup into cup"]
        long, short, timed_long, timed, raw = plans(gold, "")
        assert long == ["teleport to hallway", "look around", "wait", "focus on cat"]
        assert short.count("wait1") == 8
        assert timed.count("wait1") == 9
        assert timed_long == long
        assert raw == gold

    def test_things_are_called_as_they_were_shown(self):
        looks = [("look around", "Here you see: \n\ta butterfly egg\n\tan axe"), ("open axe", "It has no door.")]
        focus = ("focus on butterfly", "You focus on the butterfly egg.")
        rest = [("pick up butterfly", "You move the butterfly."), ("move butterfly egg to red box", "")]
        assert as_shown([*looks, focus, *rest]) == [
            *("look around", "open axe", "focus on butterfly egg", "pick up butterfly egg"),
            "move butterfly egg to red box",
        ]
        assert as_shown([focus, *rest]) == [focus[0], *(action for action, _ in rest)]  # nothing was shown
        hidden = ("focus on steel table", "You focus on the table.")
        assert as_shown([*looks, hidden]) == ["look around", "open axe", "focus on steel table"]

    def test_thoughts(self):
        seen = [
            ("look around", "a dog"),
            ("use thermometer on dog", "the thermometer measures a temperature of 30 degrees"),
        ]
        measure = "Your task is to measure the temperature of the dog, which is outside. First, focus on the dog."
        assert think(self.TASK, seen, "focus on cat") == "I see the cat, which is an animal, so I focus on it."
        assert (
            think(measure, [], "look around")
            == "My task is to measure the temperature of the dog. First I see where I am."
        )
        assert (
            think(measure, seen, "move dog in inventory to red box")
            == "It is 30 degrees, so the dog belongs in the red box."
        )
        assert think(measure, seen, "dance") == "The next step is to dance."
        assert len({think(f"{number}", [("", "")], "wait") for number in range(20)}) == 2

    def test_rules_fill_what_they_find(self):
        for rule in RULES:
            places = re.compile(rule.action).groups
            for thought in rule.thoughts:
                thought.format(*["x"] * places, goal="g", seen="s", wanted="w")
                assert ("{seen}" not in thought) or rule.seen
                assert ("{wanted}" not in thought) or re.compile(rule.goal).groups


@pytest.mark.java
class TestSimulator:
    def test_contract(self):
        check_env(ScienceWorld(), "sciworld:power-component:10")

    def test_splits(self, env):
        splits = {split: env.tasks(split) for split in SPLITS}
        assert [len(tasks) for tasks in splits.values()] == [1408, 199, 211]
        assert splits["train"][:2] == ["sciworld:boil:0", "sciworld:boil:1"]  # all 14 are taken
        for task in ("find-plant", "use-thermometer", "identify-life-stages-1"):
            env._server.load(task, 0, "easy")
            ranges = env._server._server.getVariationsTrain, env._server._server.getVariationsDev
            for split, numbers in zip(("train", "seen"), ranges, strict=True):
                most, numbers = 120 if split == "train" else 10, list(numbers())
                taken = [int(t.split(":")[2]) for t in splits[split] if env.kind(t) == task]
                assert len(taken) == min(most, len(numbers))
                assert set(taken) <= set(numbers)
                gaps = np.diff(taken)
                assert gaps.min() > 0  # in order, and none twice
                assert gaps.max() - gaps.min() <= 1  # evenly spaced
        with ScienceWorld(Settings(tasks=["find-plant"], train_variations=2, eval_variations=1)) as small:
            assert [small.tasks(split) for split in SPLITS] == [
                ["sciworld:find-plant:0", "sciworld:find-plant:75"],
                ["sciworld:find-plant:150"],
                ["sciworld:find-plant:225"],
            ]

    def test_published_lists_are_played_without_their_leaks(self, tmp_path):
        lists = {
            "train": [["task-3-find-plant", 1], ["task-3-find-plant", 160], ["task-3-find-plant", 1]],
            "dev": [["task-3-find-plant", 160], ["task-10-measure-melting-point-(known-substance)", 300]],
            "test": [["task-3-find-plant", 230], ["task-1-boil", 25]],
        }
        for name, pairs in lists.items():
            (tmp_path / f"{name}_indices.json").write_text(json.dumps(pairs))
        with ScienceWorld(Settings(splits=tmp_path)) as official:
            assert {split: official.tasks(split) for split in SPLITS} == {
                "train": ["sciworld:find-plant:1"],
                "seen": ["sciworld:find-plant:160", "sciworld:measure-melting-point-known-substance:300"],
                "unseen": ["sciworld:boil:25", "sciworld:find-plant:230"],
            }
            assert [len(tasks) for tasks in official.published().values()] == [3, 2, 2]
            assert overlaps(official.published())["train", "seen"] == 1
        key = ScienceWorld.relevant(Settings(splits=tmp_path), "seen")["splits"]
        (tmp_path / "dev_indices.json").write_text("[]")
        assert ScienceWorld.relevant(Settings(splits=tmp_path), "seen")["splits"] != key
        assert "splits" not in ScienceWorld.relevant(Settings(), "seen")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", "test_indices.json is no list of tasks and variations"),
            ('[["task-9-mendelian-genetics", 3]]', "'mendelian-genetics' is no ScienceWorld task in use"),
        ],
    )
    def test_broken_lists_are_named(self, tmp_path, text, message):
        for name in ("train", "dev", "test"):
            (tmp_path / f"{name}_indices.json").write_text(text if name == "test" else "[]")
        with pytest.raises(ValueError, match=message):
            published(tmp_path, TASKS)

    def test_example_is_real_and_in_no_split(self, env):
        task = "sciworld:find-living-thing:140"
        assert all(task not in env.tasks(split) for split in SPLITS)
        observation, _ = env.reset(options={"task": task})
        for question, answer in EXAMPLE:
            assert question.removeprefix("Observation: ") == observation
            observation, _, terminated, _, info = env.step(answer.partition("Action: ")[2])
        assert terminated
        assert info["success"]

    @pytest.mark.parametrize("task", ["sciworld:find-animal:0", "sciworld:find-living-thing:0"])
    def test_experts_name_what_is_in_sight(self, env, task):
        """Gold paths say `butterfly` to a `butterfly egg`."""
        steps = env.expert(task)
        shown = next(step.observation for step in steps if step.action == "look around")
        named = next(step.action for step in steps if step.action.startswith("focus on ")).removeprefix("focus on ")
        assert f"\ta {named}\n" in shown
        assert f"pick up {named}" in [step.action for step in steps]
        assert play(env, task, [step.action for step in steps])[-1][4]["success"]

    def test_verbs_are_the_grammars(self, env):
        env.reset(options={"task": "sciworld:power-component:0"})
        actions = env._server._interface.actionHandler().getActions()
        triggers = " ".join(action.triggers().mkString(" ") for action in actions)
        starts = re.findall(r"Pattern: List\(ActionExprOR\(orElements: (.*?)\)", triggers)
        assert {phrase.split()[0] for start in starts for phrase in start.split(",")} | {"help", "objects"} == VERBS

    def test_doors_are_the_simulators(self, env):
        env.reset(options={"task": "sciworld:boil:3"})
        for room, doors in DOORS.items():
            env.step(f"teleport to {room}")
            seen = re.findall(r"A door to the (.+?) \(that is open\)", env.step("look around")[0])
            assert tuple(sorted(seen)) == doors

    def test_step_limits(self, env):
        for task in ("find-plant", "lifespan-shortest-lived"):
            env.reset(options={"task": f"sciworld:{task}:0"})
            for number in range(1, STEP_LIMITS[task] + 1):
                _, _, terminated, truncated, _ = env.step("look around" if number % 2 else MALFORMED)
                assert not terminated
                assert truncated == (number == STEP_LIMITS[task])
            with pytest.raises(ValueError, match="call reset"):
                env.step("look around")

    def test_rewards_are_the_best_score_so_far(self, env):
        steps = play(env, "sciworld:find-plant:2", ["teleport to greenhouse", MALFORMED, "dance", "reset task"])
        assert steps[0][1] > 0
        assert [step[1] for step in steps[1:]] == [0, 0, 0]
        assert [step[4]["reward"] for step in steps] == [steps[0][1]] * 4
        assert [step[4]["valid"] for step in steps] == [True, False, False, True]
        assert steps[2][0] == "No known action matches that input."

    def test_wrong_focus_ends_the_episode_and_keeps_the_reward(self, env):
        actions = ["teleport to outside", "look around", "focus on axe"]
        steps = play(env, "sciworld:lifespan-shortest-lived:0", actions)
        assert steps[1][4]["reward"] == 0.5
        assert steps[2][1:] == (0.0, True, False, {"reward": 0.5, "success": False, "valid": True})

    def test_ambiguous_requests(self, env):
        steps = play(
            env, "sciworld:boil:0", ["open door", "2", "open door", "blue", "look around", "open door", MALFORMED]
        )
        assert steps[0][0].startswith("Ambiguous request: Please enter the number")
        assert steps[0][4]["valid"]
        assert steps[1][0] == "The door is already open."
        assert not steps[3][4]["valid"]
        assert steps[3][0].startswith("Unknown action.")
        assert "room is called" in steps[4][0]
        assert env.valid_actions()[:2] == ["0", "1"]  # a malformed reply leaves the question open

    def test_valid_actions_are_understood(self, env):
        env.reset(options={"task": "sciworld:boil:0"})
        actions = env.valid_actions()
        assert "teleport to kitchen" in actions
        assert "look around" in actions
        assert "reset task" not in actions
        chance = random.Random(0)
        for _ in range(15):  # the simulator's own list has a third that its parser refuses, in a room with cupboards
            *_, terminated, truncated, info = env.step(chance.choice(actions))
            assert info["valid"]
            if terminated or truncated:
                env.reset(options={"task": "sciworld:melt:0"})
                env.step("teleport to kitchen")
            actions = env.valid_actions()

    def test_nothing_of_the_last_episode_is_left(self, env):
        play(env, "sciworld:lifespan-shortest-lived:0", ["teleport to outside", "focus on axe"])
        (step,) = play(env, "sciworld:lifespan-shortest-lived:0", ["task"])
        assert step[1:] == (0.0, False, False, {"reward": 0.0, "success": False, "valid": True})

    def test_bad_tasks(self, env):
        for task in ("sciworld:boil:30", "sciworld:boil:-1", "sciworld:mendelian-genetics-known-plant:0", "boil:0", ""):
            with pytest.raises(ValueError, match="No such ScienceWorld task"):
                env.reset(options={"task": task})

    def test_odd_actions_do_no_harm(self, env):
        odd = [
            "help",
            "objects",
            "task",
            "0",
            "999999999999",
            "a the",
            "é \U0001f600\tx\ny",
            "look at look at",
            "x" * 5000,
        ]
        steps = play(env, "sciworld:test-conductivity:0", odd)
        assert all(step[0] for step in steps)
        assert not any(step[2] for step in steps)

    def test_seed_decides_what_animals_do(self, env):
        def watch(seed: int | None) -> list[str]:
            env.reset(options={"task": "sciworld:grow-fruit:0"}, seed=seed)
            return [
                env.step(action)[0] for action in ["teleport to greenhouse", "open bee hive", "wait", "look around"]
            ]

        assert watch(None) == watch(0) == watch(0)
        assert len({str(watch(seed)) for seed in range(4)}) > 1

    def test_close_ends_the_jvm_with_the_last_environment(self, monkeypatch):
        monkeypatch.setattr(Jvm, "_shared", None)  # a JVM of its own: other tests hold theirs
        one = ScienceWorld()
        two = ScienceWorld()
        assert one._jvm is two._jvm
        pid = one._jvm.process.pid
        one.close()
        one.close()
        assert two.tasks("seen")
        two.close()
        wait_gone([pid])


@pytest.mark.java
@pytest.mark.slow
class TestSolutions:
    def test_reach_the_full_reward_and_replay(self, solutions, alone):
        for task, solution in solutions.items():
            assert alone[task][-1][4]["reward"] == 1, task
            assert [step[0] for step in alone[task]] == [step.observation for step in solution]
            assert all(5 < len(step.thought.split()) < 30 for step in solution)

    def test_worlds_in_one_jvm_do_not_disturb_each_other(self, solutions, alone):
        """What is played in turns, step by step, with loads in between, is what is played alone."""
        worlds = {task: ScienceWorld() for task in solutions}
        turns: dict[str, list[Step]] = {task: [] for task in solutions}
        try:
            for number in range(max(map(len, solutions.values())) + len(worlds)):
                for begin, (task, world) in enumerate(worlds.items()):
                    turn = number - begin  # they begin one after the other
                    if turn == 0:
                        world.reset(options={"task": task})
                    if 0 <= turn < len(solutions[task]):
                        turns[task].append(world.step(solutions[task][turn].action))
                        if turn % 10 == 5:
                            world.valid_actions()  # draws from the simulator's generator
            assert turns == alone
        finally:
            for world in worlds.values():
                world.close()

    def test_replay_in_another_jvm(self, solutions, alone):
        """Another process, another history of the JVM, another order: the same observations and scores."""
        tasks = list(solutions)[::-4]
        script = (
            "import pickle, sys; from tests.test_sciworld import *\n"
            "tasks = pickle.load(sys.stdin.buffer)\n"
            "with ScienceWorld() as env:\n"
            "    pickle.dump({task: play(env, task, actions) for task, actions in tasks.items()}, sys.stdout.buffer)"
        )
        asked = {task: [step.action for step in solutions[task]] for task in tasks}
        run = subprocess.run(
            [sys.executable, "-c", script],
            input=pickle.dumps(asked),
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
        assert pickle.loads(run.stdout) == {task: alone[task] for task in asked}


class Hungry(ScienceWorld):
    """Wants more memory of its JVM than there is."""

    def valid_actions(self):
        java = self._jvm.gateway
        with self._jvm.turn(self._server, "hunger"):
            return list(java.new_array(java.jvm.byte, 2**28))


@pytest.mark.java
class TestPool:
    async def test_a_full_heap_is_named(self):
        async with EnvPool(Hungry, Settings(heap_mb=128)) as pool, pool.session() as env:
            with pytest.raises(EnvironmentFailure, match=r"ran out of its 128 MB with 1 .*env\.sciworld\.heap_mb"):
                await env.call("valid_actions")

    async def test_a_killed_jvm_is_a_failure_and_is_replaced(self):
        async with EnvPool("sciworld", slots=2) as pool:
            async with pool.session() as env:
                await env.reset("sciworld:boil:0")
                (worker,) = [pid for pid in descendants(os.getpid()) if "envs.pool" in _command(pid)]
                (java,) = [pid for pid in descendants(worker) if "java" in _command(pid)]
                os.kill(java, signal.SIGKILL)
                with pytest.raises(EnvironmentFailure):
                    await env.step("look around")
            async with pool.session() as env:
                assert await env.reset("sciworld:boil:0")
                os.kill(worker, signal.SIGKILL)
                (java,) = [pid for pid in descendants(worker) if "java" in _command(pid)] or [java]
                with pytest.raises(EnvironmentFailure):
                    await env.step("look around")
            wait_gone([worker, java])

    async def test_no_java_is_one_sentence(self, monkeypatch, tmp_path):
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        async with EnvPool("sciworld") as pool:
            with pytest.raises(ValueError, match="needs Java 8 or later"):
                await asyncio.wait_for(_open(pool), 60)

    def test_no_jvm_outlives_a_killed_parent(self, tmp_path):
        pids = killed_parent(tmp_path, "envs.sciworld:ScienceWorld", "Settings()", "sciworld:find-plant:0", busy=False)
        assert pids
        wait_gone(pids)


async def _open(pool: EnvPool) -> None:
    async with pool.session():
        pass


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
