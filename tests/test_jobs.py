import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.pool import EnvPool
from pipeline import arms, jobs, rollout, runs
from pipeline.config import Config
from pipeline.engines.scripted import ScriptedEngine
from pipeline.jobs import Job, check_disjoint, chosen_tasks, spread, summary
from pipeline.records import write_jsonl
from tests.test_records import trajectory
from tests.tiny_policy import save_tiny_policy
from tests.toy_env import OtherToyEnv, Settings, ToyEnv


def kind(task):
    return task.split(":")[0]


def test_spread_takes_from_every_kind_in_turn():
    tasks = ["a:0", "a:1", "a:2", "b:0", "b:1", "c:0"]
    assert [kind(task) for task in spread(tasks, 4, kind)] == ["a", "a", "b", "c"]
    assert spread(tasks, None, kind) == tasks
    assert spread(tasks, 99, kind) == tasks


def test_spread_reaches_every_part_of_a_kind_and_keeps_what_fewer_would_have():
    tasks = [f"a:{number}" for number in range(120)]
    few, more = spread(tasks, 20, kind), spread(tasks, 60, kind)
    assert set(few) < set(more)
    thirds = [sum(int(task[2:]) // 40 == third for task in few) for third in range(3)]
    assert min(thirds) >= 4
    assert set(spread(tasks[::-1], 20, kind)) == set(few)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), unique=True), st.integers(1, 20))
def test_spread_is_even_and_keeps_the_order(pairs, limit):
    tasks = [f"{letter}:{number}" for letter, number in pairs]
    kept = spread(tasks, limit, kind)
    assert len(kept) == min(limit, len(tasks))
    assert kept == [task for task in tasks if task in kept]
    taken = {letter: sum(kind(task) == letter for task in kept) for letter in "abc"}
    there = {letter: sum(kind(task) == letter for task in tasks) for letter in "abc"}
    unfinished = [taken[letter] for letter in "abc" if taken[letter] < there[letter]]
    assert not unfinished or max(taken.values()) - min(unfinished) <= 1


def test_splits_that_share_a_task_are_refused():
    check_disjoint({"train": ["a:0"], "seen": ["a:1"], "unseen": ["b:0"]})
    with pytest.raises(ValueError, match="a:0 is in both train and seen"):
        check_disjoint({"train": ["a:0"], "seen": ["a:0"], "unseen": []})


def test_a_manifest_says_where_the_time_went_and_what_was_cached():
    times = {"env_seconds": 0.5, "engine_seconds": 2.0, "queue_seconds": 0.25}
    played = trajectory(**times, prompt_tokens=300, cached_tokens=240)
    broken = trajectory(env_seconds=1.0, prompt_tokens=100)
    found = summary([played, broken])
    assert {name: found[name] for name in times} == {"env_seconds": 1.5, "engine_seconds": 2.0, "queue_seconds": 0.25}
    assert found["prefix_cache_hit_rate"] == 0.6
    assert "prefix_cache_hit_rate" not in summary([trajectory(**times)])


@pytest.mark.parametrize(
    ("undemonstrated", "explored"),
    [(False, ["toy:train:1", "toy:train:4"]), (True, [f"toy:train:{number}" for number in range(6)])],
)
async def test_tasks_without_an_expert_are_explored_on_demand(tmp_path, monkeypatch, undemonstrated, explored):
    monkeypatch.chdir(tmp_path)
    config = Config(run="r", env={"names": ["sciworld"]}, rollout={"undemonstrated": undemonstrated})
    experts = arms.of(config)[0].folder("sciworld", 0, "experts") / "episodes.jsonl"
    experts.parent.mkdir(parents=True)
    write_jsonl(experts, [trajectory(id=one) for one in ("toy:train:1", "toy:train:4")])
    job = next(one for one in rollout._wanted(config, "sciworld", 0) if one.split == "train")
    tasks = await played(job)
    assert tasks == explored


