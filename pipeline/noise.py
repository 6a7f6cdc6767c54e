"""Noise in losing trajectories: what counts as noisy, and noise put in on purpose.

The paper's *noisy* setting keeps the losing trajectories that repeat actions or hold meaningless words, its *clean* one
leaves them out; it gives no rule (arXiv 2406.14868). Here a trajectory is noisy if one of two detectors says
so, and both read nothing but its messages, so they hold for any environment and for published data:

    repeated_action    an action, or two that undo each other, three times on end with the same answers each time
    meaningless_text   a reply without an action, one that goes in circles, or one that is not made of words

A wrong action is not noise, nor is one that the environment does not understand: the detectors judge form, not merit.
Random actions made of real words (`add_actions` with `random`) are therefore not detected; their pairs say it in
`rejected_source`.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from envs import MALFORMED
from pipeline import react
from pipeline.records import Message, Pair

REPEATS = 3
"""Times on end that make a repetition: twice may be a slip or a check; before the third, the same answer came twice."""

LONGEST_CYCLE = 2
"""Actions in the longest cycle looked for: one alone, and two that undo each other (open and close, there and back).
Longer rounds are also how rooms are searched."""

WAITING = frozenset({"wait", "wait1"})
"""ScienceWorld's actions that let time pass: their answer is always the same, and its experts wait many times on end
for water to boil or plants to grow. A cycle that holds one of them is never a repetition."""

REPEATED_TRIGRAMS = 0.5
"""Share of repeated 3-grams (seq-rep-3 of arXiv 1908.04319) above which a text goes in circles. Experts' replies in
the three environments reach 0.3; a sentence and nothing else, three times over, is above."""

WORDLESS = 0.5
"""Share of unreadable words above which a text is not made of words. `click[next >]` is half unreadable, no more."""

LONGEST_WORD = 30
"""Letters on end in the longest readable word; English has none longer, and what options run together has other
characters between."""

RANDOM_WORDS = 4
"""Words of a random action: as many as in `take mug from desk`."""

NO_EFFECT = react.observation("Nothing happens.")
"""What answers an inserted action that no environment was asked about; ALFWorld's own words."""

_LABEL = re.compile(r"^\s*(?:Thought|Action):", re.MULTILINE)
_TOO_LONG = re.compile(rf"[^\W\d_]{{{LONGEST_WORD + 1}}}")


def is_noisy(completion: Sequence[Message]) -> bool:
    """Whether a trajectory repeats actions or holds a meaningless reply.

    Args:
        completion: the policy's replies and the observations between them: assistant, user, assistant, ...
    """
    replies = [message["content"] for message in completion[::2]]
    answers = [message["content"] for message in completion[1::2]]
    return repeated_action([react.action_of(reply) for reply in replies], answers) or any(
        meaningless_text(reply) for reply in replies
    )


def repeated_action(actions: Sequence[str], answers: Sequence[str]) -> bool:
    """Whether an action, or a cycle of two, comes `REPEATS` times on end with the same answers each time.

    What counts: `open door` three times, each answered `The door is already open.`; `look around` three times in an
    unchanged room; `go to desk 1`, `go to shelf 1` three times in turn with nothing new at either. What does not:
    `click[next >]`, since each page is another answer; a thermometer read again and again while it rises; any cycle
    with a waiting action (`WAITING`). Case and blanks don't matter. Malformed replies (empty actions) are not compared.

    Args:
        actions: the actions in order.
        answers: what the environment answered; the last action's may be missing, and is then taken to be the same.
    """
    if len(answers) not in (len(actions), len(actions) - 1):
        raise ValueError(f"{len(actions)} actions cannot have {len(answers)} answers.")
    said = [_plain(action) for action in actions]
    heard: list[str | None] = [*answers, None][: len(actions)]
    return any(_cycles(said, heard, length) for length in range(1, LONGEST_CYCLE + 1))


def meaningless_text(reply: str) -> bool:
    """Whether a reply says nothing; its thought and its action count, and the two labels don't.

    It does if one of these holds:

    - it holds no action (`pipeline.react.action_of`);
    - it goes in circles: of its 3-grams of words, or of its action's, more than `REPEATED_TRIGRAMS` came before;
    - it is not made of words: of its words, or of its action's, more than `WORDLESS` are unreadable. A word is that if
      it holds no letter or digit, bytes that are no text (U+FFFD), or more than `LONGEST_WORD` letters on end.
    """
    action = react.action_of(reply)
    return action == MALFORMED or any(
        _repeated_trigrams(text) > REPEATED_TRIGRAMS or _unreadable(text) > WORDLESS
        for text in (_LABEL.sub("", reply), action)
    )


