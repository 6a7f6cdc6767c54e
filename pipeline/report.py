"""Stage `report`: what a run came to, as tables on the terminal, CSV files, figures for a paper, and one page.

episodes.csv          one row an evaluated episode (`pipeline.statistics.episode_table`); see the tool `tables`
rewards.csv           one row an environment, method, split and seed (`pipeline.statistics.rewards_table`)
rewards_by_kind.csv   the same for each kind of task
differences.csv       one row an environment, split and comparison on the same tasks: with the SFT policy, and `compare`
figures/*.svg, *.pdf  rewards with their intervals, training curves, log-ratios by turn
report.html           all of it and a trajectory viewer; one file that asks the network for nothing
report/tables.json    means and intervals as printed; printed again, at once, when nothing has changed
"""

import base64
import gzip
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import arms, choose, runs
from pipeline.arms import Arm
from pipeline.config import Config
from pipeline.methods import Method
from pipeline.records import EpisodeStatus, Pair, Trajectory, atomic_write, read_jsonl, recover_jsonl

if TYPE_CHECKING:
    import pandas as pd
    import rich.console

    from pipeline import statistics

HERE = Path(__file__).parent
SOURCES = ("statistics.py", "figures.py", "viewer.py", "report.py", "report.html.jinja", "report.css", "report.js")
WAITS = {
    "engine_seconds": "the engine",
    "env_seconds": "environments at work",
    "queue_seconds": "their turn of a worker",
}
"""What an episode spends its time waiting for, as manifests have it."""
OUTPUTS = ("episodes.csv", "rewards.csv", "rewards_by_kind.csv", "differences.csv", "report.html")

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Told = Callable[[Row], str]
Groups = Mapping[str, list[str]]
"""Policies by the one that they are compared with."""
Compared = tuple[Groups, Groups, list[tuple[str, str]]]
"""What was trained and what was not, each by its SFT policy, and the recipe's further comparisons."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A finished stage of one environment and seed."""

    env: str
    seed: int
    name: str
    """Its folder below the seed's, such as `evaluate/sft/seen`."""
    folder: Path
    manifest: dict[str, Any]

    @property
    def facts(self) -> Row:
        """What the stage says of its work: counts, drops, notes."""
        return dict(self.manifest["facts"])


def main(config: Config) -> None:
    """Write the tables, figures and page of a run, and print the tables.

    Raises:
        ValueError: a stage of the run is not finished; names it.
    """
    stages = finished(config)
    folder = config.folder / "report"
    if not all((config.folder / name).is_file() for name in OUTPUTS):
        (folder / runs.MANIFEST).unlink(missing_ok=True)
    settings = {
        "config": config.model_dump(mode="json"),
        "sources": {name: runs.file_digest(HERE / name) for name in SOURCES},
    }
    inputs = {f"{one.env}/seed{one.seed}/{one.name}": one.folder for one in stages}
    with runs.stage(folder, settings=settings, inputs=inputs) as stage:
        if not stage.done:
            runs.write_json(folder / "tables.json", write(config, stages))
    print_tables(json.loads((folder / "tables.json").read_text("utf-8")))
    _console().print(f"Report: {config.folder / 'report.html'}", highlight=False, soft_wrap=True)


def finished(config: Config) -> list[Done]:
    """Every stage that the report tells of, in the order of the data.

    Raises:
        ValueError: one is not finished, or a file of it is gone; names the stage that makes it.
    """
    stages = []
    for env in config.env.names:
        for seed in config.seed:
            base = runs.seed_folder(config, env, seed)
            for folder, made_by in _folders(config, env, seed).items():
                manifest = runs.read_manifest(folder, made_by=made_by)
                name = str(folder.relative_to(base))
                stages.append(Done(env=env, seed=seed, name=name, folder=folder, manifest=manifest))
    return stages


