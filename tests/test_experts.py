import json

import pytest

from envs import ENVIRONMENTS
from envs.sciworld import ScienceWorld
from pipeline.config import Config
from pipeline.experts import keep_training_tasks, main, read_official, solve
from pipeline.recipe import load
from tests.toy_env import Settings, ToyEnv


def conversation(*values, **fields):
    speakers = ["human", "gpt"] * len(values)
    lines = [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]
    return {"id": "2", "conversations": lines} | fields


GOOD = conversation("rules", "OK", "Count to 3.", "Thought: a\nAction: up", "Observation: 1", "Action: up")


def write(path, items, *, lines=False):
    path.write_text("".join(json.dumps(item) + "\n" for item in items) if lines else json.dumps(items))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_official_conversations_become_trajectories(tmp_path, lines):
    name = "data.jsonl" if lines else "data.json"
    (one,), translated = read_official(ToyEnv, Settings(), write(tmp_path / name, [GOOD], lines=lines))
    assert one.id == "toy:train:2"
    assert translated == 0
    assert [message["content"] for message in one.prompt] == [ToyEnv.instruction(Settings()), "OK", "Count to 3."]
    assert [message["content"] for message in one.completion] == [
        "Thought: a\nAction: up", "Observation: 1", "Action: up",
    ]  # fmt: skip
    assert [(turn.action, turn.observation) for turn in one.turns] == [("up", "1"), ("up", "")]
    assert (one.reward, one.success) == (1.0, True)


def test_a_published_reward_is_kept(tmp_path):
    (one,), _ = read_official(ToyEnv, Settings(), write(tmp_path / "data.json", [GOOD | {"reward": 0.75}]))
    assert (one.reward, one.success) == (0.75, False)


def test_a_last_observation_is_left_out_of_the_messages(tmp_path):
    item = conversation("rules", "OK", "Count to 1.", "Action: up", "Observation: 1")
    (one,), _ = read_official(ToyEnv, Settings(), write(tmp_path / "data.json", [item]))
    assert one.messages[-1]["role"] == "assistant"
    assert one.turns[-1].observation == "1"


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ({"id": 1}, r"item 2: .*\(field conversations\): Field required"),
        (GOOD | {"conversations": [{"from": "robot", "value": "x"}]}, r"item 2: .*\(field conversations.0.from\)"),
        (GOOD | {"reward": 7}, r"item 2: .*\(field reward\)"),
        (conversation("rules", "OK", "Count."), "item 2: the speakers must be human and gpt in turn"),
        (conversation("rules", "OK", "Count.", "I go up."), "item 2: a reply without an `Action:` line"),
        (
            conversation("rules", "OK", "Count.", "Action: levitate 3"),
            r"item 2: toy knows no action .levitate 3. \(verb 'levitate'\)",
        ),
    ],
)
def test_bad_official_data_are_refused_with_their_place(tmp_path, item, complaint):
    path = write(tmp_path / "data.json", [GOOD, item])
    with pytest.raises(ValueError, match=complaint) as error:
        read_official(ToyEnv, Settings(), path)
    assert str(path) in str(error.value)


def test_a_source_that_is_not_there_or_no_json_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"experts.source: .*nothere.json is no file"):
        main(load("tiny", ["env=sciworld", f"experts.source={tmp_path / 'nothere.json'}"]))
    (tmp_path / "cut.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="the last line has no end"):
        read_official(ToyEnv, Settings(), tmp_path / "cut.jsonl")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match="not a ShareGPT conversation"):
        read_official(ToyEnv, Settings(), tmp_path / "broken.json")


def test_etos_numbers_of_scienceworld_tasks_become_content_ids():
    assert ScienceWorld.official_id({"id": "0_3"}, None) == "sciworld:boil:3"
    assert ScienceWorld.official_id({"id": "6_120"}, None) == "sciworld:use-thermometer:120"
    assert ScienceWorld.official_id({"id": "24_1"}, None) == "sciworld:identify-life-stages-2:1"
    for strange in ("5_0", "25_1", "boil_3", None, 7):
        with pytest.raises(ValueError, match="no ScienceWorld task"):
            ScienceWorld.official_id({"id": strange}, None)
    assert ScienceWorld.official_task("Task Description:\nYour task is to boil water.") == "Your task is to boil water."


def test_thoughts_can_be_left_out_of_official_data(tmp_path):
    (one,), _ = read_official(ToyEnv, Settings(), write(tmp_path / "data.json", [GOOD]), thoughts=False)
    assert [turn.text for turn in one.turns] == ["Action: up", "Action: up"]
    assert [message["content"] for message in one.completion] == ["Action: up", "Observation: 1", "Action: up"]


