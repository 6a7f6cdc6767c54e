"""From episodes to tables: means, standard errors, confidence intervals and paired comparisons.

Three sources of chance are told apart:

    tasks    which tasks were drawn for the split; the standard errors of `rewards_table` are over them
    seeds    the run itself (initialisation, exploration, training); `summary` adds it where there are two or more
    samples  several attempts at one task by one policy: averaged first, so that a task counts once

Tasks are taken for independent draws. Those of one kind are neighbours, so where a split holds many variations of few
kinds, its intervals say too little of how other kinds of task would come out; `by_kind` tells the kinds apart.

Every episode counts with its recorded reward. One that the environment broke (`EpisodeStatus.is_error`) is never left
out, since that would reward a policy for breaking its environment; `summary` and `statuses` say how many there are.

Nothing is called better or worse unless its 95 % interval leaves 0 out and its p-value, corrected for all comparisons
of the table, is below 1 - `LEVEL` (`judged`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, special, stats

from pipeline.records import EpisodeStatus, Trajectory

Array = NDArray[np.float64]
Episodes: TypeAlias = Iterable[Trajectory] | pd.DataFrame
"""Trajectories, or the `episode_table` of some."""

GROUP = ["env", "method", "split", "seed"]
MEASURES = ["n", "reward", "reward_se", "success", "success_se", "steps", "invalid_rate"]
MEASURES += ["steps_se", "invalid_rate_se", "steps_to_success", "steps_to_success_se"]
COLUMNS = GROUP + MEASURES
"""The columns of rewards.csv, in order."""
EPISODE = [*GROUP, "kind", "task", "sample", "reward", "success", "steps", "invalid", "status"]
"""The columns of episodes.csv, in order."""
ERRORS = [status for status in EpisodeStatus if status.is_error]
LEVEL = 0.95
"""Coverage of every interval here; 1 - LEVEL is the level of every verdict."""
EXACT = 20
"""Most differing tasks whose 2^n patterns of signs are all counted."""
LEAST = 1e-12
"""The smallest p-value that `student_p` tells from 0."""


def rewards_table(episodes: Episodes) -> pd.DataFrame:
    """Tidy rewards: one row for each environment, method, split and seed, in the order of the episodes.

    Columns (`COLUMNS`): n is the number of tasks; reward and success are means over tasks; steps is the mean number of
    turns of all episodes, those cut off among them, steps_to_success that of the solved ones alone (NaN where none
    is); invalid_rate is the share of all actions that the environment did not understand, malformed replies among them
    (NaN where nobody acted). The `_se` are standard errors over tasks, of the means s / sqrt(n) with s^2 on n - 1, of
    the rate, which is a ratio of two such means, by linearisation (Cochran 1977, "Sampling techniques", sec. 2.11);
    NaN for one task.

    Raises:
        ValueError: an attempt at a task appears twice, or has no reward.
    """
    return _table(episode_table(episodes), GROUP)[COLUMNS]


def best_of(episodes: Iterable[Trajectory]) -> list[Trajectory]:
    """Of several attempts at a task by one policy the best, the first of equal ones: what best-of-n counts."""
    best: dict[tuple[object, ...], Trajectory] = {}
    for one in episodes:
        key = (one.env, one.policy, one.split, one.seed, one.id)
        if key not in best or one.reward > best[key].reward:
            best[key] = one
    return list(best.values())


def by_kind(episodes: Episodes) -> pd.DataFrame:
    """`rewards_table` broken down by the kind of task, with a column `kind` after `seed`.

    Raises:
        ValueError: an attempt at a task appears twice, or has no reward.
    """
    return _table(episode_table(episodes), [*GROUP, "kind"])[[*GROUP, "kind", *MEASURES]]


def statuses(episodes: Episodes) -> pd.DataFrame:
    """How episodes ended: one row as in `rewards_table`, one column of counts for each `EpisodeStatus`."""
    frame = episode_table(episodes)
    counts = frame.groupby([*GROUP, "status"], sort=False).size().unstack("status", fill_value=0)
    order = pd.MultiIndex.from_frame(frame[GROUP].drop_duplicates())
    return (
        counts.reindex(index=order, columns=list(EpisodeStatus), fill_value=0).rename_axis(columns=None).reset_index()
    )


def summary(episodes: Episodes, *, by_kind: bool = False) -> pd.DataFrame:
    """Means over seeds and tasks with their `interval`: one row for each environment, method, split (and kind).

    Columns: env, method, split, (kind,) seeds and n (tasks) as counts, reward, reward_low, reward_high, success,
    success_low, success_high, iqm, iqm_low, iqm_high (of the reward, `interquartile`), steps, steps_to_success (of the
    solved episodes; NaN where none is), invalid_rate, completed (share of episodes that the environment ended), errors
    (episodes that the environment broke).

    Raises:
        ValueError: two seeds of a method played different tasks, or as in `rewards_table`.
    """
    frame = episode_table(episodes)
    keys = ["env", "method", "split"] + (["kind"] if by_kind else [])
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        scores = _matrices(group, ["reward", "success", "steps"])
        row = dict(zip(keys, key, strict=True)) | {"seeds": len(scores), "n": len(scores["reward"].columns)}
        for name in ("reward", "success"):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(scores[name].to_numpy())
        row["iqm"], row["iqm_low"], row["iqm_high"] = interquartile(scores["reward"].to_numpy())
        turns = group["steps"].sum()
        row["steps"] = float(scores["steps"].to_numpy().mean())
        row["steps_to_success"] = float(_of_solved(group, ["seed", "task"]).mean())
        row["invalid_rate"] = float(group["invalid"].sum() / turns) if turns else math.nan
        row["completed"] = float((group["status"] == EpisodeStatus.COMPLETED).mean())
        rows.append(row | {"errors": int(group["status"].isin(ERRORS).sum())})
    return pd.DataFrame(rows)


def interval(values_ST: Array) -> tuple[float, float, float]:  # noqa: N803
    """Mean of scores in [0, 1] with a 95 % confidence interval.

    With one seed the interval is over tasks alone, mean +- t(n-1) * s / sqrt(n): it says how far another draw of tasks
    would move the score of this very policy, not how far another training would. With several seeds both are in
    (`half_width`).

    Args:
        values_ST: [seeds, tasks] scores.

    Returns:
        Mean, low, high, cut to [0, 1]. Low and high are NaN where the data hold no spread to tell one from: a single
        task, or the same score throughout.
    """
    return _cut(float(values_ST.mean()), half_width(values_ST))


def _cut(mean: float, half: float) -> tuple[float, float, float]:
    """Mean, mean - half and mean + half, the last two within [0, 1]; NaN stays NaN."""
    low, high = np.clip([mean - half, mean + half], 0, 1)
    return mean, float(low), float(high)


def half_width(values_ST: Array, level: float = 1 - LEVEL) -> float:  # noqa: N803
    """How far the confidence interval of the mean of [seeds, tasks] values reaches to either side.

        half^2 = t(S-1)^2 * s_S^2 / S + t(T-1)^2 * s_T^2 / T

    where s_S^2 is the sample variance of the S seeds' means, s_T^2 that of the T tasks' means over seeds, and t(n) the
    two-sided quantile of Student's t at `level` (Banerjee 1960, "Approximate confidence interval for linear functions
    of means of k populations when the population variances are not equal", Sankhya 22, 357-358). Without spread
    between tasks it is Student's interval of the seeds' means, without spread between seeds, or with one, that of the
    tasks'.

    Of normal means such an interval misses the true mean with a chance of at most `level`, at every level and for every
    ratio of the two variances: for a normal Z, P(Z^2 > x) is convex in x, so it is at most the mean, weighted by the
    variances' shares, of what Student's t gives for each alone. A correction by `holm` needs that, since it asks for
    levels far below .05. Satterthwaite's degrees of freedom do not give it: three seeds that happen to agree make them
    count on the tasks, and where the seeds' spread matters most his interval misses in 7 % of cases at a level of 5 %,
    in 1.8 % at one of 0.28 %. In the two-way random-effects model of seeds and tasks the two variances hold the
    residual's twice, which errs on the safe side, too (Owen 2007, "The pigeonhole bootstrap", Ann. Appl. Stat. 1(2),
    sec. 3).

    Args:
        values_ST: [seeds, tasks] values.
        level: chance of a miss.

    Returns:
        Half the interval's width; NaN for a single task, or the same value throughout.
    """
    if values_ST.shape[1] < 2 or standard_error(values_ST) < 1e-9:
        return math.nan
    return math.sqrt(sum(special.stdtrit(freedom, level / 2) ** 2 * part for part, freedom in _variances(values_ST)))


def student_p(values_ST: Array) -> float:  # noqa: N803
    """Two-sided p-value of a mean of 0: the level at which the interval of `half_width` just reaches 0.

    Args:
        values_ST: [seeds, tasks] differences.

    Returns:
        p in [`LEAST`, 1]; 1 where `half_width` has nothing to tell it from.
    """
    mean = abs(float(values_ST.mean()))
    if math.isnan(half_width(values_ST)):
        return 1.0
    if half_width(values_ST, LEAST) <= mean:
        return LEAST
    log_p = optimize.brentq(lambda log: half_width(values_ST, math.exp(log)) - mean, math.log(LEAST), 0.0)
    return math.exp(float(log_p))


def standard_error(values_ST: Array) -> float:  # noqa: N803
    """Standard error of the mean of [seeds, tasks] values: sqrt(s_S^2 / S + s_T^2 / T), the terms of `half_width`.

    NaN for a single task.
    """
    return math.sqrt(sum(part for part, _ in _variances(values_ST))) if values_ST.shape[1] > 1 else math.nan


def _variances(values_ST: Array) -> list[tuple[float, int]]:  # noqa: N803
    """Variance of the mean of the seeds' means, and of that of the tasks' means, each with its degrees of freedom."""
    return [
        (float(means.var(ddof=1)) / means.size, means.size - 1)
        for means in (values_ST.mean(1), values_ST.mean(0))
        if means.size > 1
    ]


def interquartile(values_ST: Array) -> tuple[float, float, float]:  # noqa: N803
    """Interquartile mean with a 95 % interval: the mean of all scores but the lowest and the highest quarter.

    The interval is the jackknife's over seeds (Tukey 1958, Ann. Math. Stat. 29, 614): with m_s the interquartile mean
    without seed s, Student's t(S-1) times the root of (S-1)/S * sum (m_s - mean m)^2. It covers other seeds on these
    very tasks, not other tasks: in simulations of two to five seeds (spread .04 and .08) on 100 tasks 94 to 96 of 100.

    Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264, sec. 4), who proposed the measure, draw each task's seeds
    apart from the other tasks'. On Atari, where each game has runs of its own, that is right; here one training plays
    all tasks, what they share of it averages out, and such an interval covers 31 to 64 of 100. A percentile bootstrap
    of whole seeds covers 51 of 100 with two seeds, 71 to 74 with three, 78 to 80 with four, 82 with five.

    Args:
        values_ST: [seeds, tasks] scores.

    Returns:
        Interquartile mean, low, high, cut to [0, 1]. Low and high are NaN with one seed, or where no seed changes it.
    """
    middle, seeds = _iqm(values_ST), len(values_ST)
    if seeds < 2:
        return middle, math.nan, math.nan
    without_S = np.array([_iqm(np.delete(values_ST, seed, 0)) for seed in range(seeds)])  # noqa: N806
    error = math.sqrt((seeds - 1) * without_S.var())
    return _cut(middle, float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1)) * error if error > 1e-9 else math.nan)


def _iqm(values: Array) -> float:
    return float(stats.trim_mean(values, 0.25, axis=None))


def paired(
    episodes: Episodes, methods: Sequence[str], baseline: str, *, draws: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Each method against a baseline over the same tasks and seeds.

    With two seeds or more, interval and p-value are one model's, Student's over the [seeds, tasks] differences
    (`half_width`, `student_p`), and it is this p that is corrected for the number of comparisons: a training's luck is
    most of what these differences are made of, and there are as many draws of it as seeds, however many the tasks.
    Neither bootstrap nor permutation can say so. Of three to five seeds a percentile bootstrap leaves 0 out falsely in
    6 to 9 of 100 comparisons, and a permutation of their signs has no p below 2 / 2^5. The price is that so few seeds
    tell little apart after a correction for many: in the first of 18 comparisons that Holm's method looks at, a
    difference has to be 19 standard errors over three seeds, 7 over five.

    With one seed nothing is known of other trainings, and only the draw of tasks is covered: by a percentile bootstrap
    of the tasks' paired differences (Efron & Tibshirani 1993, ch. 13) and the `sign_flip_test`. Of n tasks n - 1 are
    drawn, which makes the bootstrap variance s^2 / n and not its usual (n - 1) / n part (Rao & Wu 1988, JASA 83(401)).

    Args:
        episodes: of all methods and the baseline.
        methods: whom to compare.
        baseline: against whom.
        draws: as in `comparison`.
        seed: as in `comparison`.

    Returns:
        One row for each environment, split and method: env, split, method, baseline, the columns of `comparison`, and
        those of `judged` over the whole table.

    Raises:
        ValueError: method and baseline, or two seeds of one of them, did not play the same tasks.
    """
    rows = []
    for (env, split), group in episode_table(episodes).groupby(["env", "split"], sort=False):
        scores = {
            method: _matrices(group[group["method"] == method], ["reward"])["reward"] for method in {*methods, baseline}
        }
        for method in methods:
            ours, theirs = scores[method], scores[baseline]
            if not (ours.index.equals(theirs.index) and ours.columns.equals(theirs.columns)):
                raise ValueError(
                    f"{env}, {split}: {method} and {baseline} played different tasks or seeds; evaluate both again."
                )
            values_ST = ours.to_numpy() - theirs.to_numpy()  # noqa: N806
            where = {"env": env, "split": split, "method": method, "baseline": baseline}
            rows.append(where | comparison(values_ST, draws=draws, seed=seed))
    return pd.DataFrame(judged(rows))