def _folders(config: Config, env: str, seed: int) -> dict[Path, str]:
    """Every stage folder of an environment and seed, with the stage that makes it, in the order of the data."""
    every, learning, preferring = arms.of(config), arms.trained(config), arms.preferring(config)
    who = {"experts": every, "sft": every, "rollout": learning, "pairs": preferring, "reference": preferring}
    found = [
        (folder, stage)
        for stage, those in (who | {"train": learning}).items()
        for arm in those
        for number in range(1, 2 if those is every else arm.rounds + 1)
        for folder in _made_by(arm, env, seed, stage, number)
    ]
    evaluated = runs.seed_folder(config, env, seed) / "evaluate"
    chosen = [(choose.folder(arm, env, seed), "evaluate") for arm in every if arm.candidates]
    players = ["random", *(arm.name for arm in every), "expert"]
    played = [(evaluated / player / split, "evaluate") for player in players for split in config.evaluate.splits]
    return dict([*found, *chosen, *played])


def _made_by(arm: Arm, env: str, seed: int, stage: str, number: int) -> Iterable[Path]:
    if stage == "rollout":
        return arm.explored(env, seed, number).values()
    return [arm.folder(env, seed, stage, number)]


def write(config: Config, stages: Sequence[Done]) -> Tables:
    """Write CSV files, figures and page; returns the tables to print.

    Raises:
        ValueError: a file of a stage cannot be read, or nothing was evaluated.
    """
    from pipeline import axes, figures, statistics, viewer

    every = arms.of(config)
    played = _episodes(config, stages)
    evaluated = [one for (*_, split), episodes in played.items() if split != "train" for one in episodes]
    if not evaluated:
        raise ValueError("There is nothing to report: no task of any split in evaluate.splits was played.")
    tables = write_tables(config.folder, statistics.episode_table(evaluated), *compared(config))
    drawn: dict[str, str] = {}
    axis = axes.axis([arm for arm in every if arm.name in config.arms])
    for env in config.env.names:
        logs = training_logs(config, env)
        methods = dict.fromkeys([*(arm.name for arm in every[1:]), *(name for name, _ in logs if name != "sft")])
        of_env = _of(tables["rewards"], env), _of(tables["by_seed"], env)
        for name, figure in figures.draw(env, *of_env, logs, list(methods), axis).items():
            for suffix in ("pdf", "svg"):
                with atomic_write(config.folder / "figures" / f"{name}.{suffix}", "wb") as file:
                    file.write(image := figures.save(figure, suffix, name))
            drawn[name] = figures.themed(image)
    pairs = {(one.env, one.seed): read_jsonl(one.folder / "pairs.jsonl", Pair) for one in stages if one.name == "pairs"}
    content = viewer.content(config, played, pairs)
    with atomic_write(config.folder / "report.html") as file:
        file.write(page(config, stages, tables, drawn, content))
    return tables


def write_tables(
    folder: Path,
    episodes: "pd.DataFrame",
    trained: Groups,
    bounds: Groups,
    contrasts: Sequence[tuple[str, str]] = (),
) -> Tables:
    """Write the CSV files of evaluated episodes; returns the tables to print and to draw.

    Args:
        folder: where to.
        episodes: a `statistics.episode_table`.
        trained: policies by the SFT policy that they began from.
        bounds: what was not trained, by an SFT policy: its difference is told, and nothing is concluded from it.
        contrasts: other comparisons of two trained policies, the baseline first; judged with `trained` as one table.
    """
    import pandas as pd

    import envs
    from pipeline import statistics

    by_seed = write_rewards(folder, episodes)
    judged = _groups(trained) + [([method], baseline) for baseline, method in contrasts]
    tables = [statistics.paired_all(episodes, judged)] if judged else []
    if unjudged := _groups(bounds):
        tables.append(statistics.paired_all(episodes, unjudged).assign(p_holm=math.nan, verdict="not judged"))
    differences = pd.concat(tables or [pd.DataFrame()], ignore_index=True)
    _write_csv(folder / "differences.csv", differences)
    rows = _rows(differences)
    of_contrast = [(row["baseline"], row["method"]) in contrasts for row in rows]
    return {
        "rewards": [
            row | {"completed_as": envs.load(row["env"]).completed} for row in _rows(statistics.summary(episodes))
        ],
        "by_seed": _rows(by_seed),
        "kinds": _rows(statistics.summary(episodes, by_kind=True)),
        "paired": [row for row, of in zip(rows, of_contrast, strict=True) if not of],
        "contrasts": [row for row, of in zip(rows, of_contrast, strict=True) if of],
        "statuses": _rows(statistics.statuses(episodes)),
    }


