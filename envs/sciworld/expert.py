"""From ScienceWorld's gold paths to ReAct trajectories: shorter plans, and a thought for each action.

The simulator's gold path knows the answer and shows it: it walks from door to door, opens doors that are open, and acts
on things it has never seen. `plans` drops the detours, so that an agent can learn from it what an agent could do, and
`think` says why each action follows from the task and from what was seen.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TRAVEL = re.compile(r"(?:open door to|go to) (.+)")
NO_EFFECT = re.compile(r"pour (.+?) in(?:to)? \1$")
FOCUSED = re.compile(r"You focus on the (.+?)\.")


def plans(gold: list[str], description: str) -> Iterator[list[str]]:
    """Plans worth trying, the most natural first and the gold path itself last.

    Things are called as the room shows them where that is understood; gold paths have names that nobody has read, such
    as `baby baby brown bear`. A walk through five doors costs time in which things heat, grow or cool, and some
    solutions count on it. So after the plans that just save the time come those that wait for as long instead.

    Args:
        gold: the simulator's actions.
        description: the task's text.
    """
    direct = _teleporting(gold, description, keep_time=False)
    timed = _teleporting(gold, description, keep_time=True)
    as_seen = [_as_seen(action) for action in _long_waits(direct)]
    if as_seen != _long_waits(direct):
        yield as_seen
    yield from (_long_waits(direct), direct, _long_waits(timed), timed, gold)


def _as_seen(action: str) -> str:
    """The action with things called as observations call them: `egg dove egg in inventory` is a `dove egg`."""
    action = re.sub(r"\b(\w+) \1\b", r"\1", action)
    action = re.sub(r"\begg (.+?) egg\b", r"\1 egg", action)
    action = re.sub(r"^(focus on|pick up) egg (.+)$", r"\1 \2 egg", action)
    return re.sub(r"( containing [\w ]+?)? in inventory\b", "", action)


def as_shown(played: Iterable[tuple[str, str]]) -> list[str]:
    """The actions of a solution with what they focus on called as the room showed it, there and from there on.

    Gold paths say `focus on butterfly` where a `butterfly egg` is in sight. The simulator takes that; whoever learns
    from it learns to recite names and not to read them.

    Args:
        played: (action, observation) of the whole solution.
    """
    names: dict[str, str] = {}
    shown, actions = "", []
    for action, observation in played:
        focus, answer = re.fullmatch("focus on (.+)", action), FOCUSED.match(observation)
        if focus and answer and re.search(rf"\ban? {re.escape(answer[1])}\b", shown):
            names[focus[1]] = answer[1]
        for name, seen in names.items():
            if not re.search(rf"\b{re.escape(seen)}\b", action):
                action = re.sub(rf"\b{re.escape(name)}\b", seen, action)
        actions.append(action)
        if action == "look around":
            shown = observation
    return actions


def _teleporting(gold: list[str], description: str, *, keep_time: bool) -> list[str]:
    """The gold path with one teleport for each walk, and a look around wherever what it does next needs one.

    With `keep_time` the time that this saves is waited before the first wait, or before the first measurement.
    """
    plan: list[str] = []
    destination, saved = None, 0
    for action in gold:
        travel = TRAVEL.fullmatch(action)
        if travel:
            destination = travel[1] if action.startswith("go") else destination
            saved += 1
            continue
        if NO_EFFECT.fullmatch(action):
            saved += 1
            continue
        if destination:
            plan.append(f"teleport to {destination}")
            destination = None
            saved -= 1
            if not _is_told(action, description):
                plan.append("look around")
        if keep_time and re.match("wait|use thermometer", action):
            plan += ["wait1"] * saved
            saved = 0
        if action != "look around" or plan[-1:] != ["look around"]:
            plan.append(action)
    return plan


def _is_told(action: str, description: str) -> bool:
    """Whether an action can be chosen without a look at the room: it handles what is held, or what the task names."""
    target = re.fullmatch(r"(?:drop|put down) .+|(?:pick up|(?:move|use) .+ in inventory (?:to|on)) (.+)", action)
    return target is not None and (target[1] is None or target[1].removesuffix(" in inventory") in description)


def _long_waits(plan: list[str]) -> list[str]:
    """The plan with runs of five to ten single waits as one long wait."""
    text = re.sub(r"(?:wait1\n){5,10}", "wait\n", "".join(f"{action}\n" for action in plan))
    return text.splitlines()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Thoughts for one form of action."""

    action: str
    """Pattern of the whole action; its groups fill `{0}` and `{1}`."""
    goal: str = ""
    """Pattern that the task's aim must match, if given; its group fills `{wanted}`."""
    after: str = ""
    """Pattern that the whole action before must match, if given; `$` is no action before."""
    seen: str = ""
    """Pattern whose group fills `{seen}`, from the latest observation that has it; none has it, no rule."""
    thoughts: tuple[str, ...]
    """Sentences, one of which is taken; `{goal}` is the task's aim."""