def paired_all(episodes: Episodes, compared: Iterable[tuple[Sequence[str], str]]) -> pd.DataFrame:
    """`paired` of several groups of methods, each with its own baseline, judged as one table."""
    tables = [paired(episodes, methods, baseline) for methods, baseline in compared]
    return pd.DataFrame(judged(pd.concat(tables).to_dict("records")))


def comparison(values_ST: Array, *, draws: int = 10_000, seed: int = 0) -> dict[str, float]:  # noqa: N803
    """One paired comparison.

    Args:
        values_ST: [seeds, tasks] differences of rewards, ours - theirs.
        draws: with one seed, replications of the bootstrap (`paired`) and of the permutation test.
        seed: of both; the same arguments give the same numbers.

    Returns:
        seeds, n (tasks), difference (the mean), low, high (NaN where all differences are equal, or of several seeds'
        single task); wins, losses, ties, which count the seeds x tasks episodes by the sign of their difference; p, of
        `student_p` or, with one seed, `sign_flip_test`; p_sign of `sign_test`.
    """
    wins, losses = int((values_ST > 1e-9).sum()), int((values_ST < -1e-9).sum())
    difference, tasks_T = float(values_ST.mean()), values_ST.mean(0)  # noqa: N806
    if len(values_ST) > 1:
        half, p = half_width(values_ST), student_p(values_ST)
        low, high = difference - half, difference + half
    else:
        low, high = _bootstrap(tasks_T, draws, np.random.default_rng(seed))
        p = sign_flip_test(tasks_T, draws=draws, seed=seed)
    return {
        "seeds": values_ST.shape[0],
        "n": values_ST.shape[1],
        "difference": difference,
        "low": low,
        "high": high,
        "wins": wins,
        "losses": losses,
        "ties": values_ST.size - wins - losses,
        "p": p,
        "p_sign": sign_test(tasks_T),
    }