def write_rewards(folder: Path, episodes: "statistics.Episodes") -> "pd.DataFrame":
    """Write episodes.csv, rewards.csv and rewards_by_kind.csv of evaluated episodes; returns the second."""
    from pipeline import statistics

    by_seed = statistics.rewards_table(episodes)
    _write_csv(folder / "episodes.csv", statistics.episode_table(episodes))
    _write_csv(folder / "rewards.csv", by_seed)
    _write_csv(folder / "rewards_by_kind.csv", statistics.by_kind(episodes))
    return by_seed


def _groups(methods: Groups) -> list[tuple[list[str], str]]:
    return [(group, baseline) for baseline, group in methods.items() if group]


def compared(config: Config) -> Compared:
    """What `write_tables` compares: chance is a bound, and best of n, which the reward itself chooses."""
    every = arms.of(config)
    trained: dict[str, list[str]] = {}
    bounds = {"sft": ["random"]}
    for arm in every[1:]:
        groups = bounds if arm.method == Method.BON else trained
        groups.setdefault(arms.baseline(arm, every).name, []).append(arm.name)
    contrasts = [(baseline, method) for baseline, method in config.compare if method not in trained.get(baseline, [])]
    return trained, bounds, contrasts


def training_logs(config: Config, env: str) -> dict[tuple[str, int], list[Row]]:
    """The lines of every training log of an environment, by policy and seed: `sft`, and the arms by their names.

    An arm with `choose` has the log of the candidate that stands for it; of an arm in several rounds those before the
    last are told apart, as `eto, round 1`. Arms that are one policy, evaluated otherwise, have their log once.
    """
    found: dict[Path, tuple[str, int]] = {}
    for seed in config.seed:
        found[runs.seed_folder(config, env, seed) / "sft"] = ("sft", seed)
        for arm in (arm for arm in arms.of(config) if arm.method.is_trained):
            player = choose.chosen(arm, env, seed)
            for number in range(1, player.rounds + 1):
                name = arm.name if number == player.rounds else f"{arm.name}, round {number}"
                found.setdefault(player.folder(env, seed, "train", number), (name, seed))
    return {key: read_log(folder / "log.jsonl") for folder, key in found.items()}


def _episodes(config: Config, stages: Iterable[Done]) -> dict[tuple[str, int, str, str], list[Trajectory]]:
    """All episodes of a run by environment, seed, policy and split, evaluations first; of `bon` each task's best."""
    from pipeline import statistics

    several = {arm.name for arm in arms.of(config) if arm.method == Method.BON}
    found = {}
    for one in sorted(stages, key=lambda one: not one.name.startswith("evaluate/")):
        where = {"experts": ("expert", "train"), "rollout": ("sft", "train")}.get(one.name)
        if one.name.startswith("evaluate/"):
            _, policy, split = one.name.split("/")
            where = policy, split
        if where:
            episodes = read_jsonl(one.folder / "episodes.jsonl", Trajectory)
            found[one.env, one.seed, *where] = statistics.best_of(episodes) if where[0] in several else episodes
    return found


def read_log(path: Path) -> list[Row]:
    """The lines of a training log by rising step; of a step that was logged twice (a resumed run) the last one."""
    lines = recover_jsonl(path, Row)[0] if path.is_file() else []  # a run's log may still be growing
    by_step = {line["step"]: line for line in lines if "step" in line}
    return [by_step[step] for step in sorted(by_step)]


def _rows(frame: "pd.DataFrame") -> list[Row]:
    """A table as JSON has it: NaN becomes None."""
    rows: list[Row] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def _of(rows: Iterable[Row], env: str) -> list[Row]:
    return [row for row in rows if row["env"] == env]


def _write_csv(path: Path, frame: "pd.DataFrame") -> None:
    with atomic_write(path) as file:
        frame.to_csv(file, index=False, float_format="%.6f")


# ---- The page ----