HELD = r"(?: in inventory)?"
BOX = r"((?:\w+ )*box)"
RULES = (
    Rule(action=r"(\d+)", thoughts=("Several things match; number {0} will do.",)),
    Rule(
        action=r"teleport to (.+)",
        after=r"$",
        thoughts=("My task is to {goal}. I go to the {0} first.", "To {goal}, I should start in the {0}."),
    ),
    Rule(
        action=r"teleport to (.+)",
        after=r"(?:pick up|focus on) .*",
        seen=r"You move the (.+?) to the inventory",
        thoughts=("I have the {seen}. Now I take it to the {0}.", "I hold the {seen}, so I go to the {0} next."),
    ),
    Rule(action=r"teleport to (.+)", after=r"look around|open .*", thoughts=("It is not here. I try the {0}.",)),
    Rule(action=r"teleport to (.+)", thoughts=("This is done. What I need next is in the {0}.",)),
    Rule(action=r"open door to (.+)", thoughts=("I want to go on to the {0}, so its door must be open.",)),
    Rule(action=r"go to (.+)", thoughts=("The door is open, so I walk to the {0}.",)),
    Rule(
        action=r"look around",
        after=r"(?:teleport|go) to .*",
        seen=r"You (?:teleport|move) to the (.+?)\.",
        thoughts=("I am in the {seen} now. I look at what is here.", "This is the {seen}; I see what it holds."),
    ),
    Rule(action=r"look around", after=r"$", thoughts=("My task is to {goal}. First I see where I am.",)),
    Rule(action=r"look around", thoughts=("I look around to see what has changed.", "I check how things look now.")),
    Rule(
        action=r"focus on " + BOX,
        seen=r"measures a temperature of (-?\d+)",
        thoughts=("It melted near {seen} degrees, so I focus on the {0}.",),
    ),
    Rule(
        action=r"focus on (.+)",
        goal=r"find (an? .+)",
        thoughts=("I see the {0}, which is {wanted}, so I focus on it.",),
    ),
    Rule(
        action=r"focus on (.+)",
        goal=r"find .* then the (.+)",
        after=r"focus .*",
        thoughts=("Of the animals here, the {0} has the {wanted}.",),
    ),
    Rule(
        action=r"focus on (.+)",
        goal=r"find the animal with the (\w+ life span).*",
        thoughts=("Of the animals here, the {0} has the {wanted}.",),
    ),
    Rule(
        action=r"focus on (.+)",
        goal=r"focus on the (?:\d )?life stages of the (.+)",
        thoughts=("The next life stage of the {wanted} is the {0}.",),
    ),
    Rule(
        action=r"focus on (.+)",
        goal=r".*create (.+)",
        thoughts=("The {0} is made, so the task wants me to focus on it.",),
    ),
    Rule(action=r"focus on (.+?)" + HELD, thoughts=("The task tells me to focus on the {0}.",)),
    Rule(action=r"(?:pick up|get|take) (.+)", thoughts=("I need the {0} for my task, so I pick it up.",)),
    Rule(action=r"(?:drop|put down) (.+?)" + HELD, thoughts=("I put the {0} down here to work with it.",)),
    Rule(action=r"read (.+?)" + HELD, thoughts=("The {0} says what I have to mix.",)),
    Rule(action=r"open (.+)", thoughts=("The {0} is closed, and I may need what is in it.",)),
    Rule(action=r"close (.+)", thoughts=("I close the {0} so that nothing gets away.",)),
    Rule(action=r"activate (.+)", thoughts=("The {0} has to be on, so I activate it.",)),
    Rule(action=r"deactivate (.+)", thoughts=("I am done with the {0}, so I turn it off.",)),
    Rule(
        action=r"move (.+?)" + HELD + r" to " + BOX,
        goal=r"find (an? .+)",
        thoughts=("The task wants {wanted} in the {1}, so I move it there.",),
    ),
    Rule(
        action=r"move (.+?)" + HELD + r" to " + BOX,
        seen=r"measures a temperature of (-?\d+)",
        thoughts=("It is {seen} degrees, so the {0} belongs in the {1}.",),
    ),
    Rule(
        action=r"move (.+?)" + HELD + r" to " + BOX,
        after=r"look around|wait1?",
        seen=r"which is (on)\b",
        thoughts=("Something is {seen}, so the {0} conducts; it goes to the {1}.",),
    ),
    Rule(
        action=r"move (.+?)" + HELD + r" to " + BOX,
        after=r"look around|wait1?",
        thoughts=("Nothing is on, so the {0} does not conduct; it goes to the {1}.",),
    ),
    Rule(action=r"move (.+?)" + HELD + r" to (sink)", thoughts=("I need water, so I put the {0} in the {1}.",)),
    Rule(
        action=r"move (.+?)" + HELD + r" to (stove|blast furnace|oven|fire pit)",
        thoughts=("The {1} will heat the {0}, so I move it there.",),
    ),
    Rule(
        action=r"move (.+?)" + HELD + r" to (freezer|fridge|ultra low temperature freezer)",
        thoughts=("The {1} will cool the {0}, so I move it there.",),
    ),
    Rule(action=r"move (.+?)" + HELD + r" to (.+)", thoughts=("The {0} has to be in the {1}, so I move it.",)),
    Rule(action=r"pour (.+) in(?:to)? (.+)", thoughts=("The {1} needs it, so I pour in the {0}.",)),
    Rule(action=r"mix (.+)", thoughts=("All that is needed is in the {0}, so I mix it.",)),
    Rule(
        action=r"use (thermometer)" + HELD + r" on (.+?)" + HELD,
        thoughts=("I measure how hot the {1} is.",),
    ),
    Rule(action=r"use (.+?)" + HELD + r" on (.+)", thoughts=("I use the {0} on the {1}.",)),
    Rule(action=r"examine (.+)", thoughts=("I check what the {0} is like now.",)),
    Rule(action=r"connect (.+) to (.+)", thoughts=("The circuit needs the {0} joined to the {1}.",)),
    Rule(action=r"disconnect (.+)", thoughts=("I take the {0} out of the circuit.",)),
    Rule(action=r"wait1?", thoughts=("This takes time, so I wait.", "It is not done yet, so I wait.")),
    Rule(action=r"(.+)", thoughts=("The next step is to {0}.",)),
)


