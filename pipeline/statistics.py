"""From episodes to tables: means, standard errors, confidence intervals and paired comparisons.

Three sources of chance are told apart:

    tasks    which tasks were drawn for the split; the standard errors of `rewards_table` are over them
    seeds    the run itself (initialisation, exploration, training); `summary` adds it where there are two or more
    samples  several attempts at one task by one policy: averaged first, so that a task counts once

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
from scipy import stats

from pipeline.records import EpisodeStatus, Trajectory

Array = NDArray[np.float64]
Episodes: TypeAlias = Iterable[Trajectory] | pd.DataFrame
"""Trajectories, or the `episode_table` of some."""

GROUP = ["env", "method", "split", "seed"]
MEASURES = ["n", "reward", "reward_se", "success", "success_se", "steps", "invalid_rate"]
COLUMNS = GROUP + MEASURES
"""The columns of rewards.csv, in order."""
EPISODE = [*GROUP, "kind", "task", "sample", "reward", "success", "steps", "invalid", "status"]
"""The columns of episodes.csv, in order."""
ERRORS = [status for status in EpisodeStatus if status.is_error]
LEVEL = 0.95
"""Coverage of every interval here; 1 - LEVEL is the level of every verdict."""
EXACT = 20
"""Most differing tasks whose 2^n patterns of signs are all counted."""


def rewards_table(episodes: Episodes) -> pd.DataFrame:
    """Tidy rewards: one row for each environment, method, split and seed, in the order of the episodes.

    Columns (`COLUMNS`): n is the number of tasks; reward and success are means over tasks; the `_se` are the standard
    errors of these means over tasks, s / sqrt(n) with s^2 on n - 1 (NaN for one task); steps is the mean number of
    turns; invalid_rate is the share of all actions that the environment did not understand, malformed replies among
    them (NaN where nobody acted).

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
    success_low, success_high, iqm, iqm_low, iqm_high (of the reward, `interquartile`), steps, invalid_rate, completed
    (share of episodes that the environment ended), errors (episodes that the environment broke).

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
        row["invalid_rate"] = float(group["invalid"].sum() / turns) if turns else math.nan
        row["completed"] = float((group["status"] == EpisodeStatus.COMPLETED).mean())
        rows.append(row | {"errors": int(group["status"].isin(ERRORS).sum())})
    return pd.DataFrame(rows)


def interval(values_ST: Array) -> tuple[float, float, float]:  # noqa: N803
    """Mean of scores in [0, 1] with a 95 % confidence interval.

    With one seed the interval is over tasks alone, mean +- t(n-1) * s / sqrt(n): it says how far another draw of tasks
    would move the score of this very policy, not how far another training would. With several seeds both are in:

        variance = s_S^2 / S + s_T^2 / T

    where s_S^2 is the sample variance of the S seeds' means and s_T^2 that of the T tasks' means over seeds. In the
    two-way random-effects model of seeds and tasks the sum overestimates the variance of the grand mean by one share of
    the residual, sigma_e^2 / (S T), and so errs on the safe side (Owen 2007, "The pigeonhole bootstrap", Ann. Appl.
    Stat. 1(2), sec. 3). The quantile is Student's with the degrees of freedom of Satterthwaite (1946, Biometrics
    Bulletin 2(6)) for a sum of two variances.

    Args:
        values_ST: [seeds, tasks] scores.

    Returns:
        Mean, low, high, cut to [0, 1]. Low and high are NaN where the data hold no spread to tell one from: a single
        task, or the same score throughout.
    """
    mean = float(values_ST.mean())
    error = standard_error(values_ST)
    if math.isnan(error) or error < 1e-9:
        return mean, math.nan, math.nan
    freedom = error**4 / sum(part**2 / freedom for part, freedom in _variances(values_ST))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def standard_error(values_ST: Array) -> float:  # noqa: N803
    """Standard error of the mean of [seeds, tasks] scores, as `interval` has it; NaN for a single task."""
    return math.sqrt(sum(part for part, _ in _variances(values_ST))) if values_ST.shape[1] > 1 else math.nan


def _variances(values_ST: Array) -> list[tuple[float, int]]:  # noqa: N803
    """Variance of the mean of the seeds' means, and of that of the tasks' means, each with its degrees of freedom."""
    return [
        (float(means.var(ddof=1)) / means.size, means.size - 1)
        for means in (values_ST.mean(1), values_ST.mean(0))
        if means.size > 1
    ]


