import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pipeline.records import EpisodeStatus, Trajectory, Turn
from pipeline.statistics import (
    COLUMNS,
    EXACT,
    LEAST,
    by_kind,
    comparison,
    half_width,
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
    student_p,
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
        "env", "method", "split", "seed", "n", "reward", "reward_se", "success", "success_se", "steps", "invalid_rate",
        "steps_se", "invalid_rate_se", "steps_to_success", "steps_to_success_se",
    ]  # fmt: skip
    first, second = table.to_dict("records")
    assert first == pytest.approx({
        "env": "toy", "method": "sft", "split": "seen", "seed": 0, "n": 3,
        "reward": 0.5, "reward_se": 0.5 / math.sqrt(3),  # s = 1/2
        "success": 1 / 3, "success_se": 1 / 3,  # s^2 = 1/3
        "steps": 3, "invalid_rate": 1 / 9, "steps_se": 1 / math.sqrt(3), "steps_to_success": 2,
        "invalid_rate_se": math.sqrt((2**2 + 6**2 + 4**2) / 81 / 2 / 3) / 3,  # invalid - rate * steps: -2, 6, -4 ninths
        "steps_to_success_se": math.nan,
    }, nan_ok=True)  # fmt: skip
    assert (second["method"], second["split"], second["seed"], second["n"], second["reward"]) == (
        "dmpo", "unseen", 1, 1, 0.25
    )  # fmt: skip
    assert math.isnan(second["reward_se"])
    assert math.isnan(second["invalid_rate_se"])
    assert math.isnan(second["steps_to_success"])


def test_steps_to_success_are_those_of_solved_episodes():
    episodes = [
        episode("toy:a:1", 1.0, success=True, steps=2),
        episode("toy:a:1", 1.0, success=True, steps=4, sample=1),
        episode("toy:a:1", 0.5, steps=40, sample=2),  # cut off
        episode("toy:b:2", 1.0, success=True, steps=7),
        episode("toy:b:3", 0.2, steps=40),
    ]
    row = rewards_table(episodes).iloc[0]
    assert (row["steps_to_success"], row["steps_to_success_se"]) == (5.0, 2.0)  # of the tasks' means 3 and 7
    assert summary(episodes).iloc[0]["steps_to_success"] == 5.0
    assert by_kind(episodes)["steps_to_success"].tolist() == [3.0, 7.0]
    unsolved = [episode("toy:a:1", 0.5), episode("toy:a:2", 0.5)]
    assert rewards_table(unsolved)[["steps_to_success", "steps_to_success_se"]].isna().all(axis=None)
    assert math.isnan(summary(unsolved).iloc[0]["steps_to_success"])


def test_the_error_of_the_invalid_rate_is_that_of_repeated_draws_of_tasks():
    draw, shape = np.random.default_rng(0), (200, 60)
    steps = draw.integers(2, 20, shape)
    invalid = draw.binomial(steps, draw.beta(1, 2, shape))  # a task's actions are alike
    where = pd.MultiIndex.from_product([range(200), range(60)], names=["seed", "task"])
    table = pd.DataFrame({"steps": steps.ravel(), "invalid": invalid.ravel()}, index=where).reset_index()
    same = {"env": "toy", "method": "sft", "split": "seen", "sample": 0, "reward": 0.0, "success": 0.0}
    rates = rewards_table(table.assign(**same))
    assert rates["invalid_rate_se"].mean() == pytest.approx(rates["invalid_rate"].std(), rel=0.15)


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
    # Seed means 0.44, 0.45: s^2 / 2 = 0.000025. Task means 0.43, 0.45, 0.455: s^2 / 3 = 0.000175 / 3. t(1) and t(2).
    mean, low, high = interval(np.array([[0.42, 0.44, 0.46], [0.44, 0.46, 0.45]]))
    half = math.sqrt(12.7062047**2 * 0.000025 + 4.3026527**2 * 0.000175 / 3)
    assert (mean, low, high) == pytest.approx((0.445, 0.445 - half, 0.445 + half), rel=1e-5)


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
        episode(f"toy:a:{task}", reward, seed=seed, success=reward > 0.455, steps=4, invalid=1)
        for seed, rewards in enumerate([[0.42, 0.44, 0.46], [0.44, 0.46, 0.45]])
        for task, reward in enumerate(rewards)
    ]
    row = summary(episodes).iloc[0]
    assert (row["seeds"], row["n"], row["steps"], row["invalid_rate"]) == (2, 3, 4.0, 0.25)
    assert (row["reward"], row["success"]) == pytest.approx((0.445, 1 / 3))
    assert (row["reward_low"], row["reward_high"]) == pytest.approx((0.445 - 0.07153, 0.445 + 0.07153), abs=1e-5)
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


