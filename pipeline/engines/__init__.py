"""Engines: token prompts in, token completions out.

An engine serves one checkpoint. It never sees text: what a prompt looks like is `pipeline.rendering`'s business. Many
episodes ask one engine at once; it batches what is waiting, so no episode waits for another one's turn to end.

    vllm      the one that plays; CUDA or CPU
    hf        plain transformers, one request at a time: the reference the others are tested against
    scripted  canned replies, for tests
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one completion is drawn."""

    max_tokens: int
    """Most tokens of a completion, end token included."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    seed: int = 0
    """Seed of this request alone; the same prompt, sampling and engine give the same ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine returned for one prompt."""

    token_ids: list[int]
    """The new ids. The end token, if it was drawn, is the last one."""
    logprobs: list[float]
    """Natural log-probability of each id under the policy at temperature 1."""
    finish_reason: Literal["stop", "length"]
    """`stop`: an end token was drawn; `length`: `max_tokens` or the context's end was reached."""
    cached_tokens: int = 0
    """How many prompt tokens the engine took from its prefix cache."""


class Engine(Protocol):
    """Serves one checkpoint."""

    max_length: int
    """Most tokens of a prompt and its completion together."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Complete one prompt.

        Raises:
            ValueError: the prompt and one token do not fit into `max_length`.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory and processes. Calling it twice is fine."""
        ...