def interquartile(values_ST: Array, *, draws: int = 2_000, seed: int = 0) -> tuple[float, float, float]:  # noqa: N803
    """Interquartile mean with a 95 % interval: the mean of all scores but the lowest and the highest quarter.

    The interval is the percentile bootstrap stratified by task: for every task as many of its seeds' scores are drawn
    anew as there are, independently of the other tasks (Agarwal et al. 2021, "Deep RL at the edge of the statistical
    precipice", https://arxiv.org/abs/2108.13264, sec. 4). It covers other seeds on these very tasks, not other tasks,
    and with two or three seeds it is too narrow, as any plain bootstrap of so few. No verdict hangs on it.

    Args:
        values_ST: [seeds, tasks] scores.
        draws: bootstrap replications.
        seed: of the bootstrap; the same arguments give the same interval.

    Returns:
        Interquartile mean, low, high. Low and high are NaN with one seed, or where every draw has the same mean.
    """
    middle = float(stats.trim_mean(values_ST, 0.25, axis=None))
    seeds_DST = np.random.default_rng(seed).integers(len(values_ST), size=(draws, *values_ST.shape))  # noqa: N806
    drawn_DST = np.take_along_axis(values_ST[None], seeds_DST, axis=1)  # noqa: N806
    means_D = stats.trim_mean(drawn_DST.reshape(draws, -1), 0.25, axis=1)  # noqa: N806
    return middle, *(_percentiles(means_D) if np.ptp(means_D) > 1e-9 else (math.nan, math.nan))


def paired(
    episodes: Episodes, methods: Sequence[str], baseline: str, *, draws: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Each method against a baseline over the same tasks and seeds.

    The interval is a percentile bootstrap of the paired differences (Efron & Tibshirani 1993, ch. 13). Tasks, and where
    there are several also seeds, are drawn anew independently of each other, whole rows and columns at a time (Owen
    2007, as in `interval`). Of n units n - 1 are drawn, which makes the bootstrap variance s^2 / n and not its usual
    (n - 1) / n part of it (Rao & Wu 1988, JASA 83(401)): with two or three seeds that part matters.

    Args:
        episodes: of all methods and the baseline.
        methods: whom to compare.
        baseline: against whom.
        draws: bootstrap replications.
        seed: of the bootstrap; the same arguments give the same table.

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
        draws: replications of the bootstrap (`paired`) and of the permutation test.
        seed: of both; the same arguments give the same numbers.

    Returns:
        seeds, n (tasks), difference (the mean), low, high (NaN where all differences are equal); wins, losses, ties,
        which count the seeds x tasks episodes by the sign of their difference; p of `sign_flip_test`; p_sign of
        `sign_test`.
    """
    low, high = _bootstrap(values_ST, draws, np.random.default_rng(seed))
    wins, losses = int((values_ST > 1e-9).sum()), int((values_ST < -1e-9).sum())
    tasks_T = values_ST.mean(0)  # noqa: N806
    return {
        "seeds": values_ST.shape[0],
        "n": values_ST.shape[1],
        "difference": float(values_ST.mean()),
        "low": low,
        "high": high,
        "wins": wins,
        "losses": losses,
        "ties": values_ST.size - wins - losses,
        "p": sign_flip_test(tasks_T, draws=draws, seed=seed),
        "p_sign": sign_test(tasks_T),
    }


def sign_flip_test(differences_T: Array, *, draws: int = 10_000, seed: int = 0) -> float:  # noqa: N803
    """Two-sided p-value of the mean of paired differences under random signs (Fisher 1935, sec. 21).

    If neither side is better, each task's difference, averaged over seeds, might as well have had the other sign. p is
    the share of sign patterns whose sum is at least as far from 0 as the observed one. Up to `EXACT` differing tasks
    all patterns are counted; beyond, `draws` random ones and the observed one (Phipson & Smyth 2010, SAGMB 9(1)). The
    spread between seeds is not in it; it is in the interval of `paired`.

    Args:
        differences_T: [tasks] differences, averaged over seeds.
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
    these are the wins and losses of `comparison`. 1 where nothing differs.
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


def _bootstrap(values_ST: Array, draws: int, generator: np.random.Generator) -> tuple[float, float]:  # noqa: N803
    """Percentile interval of the mean of [seeds, tasks] values; see `paired`."""
    if np.ptp(values_ST) < 1e-9:
        return math.nan, math.nan
    seeds_DS, tasks_DT = (  # noqa: N806
        generator.multinomial(max(1, size - 1), [1 / size] * size, size=draws) / max(1, size - 1)
        for size in values_ST.shape
    )
    return _percentiles(((seeds_DS @ values_ST) * tasks_DT).sum(1))


def _percentiles(means_D: Array) -> tuple[float, float]:  # noqa: N803
    """The middle `LEVEL` of bootstrap means."""
    low, high = np.quantile(means_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
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
    )
    actions = frame.groupby(keys, sort=False)[["invalid", "steps"]].sum()
    table["invalid_rate"] = actions["invalid"] / actions["steps"]
    return table.reset_index()


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
