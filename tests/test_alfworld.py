import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from envs import SPLITS, NoSolutionError
from envs.alfworld import AlfWorld, Settings, games
from envs.alfworld.expert import UnwinnableError, privileged_plan, spoken
from envs.alfworld.generator import TEST_ROOMS, UNSEEN_ROOMS, generate
from envs.pool import EnvPool
from pipeline.config import PlayConfig
from pipeline.experts import keep_training_tasks, read_official
from pipeline.play import Episode, play_episodes
from pipeline.recipe import load
from pipeline.records import EpisodeStatus, JsonlAppender, Trajectory, read_jsonl
from tests.env_checker import check_env
from tests.official_alfworld import SAMPLE, official_games, write_tree
from tests.planned import Planned
from tests.test_pool import descendants, wait_gone

SIZES = {"train_games": 12, "seen_games": 6, "unseen_games": 6}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with generated games, made as a run makes them; its path has a space."""
    folder = tmp_path_factory.mktemp("a home")
    here = Path.cwd()
    os.chdir(folder)
    try:
        AlfWorld.prepare(Settings(**SIZES), processes=1)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def settings(home, monkeypatch):
    monkeypatch.chdir(home)
    return Settings(**SIZES)


@pytest.fixture
def env(settings):
    with AlfWorld(settings) as env:
        yield env


def first(env, kind, split="train"):
    return next(task for task in env.tasks(split) if env.kind(task) == kind)


def solved(env):
    """The games that the expert solves, of all splits, with its steps."""
    for task in (task for split in SPLITS for task in env.tasks(split)):
        with contextlib.suppress(NoSolutionError):
            yield task, env.expert(task)


def play(env, actions):
    return [env.step(action) for action in actions]


class TestContract:
    def test_it_keeps_every_promise_of_an_environment(self, settings):
        env = AlfWorld(settings)
        check_env(env, next(task for task, _ in solved(env)))

    def test_the_first_observation_is_room_and_task(self, env):
        text, _ = env.reset(options={"task": env.tasks("train")[0]})
        room, task = text.split("\n")
        assert room.startswith("You are in the middle of a room. Looking quickly around you, you see a ")
        assert task.startswith("Your task is to: ")

    def test_observations_lose_the_sentence_of_arrival(self, env):
        env.reset(options={"task": env.tasks("train")[0]})
        place = next(action for action in env.valid_actions() if action.startswith("go to"))
        observation, *_ = env.step(place)
        assert observation.startswith(("On the ", "The "))

    @pytest.mark.parametrize(("profile", "limit"), [("eto", 40), ("react", 49)])
    def test_the_profiles_have_their_step_limits(self, settings, profile, limit):
        with AlfWorld(settings.model_copy(update={"profile": profile})) as env:
            env.reset(options={"task": env.tasks("seen")[0]})
            ends = [truncated for *_, truncated, _ in play(env, ["look"] * limit)]
        assert ends == [False] * (limit - 1) + [True]

    def test_reacts_thoughts_are_answered_in_its_profile_alone(self, settings, env):
        env.reset(options={"task": env.tasks("seen")[0]})
        assert env.step("think: where is it?")[0] == "Nothing happens."
        with AlfWorld(settings.model_copy(update={"profile": "react"})) as react:
            react.reset(options={"task": react.tasks("seen")[0]})
            observation, _, _, _, info = react.step("think: where is it?")
        assert (observation, info["valid"]) == ("OK.", True)

    def test_a_win_is_reward_1_and_ends_the_episode(self, env):
        task = env.tasks("unseen")[0]
        steps = env.expert(task)
        env.reset(options={"task": task})
        *before, last = play(env, [step.action for step in steps])
        assert all(reward == 0 and not terminated for _, reward, terminated, _, _ in before)
        assert last[1:] == (1.0, True, False, {"reward": 1.0, "success": True, "valid": True})

    def test_spellings_are_mended_as_the_settings_say(self, settings, env):
        task = first(env, "look_at_obj_in_light")
        solution = [step.action for step in env.expert(task)]
        odd = [action.replace("use ", "toggle ").replace("go to ", "Go To ") + "." for action in solution]
        env.reset(options={"task": task})
        assert play(env, odd)[-1][4]["success"]
        with AlfWorld(settings.model_copy(update={"spellings": []})) as strict:
            strict.reset(options={"task": task})
            assert not any(info["valid"] for *_, info in play(strict, odd))

    def test_ways_to_put_things_down_are_mended_on_request(self, settings):
        with AlfWorld(settings.model_copy(update={"spellings": ["put"]})) as env:
            task = first(env, "pick_and_place_simple")
            *before, last = [step.action for step in env.expert(task)]
            thing, place = last.removeprefix("move ").split(" to ")
            for other in (f"put {thing} in/on {place}", f"put {thing} on {place}", f"place {thing} in {place}"):
                env.reset(options={"task": task})
                assert play(env, [*before, other])[-1][4]["success"]


class TestGeneratedGames:
    def test_sizes_and_rooms_are_as_asked(self, env):
        rooms = {split: {games.room_of(task) for task in env.tasks(split)} for split in SPLITS}
        assert {split: len(env.tasks(split)) for split in SPLITS} == {"train": 12, "seen": 6, "unseen": 6}
        assert rooms["unseen"] <= UNSEEN_ROOMS
        assert not (rooms["train"] | rooms["seen"]) & (UNSEEN_ROOMS | TEST_ROOMS)

    def test_types_are_as_asked(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        chosen = {"task_types": "look_at_obj_in_light", "train_games": 2, "seen_games": 2, "unseen_games": 2}
        with AlfWorld(Settings(**chosen)) as env:
            kinds = [env.kind(task) for split in SPLITS for task in env.tasks(split)]
        assert kinds == ["look_at_obj_in_light"] * 6
        with pytest.raises(ValueError, match="task_types"):
            Settings(task_types="juggle")

    def test_every_shipped_game_keeps_the_commands_that_win_it(self, home, settings, env):
        root = games.generated_root(settings.recipe)
        for split in SPLITS:
            for task in env.tasks(split):
                file = root / games.FOLDERS[split] / task.removeprefix("alfworld:") / games.GAME
                env.reset(options={"task": task})
                assert play(env, games.read_game(file)["walkthrough"])[-1][4]["success"]

    def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(self, tmp_path, monkeypatch, home, settings):
        monkeypatch.chdir(tmp_path)
        root, index = games.generated_index(settings.recipe)
        assert index == games.generated_index(settings.recipe)[1]
        assert contents(root) == contents(home / root)
        assert generate("seen", 6, 1) != generate("seen", 6, 0)

    def test_two_processes_that_want_the_same_games_make_them_once(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            both = [pool.submit(prepare_in, tmp_path) for _ in range(2)]
            first, second = (one.result() for one in both)
        assert first == second
        assert len(first) == 3

    def test_what_a_killed_process_had_finished_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recipe = games.Recipe(sizes=dict.fromkeys(SPLITS, 1))
        root, index = games.generated_index(recipe)
        (kept, *_), before = root.rglob(games.GAME), contents(root)
        stamp = kept.stat().st_mtime_ns
        games.generated_list(recipe).unlink()
        next(file for file in root.rglob(games.GAME) if file != kept).unlink()
        assert games.generated_index(recipe) == (root, index)
        assert contents(root) == before
        assert kept.stat().st_mtime_ns == stamp

    def test_a_game_that_cannot_be_won_is_left_out_and_counted(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        draft = generate("seen", 1, 0)[0]
        hopeless = draft.problem.replace(f"{draft.params['object_target']}_bar_", "Pebble_bar_")
        monkeypatch.setattr("envs.alfworld.generator.generate", lambda *_: [with_problem(draft, hopeless)])
        _, index = games.generated_index(games.Recipe(sizes=dict.fromkeys(SPLITS, 1)))
        assert index.games == {"train": [], "seen": [], "unseen": []}
        assert index.skipped == {"something that the task needs is not in the room": 3}

    def test_the_put_dialect_plays_from_prompt_to_win(self, settings):
        with AlfWorld(settings.model_copy(update={"dialect": "put", "train_games": 1, "seen_games": 1})) as env:
            assert "put OBJ in/on REC" in env.instruction(env._settings)
            assert any("put cloth 1 in/on countertop 1" in answer for _, answer in env.example(env._settings))
            task = first(env, "pick_and_place_simple", "unseen")
            steps = env.expert(task)
            assert steps[-1].action.startswith("put ")
            assert steps[-1].observation.startswith("You put the ")
            env.reset(options={"task": task})
            assert play(env, [step.action for step in steps])[-1][4]["success"]

    def test_alfworlds_own_environment_plays_them_with_its_own_expert(self, home, settings):
        root = home / games.generated_root(settings.recipe)
        script = f"""