def drawn(count: int, share: float, seed: str) -> list[int]:
    """Exactly `round(share * count)` of the numbers below `count`, in order; a larger share holds a smaller one's."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return sorted(numbers[: round(share * count)])


def corrupt(
    pairs: Sequence[Pair], *, share: float, kind: Literal["repeat", "random"], actions: int, seed: int
) -> list[Pair]:
    """Corrupt the losers of exactly `round(share * len(pairs))` pairs, drawn by the seed.

    What a loser becomes depends on the seed and on its pair, not on the share.
    """
    words = vocabulary(pairs) if kind == "random" else []
    corrupted = list(pairs)
    for number in drawn(len(pairs), share, f"{seed} corrupted"):
        pair = pairs[number]
        rng = random.Random(f"{seed} {pair.id} {pair.chosen_source} {pair.rejected_source}")
        corrupted[number] = add_actions(pair, kind, actions, words, rng)
    return corrupted


def add_actions(
    pair: Pair, kind: Literal["repeat", "random"], actions: int, words: Sequence[str], rng: random.Random
) -> Pair:
    """A pair whose loser takes more actions, all at one random place, then goes on and ends as it did.

    `repeat`: a random turn but the last is taken again, `actions` times, each with the answer that it got; the only
    turn of a one-turn loser is answered by `NO_EFFECT`. `random`: before a random turn come actions of `RANDOM_WORDS`
    random words, each answered by `NO_EFFECT`. Reward and status stay the played trajectory's. No engine produced the
    new turns, so the loser has no token ids any more.

    Args:
        pair: the pair; it is not changed.
        kind: what to add.
        actions: how many.
        words: what random actions are made of.
        rng: draws the place and the words.
    """
    loser = pair.rejected
    if kind == "repeat":
        turn = rng.randrange(max(pair.rejected_turns - 1, 1))
        answer = loser[2 * turn + 1] if pair.rejected_turns > 1 else NO_EFFECT
        added = [loser[2 * turn], answer] * actions
    else:
        turn = rng.randrange(pair.rejected_turns)
        replies = [react.reply("", " ".join(rng.choices(words, k=RANDOM_WORDS))) for _ in range(actions)]
        added = [message for reply in replies for message in (react.assistant(reply), NO_EFFECT)]
    return replace(
        pair,
        rejected=[*loser[: 2 * turn], *added, *loser[2 * turn :]],
        rejected_token_ids=[],
        rejected_turns=pair.rejected_turns + actions,
        rejected_source=f"{pair.rejected_source}+{kind}{actions}",
    )


def vocabulary(pairs: Sequence[Pair]) -> list[str]:
    """The words (letters alone, lower case, two or more) that the pairs' trajectories are made of, sorted."""
    contents = [message["content"] for pair in pairs for message in (*pair.chosen, *pair.rejected)]
    return sorted({word.lower() for content in contents for word in re.findall(r"[A-Za-z]{2,}", content)})


def flip(pairs: Sequence[Pair], *, share: float, seed: int) -> list[Pair]:
    """Swap chosen and rejected in exactly `round(share * len(pairs))` pairs, drawn by the seed."""
    chosen = set(drawn(len(pairs), share, f"{seed} flipped"))
    return [flipped(pair) if number in chosen else pair for number, pair in enumerate(pairs)]


def flipped(pair: Pair) -> Pair:
    """The pair with everything of chosen and rejected swapped, said in `chosen_source`."""
    return Pair(
        id=pair.id,
        prompt=pair.prompt,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_token_ids=pair.rejected_token_ids,
        rejected_token_ids=pair.chosen_token_ids,
        chosen_reward=pair.rejected_reward,
        rejected_reward=pair.chosen_reward,
        chosen_status=pair.rejected_status,
        rejected_status=pair.chosen_status,
        chosen_turns=pair.rejected_turns,
        rejected_turns=pair.chosen_turns,
        chosen_source=f"{pair.rejected_source}+flipped",
        rejected_source=pair.chosen_source,
    )


def _plain(action: str) -> str:
    return " ".join(action.casefold().split())


def _cycles(actions: Sequence[str], answers: Sequence[str | None], length: int) -> bool:
    """Whether `length` actions, none of them a waiting or an empty one, come `REPEATS` times on end."""
    run = 0  # turns on end that equal the one `length` before
    for now in range(length, len(actions)):
        before = now - length
        same = actions[now] == actions[before] and answers[now] in (answers[before], None)
        run = run + 1 if same and actions[now] and actions[now] not in WAITING else 0
        if run >= length * (REPEATS - 1):
            return True
    return False


def _repeated_trigrams(text: str) -> float:
    """1 - distinct 3-grams / 3-grams of the words without their punctuation; 0 where there are none."""
    words = re.findall(r"\w+", text)
    trigrams = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _unreadable(text: str) -> float:
    """Share of the words, blanks apart, that are unreadable; 0 where there are none."""
    words = text.split()
    return sum(map(_is_unreadable, words)) / len(words) if words else 0.0


def _is_unreadable(word: str) -> bool:
    return not any(map(str.isalnum, word)) or "\ufffd" in word or _TOO_LONG.search(word) is not None