def seeds_apart(means: list[float], tasks: int = 9) -> np.ndarray:
    return np.repeat(np.array(means)[:, None], tasks, axis=1)


@pytest.mark.parametrize("means", [[0.0, 0.2], [-0.062, 0.238, 0.051, -0.053], [0.2, 0.22, 0.19, 0.21, 0.2]])
def test_tasks_that_are_alike_leave_students_test_of_the_seeds_means(means: list[float]):
    told, peer = comparison(seeds_apart(means)), stats.ttest_1samp(means, 0)
    assert (told["low"], told["high"]) == pytest.approx(tuple(peer.confidence_interval(0.95)))
    assert told["p"] == pytest.approx(peer.pvalue)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.3])
def test_seeds_that_are_alike_leave_students_test_of_the_tasks(shift: float):
    tasks = np.random.default_rng(0).normal(shift, 0.2, 30)
    told, peer = comparison(np.tile(tasks, (3, 1))), stats.ttest_1samp(tasks, 0)
    assert (told["low"], told["high"]) == pytest.approx(tuple(peer.confidence_interval(0.95)))
    assert told["p"] == pytest.approx(peer.pvalue)


def test_p_is_the_level_at_which_the_interval_reaches_0():
    values = np.random.default_rng(0).normal(0.2, 0.3, (4, 12))
    p = student_p(values)
    assert 1e-4 < p < 0.2
    assert half_width(values, p) == pytest.approx(values.mean())
    assert p > max(stats.ttest_1samp(values.mean(axis), 0).pvalue for axis in (0, 1))  # either spread alone says less


def test_p_has_its_ends():
    assert student_p(np.array([[0.11, -0.09], [-0.11, 0.09]])) == 1.0  # a mean of 0
    assert student_p(np.tile([1.0, 1.0 + 1e-6], (2, 500))) == LEAST
    for nothing_to_tell_from in ([[0.3, 0.3], [0.3, 0.3]], [[0.1], [0.2]], [[0.0, 0.0], [0.0, 0.0]]):
        told = comparison(np.array(nothing_to_tell_from))
        assert told["p"] == 1.0
        assert math.isnan(told["low"])


@pytest.mark.parametrize("seeds", [3, 5])
def test_without_an_effect_a_verdict_is_as_rare_as_the_correction_promises(seeds: int):
    # Of 18 comparisons the least p has to be below .05 / 18, so one comparison alone gets a verdict in 0.3 % of cases.
    # A bootstrap over both as interval, with the p of the tasks alone, gives one in 8 to 13 %.
    draw, trials, covered, verdicts = np.random.default_rng(0), 200, 0, 0
    others = [{"low": -0.1, "high": 0.1, "p": 1.0}] * 17
    for _ in range(trials):
        shape, by_task = (seeds, 100), draw.normal(0, 0.1, 100)
        told = comparison(draw.normal(0, 0.08, (seeds, 1)) + by_task + draw.normal(0, 0.2, shape))
        covered += told["low"] <= 0 <= told["high"]
        verdicts += judged([told, *others])[0]["verdict"] != "not told apart"
    assert verdicts <= 0.015 * trials
    assert 0.93 <= covered / trials <= 0.995


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


def test_interquartile_interval_is_the_jackknifes_over_seeds():
    # Without either seed the other's middle half is left: (0.2 + 0.3) / 2 and (0.4 + 0.5) / 2.
    scores = np.array([[0.0, 0.2, 0.3, 0.7], [0.1, 0.4, 0.5, 0.6]])
    assert interquartile(scores) == (pytest.approx(0.35), 0.0, 1.0)  # t(1) = 12.7 times 0.1, cut
    closer = 0.5 + scores / 100
    assert interquartile(closer) == pytest.approx((0.5035, 0.5035 - 0.0127062, 0.5035 + 0.0127062), abs=1e-6)


@pytest.mark.parametrize("seeds", [3, 5])
def test_interquartile_interval_covers_what_more_seeds_would_give(seeds: int):
    draw = np.random.default_rng(0)
    tasks, covered, trials = draw.uniform(0.1, 0.9, 50), 0, 200

    def played(number: int) -> np.ndarray:
        return (tasks + draw.normal(0, 0.05, (number, 1)) + draw.normal(0, 0.1, (number, 50))).clip(0, 1)

    truth = stats.trim_mean(played(5_000), 0.25, axis=None)
    for _ in range(trials):
        _, low, high = interquartile(played(seeds))
        covered += low <= truth <= high
    assert 0.9 <= covered / trials <= 0.99  # draws of each task's seeds apart: under 0.65, of whole seeds: under 0.85


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
    assert (told["wins"], told["losses"], told["ties"]) == (5, 1, 0)
    assert told["p_sign"] == 0.25  # each task's mean is above 0


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
