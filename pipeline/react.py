"""The conversation an agent is in: ReAct replies (arXiv 2210.03629) in the message form of the official ETO wrapper.

user       the environment's instruction
assistant  OK
[user, assistant, ...]   one worked example, where prompts carry one
user       the task
assistant  Thought: ...   <- turn 0, the first that is trained or scored
           Action: ...
user       Observation: ...
"""

import re

from pydantic import BaseModel

from envs import MALFORMED, TextEnv
from pipeline.records import Message

ACKNOWLEDGEMENT = "OK"
_ACTION = re.compile(r"Action:\s*(\S.*?)\s*$", re.MULTILINE)


def user(content: str) -> Message:
    """A message to the policy."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A message of the policy."""
    return {"role": "assistant", "content": content}


def prompt(env: type[TextEnv], settings: BaseModel, task: str, *, example: bool) -> list[Message]:
    """The messages before the first turn, given the text of the task."""
    messages = [user(env.instruction(settings)), assistant(ACKNOWLEDGEMENT)]
    if example:
        for question, answer in env.example(settings):
            messages += [user(question), assistant(answer)]
    return [*messages, user(task)]


def zero_shot(messages: list[Message]) -> list[Message]:
    """A prompt without its worked example: what SFT and the pairs train on."""
    return [*messages[:2], messages[-1]]


def observation(text: str) -> Message:
    """What the environment answered, as the policy reads it."""
    return user(f"Observation: {text}")


def reply(thought: str, action: str) -> str:
    """An expert's reply; without a thought it is the action line alone."""
    return f"Thought: {thought}\nAction: {action}" if thought else f"Action: {action}"


def action_of(text: str) -> str:
    """The action inside a reply: the line that follows its first `Action:`, or `MALFORMED`.

    The official wrapper takes all that follows, further lines included.
    """
    found = _ACTION.search(text)
    return found.group(1) if found else MALFORMED
