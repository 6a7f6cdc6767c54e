"""The tool `splits`: toy lists, and the goals of a small WebShop catalogue."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.recipe import load
from pipeline.splits import counted, overlaps, task_lists

SHOP = ["env=webshop", "env.webshop.products=100", "env.webshop.seen_goals=15", "env.webshop.unseen_goals=10"]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lists(work):
    """The published lists of a toy: one train goal twice, and two that are tested."""
    (work / "train_indices.json").write_text(json.dumps([5, 9, 9, 3, 7, 8]))
    (work / "test_indices.json").write_text(json.dumps([7, 8, 30]))
    return f"env.webshop.splits={work}"


def test_overlap_of_every_pair():
    found = overlaps({"train": ["a", "b", "b", "c"], "seen": ["b", "c", "d"], "unseen": ["e"]})
    assert found == {("train", "seen"): 2, ("train", "unseen"): 0, ("seen", "unseen"): 0}
    assert counted(["a", "b", "b"]) == "3 (2 different)"
    assert counted(["a", "b"]) == "2"


def test_our_own_splits_share_nothing():
    found = task_lists(load("tiny", SHOP), "webshop")
    assert list(found) == ["train", "seen", "unseen"]
    assert all(found.values())
    assert set(overlaps(found).values()) == {0}


def test_the_tasks_that_are_set_aside_are_a_split():
    whole = task_lists(load("tiny", SHOP), "webshop")
    found = task_lists(load("tiny", [*SHOP, "env.dev_tasks=1"]), "webshop")
    assert list(found) == ["train", "dev", "seen", "unseen"]
    assert sorted(found["train"] + found["dev"]) == sorted(whole["train"])
    assert len(found["dev"]) == 1


def test_published_lists_stand_beside_those_that_are_played(lists, capsys):
    found = task_lists(load("tiny", [*SHOP, lists]), "webshop")
    shared = overlaps(found)
    assert [len(found[name]) for name in ("train", "seen", "published train", "published seen")] == [3, 3, 6, 3]
    assert shared["published train", "published seen"] == 2
    assert shared["train", "seen"] == 0
    assert shared["train", "published train"] == 3
    assert main(["splits", "tiny", *SHOP, lists]) == 0
    printed = capsys.readouterr().out
    assert "webshop: tasks shared" in printed
    assert "6 (5 different)" in printed


def test_a_wrong_recipe_is_one_sentence(capsys):
    assert main(["splits", "no-such-recipe"]) == 1
    assert "No recipe 'no-such-recipe'" in capsys.readouterr().err


def test_splits_that_share_a_task_are_told(monkeypatch, capsys):
    from pipeline import splits

    monkeypatch.setattr(
        splits,
        "task_lists",
        lambda *_: {"train": ["a", "b"], "seen": ["b", "c"], "unseen": ["d"], "published seen": ["a"]},
    )
    assert main(["splits", "tiny", "env=webshop"]) == 0
    printed = capsys.readouterr().out
    assert "train and seen share tasks (1): no stage will play them." in printed
    assert printed.count("no stage will play") == 1