async def test_a_policy_explores_tasks_drawn_by_the_seed_and_others_play_them_in_turn():
    drawn = {tuple(await played(job(seed=seed, policy="sft", explores=True))) for seed in range(5)}
    assert len(drawn) > 1
    assert all(len(tasks) == 3 for tasks in drawn)
    in_turn = [await played(job(seed=seed, policy=policy)) for seed in range(3) for policy in ("sft", "expert")]
    assert in_turn == [["toy:train:1", "toy:train:3", "toy:train:5"]] * 6


def job(**fields):
    return Job(config=Config(), folder=Path(), env="toy", split="train", limit=3, **fields)


async def played(job):
    async with EnvPool(ToyEnv, Settings(variations=6), workers=1, slots=2) as pool:
        return list(await chosen_tasks(job, pool, ToyEnv))


class CountingEngine(ScriptedEngine):
    """An engine that remembers what was loaded into it."""

    def __init__(self, max_length, end_token_ids):
        super().__init__(lambda _: [5], max_length=max_length, end_token_ids=end_token_ids)
        self.loaded = []

    def load(self, path, end_token_ids):
        self.loaded.append(path.parent.name)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Engines that jobs have started, in this process; the environments are toys."""
    engines = []

    def start(settings, path, max_length, end_token_ids):
        engines.append(CountingEngine(max_length, end_token_ids))
        return engines[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "load_engine", start)
    monkeypatch.setattr(jobs, "_in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(jobs, "section", lambda config, env: Settings(variations=2))
    monkeypatch.setattr(jobs.envs, "load", {"toy": ToyEnv, "other": OtherToyEnv}.__getitem__)
    return engines


def made(policy, **sizes):
    """A stage that has made a policy."""
    folder = Path("made") / policy
    with runs.stage(folder, settings={}):
        save_tiny_policy(folder / "policy", **sizes)
    return folder


def play_all(policies, envs=("toy", "other")):
    """Play every policy in every environment, one policy after the other; returns the manifests' facts."""
    config = Config(run="r", workers={"processes": 1, "slots": 2}, play={"max_tokens": 8})
    config.folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        Job(
            config=config,
            folder=config.folder / env / policy,
            env=env,
            seed=0,
            policy=policy,
            checkpoint=checkpoint,
            made_by="sft",
            split="seen",
        )
        for policy, checkpoint in policies.items()
        for env in envs
    ]
    jobs.run(wanted)
    return {(one.env, one.policy): json.loads((one.folder / "manifest.json").read_text())["facts"] for one in wanted}


def test_policies_of_one_shape_share_one_engine_in_every_environment(started):
    facts = play_all({policy: made(policy, seed=number) for number, policy in enumerate("abc")})
    (engine,) = started
    assert engine.loaded == ["a", "b", "c", "a", "b", "c"]
    assert {key: fact["episodes"] for key, fact in facts.items()} == dict.fromkeys(facts, 2)
    assert {fact["engine_dtype"] for fact in facts.values()} == {engine.dtype}


def test_another_shape_has_an_engine_of_its_own_and_chance_has_none(started):
    facts = play_all({"a": made("a"), "deep": made("deep", layers=3), "random": None})
    assert [engine.loaded for engine in started] == [["a", "a"], ["deep", "deep"]]
    assert "engine_dtype" not in facts["toy", "random"]


def test_a_manifest_says_which_episodes_its_seconds_are_of(started, monkeypatch):
    policy = {"a": made("a")}
    append, room = jobs.JsonlAppender.append, [1]

    def fill_disk(self, record):
        if not room:
            raise OSError(28, "No space left on device")
        append(self, record)
        room.pop()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(jobs.JsonlAppender, "append", fill_disk)
        play_all(policy, envs=["toy"])
    facts = play_all(policy, envs=["toy"])["toy", "a"]
    assert facts["seconds_are_of"] == "the last process, which played 1 of 2 episodes"
