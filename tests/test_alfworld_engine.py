"""The quick engine against the unmodified one, in processes of their own: what is put in place stays in a process."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fast_downward import interface as downward

from envs.alfworld import engine, games
from envs.alfworld.engine import Engine, Translation, Translations
from envs.alfworld.expert import win
from envs.alfworld.generator import generate
from tests.official_alfworld import SAMPLE, game_data, official_games

WALK = """
import hashlib, json, random, sys
games, folder = json.load(open(sys.argv[1])), sys.argv[2]
if folder:
    from pathlib import Path
    from envs.alfworld.engine import Engine, Translations
    env = Engine.acquire()
    def begin(game):
        env.load(game, Translations(Path(folder)))
        env.reset()
        return env.state
    def step(command):
        env.step(command)
        return env.state
else:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl import PddlEnv
    env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
    def begin(game):
        env.load(game)
        return env.reset()
    def step(command):
        return env.step(command)[0]
for number, game in enumerate(games):
    chance, seen, state = random.Random(number), hashlib.sha256(), begin(game)
    won = False
    for command in [*game["walkthrough"], "dance", *[None] * 5]:
        seen.update(repr((state["feedback"], state["admissible_commands"], state["won"])).encode())
        state = step(command or chance.choice(state["admissible_commands"]))
        won = won or state["won"]
    print(seen.hexdigest(), won)
"""


def transcripts(chosen, tmp_path, translations):
    file = tmp_path / "games.json"
    file.write_text(json.dumps(chosen))
    ran = subprocess.run(
        [sys.executable, "-c", WALK, str(file), translations],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return ran.stdout.splitlines()


def generated(dialect, number, seed=0):
    return [games.game_of(draft, dialect, []) for draft in generate("train", number, seed)]


def winnable(dialect, number, seed):
    """Generated games, of six types if they are six or more, with commands that win them."""
    drafts = generate("train", number, seed)
    made = [(games.game_of(draft, dialect, []), draft) for draft in drafts]
    return [game | {"walkthrough": win(game, draft.task_type, draft.params)} for game, draft in made]


@pytest.mark.slow
def test_transcripts_and_admissible_commands_are_the_unmodified_engines(tmp_path, monkeypatch):
    """From the first text through what wins, an invalid command and a random walk."""
    monkeypatch.chdir(tmp_path)
    chosen = winnable("move", 6, seed=4) + winnable("put", 2, seed=5)
    verbs = {command.split()[0] for game in chosen for command in game["walkthrough"]}
    assert verbs >= {"go", "open", "take", "move", "put", "clean", "heat", "cool", "use"}
    if SAMPLE.is_file():
        sample = [game for game in official_games(every=900) if game["gt_actions"]]
        chosen += [game_data(game) | {"walkthrough": game["gt_actions"]} for game in sample]
    plain = transcripts(chosen, tmp_path, "")
    assert len(plain) == len(chosen)
    assert all(line.endswith(" True") for line in plain), "each game is won on the way"
    assert transcripts(chosen, tmp_path, str(tmp_path / "translations")) == plain, "translated now"
    assert transcripts(chosen, tmp_path, str(tmp_path / "translations")) == plain, "translations read from the disk"


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    return Translations(tmp_path_factory.mktemp("translations"))


def test_games_played_in_turns_read_what_they_read_alone(translations):
    chosen = generated("move", 3, seed=6)

    def walk(env, number, state):
        return env.step(random.Random(f"{number} {state}").choice(env.admissible))

    alone = []
    for number, game in enumerate(chosen):
        env = Engine.acquire()
        env.load(game, translations)
        alone.append([env.reset()] + [walk(env, number, step) for step in range(10)])
        env.release()
    envs = [Engine.acquire() for _ in chosen]
    for env, game in zip(envs, chosen, strict=True):
        env.load(game, translations)
    together = [[env.reset()] for env in envs]
    for step in range(10):
        for number, env in enumerate(envs):
            together[number].append(walk(env, number, step))
    for env in envs:
        env.release()
    assert together == alone


def test_engines_are_handed_on():
    one = Engine.acquire()
    one.release()
    assert Engine.acquire() is one
    one.release()


def test_the_process_keeps_its_arguments_output_and_random_numbers(translations, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine", "alone"])
    random.seed(1)
    expected = random.Random(1).random()
    output = sys.stdout
    env = Engine.acquire()
    env.load(generated("move", 1, seed=8)[0], translations)
    env.reset()
    env.step("look")
    env.release()
    assert sys.argv == ["mine", "alone"]
    assert sys.stdout is output
    assert random.random() == expected
    assert capfd.readouterr().out == ""


def test_engines_copy_what_is_loaded_of_the_planners_library(monkeypatch, tmp_path):
    library = Path(downward.DOWNWARD_LIB_PATH)
    loaded, copied = engine.loaded_part(library), []
    assert library.read_bytes().startswith(loaded)
    assert len(loaded) < library.stat().st_size / 10
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *paths: copied.append(Path(copy(*paths)).stat().st_size))
    Engine().release()
    assert copied == [len(loaded)]
    assert Path(downward.DOWNWARD_LIB_PATH) == library
    (tmp_path / "other").write_bytes(b"no ELF file")
    assert engine.loaded_part(tmp_path / "other") == b"no ELF file"


def test_a_damaged_translation_is_made_again(tmp_path):
    game = generated("move", 1)[0]
    store = Translations(tmp_path)
    first = store.get(game["pddl_domain"], game["pddl_problem"])
    (file,) = tmp_path.rglob("*.json.z")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert store.get(game["pddl_domain"], game["pddl_problem"]) == first
    assert file.read_bytes() == whole
    assert not [one for one in tmp_path.rglob("*") if one.is_file() and one != file]


def test_text_that_is_no_pddl_is_refused():
    with pytest.raises(ValueError, match="the game's PDDL cannot be read"):
        Translation.of(games.packaged("alfred.pddl"), "(define (problem")


def test_a_broken_grammar_is_refused(translations):
    game = generated("move", 1)[0]
    env = Engine.acquire()
    with pytest.raises(ValueError, match="the game's grammar cannot be read"):
        env.load(game | {"grammar": game["grammar"][:500]}, translations)
    env.release()


def test_python_3_13_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(ValueError, match=r"cannot run on Python 3.13.*PEP 667.*Use Python 3.11 or 3.12"):
        engine._accelerate.__wrapped__()


@pytest.mark.slow
def test_playing_on_does_not_grow_the_process(tmp_path):
    """300 games, 3 at a time: the library keeps every proposition that it made, unless they are forgotten."""
    script = f"""
import sys
from pathlib import Path
from envs.alfworld import games
from envs.alfworld.engine import Engine, Translations
from envs.alfworld.generator import generate
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
envs, store = [Engine.acquire() for _ in range(3)], Translations(Path({str(tmp_path)!r}))
drafts = generate("train", 60, 9)
for number in range(300):
    env = envs[number % 3]
    env.load(games.game_of(drafts[number % 60], "move", []), store)
    env.reset()
    for step in range(3):
        env.step(env.admissible[step])
    if number == 59:
        before = resident()
print(resident() - before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 50
