from collections import Counter

import pytest

from pipeline.config import PairsConfig
from pipeline.pairs import build
from pipeline.records import EpisodeStatus
from tests.test_records import trajectory

EXPERT = {"policy": "expert", "reward": 1.0, "success": True, "status": EpisodeStatus.COMPLETED}


def expert(**changes):
    one = trajectory(**(EXPERT | changes))
    for turn in one.turns:
        turn.token_ids = []
    return one


def test_the_higher_reward_is_chosen_whoever_has_it():
    experts = [expert(id="t:0"), expert(id="t:1", reward=0.2, success=False)]
    explored = [trajectory(id="t:1", reward=0.9), trajectory(id="t:0", reward=0.4)]
    pairs, dropped = build(experts, explored, PairsConfig())
    assert [(pair.id, pair.chosen_source, pair.rejected_source) for pair in pairs] == [
        ("t:0", "expert/seed0/0", "sft/seed0/0"),
        ("t:1", "sft/seed0/0", "expert/seed0/0"),
    ]
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (1.0, 0.4)
    assert not dropped


def test_the_engines_ids_travel_with_the_policys_side():
    (pair,), _ = build([expert()], [trajectory()], PairsConfig())
    assert pair.chosen_token_ids == []
    assert pair.rejected_token_ids == [[4, 1]]


def test_a_worked_example_is_left_out_of_the_prompt():
    prompt = [
        {"role": role, "content": content}
        for role, content in [
            ("user", "instruction"), ("assistant", "OK"),
            ("user", "example"), ("assistant", "Action: wait"), ("user", "task"),
        ]
    ]  # fmt: skip
    one = trajectory(messages=[*prompt, {"role": "assistant", "content": "Action: wait"}], prompt_length=5)
    (pair,), _ = build([one], [expert(messages=one.messages, prompt_length=5)], PairsConfig())
    assert [message["content"] for message in pair.prompt] == ["instruction", "OK", "task"]


@pytest.mark.parametrize(
    ("explored", "reason"),
    [
        ({"reward": 1.0}, "tie"),
        ({"reward": 0.95}, "rewards closer than min_gap"),
        ({"id": "nobody:0"}, "no expert for the task"),
        ({"status": EpisodeStatus.ENV_ERROR}, "ended in env_error"),
        ({"status": EpisodeStatus.TIMEOUT}, "ended in timeout"),
        ({"turns": [], "messages": [], "prompt_length": 0}, "no turn was played"),
    ],
)
def test_what_makes_no_pair_is_counted_with_its_reason(explored, reason):
    pairs, dropped = build([expert()], [trajectory(**explored)], PairsConfig(min_gap=0.1))
    assert (pairs, dropped) == ([], Counter({reason: 1}))


def test_the_order_of_the_pairs_is_that_of_the_tasks_not_of_the_file():
    experts = [expert(id=f"t:{number}") for number in range(5)]
    explored = [trajectory(id=f"t:{number}", sample=sample) for number in range(5) for sample in range(2)]
    forward, _ = build(experts, explored, PairsConfig())
    backward, _ = build(experts[::-1], explored[::-1], PairsConfig())
    assert forward == backward
