"""What a WebShop policy can do, and what goes wrong first where it does not.

    python docs/results/pilot-cool/shopping.py runs/RUN/webshop/seed0

takes a run's SFT policy, its exploration and what was evaluated. It writes, of the option turns of the experts' unseen
episodes, how often the value that the thought names is the policy's likeliest continuation, and how often the click
is, given the experts' own words before; in how many pairs the winner alone chose an option; then, for the exploration,
for the losers of its pairs and for each policy's tests, in how many episodes an option was chosen, and what went wrong
first in each.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from pipeline import models, recipe
from pipeline.examples import sft_examples
from pipeline.records import Message, Pair, Trajectory, read_jsonl
from pipeline.rendering import Renderer

OPTION = re.compile(r"Thought: [a-z ]+: (.+)\. I choose it\.\nAction: click\[(.+)\]")
ACTION = re.compile(r"Action: (?:search|click)\[(.*)\]")
PRODUCT = re.compile(r"B0[A-Z]+")


@torch.no_grad()
def options(seed: Path) -> dict[str, int]:
    """Option turns of the experts' unseen episodes, and those whose value and whose click SFT's policy would say."""
    model, tokenizer = models.load_policy(seed / "sft/policy", recipe.beside(seed).model)
    episodes = read_jsonl(seed / "evaluate/expert/unseen/episodes.jsonl", Trajectory)
    examples, _ = sft_examples(Renderer(tokenizer), episodes, model.config.max_position_embeddings)
    found: Counter[str] = Counter()
    for example in examples:
        ids = torch.tensor(example.ids)
        right = [False, *(model(ids[None]).logits[0, :-1].argmax(-1) == ids[1:]).tolist()]
        for turn in sorted(set(example.turn_index) - {-1}):
            places = [place for place, of in enumerate(example.turn_index) if of == turn]
            texts = [tokenizer.decode([example.ids[place]]) for place in places]
            if option := OPTION.search("".join(texts)):
                said = [right[place] for place in places]
                found["turns"] += 1
                found["value"] += all(_within(said, texts, option.span(1)))
                found["click"] += all(_within(said, texts, option.span(2)))
    return dict(found)


def _within(said: Sequence[bool], texts: Sequence[str], span: tuple[int, int]) -> Iterable[bool]:
    """Whether the tokens were said that reach into a span of characters."""
    begin = 0
    for one, text in zip(said, texts, strict=True):
        if begin < span[1] and begin + len(text) > span[0]:
            yield one
        begin += len(text)


def first_wrong(episode: Trajectory) -> str:
    """What an episode's first mistake is, by its replies; else how it ended."""
    shown = ""
    for turn in episode.turns:
        action = ACTION.search(turn.text)
        if not action:
            return "a price's words again and again" if turn.text.count("$") > 2 else "another reply without an action"
        if PRODUCT.fullmatch(action[1]) and action[1] not in shown:
            return "a product that is not listed"
        shown += turn.observation or ""
    return f"bought for {episode.reward:.2f}" if episode.status.value == "completed" else episode.status.value


def chose(episode: Trajectory) -> bool:
    """Whether an option was chosen."""
    return any(turn.valid and OPTION.search(turn.text) for turn in episode.turns)


def told(name: str, episodes: Sequence[Trajectory]) -> None:
    """Write of some episodes how many chose an option, and the first mistakes, the most frequent ones first."""
    mistakes = Counter(map(first_wrong, episodes)).most_common()
    sys.stdout.write(
        f"{name}: {len(episodes)} episodes, {sum(map(chose, episodes))} with an option, {dict(mistakes)}\n"
    )


def main() -> None:
    """Measure and write."""
    seed = Path(sys.argv[1])
    sys.stdout.write(f"options: {options(seed)}\n")
    samples = {(one.id, one.sample): one for one in read_jsonl(seed / "rollout/episodes.jsonl", Trajectory)}
    told("samples", list(samples.values()))
    pairs = read_jsonl(seed / "pairs/pairs.jsonl", Pair)
    sides = [[_sample(pair.id, side, samples.values()) for side in (pair.chosen, pair.rejected)] for pair in pairs]
    alone = sum(chose(winner) and not chose(loser) for winner, loser in sides)
    sys.stdout.write(f"pairs: {len(pairs)}, in {alone} the winner alone chose an option\n")
    told("losers", [loser for _, loser in sides])
    for file in sorted(seed.glob("evaluate/*/*seen/episodes.jsonl")):
        told(f"{file.parent.parent.name}, {file.parent.name}", read_jsonl(file, Trajectory))


def _sample(task: str, side: Sequence[Message], samples: Iterable[Trajectory]) -> Trajectory:
    """The sample that a pair's side is."""
    said = [turn["content"] for turn in side[::2]]
    return next(one for one in samples if one.id == task and [turn.text for turn in one.turns] == said)


if __name__ == "__main__":
    main()