import textworld.gym
from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
paths = dict(data_path={str(root / "train")!r}, eval_id_data_path="", eval_ood_data_path="", num_train_games=0)
config = dict(
    dataset=paths,
    env=dict(goal_desc_human_anns_prob=0, task_types=[1, 2, 3, 4, 5, 6], domain_randomization=False,
             expert_type="handcoded"),
    general=dict(training_method="dagger"),
    dagger=dict(training=dict(max_nb_steps_per_episode=50)),
)
games = AlfredTWEnv(config)
assert games.num_games == 12, games.num_games
games.game_files = sorted(games.game_files)[:1]
env = games.init_env(batch_size=1)
text, infos = env.reset()
assert "Your task is to" in text[0]
for _ in range(50):
    text, _, done, infos = env.step([infos["extra.expert_plan"][0][0]])
    if done[0]:
        break
assert infos["won"][0]
print("won")
"""
        ran = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=os.environ | {"HOME": str(home)},
            timeout=300,
        )
        assert "won" in ran.stdout, ran.stderr[-2000:]


class TestExperts:
    @pytest.mark.parametrize("expert", ["handcoded", "plan"])
    def test_both_experts_solve_every_kind(self, settings, expert):
        with AlfWorld(settings.model_copy(update={"expert": expert})) as env:
            lengths = {env.kind(task): len(steps) for task, steps in solved(env)}
        assert len(lengths) == 6
        assert max(lengths.values()) <= (40 if expert == "handcoded" else 12)

    def test_an_expert_over_the_limit_is_dropped_with_the_reason(self, env, monkeypatch):
        monkeypatch.setattr(env, "_limit", 2)
        with pytest.raises(NoSolutionError, match="the handcoded expert needs more than 2 steps"):
            env.expert(env.tasks("train")[0])

    def test_the_mended_bookkeeping_lets_the_expert_place_two_objects(self, env, monkeypatch):
        """Without it the expert never learns that its hands are empty."""
        task = next(task for task, _ in solved(env) if env.kind(task) == "pick_two_obj_and_place")
        monkeypatch.setattr("envs.alfworld.expert.spoken", lambda command, dialect: command)
        with pytest.raises(NoSolutionError):
            env.expert(task)

    def test_a_room_is_searched_in_the_order_that_tells_of_it(self, env):
        on = []
        for task, steps in solved(env):
            told = re.findall(r"\ba (\w+ \d+)", env.reset(options={"task": task})[0].partition("Your task")[0])
            before = itertools.takewhile(lambda action: not action.startswith("take "), [step.action for step in steps])
            places = [told.index(action[len("go to ") :]) for action in before if action.startswith("go to ")]
            on += [later > earlier for earlier, later in itertools.pairwise(places)]
        assert len(on) > 40
        assert sum(on) / len(on) > 0.9  # where it is stuck it goes anywhere

    def test_thoughts_name_the_goal_and_follow_what_was_seen(self, env):
        task = first(env, "pick_cool_then_place_in_recep")
        target = task.split("-")[1].lower()
        steps = env.expert(task)
        goal = env.reset(options={"task": task})[0].rpartition("Your task is to: ")[2].rstrip(".")
        assert steps[0].thought.startswith(f"To {goal}, I look for a {target}. I try a ")
        (take,) = [step for step in steps if step.action.startswith("take")]
        assert take.thought == f"I see a {target} {take.action.split()[2]}. To {goal}, I take it."
        assert any(step.thought.startswith("I have the") and "To cool it" in step.thought for step in steps)

    def test_dialects_translate_back_and_forth(self):
        assert spoken("move mug 1 to shelf 2", "put") == "put mug 1 in/on shelf 2"
        assert spoken("put mug 1 in/on shelf 2", "move") == "move mug 1 to shelf 2"
        assert spoken("go to shelf 2", "put") == spoken("go to shelf 2", "move") == "go to shelf 2"

    def test_a_room_without_what_the_task_needs_has_no_plan(self):
        params = {"object_target": "Mug", "parent_target": "Shelf", "toggle_target": ""}
        with pytest.raises(UnwinnableError, match="not in the room"):
            privileged_plan([("inreceptacle", "apple 1", "fridge 1")], "pick_and_place_simple", params)


class Crashing(AlfWorld):
    """Dies in native code when told to."""

    def step(self, action):
        if action == "crash":
            ctypes.string_at(0)
        return super().step(action)


@pytest.mark.slow
class TestWorkers:
    async def test_a_worker_that_dies_in_native_code_costs_its_episode_one_retry_and_no_other(self, settings, tmp_path):
        with AlfWorld(settings) as env:
            plans = {task: [step.action for step in steps] for task, steps in itertools.islice(solved(env), 3)}
        tasks = list(plans)
        plans[tasks[0]] = [*plans[tasks[0]][:1], "crash"]
        episodes = [Episode(task=task, kind="", split="train", policy="sft", seed=0) for task in tasks]
        with JsonlAppender(tmp_path / "episodes.jsonl") as appender:
            async with EnvPool(Crashing, settings, workers=1, slots=3) as pool:
                await play_episodes(
                    pool, episodes, lambda _: Planned(plans), PlayConfig(), appender,
                    example=False, label="crash",
                )  # fmt: skip
        found = {one.id: one for one in read_jsonl(tmp_path / "episodes.jsonl", Trajectory)}
        assert found.keys() == set(tasks)
        assert found[tasks[0]].status == EpisodeStatus.ENV_ERROR
        assert "signal 11" in found[tasks[0]].note
        assert all(found[task].success for task in tasks[1:])

    def test_nothing_outlives_a_parent_killed_while_games_are_made(self, tmp_path):
        script = (
            "import os; from envs.alfworld import AlfWorld, Settings\n"
            "if __name__ == '__main__': AlfWorld.prepare(Settings(train_games=200, games_seed=9), processes=2)"
        )
        (tmp_path / "make.py").write_text(script)
        root = str(Path(__file__).parents[1])
        made = subprocess.Popen([sys.executable, "make.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root})
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob(games.GAME)) and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = descendants(made.pid)
        assert len(pids) >= 2
        made.kill()
        made.wait()
        wait_gone(pids)


class TestOfficialData:
    """Expert data as ETO publishes them, against games of either dialect."""

    @pytest.fixture
    def published(self, settings, tmp_path):
        """A trajectory of a generated game in the published form and the `put` dialect."""
        with AlfWorld(settings) as env:
            task = first(env, "pick_and_place_simple")
            steps = env.expert(task)
            text, _ = env.reset(options={"task": task})
        lines = [("human", "Interact with a household."), ("gpt", "OK"), ("human", text.replace("\n", "\n\n"))]
        for step in steps:
            said = step.observation.replace("You move the ", "You put the ").replace(" to the ", " in/on the ")
            lines += [("gpt", f"Thought: {step.thought}\nAction: {spoken(step.action, 'put')}")]
            lines += [("human", f"Observation: {said}")]
        file = f"json_2.1.1/train/{task.removeprefix('alfworld:')}/game.tw-pddl"
        item = {
            "id": "alfworld_7",
            "game_file": file,
            "conversations": [{"from": speaker, "value": value} for speaker, value in lines],
        }
        path = tmp_path / "alfworld_sft.json"
        path.write_text(json.dumps([item]))
        return task, path

    def test_the_other_dialect_is_refused_with_what_to_do(self, settings, published):
        with pytest.raises(
            ValueError, match=r"item 1: the action .* set env.alfworld.translate=true, or .*dialect=put"
        ):
            read_official(AlfWorld, settings, published[1])

    async def test_it_is_translated_on_request_counted_and_replays(self, settings, published):
        task, path = published
        overrides = ["env=alfworld", "env.alfworld.translate=true", f"experts.source={path}", "workers.processes=1"]
        overrides.append(f"env.alfworld.task_types={','.join(games.TASK_TYPES)}")
        config = load("tiny", overrides + [f"env.alfworld.{key}={size}" for key, size in SIZES.items()])
        trajectories, translated = read_official(AlfWorld, config.env.alfworld, path)
        assert [one.id for one in trajectories] == [task]
        assert translated == 1
        assert "Action: move " in trajectories[0].turns[-1].text
        kept, facts = await keep_training_tasks(config, AlfWorld, trajectories)
        assert len(kept) == 1
        assert facts["replays_that_differ"] == []
        kept[0].turns[1].observation = "You see a ghost."
        assert (await keep_training_tasks(config, AlfWorld, kept))[1]["replays_that_differ"] == [task]
        kept[0].turns[1].observation = trajectories[0].turns[1].observation
        kept[0].turns += kept[0].turns[-1:]  # goes on after the win
        assert (await keep_training_tasks(config, AlfWorld, kept))[1]["replays_that_differ"] == [task]

    @pytest.mark.parametrize("said", ["put mug 1 in shelf 2", "put mug 1 on shelf 2", "put mug 1 in/on shelf 2"])
    def test_no_way_to_put_something_down_passes_for_the_games_own(self, settings, said):
        with pytest.raises(ValueError, match="another dialect"):
            AlfWorld.official_turn(said, "", settings)
        lenient = settings.model_copy(update={"translate": True})
        assert AlfWorld.official_turn(said, "", lenient)[0] == "move mug 1 to shelf 2"

    def test_spellings_that_play_mends_are_no_other_version(self, settings):
        for said in ("Go to shelf 1", "toggle desklamp 1"):
            assert AlfWorld.official_turn(said, "so", settings) == (said, "so")

    @pytest.mark.parametrize("gap", ["", "  ", "\t", "\n"])
    def test_what_is_learned_is_translated_however_it_is_spaced(self, settings, published, gap):
        path = published[1]
        path.write_text(path.read_text().replace("Action: put", f"Action:{json.dumps(gap)[1:-1]}put"))
        lenient = settings.model_copy(update={"translate": True})
        ((one,), translated) = read_official(AlfWorld, lenient, path)
        assert translated == 1
        assert one.turns[-1].action.startswith("move ")
        assert one.turns[-1].text.endswith(one.turns[-1].action)

    def test_an_item_that_names_no_game_is_refused(self):
        with pytest.raises(ValueError, match="no `game_file`"):
            AlfWorld.official_id({"id": "alfworld_7"}, None)

    def test_a_verb_of_no_dialect_is_refused(self, settings):
        with pytest.raises(ValueError, match=r"verb 'teleport'"):
            AlfWorld.official_turn("teleport to kitchen", "", settings)


@pytest.fixture
def tree(tmp_path, settings, home):
    """A tree of games in the official layout and the `put` dialect."""
    drafts = {split: generate(split, 2, 5) for split in SPLITS}
    root = tmp_path / "my data" / "json_2.1.1"
    for split, found in drafts.items():
        for draft in found:
            folder = root / games.FOLDERS[split] / games.folder_of(draft)
            games.write(folder / games.GAME, json.dumps(games.game_of(draft, "put", [])))
            games.write(folder / games.TRAJECTORY, json.dumps(games.trajectory_of(draft)))
    return root


def a_game(root, split="train"):
    return next((root / games.FOLDERS[split]).rglob(games.GAME))


class TestOfficialTrees:
    @pytest.mark.parametrize("named", ["", "json_2.1.1", "$GAMES"])
    def test_a_tree_is_found_and_played_in_its_own_dialect(self, tree, monkeypatch, named):
        monkeypatch.setenv("GAMES", str(tree.parent))
        settings = Settings(data=named if named == "$GAMES" else str(tree.parent / named))
        with AlfWorld(settings) as env:
            assert [len(env.tasks(split)) for split in SPLITS] == [2, 2, 2]
            assert "put OBJ in/on REC" in env.instruction(settings)
            task = env.tasks("unseen")[0]
            steps = env.expert(task)
            env.reset(options={"task": task})
            assert play(env, [step.action for step in steps])[-1][4]["success"]

    def test_official_means_where_alfworld_download_puts_them(self, tree, monkeypatch):
        monkeypatch.setenv("ALFWORLD_DATA", str(tree.parent))
        assert games.official_root("official") == tree

    def test_no_games_is_one_sentence_with_what_to_do(self, tmp_path):
        with pytest.raises(ValueError, match=r"No ALFWorld games in .*nothing: .*`alfworld-download`.*generated here"):
            AlfWorld(Settings(data=str(tmp_path / "nothing")))

    def test_a_tree_may_lack_a_split_until_it_is_played(self, tree):
        shutil.rmtree(tree / "valid_seen")
        with AlfWorld(Settings(data=str(tree))) as env:
            assert [len(env.tasks(split)) for split in SPLITS] == [2, 0, 2]

    def test_a_game_that_is_cut_short_is_named(self, tree):
        file = a_game(tree)
        file.write_text(file.read_text()[:1000])
        with pytest.raises(ValueError, match=r"game.tw-pddl: no whole ALFWorld game .* fetch it again"):
            AlfWorld(Settings(data=str(tree)))

    def test_a_game_of_another_domain_is_named(self, tree):
        file = a_game(tree)
        file.write_text(json.dumps(games.read_game(file) | {"pddl_domain": "(define (domain blocks))"}))
        with pytest.raises(ValueError, match=r"game.tw-pddl: a game of the PDDL domain 'blocks', not of alfred"):
            AlfWorld(Settings(data=str(tree)))

    def test_pddl_that_does_not_parse_is_named_when_it_is_played(self, tree):
        file = a_game(tree)
        game = games.read_game(file)
        file.write_text(json.dumps(game | {"pddl_problem": game["pddl_problem"][:-2000]}))
        with AlfWorld(Settings(data=str(tree))) as env:
            task = f"alfworld:{file.parent.relative_to(tree / 'train')}"
            with pytest.raises(ValueError, match=r"game.tw-pddl: the game's PDDL cannot be read"):
                env.reset(options={"task": task})
            assert env.reset(options={"task": env.tasks("seen")[0]})

    def test_unsolvable_and_unsupported_games_are_counted_in_the_fingerprint(self, tree):
        file = a_game(tree)
        file.write_text(json.dumps(games.read_game(file) | {"solvable": False}))
        odd = file.parent.parent.parent / "pick_and_place_with_movable_recep-Mug-Bowl-Shelf-5" / "trial_1"
        games.write(odd / games.GAME, "{}")
        fingerprint = AlfWorld.fingerprint(Settings(data=str(tree)))
        assert "'not solvable': 1" in fingerprint
        assert "'movable receptacles or sliced objects': 1" in fingerprint

    def test_an_unseen_room_in_train_is_refused(self, tree):
        file = a_game(tree, "unseen")
        games.write(tree / "train" / file.parent.parent.name / "trial_x" / games.GAME, file.read_text())
        trajectory = (file.parent / games.TRAJECTORY).read_text()
        games.write(tree / "train" / file.parent.parent.name / "trial_x" / games.TRAJECTORY, trajectory)
        with pytest.raises(ValueError, match="unseen games share rooms with its training games"):
            AlfWorld(Settings(data=str(tree)))

    def test_a_tree_that_changed_is_read_again(self, tree):
        before = games.index_of(tree)
        file = a_game(tree)
        file.write_text(json.dumps(games.read_game(file) | {"solvable": False}))
        after = games.index_of(tree)
        assert after.digest != before.digest
        assert len(after.games["train"]) == 1

    def test_a_task_that_changed_is_another_game(self, tree):
        before = games.index_of(tree)
        beside = a_game(tree).parent / games.TRAJECTORY
        beside.write_text(beside.read_text().replace('"object_sliced": false', '"object_sliced": true'))
        assert games.index_of(tree).digest != before.digest
        beside.unlink()
        assert games.index_of(tree).skipped == {"no traj_data.json": 1}
        beside.write_text('{"task_type": "pick_and_place_simple", "pddl_params": {}}')
        with pytest.raises(ValueError, match=r"traj_data.json: not whole \(KeyError\)"):
            games.index_of(tree)

    def test_a_folder_without_a_room_is_named(self, tree):
        folder = a_game(tree).parent
        folder.parent.rename(folder.parent.parent / "put_things_away")
        with pytest.raises(ValueError, match=r"put_things_away/trial_\w+: .*does not end with a room's number"):
            AlfWorld(Settings(data=str(tree)))

    @pytest.mark.parametrize(
        ("key", "was", "now"),
        [("pddl_problem", "(:init", "(:init\n(unheard_of Apple)"), ("grammar", '"intro"', '"outro"')],
    )
    def test_contents_that_do_not_go_together_name_the_file(self, tree, key, was, now):
        file = a_game(tree)
        game = games.read_game(file)
        file.write_text(json.dumps(game | {key: game[key].replace(was, now)}))
        with AlfWorld(Settings(data=str(tree))) as env, pytest.raises(ValueError, match=r"game.tw-pddl: the game"):
            env.reset(options={"task": f"alfworld:{file.parent.relative_to(tree / 'train')}"})

    def test_sizes_cap_official_games_too_and_the_recipe_tiny_takes_them(self, tree):
        config = load("tiny", ["env=alfworld", f"env.alfworld.data={tree}", "env.alfworld.seen_games=1"])
        with AlfWorld(config.env.alfworld.model_copy(update={"task_types": list(games.TASK_TYPES)})) as env:
            assert [len(env.tasks(split)) for split in SPLITS] == [2, 1, 2]

    def test_two_processes_read_one_tree_at_once(self, tree, tmp_path):
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            first, second = pool.map(index_in, [tmp_path] * 2, [tree] * 2)
        assert first == second == games.index_of(tree)

    def test_keys_of_generated_games_have_no_place_beside_official_ones(self):
        with pytest.raises(ValueError, match="dialect is for generated games"):
            Settings(data="official", dialect="put")


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"the sample of official games is not at {SAMPLE}")
class TestOfficialSample:
    @pytest.mark.slow
    def test_official_games_play_and_their_expert_traces_replay(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        chosen = official_games(every=int(os.environ.get("OFFICIAL_EVERY", "300")))
        root = write_tree(tmp_path / "json_2.1.1", chosen)
        with AlfWorld(Settings(data=str(root))) as env:
            replayed = 0
            for game in chosen:
                env.reset(options={"task": f"alfworld:{game['id'].partition('/')[2]}"})
                if game["gt_actions"]:
                    ends = play(env, game["gt_actions"][:40])
                    assert all(info["valid"] for *_, info in ends), game["id"]
                    assert ends[-1][4]["success"] or len(game["gt_actions"]) > 40, game["id"]
                    replayed += 1
        assert replayed >= 10


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def with_problem(draft, problem):
    from dataclasses import replace

    return replace(draft, problem=problem)


def index_in(folder, tree):
    os.chdir(folder)
    return games.index_of(tree)


def prepare_in(folder):
    os.chdir(folder)
    root, _ = games.generated_index(games.Recipe(sizes=dict.fromkeys(SPLITS, 1), seed=3))
    return {str(file): file.stat().st_mtime_ns for file in root.rglob(games.GAME)}