def sign_flip_test(differences_T: Array, *, draws: int = 10_000, seed: int = 0) -> float:  # noqa: N803
    """Two-sided p-value of the mean of paired differences under random signs (Fisher 1935, sec. 21).

    If neither policy is better, each task's difference might as well have had the other sign. p is the share of sign
    patterns whose sum is at least as far from 0 as the observed one. Up to `EXACT` differing tasks all patterns are
    counted; beyond, `draws` random ones and the observed one (Phipson & Smyth 2010, SAGMB 9(1)). It tells these two
    policies apart, not their trainings: with several seeds `student_p` does.

    Args:
        differences_T: [tasks] differences of one seed.
        draws: of random patterns.
        seed: of the draws.

    Returns:
        p in (0, 1]; 1 where nothing differs.
    """
    differing = differences_T[np.abs(differences_T) > 1e-9]
    least = abs(differing.sum()) - 1e-9  # sums of floats that are equal on paper
    if differing.size <= EXACT:
        sums = np.zeros(1)
        for difference in differing:
            sums = np.concatenate([sums + difference, sums - difference])
        return float((np.abs(sums) >= least).mean())
    signs_DT = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, differing.size))  # noqa: N806
    return float((1 + (np.abs(signs_DT @ differing) >= least).sum()) / (1 + draws))


