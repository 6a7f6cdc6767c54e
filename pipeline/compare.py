"""Tool `compare`: two runs, paired over the same tasks and seeds.

python -m pipeline compare tiny versus
python -m pipeline compare tiny tiny --policies sft:dmpo

Prints reward and difference (B - A) of each policy on each split, and which settings, data and versions the two runs do
not share. Only tasks and seeds that both have played are compared; how many were left out is said.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import runs
from pipeline.card import Evaluation, entry, read
from pipeline.records import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
Place = tuple[str, str, str]
"""Environment, split, and policy (or the two policies, as `sft:dmpo`)."""

OWN = ("n", "seeds", "checkpoint", "episodes")
"""What two entries of cards differ in anyway, or what the table tells."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("run_a", metavar="RUN_A", help="a run's folder, or its name under runs/")
    parser.add_argument("run_b", metavar="RUN_B", help="the other run, which may be the same")
    parser.add_argument("--split", help="compare on this split alone")
    parser.add_argument(
        "--policies", type=_two_names, metavar="A:B", help="policy A of RUN_A with policy B of RUN_B, as sft:dmpo"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too")


def _two_names(text: str) -> list[str]:
    if len(names := text.split(":")) != 2 or not all(names):
        raise argparse.ArgumentTypeError("it has to be two names, as sft:dmpo")
    return names


def main(options: argparse.Namespace) -> int:
    """Compare two runs.

    Raises:
        ValueError: one is no run, they evaluated nothing alike, or they share no task or seed there.
    """
    from rich.console import Console

    from pipeline.statistics import judged

    folders = run_folder(options.run_a), run_folder(options.run_b)
    names = options.policies or ["*", "*"]
    found = [
        evaluations(folder, options.split or "*", name, ":".join(options.policies or []))
        for folder, name in zip(folders, names, strict=True)
    ]
    ours, theirs = found
    places = [place for place in theirs if place in ours]
    if not places:
        wanted = " and ".join(options.policies or ["the same policy"])
        raise ValueError(f"{folders[0]} and {folders[1]} hold no finished evaluation of {wanted} on the same split.")
    common = {place: shared(place, ours[place], theirs[place]) for place in places}
    rows = judged([row(place, *common[place], ours[place], theirs[place]) for place in places])
    if options.csv:
        write_csv(options.csv, rows)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(f"A: {folders[0]}\nB: {folders[1]}", highlight=False, markup=False, soft_wrap=True)
    _print_rows(console, rows)
    for line in [*left_out(rows), *_unmatched(ours, theirs)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    recipes = [yaml.safe_load((folder / "config.yaml").read_text("utf-8")) for folder in folders]
    _print_differences(console, "recipes", list(differing(*(recipe | {"run": None} for recipe in recipes))))
    _print_differences(console, "what was measured under", under(common))
    return 0


def run_folder(name: str) -> Path:
    """The folder of a run, given by its path or its name under runs/.

    Raises:
        ValueError: there is none.
    """
    for folder in (Path("runs") / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"{name} is no run: neither it nor runs/{name} is a folder with a config.yaml.")


def evaluations(folder: Path, split: str, policy: str, label: str) -> dict[Place, list[Evaluation]]:
    """The finished evaluations of a run by place, each list by rising seed.

    Args:
        folder: of the run.
        split: its name, or `*` for all.
        policy: its name, or `*` for all.
        label: what to call the policy in the place; empty: its name.
    """
    found: dict[Place, list[Evaluation]] = defaultdict(list)
    for manifest in sorted(folder.glob(f"*/seed*/evaluate/{policy}/{split}/{runs.MANIFEST}")):
        one = read(manifest.parent)
        found[one.env, one.split, label or one.policy].append(one)
    return {place: sorted(group, key=lambda one: one.seed) for place, group in found.items()}


def shared(
    place: Place, ours: Sequence[Evaluation], theirs: Sequence[Evaluation]
) -> tuple[list[Evaluation], list[Evaluation]]:
    """Both sides with only the seeds that both have, and only the tasks that both have under each of these.

    Raises:
        ValueError: there is no such seed or task.
    """
    seeds = {one.seed for one in ours} & {one.seed for one in theirs}
    if not seeds:
        raise ValueError(f"{', '.join(place)}: A and B have no seed in common, so nothing can be paired.")
    sides = [[one for one in side if one.seed in seeds] for side in (ours, theirs)]
    tasks = set.intersection(*({episode.id for episode in one.episodes} for side in sides for one in side))
    if not tasks:
        raise ValueError(f"{', '.join(place)}: A and B have no task in common, so nothing can be paired.")
    kept_a, kept_b = (
        [replace(one, episodes=[episode for episode in one.episodes if episode.id in tasks]) for one in side]
        for side in sides
    )
    return kept_a, kept_b


def row(
    place: Place,
    kept_a: Sequence[Evaluation],
    kept_b: Sequence[Evaluation],
    all_a: Sequence[Evaluation],
    all_b: Sequence[Evaluation],
) -> Row:
    """One line of the table, without the columns of `judged`.

    Args:
        place: what is compared.
        kept_a: one side, as `shared` leaves it.
        kept_b: the other.
        all_a: one side, whole.
        all_b: the other.

    Returns:
        env, split, policy; reward and its standard error on both sides (`statistics.standard_error`); the columns of
        `statistics.comparison` of B - A; how many tasks and seeds of each side were left out.
    """
    from pipeline import statistics

    a_ST, b_ST = (  # noqa: N806
        statistics.reward_matrix(_episodes(side)).to_numpy() for side in (kept_a, kept_b)
    )
    told: Row = dict(zip(("env", "split", "policy"), place, strict=True))
    for name, values_ST in (("a", a_ST), ("b", b_ST)):  # noqa: N806
        told |= {f"reward_{name}": float(values_ST.mean()), f"se_{name}": statistics.standard_error(values_ST)}
    told |= statistics.comparison(b_ST - a_ST)
    for name, whole in (("a", all_a), ("b", all_b)):
        told[f"tasks_left_out_{name}"] = len({episode.id for episode in _episodes(whole)}) - told["n"]
        told[f"seeds_left_out_{name}"] = len(whole) - told["seeds"]
    return told


def _episodes(side: Iterable[Evaluation]) -> list[Any]:
    return [episode for one in side for episode in one.episodes]


def left_out(rows: Sequence[Row]) -> list[str]:
    """Sentences on what a side has that was not compared, one for all comparisons with the same counts."""
    places: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for side in ("a", "b"):
        for row in rows:
            where = f"{row['env']} {row['split']} {row['policy']}"
            places[side, row[f"tasks_left_out_{side}"], row[f"seeds_left_out_{side}"]].append(where)
    return [
        f"Left out of {side.upper()}, not played on both sides: tasks {tasks}, seeds {seeds} ({', '.join(where)})."
        for (side, tasks, seeds), where in places.items()
        if tasks or seeds
    ]


def _unmatched(ours: Iterable[Place], theirs: Iterable[Place]) -> Iterator[str]:
    for side, mine, other in (("A", ours, theirs), ("B", theirs, ours)):
        if alone := [" ".join(place) for place in mine if place not in set(other)]:
            yield f"Evaluated by {side} alone: {', '.join(alone)}."


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the table, with a column for each key of its rows."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted key."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in dotted(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, A's value, B's value) wherever two trees differ; a missing key counts as None."""
    a, b = dotted(ours), dotted(theirs)
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def under(common: Mapping[Place, tuple[Sequence[Evaluation], Sequence[Evaluation]]]) -> list[tuple[str, Any, Any]]:
    """What the cards of the two sides differ in: each difference once, with the number of comparisons that have it."""
    places: dict[tuple[str, str, str], int] = defaultdict(int)
    for sides in common.values():
        ours, theirs = ({key: value for key, value in entry(side).items() if key not in OWN} for side in sides)
        for key, a, b in differing(ours, theirs):
            places[key, str(a), str(b)] += 1
    return [(f"{key} (in {count} of {len(common)})", a, b) for (key, a, b), count in places.items()]


def _print_rows(console: "Console", rows: Sequence[Row]) -> None:
    from rich.table import Table

    from pipeline.report import ci, number, p_value

    columns = ("env", "split", "policy", "n x seeds", "A ± SE", "B ± SE", "B - A, 95 % CI", "won/lost/tied", "p (Holm)")
    table = Table(*columns, "B is", show_edge=False)
    for row in rows:
        table.add_row(
            *(row[name] for name in ("env", "split", "policy")),
            f"{row['n']} x {row['seeds']}",
            *(f"{number(row[f'reward_{side}'])} ± {number(row[f'se_{side}'])}" for side in "ab"),
            f"{row['difference']:+.3f} {ci(row['low'], row['high'])}",
            f"{row['wins']}/{row['losses']}/{row['ties']}",
            p_value(row["p_holm"]),
            row["verdict"],
        )
    console.print(table)


def _print_differences(console: "Console", title: str, found: Sequence[tuple[str, Any, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not found:
        console.print(f"No difference in {title}.", highlight=False)
        return
    table = Table(f"differences in {title}", "A", "B", show_edge=False)
    for key, a, b in found:
        table.add_row(key, escape(str(a)), escape(str(b)))
    console.print(table)
