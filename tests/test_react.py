import pytest

from envs import MALFORMED
from pipeline import react


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("Thought: I need heat.\nAction: activate stove", "activate stove"),
        ("Action: look around  ", "look around"),
        ("  Action:wait", "wait"),
        ("Thought: so.\nAction: open door\nAction: close door", "open door"),
        ("Thought: so. Action: open door\nThen close it.", "open door"),
        ("Thought: I do nothing.", MALFORMED),
        ("Action:", MALFORMED),
        ("Action:\nlook around", "look around"),
        ("", MALFORMED),
    ],
)
def test_what_follows_the_first_mark_is_the_action(reply, action):
    assert react.action_of(reply) == action


def test_a_reply_reads_back():
    text = react.reply("The stove heats it.", "activate stove")
    assert text == "Thought: The stove heats it.\nAction: activate stove"
    assert react.action_of(text) == "activate stove"
    assert react.reply("", "wait") == "Action: wait"


def test_zero_shot_drops_the_worked_example_alone():
    class Env:
        @staticmethod
        def instruction(settings):
            return f"rules of {settings}"

        @staticmethod
        def example(settings):
            return [("task A", "Action: a"), ("Observation: x", "Action: b")]

    with_example = react.prompt(Env, "chess", "task B", example=True)
    assert with_example[0]["content"] == "rules of chess"
    assert [message["role"] for message in with_example] == ["user", "assistant"] * 3 + ["user"]
    assert react.zero_shot(with_example) == react.prompt(Env, "chess", "task B", example=False)