def page(config: Config, stages: Sequence[Done], tables: Tables, drawn: Mapping[str, str], content: Row) -> str:
    """The report as one HTML file.

    Text of policies and environments is escaped by the template or, in the viewer, compressed JSON that the script
    turns into text nodes. The page's own policy allows that one script, by its hash, and nothing from any address.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters.update(number=number, p_value=p_value, ci=ci, duration=duration, flat=flat)
    script = (HERE / "report.js").read_text("utf-8")
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    text: str = jinja.get_template("report.html.jinja").render(
        config=config,
        arms=arms.of(config),
        recipe=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        made=time.strftime("%Y-%m-%d %H:%M"),
        commits=sorted({one.manifest.get("git_commit") or "outside git" for one in stages}),
        machines=sorted({one.manifest["machine"] for one in stages if "machine" in one.manifest}),
        packages=_packages(stages),
        stages=stages,
        left_out=left_out(stages),
        waits=waits_told(stages),
        notes=[(one, note) for one in stages for note in notes(one.facts)],
        tables=tables,
        contrasts=labelled(tables["contrasts"]),
        tasks=list(dict.fromkeys(f"{row['env']} {row['split']} {row['n']}" for row in tables["rewards"])),
        figures={name: Markup(svg) for name, svg in drawn.items()},
        of=_of,
        markdown=markdown(tables["rewards"]),
        latex=latex(tables["rewards"]),
        errors=errors_told(tables),
        findings=[*findings(tables["paired"]), *contrasts_told(tables["contrasts"])],
        discounts=discounts_told(content["weightings"]),
        groups=content["groups"],
        css=Markup((HERE / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=base64.b64encode(gzip.compress(data, mtime=0)).decode(),
    )
    return text


def _packages(stages: Iterable[Done]) -> dict[str, str]:
    """Versions of the packages that the stages were made with; several where they differ."""
    versions: dict[str, set[str]] = {}
    for one in stages:
        for name, version in {"python": one.manifest.get("python"), **one.manifest.get("packages", {})}.items():
            versions.setdefault(name, set()).add(str(version))
    return {name: " / ".join(sorted(found)) for name, found in versions.items()}


def left_out(stages: Iterable[Done]) -> list[tuple[Done, str, int]]:
    """What manifests count as dropped or cut off, as (stage, reason, count); zeros are not told."""
    return [
        (one, reason, count)
        for one in stages
        for reason, count in flat({key: value for key, value in one.facts.items() if "drop" in key or "cut" in key})
        if isinstance(count, int) and count
    ]


def waits_told(stages: Iterable[Done]) -> str:
    """What the episodes of stages in which an engine played waited for, as a sentence; empty without such a stage."""
    played = [one.facts for one in stages if "prefix_cache_hit_rate" in one.facts]
    if not (total := sum(facts.get(key, 0) for facts in played for key in WAITS)):
        return ""
    shares = (f"{what} {sum(facts.get(key, 0) for facts in played) / total:.0%}" for key, what in WAITS.items())
    hits = [facts["prefix_cache_hit_rate"] for facts in played]
    return (
        f"What the policies' episodes, many at once, waited for: {', '.join(shares)}. The prefix cache held "
        f"{min(hits):.0%} to {max(hits):.0%} of a stage's prompt tokens."
    )


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What a manifest's facts say in words: `notes` and `deviations`, each a sentence or a list of them."""
    found = [facts.get(key) or [] for key in ("notes", "deviations")]
    return [str(note) for value in found for note in (value if isinstance(value, list) else [value])]


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as (dotted name, value)."""
    pairs: list[tuple[str, Any]] = []
    for key, value in facts.items():
        pairs += flat(value, f"{prefix}{key}: ") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs


# ---- Text ----


def discounts_told(weightings: Sequence[Row]) -> list[str]:
    """Gamma and beta of each policy, as `dmpo: γ = 0.5 (2 of 3), 0.9 (1 of 3), β = 1.0`; equal ones in one sentence.

    Args:
        weightings: `viewer.weightings`; where they differ, it is said for how many environments and seeds each holds.
    """
    told: dict[str, list[str]] = {}
    for policy in dict.fromkeys(row["policy"] for row in weightings):
        rows = [row for row in weightings if row["policy"] == policy]
        words = [
            f"{symbol} = {_counted([row[key] for row in rows])}"
            for symbol, key in (("γ", "gamma"), ("β", "beta"))  # noqa: RUF001
            if rows[0][key] is not None
        ]
        told.setdefault(", ".join(words), []).append(policy)
    return [f"{', '.join(policies)}: {words}" for words, policies in told.items()]


def _counted(values: Sequence[float]) -> str:
    """Rising values, each with how often it comes where they differ."""
    found = sorted(Counter(values).items())
    return ", ".join(f"{value}" if len(found) == 1 else f"{value} ({count} of {len(values)})" for value, count in found)


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many decimals; a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"  # noqa: RUF001


def p_value(p: float | None) -> str:
    """A p-value to three decimals, none of which is 0; a dash where there is none."""
    return "<0.001" if p is not None and p < 0.001 else number(p)


def ci(low: float | None, high: float | None, digits: int = 3) -> str:
    """An interval in brackets, or nothing."""
    return "" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, as `1 h 02 min` or `14.2 s`."""
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.1f} s"


