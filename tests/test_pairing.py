from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import pairs as pairs_stage
from pipeline.config import PairsConfig
from pipeline.pairing import build, facts
from pipeline.react import assistant, observation
from pipeline.recipe import load
from pipeline.records import EpisodeStatus, Turn
from pipeline.runs import settings_of
from tests.synthetic_run import make_run
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
    pairs, dropped = build(experts, explored, PairsConfig(), seed=0)
    assert [(pair.id, pair.chosen_source, pair.rejected_source) for pair in pairs] == [
        ("t:0", "expert/seed0/0", "sft/seed0/0"),
        ("t:1", "sft/seed0/0", "expert/seed0/0"),
    ]
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (1.0, 0.4)
    assert not dropped


def test_the_engines_ids_travel_with_the_policys_side():
    (pair,), _ = build([expert()], [trajectory()], PairsConfig(), seed=0)
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
    (pair,), _ = build([one], [expert(messages=one.messages, prompt_length=5)], PairsConfig(), seed=0)
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
    pairs, dropped = build([expert()], [trajectory(**explored)], PairsConfig(min_gap=0.1), seed=0)
    assert (pairs, dropped) == ([], Counter({reason: 1}))


def test_the_order_of_the_pairs_is_that_of_the_tasks_not_of_the_file():
    experts = [expert(id=f"t:{number}") for number in range(5)]
    explored = [trajectory(id=f"t:{number}", sample=sample) for number in range(5) for sample in range(2)]
    forward, _ = build(experts, explored, PairsConfig(), seed=0)
    backward, _ = build(experts[::-1], explored[::-1], PairsConfig(), seed=0)
    assert forward == backward


def played(turns, **changes):
    """A trajectory of so many turns, all different."""
    steps = [
        Turn(
            text=f"Action: go to {n}", action=f"go to {n}", observation=f"at {n}", reward=0.0, valid=True, token_ids=[n]
        )
        for n in range(turns)
    ]
    messages = [{"role": "user", "content": "task"}]
    for step in steps:
        messages += [assistant(step.text), observation(step.observation)]
    return trajectory(**({"turns": steps, "messages": messages[:-1] if steps else messages} | changes))


def made(explored, rules, experts=None, seed=0):
    return build([expert()] if experts is None else experts, explored, rules, seed)


SAMPLES = [
    played(4, sample=0, reward=0.2),
    played(2, sample=1, reward=0.8),
    played(3, sample=2, reward=0.2),
    played(1, sample=3, reward=0.8),
    played(3, sample=4, reward=0.2),
    played(9, sample=5, reward=0.5),
]


@pytest.mark.parametrize(
    ("contest", "sides", "others"),
    [
        ("samples", ("sft/seed0/3", "sft/seed0/2"), 4),  # among equals the fewest turns, then the earliest
        ("all", ("expert/seed0/0", "sft/seed0/2"), 5),
    ],
)
def test_the_best_is_paired_with_the_worst(contest, sides, others):
    (pair,), dropped = made(SAMPLES[::-1], PairsConfig(contest=contest))
    assert (pair.chosen_source, pair.rejected_source) == sides
    assert dropped == {"neither best nor worst": others}


def test_samples_compete_without_an_expert():
    for contest in ("samples", "all"):
        pairs, dropped = made(SAMPLES, PairsConfig(contest=contest), experts=[])
        assert (len(pairs), dropped) == (1, {"neither best nor worst": 4})
    assert made(SAMPLES, PairsConfig(contest="expert"), experts=[]) == ([], {"no expert for the task": 6})


def test_the_expert_is_the_worst_where_every_sample_is_better():
    (pair,), _ = made(SAMPLES, PairsConfig(contest="all"), experts=[expert(reward=0.1)])
    assert (pair.chosen_source, pair.rejected_source) == ("sft/seed0/3", "expert/seed0/0")


def test_a_contest_without_a_pair_counts_all_its_samples():
    rules = PairsConfig(contest="samples", min_gap=0.7)
    assert made(SAMPLES, rules) == ([], {"rewards closer than min_gap": 6})
    assert made(SAMPLES[::2][:2], rules) == ([], {"tie": 2})
    assert made(SAMPLES[:1], rules) == ([], {"the only sample of the task": 1})


def test_success_alone_may_decide():
    samples = [played(2, sample=0, reward=0.9), played(2, sample=1, reward=0.5, success=True)]
    (pair,), _ = made(samples, PairsConfig(contest="samples", reward="success"))
    assert (pair.chosen_source, pair.chosen_reward, pair.rejected_reward) == ("sft/seed0/1", 0.5, 0.9)
    assert made([played(2, success=True)], PairsConfig(reward="success")) == ([], {"tie": 1})


