import random
from dataclasses import replace

import pytest

from pipeline import noise
from pipeline.react import assistant, observation
from pipeline.records import EpisodeStatus, Pair


def completion(*actions, answer="Observation: ok"):
    """Replies with the same answer between them."""
    between = {"role": "user", "content": answer}
    messages = [message for action in actions for message in (assistant(f"Action: {action}"), between)]
    return messages[:-1]


def pair(number=0, rejected=("look", "open door", "go to hall"), **changes):
    fields = {
        "id": f"t:{number}", "prompt": [{"role": "user", "content": "task"}],
        "chosen": completion("win"), "rejected": completion(*rejected),
        "rejected_token_ids": [[7, turn] for turn in range(len(rejected))],
        "chosen_reward": 1.0, "rejected_reward": 0.25,
        "chosen_status": EpisodeStatus.COMPLETED, "rejected_status": EpisodeStatus.MAX_STEPS,
        "chosen_turns": 1, "rejected_turns": len(rejected),
        "chosen_source": "expert/seed0/0", "rejected_source": "sft/seed0/0",
    }  # fmt: skip
    return Pair(**(fields | changes))


@pytest.mark.parametrize(
    ("actions", "answers"),
    [
        (["look around"] * 3, ["a room"] * 3),
        (["look around"] * 3, ["a room"] * 2),  # the last answer is not known
        (["Look  around", "look around", "look around "], ["a room"] * 3),
        (["open door", *["go to hall"] * 3, "look"], ["opened", *["no door"] * 3, "a room"]),
        (["go to desk 1", "go to shelf 1"] * 3, ["a pen", "a book"] * 3),
        (["click[next >]", "click[< prev]"] * 3, ["page 2", "page 1"] * 3),
    ],
)
def test_the_same_action_with_the_same_answer_three_times_is_a_repetition(actions, answers):
    assert noise.repeated_action(actions, answers)


@pytest.mark.parametrize(
    ("actions", "answers"),
    [
        ([], []),
        (["look around"] * 2, ["a room"] * 2),
        (["look around", "look around", "wait", "look around"], ["a room", "a room", "", "a room"]),
        (["click[next >]"] * 4, ["page 2", "page 3", "page 4", "page 5"]),
        (["use thermometer on water"] * 3, ["20 degrees", "40 degrees", "60 degrees"]),
        (["wait1"] * 9, ["You decide to wait for 1 iterations."] * 9),
        (["wait", "look at pot"] * 5, ["You wait.", "a seed"] * 5),
        (["go to desk 1", "go to shelf 1"] * 2 + ["go to desk 1"], ["a pen", "a book"] * 2 + ["a pen"]),
        (["a", "b", "c"] * 3, ["ok"] * 9),
        ([""] * 3, ["no action"] * 3),
    ],
)
def test_what_changes_or_waits_or_comes_twice_is_no_repetition(actions, answers):
    assert not noise.repeated_action(actions, answers)


def test_actions_and_answers_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="3 actions cannot have 1 answers"):
        noise.repeated_action(["a", "b", "c"], ["ok"])


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I should go to the kitchen.",
        "Thought: I need a pot.\nAction:",
        "Thought: the pot the pot the pot the pot the pot\nAction: pick up pot",
        "Thought: I look for it.\nAction: go to go to go to go to go to",
        "Action: search[red red red red red red]",
        "Action: ### ??? look",
        "Action: \ufffd\ufffd",
        "Thought: I go to the hall.\nAction: " + "click" * 7,
    ],
)
def test_no_action_circles_and_no_words_are_meaningless(reply):
    assert noise.meaningless_text(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Action: wait",
        "Action: look",
        "Thought: I need to open the door to the kitchen.\nAction: open door to kitchen",
        "Thought: I have to open the door to the hall to go to the hall.\nAction: go to hall",
        "Action: click[next >]",
        "Action: click[< prev]",
        "Action: click[$20.00 to $50.00]",
        "Action: click[b09kp78g37]",
        "Thought: Ich gehe zur Tür.\nAction: öffne tür",
        "Action: search[women's long-sleeve t-shirt, 3x-large, color: black | white, price < 40.00 dollars]",
        "Action: connect red wire terminal 1 to battery anode",
        "Action: drink a green idea",  # nonsense in words is the environment's to judge
        "Action: " + "click" * 6,  # thirty letters
    ],
)
def test_replies_that_say_something_are_not_meaningless(reply):
    assert not noise.meaningless_text(reply)


def test_a_trajectory_is_noisy_by_its_actions_or_by_one_reply():
    assert noise.is_noisy(completion("look", "look", "look"))
    assert noise.is_noisy([*completion("look", "open door"), observation("ok"), assistant("hm")])
    assert not noise.is_noisy(completion("look", "look", "open door"))
    assert not noise.is_noisy([])


