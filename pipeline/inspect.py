"""Tool `inspect`: a trajectory or pair of a file as the policy sees it, its tokens coloured by turn.

python -m pipeline inspect runs/tiny/sciworld/seed0/pairs/pairs.jsonl --method dmpo
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipeline import recipe
from pipeline.methods import Discount
from pipeline.records import Message, Pair, Trajectory, recover_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("file", type=Path, help="episodes.jsonl or pairs.jsonl of a run")
    parser.add_argument("--id", help="content id of the task; default: the first record")
    parser.add_argument("--tokenizer", type=Path, help="folder of a policy; default: the run's own sft/policy")
    parser.add_argument(
        "--method", default="dmpo", choices=list(map(str, Discount)), help="discount whose weights are shown: dmpo"
    )
    parser.add_argument("--gamma", type=float, help="gamma of the discount; default: the run's")


def main(options: argparse.Namespace) -> None:
    """Print one record.

    Raises:
        ValueError: no such record, or no tokenizer is found beside the file.
    """
    records: list[Trajectory] | list[Pair]
    records = recover_jsonl(options.file, Pair)[0] if options.file.name == "pairs.jsonl" else _episodes(options.file)
    chosen = [record for record in records if options.id in (None, record.id)]
    if not chosen:
        raise ValueError(f"{options.file}: no record {options.id!r} among {len(records)}.")
    console = Console()
    for title, prompt, completion, token_ids in _conversations(chosen[0]):
        console.rule(title)
        console.print(_coloured(options, prompt, completion, token_ids))


def _episodes(file: Path) -> list[Trajectory]:
    """The episodes that hold a turn."""
    return [one for one in recover_jsonl(file, Trajectory)[0] if one.turns]


def _conversations(record: Trajectory | Pair) -> list[tuple[str, list[Message], list[Message], list[list[int]]]]:
    """What a record holds, as (title, prompt, completion, the engine's ids of each turn)."""
    if isinstance(record, Trajectory):
        title = f"{record.id}: {record.policy}, reward {record.reward:.2f}, {record.status}"
        return [(title, record.prompt, record.completion, [turn.token_ids for turn in record.turns])]
    return [
        (
            f"{record.id}: chosen, {record.chosen_source}, reward {record.chosen_reward:.2f}",
            record.prompt,
            record.chosen,
            record.chosen_token_ids,
        ),
        (
            f"{record.id}: rejected, {record.rejected_source}, reward {record.rejected_reward:.2f}",
            record.prompt,
            record.rejected,
            record.rejected_token_ids,
        ),
    ]


def _coloured(
    options: argparse.Namespace, prompt: list[Message], completion: list[Message], token_ids: Sequence[Sequence[int]]
) -> Text:
    import torch
    from transformers import AutoTokenizer

    from pipeline.losses import discount
    from pipeline.rendering import Renderer, fit

    renderer = Renderer(AutoTokenizer.from_pretrained(options.tokenizer or _policy_beside(options.file)))
    config = recipe.beside(options.file)
    rendered = fit(renderer.render(prompt, completion, token_ids), config.model.max_length)
    gamma = config.train.gamma if options.gamma is None else options.gamma
    weights = discount(options.method, torch.tensor([rendered.turns + rendered.dropped_turns]), gamma)[0]
    return renderer.coloured(rendered, weights.tolist())


def _policy_beside(file: Path) -> Path:
    """The SFT policy of the run that a file belongs to."""
    for folder in file.resolve().parents:
        if (folder / "sft" / "policy").is_dir():
            return folder / "sft" / "policy"
    raise ValueError(f"No sft/policy beside {file}; name a policy's folder with --tokenizer.")
