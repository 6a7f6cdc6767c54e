"""The tool `tables` on made-up runs: seeds that were run apart become the tables of one run."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import __main__, report, statistics
from pipeline.records import Trajectory, read_jsonl
from tests.synthetic_run import make_run

TASKS = 8
FILES = ("episodes.csv", "rewards.csv", "rewards_by_kind.csv", "differences.csv")


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(seeds: list[int], name: str, gamma: float = 0.7, **recipe: Any) -> Path:
    """An evaluated run, with what the stage `evaluate` writes."""
    config = make_run(methods=["dmpo", "dpo"], seeds=seeds, tasks=TASKS, name=name, gamma=gamma, **recipe)
    played = sorted(config.folder.glob("*/seed*/evaluate/*/*/episodes.jsonl"))
    episodes = statistics.episode_table(one for path in played for one in read_jsonl(path, Trajectory))
    report.write_rewards(config.folder, episodes)
    return config.folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tables(*arguments: object) -> int:
    return __main__.main(["tables", *map(str, arguments)])


def test_seeds_that_were_run_apart_give_the_tables_of_one_run(capsys):
    run([0], "first")
    whole, second = run([0, 1], "whole"), run([1], "second")
    episodes = statistics.episode_table(pd.read_csv(whole / "episodes.csv"))
    report.write_tables(whole, episodes, {"sft": ["dmpo", "dpo"]}, {"sft": ["random"]})
    assert tables("first", second, "--to", "both") == 0
    printed = capsys.readouterr().out
    assert "sciworld: mean reward with 95 % CI" in printed
    assert f"(seen {TASKS}, unseen {TASKS} tasks, 2 seeds)" in printed
    for name in FILES:
        ours, theirs = (rows_of(folder / name) for folder in (Path("both"), whole))
        assert sorted(map(str, ours)) == sorted(map(str, theirs)), name
    assert Path("both/figures/rewards-sciworld.svg").read_text().startswith("<?xml")


def test_the_comparisons_are_those_of_the_recipe():
    """What the report of one run compares and judges, the tool compares and judges."""
    recipe = {
        "arms": {"dmpo+nll": {"method": "dmpo", "train.nll": 0.3}},
        "compare": [["dpo", "dmpo"], ["dpo", "dmpo+nll"]],
    }
    for seeds, name in (([0, 1], "whole"), ([0], "first"), ([1], "second")):
        run(seeds, name, **recipe)
    assert __main__.main(["report", "runs/whole/config.yaml"]) == 0
    assert tables("first", "second", "--to", "both") == 0
    ours, theirs = (rows_of(Path(folder) / "differences.csv") for folder in ("both", "runs/whole"))
    assert sorted(map(str, ours)) == sorted(map(str, theirs))
    contrasts = [(row["baseline"], row["method"]) for row in ours if row["split"] == "seen"]
    assert contrasts[-3:] == [("dpo", "dmpo"), ("dpo", "dmpo+nll"), ("sft", "random")]
    assert tables("first", "second", "--to", "with-dpo", "--baseline", "dpo") == 0
    assert {row["baseline"] for row in rows_of(Path("with-dpo/differences.csv"))} == {"dpo"}


def test_what_other_environments_are_like_keeps_no_seeds_apart(capsys):
    run([0], "first", env={"names": ["sciworld"]}, experts={"tasks": 300})
    goals = {"names": ["sciworld"], "webshop": {"train_goals": 70}}
    run([1], "second", env=goals, experts={"tasks": {"sciworld": 300, "webshop": 1800}})
    run([2], "third", env=goals, experts={"tasks": {"sciworld": 200}})
    assert tables("first", "second", "--to", "both") == 0
    assert tables("first", "second", "third", "--to", "all") == 1
    assert "experts.tasks.sciworld is 300 in runs/first/config.yaml and 200 in runs/third" in capsys.readouterr().err


def test_a_file_alone_is_enough(tmp_path):
    folder = run([0], "first")
    (folder / "episodes.csv").rename(tmp_path / "sent.csv")
    assert tables("sent.csv", "--to", "out", "--baseline", "dpo") == 0
    rows = rows_of(Path("out/differences.csv"))
    assert {(row["method"], row["baseline"]) for row in rows} == {(one, "dpo") for one in ("random", "sft", "dmpo")}


def test_every_episode_is_a_line():
    folder = run([0], "first")
    rows = rows_of(folder / "episodes.csv")
    assert len(rows) == 5 * 2 * TASKS
    (broken,) = [row for row in rows if row["status"] == "env_error"]
    assert (broken["method"], broken["split"], broken["task"]) == ("dmpo", "seen", "sciworld:find-plant:101")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["first", "first/episodes.csv"], "both hold seed 0 of sciworld"),
        (["first", "other"], "train.gamma is 0.7 in runs/first/config.yaml and 0.3 in runs/other/config.yaml"),
        (["nowhere"], "no episodes.csv there or in runs/nowhere"),
        (["first/rewards.csv"], "has no column kind"),
        (["first", "--baseline", "eto"], "No policy 'eto' was evaluated"),
    ],
)
def test_what_cannot_be_put_together_is_one_sentence(arguments, sentence, capsys):
    run([0], "first")
    run([1], "other", gamma=0.3)
    assert tables(*arguments, "--to", "out") == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
