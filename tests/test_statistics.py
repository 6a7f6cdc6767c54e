import itertools
import math

import numpy as np
import pytest

from pipeline.records import EpisodeStatus, Trajectory, Turn
from pipeline.statistics import (
    COLUMNS,
    EXACT,
    by_kind,
    comparison,
    holm,
    interquartile,
    interval,
    judged,
    paired,
    paired_all,
    reward_matrix,
    rewards_table,
    sign_flip_test,
    sign_test,
    standard_error,
    statuses,
    summary,
)


def episode(
    task: str, reward: float, *, policy: str = "sft", seed: int = 0, sample: int = 0, steps: int = 2, invalid: int = 0,
    split: str = "seen", status: EpisodeStatus = EpisodeStatus.COMPLETED, success: bool = False,
) -> Trajectory:  # fmt: skip
    turns = [Turn(text="", action="", observation="", reward=reward, valid=place >= invalid) for place in range(steps)]
    return Trajectory(
        id=task, env="toy", split=split, kind=task.split(":")[1], policy=policy, seed=seed, sample=sample, messages=[],
        prompt_length=0, turns=turns, reward=reward, success=success, status=status,
    )  # fmt: skip


def test_means_and_standard_errors_by_hand():
    episodes = [
        episode("toy:a:1", 1.0, success=True, steps=2),
        episode("toy:a:2", 0.5, steps=3, invalid=1),
        episode("toy:b:1", 0.0, steps=4),
        episode("toy:a:1", 0.25, policy="dmpo", seed=1, split="unseen"),
    ]
    table = rewards_table(episodes)
    assert list(table.columns) == COLUMNS
    assert COLUMNS == [
        "env", "method", "split", "seed", "n", "reward", "reward_se", "success", "success_se", "steps", "invalid_rate"
    ]  # fmt: skip
    first, second = table.to_dict("records")
    assert first == pytest.approx({
        "env": "toy", "method": "sft", "split": "seen", "seed": 0, "n": 3,
        "reward": 0.5, "reward_se": 0.5 / math.sqrt(3),  # s = 1/2
        "success": 1 / 3, "success_se": 1 / 3,  # s^2 = 1/3
        "steps": 3, "invalid_rate": 1 / 9,
    })  # fmt: skip
    assert (second["method"], second["split"], second["seed"], second["n"], second["reward"]) == (
        "dmpo", "unseen", 1, 1, 0.25
    )  # fmt: skip
    assert math.isnan(second["reward_se"])


def test_samples_of_a_task_are_averaged_first():
    episodes = [episode("toy:a:1", 1.0), episode("toy:a:1", 0.0, sample=1), episode("toy:a:2", 0.1)]
    row = rewards_table(episodes).iloc[0]
    assert (row["n"], row["reward"]) == (2, pytest.approx(0.3))
    assert row["reward_se"] == pytest.approx(0.2)  # of the task means 0.5 and 0.1


def test_breakdown_by_kind():
    episodes = [episode("toy:a:1", 1.0), episode("toy:a:2", 0.0), episode("toy:b:1", 0.25)]
    table = by_kind(episodes)
    assert list(table.columns) == ["env", "method", "split", "seed", "kind", *COLUMNS[4:]]
    assert table[["kind", "n", "reward"]].to_numpy().tolist() == [["a", 2, 0.5], ["b", 1, 0.25]]


def test_no_actions_have_no_invalid_rate():
    assert math.isnan(rewards_table([episode("toy:a:1", 0.0, steps=0)]).iloc[0]["invalid_rate"])


def test_broken_episodes_count_with_their_reward_and_are_told():
    episodes = [episode("toy:a:1", 1.0), episode("toy:a:2", 0.5, status=EpisodeStatus.ENV_ERROR)]
    assert rewards_table(episodes).iloc[0][["n", "reward"]].tolist() == [2, 0.75]
    assert summary(episodes).iloc[0]["errors"] == 1
    row = statuses(episodes).iloc[0]
    assert (row["completed"], row["env_error"], row["timeout"]) == (1, 1, 0)
    assert row[list(EpisodeStatus)].sum() == 2


