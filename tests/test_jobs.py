import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.jobs import check_disjoint, spread


def kind(task):
    return task.split(":")[0]


def test_spread_takes_from_every_kind_in_turn():
    tasks = ["a:0", "a:1", "a:2", "b:0", "b:1", "c:0"]
    assert spread(tasks, 4, kind) == ["a:0", "a:1", "b:0", "c:0"]
    assert spread(tasks, None, kind) == tasks
    assert spread(tasks, 99, kind) == tasks


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), unique=True), st.integers(1, 20))
def test_spread_is_even_and_keeps_the_order(pairs, limit):
    tasks = [f"{letter}:{number}" for letter, number in pairs]
    kept = spread(tasks, limit, kind)
    assert len(kept) == min(limit, len(tasks))
    assert kept == [task for task in tasks if task in kept]
    taken = {letter: sum(kind(task) == letter for task in kept) for letter in "abc"}
    there = {letter: sum(kind(task) == letter for task in tasks) for letter in "abc"}
    unfinished = [taken[letter] for letter in "abc" if taken[letter] < there[letter]]
    assert not unfinished or max(taken.values()) - min(unfinished) <= 1


def test_splits_that_share_a_task_are_refused():
    check_disjoint({"train": ["a:0"], "seen": ["a:1"], "unseen": ["b:0"]})
    with pytest.raises(ValueError, match="a:0 is in both train and seen"):
        check_disjoint({"train": ["a:0"], "seen": ["a:0"], "unseen": []})