def _grid(rewards: Sequence[Row]) -> tuple[list[tuple[str, str]], list[str], dict[tuple[str, str, str], Row]]:
    """Columns (environment, split), rows (method) and cells of the reward table."""
    cells = {(row["env"], row["split"], row["method"]): row for row in rewards}
    columns = list(dict.fromkeys((env, split) for env, split, _ in cells))
    return columns, list(dict.fromkeys(method for *_, method in cells)), cells


def markdown(rewards: Sequence[Row]) -> str:
    """Mean rewards with intervals as a Markdown table: methods in rows, environments and splits in columns."""
    columns, methods, cells = _grid(rewards)
    lines = ["| method |" + "".join(f" {env} {split} |" for env, split in columns)]
    lines += ["|---|" + "---|" * len(columns)]
    for method in methods:
        found = [cells[env, split, method] for env, split in columns]
        texts = [f"{number(row['reward'])} {ci(row['reward_low'], row['reward_high'])}".strip() for row in found]
        lines += [f"| {method} | " + " | ".join(texts) + " |"]
    return "\n".join(lines) + "\n"


def latex(rewards: Sequence[Row]) -> str:
    r"""The same as a LaTeX table; needs `\usepackage{booktabs}`."""
    columns, methods, cells = _grid(rewards)

    def line(texts: Iterable[str]) -> str:
        return " & ".join(texts) + r" \\"

    def tex(text: str) -> str:
        return re.sub(r"([_&%#$])", r"\\\1", text)

    lines = [r"\begin{tabular}{l" + "c" * len(columns) + "}", r"\toprule"]
    lines += [line(["method", *(tex(f"{env} {split}") for env, split in columns)]), r"\midrule"]
    for method in methods:
        found = [cells[env, split, method] for env, split in columns]
        lines += [line([tex(method), *(f"{number(r['reward'])} {_tex_ci(r)}".strip() for r in found)])]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex_ci(row: Row) -> str:
    interval = ci(row["reward_low"], row["reward_high"])
    return rf"{{\scriptsize {interval}}}" if interval else ""


# ---- The terminal ----