def test_an_episode_twice_is_refused():
    with pytest.raises(ValueError, match="task toy:a:1, sample 0 appears twice"):
        rewards_table([episode("toy:a:1", 1.0), episode("toy:a:1", 0.0)])


def test_a_lost_reward_is_refused_and_not_skipped():
    with pytest.raises(ValueError, match="has no reward"):
        rewards_table([episode("toy:a:1", math.nan)])


# Quantiles from mpmath's incomplete beta function; those of whole numbers stand in every table.
def test_interval_of_one_seed_is_students():
    mean, low, high = interval(np.array([[0.4, 0.5, 0.6, 0.5, 0.5]]))
    half = 2.7764451 * math.sqrt(0.005 / 5)  # t(4), s^2 = 0.02 / 4
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-5)


def test_interval_of_two_seeds_by_hand():
    # Seed means 0.4, 0.5: s^2 / 2 = 0.0025. Task means 0.3, 0.5, 0.55: s^2 / 3 = 0.0175 / 3. Satterthwaite: 2.985075.
    mean, low, high = interval(np.array([[0.2, 0.4, 0.6], [0.4, 0.6, 0.5]]))
    half = 3.1914672 * math.sqrt(0.0025 + 0.0175 / 3)
    assert (mean, low, high) == pytest.approx((0.45, 0.45 - half, 0.45 + half), rel=1e-5)


def test_interval_stays_in_the_unit_interval_and_needs_spread():
    assert interval(np.array([[0.0, 0.0, 1.0]]))[1] == 0.0
    assert interval(np.array([[1.0, 1.0, 0.0]]))[2] == 1.0
    for values in ([[0.3]], [[0.3], [0.4]], [[1.0, 1.0, 1.0]]):
        mean, low, high = interval(np.array(values))
        assert mean == pytest.approx(np.mean(values))
        assert math.isnan(low)
        assert math.isnan(high)


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_covers_the_truth_as_often_as_it_says(seeds: int):
    # Scores that differ by seed, by task and by chance; with one seed, only the tasks' spread is promised.
    draw, covered, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        by_seed = draw.normal(0, 0.03, (seeds, 1)) if seeds > 1 else 0
        scores = 0.5 + by_seed + draw.normal(0, 0.1, (1, 20)) + draw.normal(0, 0.05, (seeds, 20))
        _, low, high = interval(scores)
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / trials <= 0.99


def test_summary_over_seeds():
    episodes = [
        episode(f"toy:a:{task}", reward, seed=seed, success=reward > 0.5, steps=4, invalid=1)
        for seed, rewards in enumerate([[0.2, 0.4, 0.6], [0.4, 0.6, 0.5]])
        for task, reward in enumerate(rewards)
    ]
    row = summary(episodes).iloc[0]
    assert (row["seeds"], row["n"], row["steps"], row["invalid_rate"]) == (2, 3, 4.0, 0.25)
    assert (row["reward"], row["success"]) == pytest.approx((0.45, 1 / 3))
    assert (row["reward_low"], row["reward_high"]) == pytest.approx((0.45 - 0.29134, 0.45 + 0.29134), abs=1e-5)
    assert summary(episodes, by_kind=True).iloc[0]["kind"] == "a"


def test_summary_refuses_seeds_with_other_tasks():
    with pytest.raises(ValueError, match="played different tasks"):
        summary([episode("toy:a:1", 1.0), episode("toy:a:2", 1.0, seed=1)])


def both(ours: list[list[float]], theirs: list[list[float]]) -> list[Trajectory]:
    return [
        episode(f"toy:a:{task}", reward, policy=policy, seed=seed)
        for policy, table in (("dmpo", ours), ("sft", theirs))
        for seed, rewards in enumerate(table)
        for task, reward in enumerate(rewards)
    ]


def test_paired_counts_and_difference():
    row = paired(both([[0.9, 0.2, 0.5]], [[0.4, 0.3, 0.5]]), ["dmpo"], "sft").iloc[0]
    assert (row["wins"], row["losses"], row["ties"], row["n"], row["seeds"]) == (1, 1, 1, 3, 1)
    assert row["difference"] == pytest.approx((0.5 - 0.1 + 0) / 3)
    assert row["low"] < row["difference"] < row["high"]


