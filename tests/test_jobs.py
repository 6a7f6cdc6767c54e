from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.pool import EnvPool
from pipeline import arms, rollout
from pipeline.config import Config
from pipeline.jobs import Job, check_disjoint, chosen_tasks, spread, summary
from pipeline.records import write_jsonl
from tests.test_records import trajectory
from tests.toy_env import Settings, ToyEnv


def kind(task):
    return task.split(":")[0]


def test_spread_takes_from_every_kind_in_turn():
    tasks = ["a:0", "a:1", "a:2", "b:0", "b:1", "c:0"]
    assert spread(tasks, 4, kind) == ["a:0", "a:1", "b:0", "c:0"]
    assert spread(tasks, None, kind) == tasks
    assert spread(tasks, 99, kind) == tasks


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
    drawn = {tuple(await played(job(seed=seed, policy="sft"))) for seed in range(5)}
    assert len(drawn) > 1
    assert all(len(tasks) == 3 for tasks in drawn)
    assert {tuple(await played(job(seed=seed, policy="expert"))) for seed in range(5)} == {
        ("toy:train:0", "toy:train:1", "toy:train:2")
    }


def job(**fields):
    return Job(config=Config(), folder=Path(), env="toy", split="train", limit=3, **fields)


async def played(job):
    async with EnvPool(ToyEnv, Settings(variations=6), workers=1, slots=2) as pool:
        return list(await chosen_tasks(job, pool, ToyEnv))