def _console() -> "rich.console.Console":
    """Standard output; wide enough for the tables where it is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def print_tables(tables: Tables) -> None:
    """Print rewards, differences to the SFT policy, and rewards by kind, one environment after the other."""
    console = _console()
    for env in dict.fromkeys(row["env"] for row in tables["rewards"]):
        rewards, paired, kinds = (_of(tables[name], env) for name in ("rewards", "paired", "kinds"))
        tasks = ", ".join(f"{split} {n}" for split, n in {row["split"]: row["n"] for row in rewards}.items())
        seeds = max(row["seeds"] for row in rewards)
        title = f"{env}: mean reward with 95 % CI, and success ({tasks} tasks, {seeds} seed{'s' * (seeds > 1)})"
        parts: dict[str, Told] = {"": _reward_told, "success": lambda row: number(row["success"])}
        if completed_as := rewards[0]["completed_as"]:
            parts[completed_as] = lambda row: number(row["completed"])
        _print(console, title, rewards, "method", "split", parts)
        contrasts = _of(labelled(tables["contrasts"]), env)
        for rows, of in ((paired, "reward less the SFT policy's"), (contrasts, "reward of one policy less another's")):
            for split in dict.fromkeys(row["split"] for row in rows):
                title = f"{env}, {split}: {of} on the same tasks"
                _print(console, title, [row for row in rows if row["split"] == split], "method", "split", {
                    "": _difference_told,
                    "won/lost/tied": lambda row: f"{row['wins']}/{row['losses']}/{row['ties']}",
                    "p (Holm)": lambda row: f"{p_value(row['p_holm'])} {row['verdict']}",
                })  # fmt: skip
        for split in dict.fromkeys(row["split"] for row in kinds):
            of_split = [row | {"kind": f"{row['kind']} ({row['n']})"} for row in kinds if row["split"] == split]
            title = f"{env}, {split}: mean reward by kind of task (number of tasks)"
            _print(console, title, of_split, "kind", "method", {"": lambda row: number(row["reward"])})
    for sentence in [*findings(tables["paired"]), *contrasts_told(tables["contrasts"]), errors_told(tables)]:
        console.print(sentence, highlight=False)


def _reward_told(row: Row) -> str:
    return f"{number(row['reward'])} {ci(row['reward_low'], row['reward_high'])}"


def _difference_told(row: Row) -> str:
    return f"{row['difference']:+.3f} {ci(row['low'], row['high'])}".strip()


def labelled(contrasts: Iterable[Row]) -> list[Row]:
    """The rows with both policies in place of the method, as `dmpo less dpo`."""
    return [row | {"method": f"{row['method']} less {row['baseline']}"} for row in contrasts]


def _print(
    console: "rich.console.Console", title: str, rows: Sequence[Row], by: str, across: str, parts: Mapping[str, Told]
) -> None:
    """Print rows as a grid: one line for each value of `by`, one column for each value of `across` and each part."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(by)
    columns = list(dict.fromkeys(row[across] for row in rows))
    for column in columns:
        for part in parts:
            table.add_column(f"{column} {part}".strip(), no_wrap=True)
    cells = {(row[by], row[across]): row for row in rows}
    for name in dict.fromkeys(row[by] for row in rows):
        found = [cells.get((name, column)) for column in columns]
        table.add_row(name, *(told(row) if row else "" for row in found for told in parts.values()))
    console.print(table)


def findings(paired: Sequence[Row]) -> list[str]:
    """Three sentences on the trained policies: better, worse, or not told apart from the SFT policy they began from."""
    told = {
        verdict: [
            f"{row['method']} on {row['env']} {row['split']} ({_difference_told(row)})"
            for row in paired
            if row["verdict"] == verdict
        ]
        for verdict in ("better", "worse", "not told apart")
    }
    return [
        f"Better than the SFT policy: {', '.join(told['better']) or 'none'}.",
        f"Worse: {', '.join(told['worse']) or 'none'}.",
        f"Not told apart from it: {', '.join(told['not told apart']) or 'none'}.",
    ]


def contrasts_told(contrasts: Sequence[Row]) -> list[str]:
    """A sentence on each contrast: where the one policy is better or worse than the other, or not told apart."""
    found: dict[str, list[str]] = {}
    for row in labelled(contrasts):
        place = f"{row['verdict']} on {row['env']} {row['split']} ({_difference_told(row)})"
        found.setdefault(row["method"], []).append(place)
    return [f"{compared}: {', '.join(places)}." for compared, places in found.items()]


def errors_told(tables: Tables) -> str:
    """One sentence on the episodes that the environment broke."""
    errors = {(r["env"], r["method"], r["split"]): r["errors"] for r in tables["rewards"] if r["errors"]}
    total = sum(row[status] for row in tables["statuses"] for status in EpisodeStatus)
    if not errors:
        return f"None of {total} episodes ended in an environment error or a time-out."
    where = ", ".join(f"{' '.join(place)} {count}" for place, count in errors.items())
    return f"Ended in an environment error or a time-out, counted with reward 0, of {total} episodes: {where}."