def test_paired_draws_one_of_two_tasks():
    # n - 1 = 1 of the two differences 0 and 1 is drawn: the bootstrap mean is 0 or 1.
    row = paired(both([[0.0, 1.0]], [[0.0, 0.0]]), ["dmpo"], "sft").iloc[0]
    assert (row["low"], row["high"]) == (0.0, 1.0)


def test_paired_interval_has_the_normal_width_on_many_tasks():
    draw = np.random.default_rng(1)
    theirs = draw.uniform(0.2, 0.8, 400)
    ours = theirs + draw.normal(0.05, 0.1, 400)
    row = paired(both([ours.tolist()], [theirs.tolist()]), ["dmpo"], "sft").iloc[0]
    half = 1.96 * (ours - theirs).std(ddof=1) / 20
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.05)
    assert paired(both([ours.tolist()], [theirs.tolist()]), ["dmpo"], "sft").iloc[0].equals(row)


def test_paired_takes_seeds_into_account():
    # No spread over tasks, 0.2 between the two seeds: one seed of two is drawn.
    row = paired(both([[0.5] * 9, [0.7] * 9], [[0.5] * 9, [0.5] * 9]), ["dmpo"], "sft").iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((0.0, 0.2))


def test_paired_without_spread_has_no_interval():
    row = paired(both([[0.5, 0.6]], [[0.4, 0.5]]), ["dmpo"], "sft").iloc[0]
    assert row["difference"] == pytest.approx(0.1)
    assert math.isnan(row["low"])


def test_paired_refuses_other_tasks():
    episodes = [episode("toy:a:1", 1.0, policy="dmpo"), episode("toy:a:2", 1.0)]
    with pytest.raises(ValueError, match="dmpo and sft played different tasks"):
        paired(episodes, ["dmpo"], "sft")


def test_standard_error_adds_seeds_and_tasks():
    assert standard_error(np.array([[0.2, 0.4, 0.6], [0.4, 0.6, 0.5]])) == pytest.approx(math.sqrt(0.0025 + 0.0175 / 3))
    assert math.isnan(standard_error(np.array([[0.3], [0.4]])))


def test_interquartile_mean_leaves_a_quarter_out_at_each_end():
    scores = np.array([[0.0, 0.7, 0.2, 0.3], [0.4, 0.5, 0.6, 0.1]])
    middle, low, high = interquartile(scores)
    assert middle == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)
    assert low < middle < high
    assert interquartile(scores) == (middle, low, high)


def test_interquartile_interval_draws_the_seeds_of_each_task():
    # One task, scores 0 and 1: both draws are the same with probability 1/2, so the interval is all there is.
    assert interquartile(np.array([[0.0], [1.0]])) == (0.5, 0.0, 1.0)
    # Task 2 has no spread: the means are 0.25, 0.5 and 0.75, and no draw takes one task's score for another's.
    assert interquartile(np.array([[0.0, 0.5], [1.0, 0.5]]))[1:] == (0.25, 0.75)


def test_interquartile_interval_needs_seeds_that_differ():
    tails = [[0.5] * 8, [0.4, *[0.5] * 7]]  # the seeds differ, but never in the middle half
    for values in ([[0.1, 0.5, 0.9]], [[0.1, 0.5, 0.9]] * 2, tails):
        middle, low, high = interquartile(np.array(values))
        assert middle == pytest.approx(0.5)
        assert math.isnan(low)
        assert math.isnan(high)
    row = summary([episode("toy:a:1", reward, seed=seed) for seed, reward in enumerate((0.0, 1.0))]).iloc[0]
    assert (row["iqm"], row["iqm_low"], row["iqm_high"]) == (0.5, 0.0, 1.0)


