"""Whether policies can still copy: how often they say the one token that has followed the same two tokens before.

    python -m benchmarks.copying runs/RUN/sciworld/seed0 [--trajectories 40] [--json FILE]

A new model is made with heads that do so (`pipeline/induction.py`), and a policy that has lost them names things that
are not there, whatever it prefers. The experts' trajectories on unseen tasks are read by the run's new model, its SFT
policy and all that were trained from it; of the turns' tokens those count that follow two tokens which have stood
together before, with the same token behind them each time. Told: their number, the share of them that is the likeliest
token, and their mean negative log-prob in nats.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import models, recipe
from pipeline.examples import sft_examples
from pipeline.records import Trajectory, read_jsonl
from pipeline.rendering import Rendered, Renderer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=Path, help="the folder of an environment's seed, evaluated with its expert")
    parser.add_argument("--trajectories", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    file = options.seed / "evaluate/expert/unseen/episodes.jsonl"
    if not file.is_file():
        parser.error(f"{file} is not there: give the folder of an evaluated run's seed, as runs/RUN/sciworld/seed0.")
    if recipe.beside(options.seed).model.path:
        parser.error(f"The policies of {options.seed} begin with a model of the Hub, which nothing was written into.")
    unseen = read_jsonl(file, Trajectory)[: options.trajectories]
    found = {}
    for name, model, tokenizer in policies(options.seed):
        examples, _ = sft_examples(Renderer(tokenizer), unseen, model.config.max_position_embeddings)
        found[name] = copied(model, examples)
        print("{:24} {tokens:6} {likeliest:.3f} {nats:.3f}".format(name, **found[name]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def policies(seed: Path) -> Iterator[tuple[str, Any, Any]]:
    """(name, model, tokenizer) of the new model, the SFT policy and the trained ones."""
    config = recipe.beside(seed)
    experts = read_jsonl(seed / "experts/episodes.jsonl", Trajectory)
    texts = [message["content"] for expert in experts for message in expert.messages]
    yield "new", *models.new_policy(config.model, texts, int(seed.name.removeprefix("seed")))
    for policy in [seed / "sft/policy", *sorted(seed.glob("train/*/policy"))]:
        yield policy.parent.name, *models.load_policy(policy, config.model)


@torch.no_grad()
def copied(model: Any, examples: Sequence[Rendered]) -> dict[str, float]:
    """Number of tokens that repeat, the share that is the model's likeliest, and their mean nats."""
    said, nats = [], []
    for example in examples:
        places = torch.tensor(repeats(example.ids, example.turn_index))
        if len(places):
            ids = torch.tensor(example.ids)
            logprobs = model(ids[None]).logits[0, places - 1].float().log_softmax(-1)  # [repeats, vocabulary]
            nats.append(-logprobs.gather(1, ids[places, None]))
            said.append(logprobs.argmax(-1) == ids[places])
    return {
        "tokens": sum(map(len, said)),
        "likeliest": float(torch.cat(said).float().mean()),
        "nats": float(torch.cat(nats).mean()),
    }


def repeats(ids: Sequence[int], turn_index: Sequence[int]) -> list[int]:
    """Positions in the policy's turns of tokens that alone have followed the two tokens before them, earlier on."""
    followed: dict[tuple[int, int], set[int]] = defaultdict(set)
    found = []
    for place in range(2, len(ids)):
        after = followed[ids[place - 2], ids[place - 1]]
        if turn_index[place] >= 0 and after == {ids[place]}:
            found.append(place)
        after.add(ids[place])
    return found


if __name__ == "__main__":
    main()