def alternates(messages):
    return [message["role"] for message in messages] == (["assistant", "user"] * len(messages))[: len(messages)] and (
        messages[-1]["role"] == "assistant"
    )


@pytest.mark.parametrize("actions", [1, 4])
@pytest.mark.parametrize("rejected", [("look",), ("look", "open door"), ("a", "b", "c", "d")])
@pytest.mark.parametrize("kind", ["repeat", "random"])
def test_a_corrupted_loser_is_longer_ends_as_it_did_and_has_no_ids(kind, rejected, actions):
    before = pair(rejected=rejected)
    for seed in range(10):
        after = noise.add_actions(before, kind, actions, ["red", "door"], random.Random(seed))
        assert alternates(after.rejected)
        assert after.rejected_turns == len(after.rejected[::2]) == len(rejected) + actions
        assert after.rejected[-1] == before.rejected[-1]
        assert after.rejected_token_ids == []
        assert after.rejected_source == f"sft/seed0/0+{kind}{actions}"
        assert (after.rejected_reward, after.rejected_status) == (before.rejected_reward, before.rejected_status)
        assert after.chosen == before.chosen
    assert before == pair(rejected=rejected)


def test_a_repeated_turn_comes_with_the_answer_it_got():
    messages = [
        assistant("Action: a"),
        observation("A"),
        assistant("Action: b"),
        observation("B"),
        assistant("Action: c"),
    ]
    before = replace(pair(), rejected=messages)
    first, second = messages[:2], messages[2:4]
    expected = [[*first, *first, *first, *second, messages[4]], [*first, *second, *second, *second, messages[4]]]
    found = [noise.add_actions(before, "repeat", 2, [], random.Random(seed)).rejected for seed in range(20)]
    assert all(one in found for one in expected)
    assert all(one in expected for one in found)
    assert all(noise.is_noisy(one) for one in found)


def test_the_only_turn_of_a_loser_is_repeated_to_no_effect():
    after = noise.add_actions(pair(rejected=("look",)), "repeat", 1, [], random.Random(0))
    assert after.rejected == [assistant("Action: look"), noise.NO_EFFECT, assistant("Action: look")]


def test_random_actions_are_words_of_the_pairs_and_told_apart_by_their_source_alone():
    pairs = [pair(number) for number in range(20)]
    words = set(noise.vocabulary(pairs))
    assert words == {"action", "observation", "ok", "win", "look", "open", "door", "go", "to", "hall"}
    for before, after in zip(pairs, corrupted(pairs, 1.0, kind="random", actions=2), strict=True):
        new = [message for message in after.rejected[::2] if message not in before.rejected]
        assert len(new) == 2
        for message in new:
            said = message["content"].removeprefix("Action: ").split()
            assert len(said) == noise.RANDOM_WORDS
            assert set(said) <= words


def corrupted(pairs, share, kind="repeat", actions=3, seed=0):
    return noise.corrupt(pairs, share=share, kind=kind, actions=actions, seed=seed)


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.3, 3), (7, 0.5, 4), (9, 0.5, 4), (3, 0, 0), (3, 1, 3)])
def test_shares_are_exact(count, share, expected):
    pairs = [pair(number) for number in range(count)]
    for seed in range(5):
        changed = zip(pairs, corrupted(pairs, share, seed=seed), strict=True)
        assert sum(before != after for before, after in changed) == expected
        changed = zip(pairs, noise.flip(pairs, share=share, seed=seed), strict=True)
        assert sum(before != after for before, after in changed) == expected


@pytest.mark.parametrize("kind", ["repeat", "random"])
def test_noise_follows_the_seed_and_more_of_it_holds_the_less(kind):
    pairs = [pair(number) for number in range(30)]
    assert corrupted(pairs, 0.4, kind) == corrupted(pairs, 0.4, kind)
    assert corrupted(pairs, 0.4, kind) != corrupted(pairs, 0.4, kind, seed=1)
    little, much = corrupted(pairs, 0.2, kind), corrupted(pairs, 0.6, kind)
    assert all(more == less for before, less, more in zip(pairs, little, much, strict=True) if less != before)
    assert set(noise.drawn(30, 0.2, "x")) < set(noise.drawn(30, 0.6, "x"))
    assert noise.flip(pairs, share=0.4, seed=0) == noise.flip(pairs, share=0.4, seed=0)
    assert noise.flip(pairs, share=0.4, seed=0) != noise.flip(pairs, share=0.4, seed=1)


def test_a_flip_swaps_everything_and_says_so():
    before, after = pair(), noise.flipped(pair())
    fields = ("", "_token_ids", "_reward", "_status", "_turns")
    for field in fields:
        assert getattr(after, f"chosen{field}") == getattr(before, f"rejected{field}")
        assert getattr(after, f"rejected{field}") == getattr(before, f"chosen{field}")
    assert (after.chosen_source, after.rejected_source) == ("sft/seed0/0+flipped", "expert/seed0/0")