def test_sign_flips_by_hand():
    assert sign_flip_test(np.array([0.1, 0.2, 0.3])) == 2 / 8  # all up or all down
    assert sign_flip_test(np.array([0.1, 0.2, -0.3])) == 1.0  # a sum of 0 is reached by every pattern
    assert sign_flip_test(np.array([0.1, 0.2, 0.3, 0.0, 0.0])) == 2 / 8  # ties tell nothing
    assert sign_flip_test(np.array([0.0, 0.0])) == sign_flip_test(np.array([0.4])) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_sign_flips_are_all_patterns_counted(seed: int):
    differences = np.random.default_rng(seed).choice([-0.3, -0.1, 0.1, 0.2, 0.4, 0.5], size=9)
    sums = [abs(math.fsum(differences * signs)) for signs in itertools.product((-1, 1), repeat=9)]
    exact = sum(one >= abs(math.fsum(differences)) - 1e-9 for one in sums) / 2**9
    assert sign_flip_test(differences) == exact


def test_many_tasks_are_drawn_near_the_exact_value():
    differences = np.random.default_rng(3).normal(0.4, 1, EXACT)
    exact = sign_flip_test(differences)
    drawn = sign_flip_test(np.concatenate([differences, [1e-6]]))  # one more that hardly counts
    assert 0.02 < exact < 0.5
    assert drawn == pytest.approx(exact, abs=0.015)
    assert sign_flip_test(np.full(200, 0.1)) == 1 / 10_001  # never 0


def test_sign_test_is_the_binomials():
    assert sign_test(np.array([0.1] * 8 + [-0.1] * 2 + [0.0] * 5)) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(np.zeros(3)) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_verdict_needs_the_interval_and_the_corrected_p():
    rows = [
        {"low": 0.1, "high": 0.2, "p": 0.01},
        {"low": -0.2, "high": -0.1, "p": 0.012},
        {"low": -0.1, "high": 0.2, "p": 0.001},
        {"low": 0.1, "high": 0.2, "p": 0.04},
        {"low": math.nan, "high": math.nan, "p": 0.0001},
    ]
    verdicts = ["better", "worse", "not told apart", "better", "not told apart"]
    assert [row["verdict"] for row in judged(rows)] == verdicts
    once_more = judged([*rows, rows[3]])  # now 0.04 is there twice, and counts as 0.08
    assert [row["verdict"] for row in once_more] == [*verdicts[:3], *["not told apart"] * 3]


def test_paired_is_corrected_over_its_whole_table():
    tasks = [0.1, 0.2, 0.3, 0.15, 0.25, 0.12, 0.4, 0.11, 0.33]
    one = paired(both([tasks], [[0.0] * 9]), ["dmpo"], "sft").iloc[0]
    assert (one["p"], one["p_holm"], one["p_sign"], one["verdict"]) == (2 / 512, 2 / 512, 2 / 512, "better")
    two = paired(both([tasks], [[0.0] * 9]), ["dmpo", "dmpo"], "sft")
    assert two["p_holm"].tolist() == [4 / 512] * 2


def test_seeds_are_averaged_before_tasks_are_counted():
    told = comparison(np.array([[0.1, 0.2, -0.1], [0.1, 0.2, 0.3]]))
    assert (told["wins"], told["losses"], told["ties"], told["p"]) == (5, 1, 0, 2 / 8)
    assert told["p_sign"] == 0.25


def test_reward_matrix_has_a_gap_where_a_seed_did_not_play():
    table = reward_matrix([episode("toy:a:1", 1.0), episode("toy:a:2", 0.5), episode("toy:a:1", 0.0, seed=1)])
    assert table.index.tolist() == [0, 1]
    assert table["toy:a:1"].tolist() == [1.0, 0.0]
    assert math.isnan(table["toy:a:2"][1])


def test_groups_with_their_own_baselines_are_corrected_as_one_table():
    episodes = both([[0.9, 0.8, 0.7, 0.9, 0.8, 0.9]], [[0.1, 0.2, 0.1, 0.0, 0.1, 0.2]])
    one = paired(episodes, ["dmpo"], "sft").iloc[0]
    two = paired_all(episodes, [(["dmpo"], "sft"), (["sft"], "dmpo")])
    assert list(zip(two["method"], two["baseline"], strict=True)) == [("dmpo", "sft"), ("sft", "dmpo")]
    assert two["p_holm"].tolist() == [2 * one["p"]] * 2
    assert two["verdict"].tolist() == ["not told apart"] * 2
    assert one["verdict"] == "better"
