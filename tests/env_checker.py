"""What every text environment promises, checked by playing it."""

from typing import Any

import pytest

from envs import MALFORMED, MALFORMED_OBSERVATION, SPLITS, ExpertStep, TextEnv


def check_env(env: TextEnv, task: str, *, unknown: str = "xyzzy the plugh") -> None:
    """Play a task in every way that the contract speaks of; the environment is closed in the end.

    Args:
        env: a fresh environment.
        task: one of its tasks, which its expert can solve.
        unknown: an action that the environment does not understand.
    """
    check_class(type(env))
    check_splits(env)
    check_bad_requests(env)
    check_solution(env, task)
    check_malformed(env, task)
    check_unknown(env, task, unknown)
    with env as entered:
        assert entered is env
    env.close()


def check_class(env: type[TextEnv]) -> None:
    assert env.name
    assert env.name == env.name.lower()
    settings = env.Settings()
    assert len(env.instruction(settings).split()) < 150
    assert env.Settings(**settings.model_dump()) == settings
    assert env.fingerprint(settings) == env.fingerprint(settings) != ""
    for question, answer in env.example(settings):
        assert question
        assert "Action: " in answer
    assert env.__doc__


def check_splits(env: TextEnv) -> None:
    splits = {split: env.tasks(split) for split in SPLITS}
    for tasks in splits.values():
        assert tasks
        assert len(set(tasks)) == len(tasks)
        assert all(task.startswith(f"{env.name}:") and env.kind(task) for task in tasks)
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())), "a task is in two splits"
    assert env.tasks("train") == splits["train"]


def check_bad_requests(env: TextEnv) -> None:
    for bad in ({"options": {"task": f"{env.name}:no-such-task"}}, {"options": {}}, {}):
        refused(env.reset, **bad)
    refused(env.tasks, "no-such-split")


def check_solution(env: TextEnv, task: str) -> None:
    """The expert's solution is a plain list of steps, and replays: same observations, rewards that add up to 1."""
    steps = env.expert(task)
    assert steps
    assert all(isinstance(step, ExpertStep) and step.thought and step.action for step in steps)
    assert all("\n" not in step.thought + step.action for step in steps)
    assert all(known(env, step.action) for step in steps)
    text, info = env.reset(options={"task": task})
    assert text
    assert info == {"reward": 0.0, "success": False, "valid": True}
    total, terminated, truncated = 0.0, False, False
    for step in steps:
        assert not terminated
        assert not truncated
        observation, reward, terminated, truncated, info = env.step(step.action)
        check_step(observation, reward, terminated, truncated, info)
        total += reward
        assert observation == step.observation
        assert abs(total - info["reward"]) < 1e-9
    assert terminated
    assert not truncated
    assert info["success"]
    assert info["reward"] == 1
    refused(env.step, steps[0].action)


def check_malformed(env: TextEnv, task: str) -> None:
    """A reply without an action costs a step and nothing else: the solution goes on, and alone it ends by the limit."""
    first = env.expert(task)[0].action
    env.reset(options={"task": task})
    expected = env.step(first)
    env.reset(options={"task": task})
    for blank in (MALFORMED, "  "):
        observation, reward, terminated, truncated, info = env.step(blank)
        assert observation == MALFORMED_OBSERVATION
        assert reward == 0
        assert not terminated
        assert not truncated
        assert info == {"reward": 0.0, "success": False, "valid": False}
    played = env.step(first)
    assert played[1:3] == expected[1:3]
    assert played[4] == expected[4]
    before = played[4]["reward"]
    for _ in range(200):
        _, reward, terminated, truncated, info = env.step(MALFORMED)
        assert reward == 0
        assert info["reward"] == before
        assert not terminated
        if truncated:
            return
    raise AssertionError("no step limit within 200 steps")


def check_unknown(env: TextEnv, task: str, unknown: str) -> None:
    refused(env.official_turn, unknown, "", env.Settings())
    env.reset(options={"task": task})
    actions = env.valid_actions()
    assert actions
    assert actions == sorted(set(actions))
    assert all(known(env, action) for action in actions)
    observation, reward, terminated, truncated, info = env.step(unknown)
    check_step(observation, reward, terminated, truncated, info)
    assert not info["valid"]
    assert reward == 0
    _, _, _, _, info = env.step(actions[0])
    assert info["valid"]


def check_step(observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any) -> None:
    assert isinstance(observation, str)
    assert observation
    assert isinstance(reward, float | int)
    assert reward >= 0
    assert type(terminated) is type(truncated) is bool
    assert not (terminated and truncated)
    assert set(info) == {"reward", "success", "valid"}
    assert 0 <= info["reward"] <= 1
    assert not info["success"] or terminated


def known(env: TextEnv, action: str) -> bool:
    """Whether published data may hold the action, and it is taken as it is."""
    return env.official_turn(action, "what it said", env.Settings()) == (action, "what it said")


def refused(function: Any, *args: Any, **kwargs: Any) -> None:
    """The call is refused by a ValueError that says something."""
    with pytest.raises(ValueError, match=r"\w"):
        function(*args, **kwargs)