def sign_test(differences_T: Array) -> float:  # noqa: N803
    """Exact two-sided sign test: p of the tasks won and lost, averaged over seeds, under a fair coin; ties left out.

    Episodes of one task under several seeds are not independent, so tasks are counted, not episodes; with one seed
    these are the wins and losses of `comparison`. Like `sign_flip_test` it knows nothing of other trainings, and no
    verdict hangs on it. 1 where nothing differs.
    """
    wins, losses = int((differences_T > 1e-9).sum()), int((differences_T < -1e-9).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that the chance of one false finding among them stays below the level.

    The k-th smallest of m is multiplied by m - k + 1, made no smaller than the one before it, and cut to 1 (Holm 1979,
    Scand. J. Stat. 6(2)). Holds whatever the dependence of the tests.
    """
    p = np.asarray(p_values, dtype=float)
    order = p.argsort()
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)).clip(max=1)
    return [float(one) for one in corrected]


def judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All comparisons of one table with two columns more.

    p_holm is p corrected by `holm` over these rows. verdict is "better" or "worse" only where the interval leaves 0 out
    and p_holm < 1 - `LEVEL`, else "not told apart".
    """
    corrected = holm([row["p"] for row in rows])
    return [
        row | {"p_holm": p, "verdict": _verdict(row["low"], row["high"], p)}
        for row, p in zip(rows, corrected, strict=True)
    ]


def _verdict(low: float, high: float, p: float) -> str:
    if p < 1 - LEVEL and (low > 0 or high < 0):
        return "better" if low > 0 else "worse"
    return "not told apart"


def _bootstrap(values_T: Array, draws: int, generator: np.random.Generator) -> tuple[float, float]:  # noqa: N803
    """Percentile interval of the mean of tasks' values; see `paired`."""
    if np.ptp(values_T) < 1e-9:
        return math.nan, math.nan
    size = values_T.size
    tasks_DT = generator.multinomial(size - 1, [1 / size] * size, size=draws) / (size - 1)  # noqa: N806
    low, high = np.quantile(tasks_DT @ values_T, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def reward_matrix(episodes: Episodes) -> pd.DataFrame:
    """Rewards of one policy on one split: a row a seed, a column a task, samples averaged, NaN where not played.

    Raises:
        ValueError: as `rewards_table`.
    """
    return episode_table(episodes).pivot_table(index="seed", columns="task", values="reward", aggfunc="mean")


def episode_table(episodes: Episodes) -> pd.DataFrame:
    """One row an episode, with the columns `EPISODE`: what every other table here is made of.

    Args:
        episodes: trajectories, or a table of this form, which is only checked.

    Raises:
        ValueError: an attempt at a task appears twice, or has no reward.
    """
    if isinstance(episodes, pd.DataFrame):
        frame = episodes
    else:
        frame = pd.DataFrame([_row(one) for one in episodes], columns=EPISODE)
    twice = frame[frame.duplicated([*GROUP, "task", "sample"])]
    if len(twice):
        raise ValueError(f"{_named(twice)} appears twice; delete the second of the two lines in its episodes.jsonl.")
    lost = frame[~np.isfinite(frame["reward"].astype(float))]
    if len(lost):
        raise ValueError(f"{_named(lost)} has no reward; delete its line in episodes.jsonl and play it again.")
    return frame


def _row(one: Trajectory) -> dict[str, Any]:
    return {
        "env": one.env,
        "method": one.policy,
        "split": one.split,
        "seed": one.seed,
        "kind": one.kind,
        "task": one.id,
        "sample": one.sample,
        "reward": one.reward,
        "success": float(one.success),
        "steps": len(one.turns),
        "invalid": sum(not turn.valid for turn in one.turns),
        "status": one.status.value,
    }


def _named(rows: pd.DataFrame) -> str:
    """The first of some episodes, for a message."""
    first = rows.iloc[0]
    return (
        f"{first['env']}, {first['method']}, {first['split']}, seed {first['seed']}: "
        f"task {first['task']}, sample {first['sample']}"
    )


def _table(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Means and standard errors over tasks; keys, then `MEASURES`."""
    tasks = frame.groupby([*keys, "task"], sort=False)[["reward", "success", "steps"]].mean()
    table = tasks.groupby(keys, sort=False).agg(
        n=("reward", "size"),
        reward=("reward", "mean"),
        reward_se=("reward", "sem"),
        success=("success", "mean"),
        success_se=("success", "sem"),
        steps=("steps", "mean"),
        steps_se=("steps", "sem"),
    )
    solved = _of_solved(frame, [*keys, "task"]).groupby(level=keys, sort=False)
    table["steps_to_success"], table["steps_to_success_se"] = solved.mean(), solved.sem()
    actions = frame.groupby([*keys, "task"], sort=False)[["invalid", "steps"]].sum()
    totals = actions.groupby(keys, sort=False).transform("sum")
    apart = actions["invalid"] - actions["steps"] * (totals["invalid"] / totals["steps"])
    by_key = actions.groupby(keys, sort=False)
    table["invalid_rate"] = by_key["invalid"].sum() / by_key["steps"].sum()
    table["invalid_rate_se"] = apart.groupby(level=keys, sort=False).sem() / by_key["steps"].mean()
    return table.reset_index()


def _of_solved(frame: pd.DataFrame, keys: list[str]) -> "pd.Series[float]":
    """Mean number of turns of the solved episodes, for each value of some columns that has one."""
    return frame[frame["success"] > 0].groupby(keys, sort=False)["steps"].mean()


def _matrices(group: pd.DataFrame, measures: list[str]) -> pd.DataFrame:
    """Measures of one method, each a block of columns [seeds, tasks], samples averaged.

    Raises:
        ValueError: a seed lacks a task that another one has.
    """
    matrix = group.pivot_table(index="seed", columns="task", values=measures, aggfunc="mean")
    if matrix.isna().to_numpy().any():
        first = group.iloc[0]
        raise ValueError(
            f"{first['env']}, {first['method']}, {first['split']}: the seeds played different tasks; evaluate again."
        )
    return matrix