def think(description: str, history: list[tuple[str, str]], action: str) -> str:
    """Why this action comes next, in a sentence or two; the same each time.

    Args:
        description: the task's text.
        history: (action, observation) of the episode so far.
        action: the action to give a reason for.
    """
    goal = _goal(description)
    before = history[-1][0] if history else ""
    for rule in RULES:
        done, aim = re.fullmatch(rule.action, action), re.fullmatch(rule.goal or ".*", goal)
        seen = _latest(rule.seen, history)
        if done is None or aim is None or seen is None or (rule.after and not re.fullmatch(rule.after, before)):
            continue
        wanted = aim[1] if aim.re.groups else ""
        # Which sentence: by the text, so that it varies and yet is the same on every machine.
        choice = zlib.crc32(f"{description}{len(history)}".encode()) % len(rule.thoughts)
        thought = rule.thoughts[choice].format(*done.groups(), goal=goal, seen=seen, wanted=wanted)
        return re.sub(r"(?:in|to) the outside", "outside", thought)
    raise AssertionError("the last rule matches every action")


def _goal(description: str) -> str:
    """The task's aim as a phrase: `boil water`."""
    aim = re.search(r"task is to (.+?)(?:, (?:which|starting|where) .*)?(?:\. .*|\.)?$", description, re.DOTALL)
    phrase = aim[1] if aim else "do the task"
    return re.sub(r"\ba\(n\)", "a", re.sub(r"\ba\(n\) (?=[aeiou])", "an ", phrase))


def _latest(pattern: str, history: list[tuple[str, str]]) -> str | None:
    """What the pattern's group matches in the latest observation that has it, or None; nothing for no pattern."""
    if not pattern:
        return ""
    for _, observation in reversed(history):
        if found := re.findall(pattern, observation):
            return str(found[-1])
    return None