async def test_official_trajectories_of_test_tasks_are_dropped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.jobs.open_pool", lambda *_: _pool())
    published, _ = read_official(ToyEnv, Settings(), write(tmp_path / "data.json", [GOOD, GOOD, GOOD]))
    published[1].id, published[2].id = "toy:seen:1", "toy:train:99"
    kept, facts = await keep_training_tasks(Config(), ToyEnv, published)
    assert [one.id for one in kept] == ["toy:train:2"]
    assert facts == {
        "dropped": {"in the seen split": 1, "in no split": 1},
        "dropped_ids": ["toy:seen:1", "toy:train:99"],
        "replays_that_differ": [],  # that the last observation is not published is no difference
    }


@pytest.mark.parametrize(
    ("values", "differs"),
    [
        (["Count to 3.", "Action: up", "Observation: 1", "Action: up"], False),
        (["Count to 4.", "Action: up", "Observation: 1", "Action: up"], True),  # another task
        (["Count to 3.", "Action: up", "Observation: 7", "Action: up"], True),
        (["Count to 3.", *["Action: up", ""] * 4], True),  # goes on after the end
        (["Count to 3.", "Action: exit 3"], True),  # the worker dies of it
    ],
)
async def test_published_trajectories_that_replay_otherwise_are_named(tmp_path, monkeypatch, values, differs):
    monkeypatch.setattr("pipeline.jobs.open_pool", lambda *_: _pool())
    monkeypatch.setattr(ToyEnv, "official_turn", lambda action, observation, settings: (action, observation))
    published, _ = read_official(
        ToyEnv, Settings(), write(tmp_path / "data.json", [conversation("rules", "OK", *values)])
    )
    kept, facts = await keep_training_tasks(Config(), ToyEnv, published)
    assert facts["replays_that_differ"] == ["toy:train:2"] * differs
    assert [one.kind for one in kept] == ["train"]


async def test_solutions_that_fail_are_counted_and_named(tmp_path, monkeypatch):
    config = Config()
    config.workers.processes = 1
    monkeypatch.setattr("pipeline.jobs.open_pool", lambda *_: _pool())
    kept, facts = await solve(config, ToyEnv, 0, tmp_path / "replays.jsonl")
    assert [one.id for one in kept] == [f"toy:train:{number}" for number in range(5)]
    assert facts["dropped_ids"] == ["toy:train:5"]
    assert facts["dropped"] == {"reward below 1 (max_steps)": 1}
    assert facts["replays_that_differ"] == []


async def test_imperfect_solutions_can_be_kept(tmp_path, monkeypatch):
    """Task n wants n + 1 steps of at most five; task 5's expert ends at five sixths."""
    config = Config(experts={"min_reward": 0.5})
    config.workers.processes = 1
    monkeypatch.setattr("pipeline.jobs.open_pool", lambda *_: _pool())
    kept, facts = await solve(config, ToyEnv, 0, tmp_path / "replays.jsonl")
    assert [one.id for one in kept] == [f"toy:train:{number}" for number in range(6)]
    assert [one.success for one in kept] == [True] * 5 + [False]
    assert facts["dropped"] == {}


@pytest.mark.parametrize("tasks", [3, {"toy": 3, "sciworld": 5}])
async def test_some_tasks_can_be_left_without_an_expert(tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "toy", "ToyEnv")
    config = Config(experts={"tasks": tasks})
    config.workers.processes = 1
    monkeypatch.setattr("pipeline.jobs.open_pool", lambda *_: _pool())
    kept, facts = await solve(config, ToyEnv, 0, tmp_path / "replays.jsonl")
    assert [one.id for one in kept] == ["toy:train:1", "toy:train:3"]
    assert facts["dropped_ids"] == ["toy:train:5"]
    published, _ = read_official(
        ToyEnv, Settings(), write(tmp_path / "data.json", [GOOD | {"id": str(number)} for number in range(1, 5)])
    )
    kept, facts = await keep_training_tasks(config, ToyEnv, published)
    assert [one.id for one in kept] == ["toy:train:1", "toy:train:2", "toy:train:3"]
    assert facts["dropped"] == {"beyond experts.tasks": 1}


def _pool():
    from envs.pool import EnvPool

    return EnvPool(ToyEnv, Settings(variations=6), workers=1, slots=2)