@pytest.mark.parametrize(("turns", "left"), [(6, 6), (7, 6), (12, 6)])
def test_the_official_cut_leaves_the_winners_turns_and_five(turns, left):
    (whole,), _ = made([played(turns)], PairsConfig())
    (pair,), _ = made([played(turns)], PairsConfig(cut="official"))
    assert whole.rejected_turns == turns
    assert pair.rejected == whole.rejected[: 2 * left - 1]
    assert pair.rejected[-1]["role"] == "assistant"
    assert pair.rejected_token_ids == [[n] for n in range(left)]
    assert (pair.rejected_turns, pair.chosen, pair.rejected_reward) == (left, whole.chosen, 0.5)
    assert pair.rejected_source == "sft/seed0/0" + (f"+cut{turns - left}" if turns > left else "")


def test_an_expert_that_loses_is_not_cut():
    losing = played(12, policy="expert", reward=0.1)
    (pair,), _ = made([played(1)], PairsConfig(cut="official"), experts=[losing])
    assert (pair.rejected_turns, pair.rejected_source) == (12, "expert/seed0/0")


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        ({"min_turns": 9}, {"loser shorter than min_turns": 1}),
        ({"min_turns": 8, "max_turns": 8}, {}),
        ({"max_turns": 7}, {"loser longer than max_turns": 1}),
        ({"max_turns": 7, "cut": "official"}, {}),  # the winner has one turn: six are left
        ({"min_turns": 7, "cut": "official"}, {"loser shorter than min_turns": 1}),
    ],
)
def test_a_loser_too_short_or_too_long_makes_no_pair(rules, dropped):
    pairs, counted = made([played(8)], PairsConfig(**rules))
    assert (len(pairs), counted) == (1 - len(dropped), dropped)


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        ({"min_turn_gap": 7, "max_turn_gap": 7}, {}),
        ({"min_turn_gap": 8}, {"lengths closer than min_turn_gap": 1}),
        ({"max_turn_gap": 6}, {"lengths farther apart than max_turn_gap": 1}),
    ],
)
@pytest.mark.parametrize("loser_is_longer", [True, False])
def test_sides_too_like_or_too_unlike_in_length_make_no_pair(rules, dropped, loser_is_longer):
    short, long = expert(reward=float(loser_is_longer)), played(8, reward=0.5)
    pairs, counted = made([long], PairsConfig(**rules), experts=[short])
    assert (len(pairs), counted) == (1 - len(dropped), dropped)
    assert all((one.rejected_turns > one.chosen_turns) == loser_is_longer for one in pairs)


def test_the_gap_is_that_of_the_cut_loser():
    assert len(made([played(8)], PairsConfig(max_turn_gap=5, cut="official"))[0]) == 1


def test_noisy_losers_are_kept_dropped_or_kept_alone():
    clean = played(3)
    noisy = played(3, sample=1)
    noisy.messages[-1] = assistant("hm hm")
    kept = {setting: made([clean, noisy], PairsConfig(noisy=setting)) for setting in ("keep", "drop", "only")}
    assert [pair.rejected_source[-1] for pair in kept["keep"][0]] == ["0", "1"]
    assert [pair.rejected_source[-1] for pair in kept["drop"][0]] == ["0"]
    assert [pair.rejected_source[-1] for pair in kept["only"][0]] == ["1"]
    assert kept["drop"][1] == {"loser is noisy": 1}
    assert kept["only"][1] == {"loser is not noisy": 1}


def test_noise_that_is_cut_off_does_not_count():
    long = played(12)
    long.messages[-1] = assistant("hm hm")
    assert made([long], PairsConfig(noisy="drop"))[1] == {"loser is noisy": 1}
    assert len(made([long], PairsConfig(noisy="drop", cut="official"))[0]) == 1


def many(count):
    return [expert(id=f"t:{n}") for n in range(count)], [played(3, id=f"t:{n}") for n in range(count)]


def test_the_limit_draws_by_the_seed_and_keeps_the_order():
    experts, explored = many(20)
    kept = {seed: made(explored, PairsConfig(limit=5), experts, seed) for seed in range(3)}
    assert all(dropped == {"beyond pairs.limit": 15} for _, dropped in kept.values())
    ids = {seed: [pair.id for pair in pairs] for seed, (pairs, _) in kept.items()}
    every = [pair.id for pair in made(explored, PairsConfig(), experts)[0]]
    assert all(len(one) == 5 and one == [name for name in every if name in one] for one in ids.values())
    assert ids[0] != ids[1]
    assert made(explored, PairsConfig(limit=5), experts, 1) == kept[1]
    assert made(explored, PairsConfig(limit=20), experts)[1] == {}


def test_fewer_pairs_than_the_limit_are_an_error_that_says_why():
    experts, explored = many(4)
    explored[0].reward = 1.0
    with pytest.raises(
        ValueError, match=r"^3 pairs are fewer than pairs.limit=4 \(tie: 1\); set a limit that every arm"
    ):
        made(explored, PairsConfig(limit=4), experts)


