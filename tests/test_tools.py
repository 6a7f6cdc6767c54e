import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from pipeline.config import Config
from pipeline.pairing import pair
from pipeline.records import EpisodeStatus, Trajectory, Turn, read_jsonl, write_jsonl
from tests.test_pairing import expert
from tests.test_records import trajectory
from tests.tiny_policy import save_tiny_policy


def tool(*arguments):
    return subprocess.run([sys.executable, "-m", "pipeline", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with a policy, one episode and one pair."""
    seed = tmp_path / "sciworld" / "seed0"
    (seed / "sft").mkdir(parents=True)
    save_tiny_policy(seed / "sft" / "policy")
    one = trajectory()
    one.turns[0].token_ids = []
    write_jsonl(seed / "rollout" / "episodes.jsonl", [one])
    write_jsonl(seed / "pairs" / "pairs.jsonl", [pair(expert(messages=one.messages), one)])
    return tmp_path


def test_inspect_shows_an_episode_by_turn_and_weight(run_folder):
    shown = tool("inspect", run_folder / "sciworld" / "seed0" / "rollout" / "episodes.jsonl")
    assert shown.returncode == 0, shown.stderr
    assert "sciworld:boil:3: sft, reward 0.50, max_steps" in shown.stdout
    assert "[turn 0 x 1]" in shown.stdout
    assert "Action: wait" in shown.stdout


def test_inspect_shows_both_sides_of_a_pair(run_folder):
    shown = tool("inspect", run_folder / "sciworld" / "seed0" / "pairs" / "pairs.jsonl", "--method", "mean")
    assert shown.returncode == 0, shown.stderr
    assert "chosen, expert/seed0/0" in shown.stdout
    assert "rejected, sft/seed0/0" in shown.stdout


def test_inspect_says_what_is_missing(run_folder, tmp_path):
    path = run_folder / "sciworld" / "seed0" / "rollout" / "episodes.jsonl"
    assert "no record 'sciworld:melt:0' among 1" in tool("inspect", path, "--id", "sciworld:melt:0").stderr
    write_jsonl(tmp_path / "lonely" / "episodes.jsonl", [trajectory()])
    assert "--tokenizer" in tool("inspect", tmp_path / "lonely" / "episodes.jsonl").stderr


@pytest.mark.java
def test_replay_finds_the_turn_that_differs(tmp_path):
    from envs.sciworld import ScienceWorld

    task = "sciworld:lifespan-longest-lived:0"
    with ScienceWorld() as env:
        steps = env.expert(task)
        text, _ = env.reset(options={"task": task})
        rewards = [env.step(step.action)[4]["reward"] for step in steps]
    turns = [
        Turn(text="", action=step.action, observation=step.observation, reward=reward, valid=True)
        for step, reward in zip(steps, rewards, strict=True)
    ]
    path = tmp_path / "runs" / "x" / "episodes.jsonl"
    whole = {"messages": [{"role": "user", "content": text}], "prompt_length": 1, "reward": 1.0, "success": True}
    write_jsonl(path, [trajectory(id=task, turns=turns, status=EpisodeStatus.COMPLETED, **whole)])
    (path.parent / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")))
    same = tool("replay", path)
    assert same.returncode == 0, same.stderr
    assert "1 of 1 episodes replay exactly" in same.stdout

    def changed(**changes):
        (one,) = read_jsonl(path, Trajectory)
        return replace(one, **changes)

    ghost = [*turns[:1], replace(turns[1], observation="You see a dragon."), *turns[2:]]
    same_but = [
        (changed(turns=ghost), f"{task}, turn 1"),
        (changed(turns=turns + turns[-1:]), "the episode is over before it"),
        (changed(turns=turns[:-1]), "reward and success were"),
        (changed(success=False), "reward and success were"),
        (changed(messages=[{"role": "user", "content": "Boil a dragon."}]), "the task was 'Boil a dragon.'"),
    ]
    write_jsonl(path, [one for one, _ in same_but])
    differs = tool("replay", path)
    assert differs.returncode == 1
    for line, (_, told) in zip(differs.stdout.splitlines(), same_but, strict=False):
        assert told in line
    assert "0 of 5 episodes replay exactly" in differs.stdout


@pytest.mark.java
def test_doctor_finds_this_machine_well():
    found = tool("doctor")
    assert found.returncode == 0, found.stdout
    for check in ("Python", "packages", "vLLM", "Java", "ScienceWorld", "ALFWorld", "WebShop", "disk"):
        assert check in found.stdout


def test_a_check_that_breaks_is_a_row_of_the_table(monkeypatch, capsys):
    from pipeline import doctor

    def broken():
        raise ImportError("No module named 'py4j'")

    monkeypatch.setattr(doctor, "_checks", lambda: {"ScienceWorld": broken, "disk": lambda: "plenty"})
    assert doctor.main(None) == 1
    shown = capsys.readouterr().out
    assert "py4j" in shown
    assert "plenty" in shown


def test_doctor_names_what_mends_a_missing_java(monkeypatch, capsys, tmp_path):
    from pipeline import doctor

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(doctor, "_scienceworld", lambda: "skipped here")
    assert doctor.main(None) == 1
    assert "apt-get install default-jre-headless" in capsys.readouterr().out
