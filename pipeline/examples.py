"""Records become training examples: rendered, and cut by whole turns where they are too long. Cuts are counted."""

from collections.abc import Iterable
from typing import Any

from pipeline.records import Pair, Trajectory
from pipeline.rendering import DoesNotFitError, Rendered, Renderer, fit


def sft_examples(
    renderer: Renderer, trajectories: Iterable[Trajectory], max_length: int
) -> tuple[list[Rendered], dict[str, Any]]:
    """The trajectories that fit, at least in part.

    Returns:
        The examples, and counts for the manifest.

    Raises:
        ValueError: none fits.
    """
    examples: list[Rendered] = []
    too_long: list[str] = []
    for trajectory in trajectories:
        ids = [turn.token_ids for turn in trajectory.turns]
        try:
            examples.append(fit(renderer.render(trajectory.prompt, trajectory.completion, ids), max_length))
        except DoesNotFitError:
            too_long.append(trajectory.id)
    if not examples:
        raise ValueError(f"No trajectory fits into model.max_length={max_length}, not even its first turn; raise it.")
    return examples, _counts(examples, too_long)


def pair_examples(
    renderer: Renderer, pairs: Iterable[Pair], max_length: int
) -> tuple[list[Pair], list[tuple[Rendered, Rendered]], dict[str, Any]]:
    """The pairs of which both sides fit, at least in part.

    Returns:
        The pairs, their (chosen, rejected) examples, and counts for the manifest.

    Raises:
        ValueError: none fits, or a side renders to no turn; names the pair.
    """
    kept: list[Pair] = []
    examples: list[tuple[Rendered, Rendered]] = []
    too_long: list[str] = []
    for pair in pairs:
        try:
            chosen = renderer.render(pair.prompt, pair.chosen, pair.chosen_token_ids)
            rejected = renderer.render(pair.prompt, pair.rejected, pair.rejected_token_ids)
            examples.append((fit(chosen, max_length), fit(rejected, max_length)))
            kept.append(pair)
        except DoesNotFitError:
            too_long.append(pair.id)
        except ValueError as error:
            raise ValueError(f"The pair of {pair.id} ({pair.rejected_source}) cannot be rendered: {error}") from None
    if not kept:
        raise ValueError(f"No pair fits into model.max_length={max_length}, not even its first turns; raise it.")
    return kept, examples, _counts([side for example in examples for side in example], too_long)


def _counts(examples: list[Rendered], too_long: list[str]) -> dict[str, Any]:
    return {
        "trajectories": len(examples),
        "rendered_tokens": sum(len(example.ids) for example in examples),
        "policy_tokens": sum(example.trained_tokens for example in examples),
        "longest": max(len(example.ids) for example in examples),
        "dropped_too_long": too_long,
        "turns_cut_off": sum(example.dropped_turns for example in examples),
        "trajectories_cut": sum(example.dropped_turns > 0 for example in examples),
    }