def test_the_stage_says_whose_pairs_are_too_few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_run(methods=["dmpo"], seeds=[3], tasks=8)
    few = config.model_copy(update={"arms": {"few": {"method": "dmpo", "pairs.limit": 99}}})
    with pytest.raises(ValueError, match=r"^sciworld, seed 3, few: \d pairs are fewer than pairs.limit=99 \(.*\.$"):
        pairs_stage.main(few)


def test_pairs_made_before_there_were_limits_of_the_gap_are_not_made_again():
    def fingerprinted(**keys):
        return settings_of(PairsConfig(**keys))["PairsConfig"]

    assert not {key for key in fingerprinted() if "turn_gap" in key}
    assert fingerprinted(min_turn_gap=3, max_turn_gap=9).items() >= {("min_turn_gap", 3), ("max_turn_gap", 9)}


def test_the_facts_count_what_was_done():
    experts, _ = many(10)
    explored = [played(8, id=f"t:{n}") for n in range(10)]
    rules = PairsConfig(cut="official", corrupted=0.5, flipped=0.2)
    found = facts(*made(explored, rules, experts))
    assert found["pairs"] == 10
    assert found["cut"] == {"pairs": 10, "turns": 20}
    assert (found["corrupted"], found["flipped"]) == (5, 2)
    assert found["won_by"] == {"expert": 8, "sft": 2}
    turns = found["turns"]["chosen"].items() | found["turns"]["rejected"].items()
    assert {number for number, _ in turns} == {1, 6, 9}
    assert found["turns"]["rejected"][1] == 2
    assert facts(*made(explored, PairsConfig(corrupted=0.5, corrupted_actions=2), experts))["noisy"] == 5
    assert facts(*made(explored, PairsConfig(), experts))["noisy"] == 0


def test_a_flip_keeps_the_rest_as_it_is():
    experts, explored = many(8)
    plain, dropped = made(explored, PairsConfig(), experts)
    swapped, dropped_too = made(explored, PairsConfig(flipped=1), experts)
    assert dropped == dropped_too
    assert [(one.chosen, one.rejected) for one in swapped] == [(one.rejected, one.chosen) for one in plain]


def test_every_setting_can_be_written_on_the_command_line():
    for key in ("contest", "reward", "errors", "cut", "noisy"):
        for value in get_args(PairsConfig.model_fields[key].annotation):
            assert getattr(load("tiny", [f"pairs.{key}={value}"]).pairs, key) == value


ATTEMPT = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["t:0", "t:1", "nobody:0"]),
        "reward": st.sampled_from([0.0, 0.5, 1.0]),
        "success": st.booleans(),
        "status": st.sampled_from([EpisodeStatus.COMPLETED, EpisodeStatus.TIMEOUT]),
    }
)
RULES = st.fixed_dictionaries(
    {
        "contest": st.sampled_from(["expert", "samples", "all"]),
        "reward": st.sampled_from(["score", "success"]),
        "min_gap": st.sampled_from([0.0, 0.6]),
        "errors": st.sampled_from(["drop", "keep"]),
        "cut": st.sampled_from(["none", "official"]),
        "max_turns": st.sampled_from([None, 3]),
        "max_turn_gap": st.sampled_from([None, 2]),
        "noisy": st.sampled_from(["keep", "drop", "only"]),
        "limit": st.sampled_from([None, 1, 2]),
        "corrupted": st.sampled_from([0.0, 0.5]),
        "corruption": st.sampled_from(["repeat", "random"]),
        "flipped": st.sampled_from([0.0, 0.5]),
    }
)


@given(st.lists(st.tuples(st.integers(0, 8), ATTEMPT), max_size=8), RULES, st.integers(0, 3))
def test_every_explored_trajectory_is_in_a_pair_or_counted(attempts, rules, seed):
    explored = [played(turns, sample=number, **fields) for number, (turns, fields) in enumerate(attempts)]
    experts = [expert(id="t:0"), expert(id="t:1", reward=0.2)]
    count = len(build(experts, explored, PairsConfig(**rules | {"limit": None}), seed)[0])
    if count < (rules["limit"] or 0):
        with pytest.raises(ValueError, match="pairs are fewer than"):
            build(experts, explored, PairsConfig(**rules), seed)
        return
    pairs, dropped = build(experts, explored, PairsConfig(**rules), seed)
    sources = [source.partition("+")[0] for pair in pairs for source in (pair.chosen_source, pair.rejected_source)]
    paired = [source for source in sources if source.startswith("sft")]
    assert len(set(paired)) == len(paired)
    assert len(paired) + dropped.total() == len(explored)
    for pair in pairs:
        for side, turns in ((pair.chosen, pair.chosen_turns), (pair.rejected, pair.rejected_turns)):
            assert [message["role"] for message in side] == (["assistant", "user"] * turns)[:-1]
        assert len(pair.rejected_token_ids) in (0, pair.rejected_turns)
        assert len(pair.chosen_token_ids) in (0, pair.chosen_turns)
