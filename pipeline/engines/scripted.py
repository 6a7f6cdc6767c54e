"""Canned replies in place of a model, for tests of everything above the engine."""

from collections.abc import Callable, Iterable, Sequence

from pipeline.engines import Completion, Sampling, check_prompt


class ScriptedEngine:
    """Replies what a test wrote down. It cuts at end tokens and at budgets as a real engine does.

    Args:
        replies: a function from prompt ids to reply ids, or replies to give one after the other. A reply without an end
            token gets one, so that a script can hold actions only.
        max_length: most tokens of a prompt and its completion together.
        end_token_ids: ids that end a completion.
    """

    def __init__(
        self,
        replies: Callable[[Sequence[int]], Sequence[int]] | Iterable[Sequence[int]],
        *,
        max_length: int,
        end_token_ids: Sequence[int],
    ) -> None:
        self.max_length, self.dtype = max_length, "float32"
        self.requests: list[tuple[list[int], Sampling, str]] = []
        """Prompt, sampling and episode of every request so far."""
        self._reply = replies if callable(replies) else _one_by_one(replies)
        self._ends = list(end_token_ids)
        self._closed = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """See `Engine.generate`. Log-probs are 0.

        Raises:
            ValueError: also when the script has no reply left.
        """
        if self._closed:
            raise RuntimeError("The engine is closed.")
        check_prompt(prompt_ids, self.max_length, vocabulary=max(prompt_ids, default=0) + 1)
        self.requests.append((list(prompt_ids), sampling, episode))
        ids = self._until_end(list(self._reply(prompt_ids)))
        budget = min(sampling.max_tokens, self.max_length - len(prompt_ids))
        return Completion(
            token_ids=ids[:budget],
            logprobs=[0.0] * len(ids[:budget]),
            finish_reason="stop" if len(ids) <= budget else "length",
        )

    def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True

    def _until_end(self, ids: list[int]) -> list[int]:
        for position, token in enumerate(ids):
            if token in self._ends:
                return ids[: position + 1]
        return ids + self._ends[:1]


def _one_by_one(replies: Iterable[Sequence[int]]) -> Callable[[Sequence[int]], Sequence[int]]:
    left = iter(list(replies))

    def reply(_: Sequence[int]) -> Sequence[int]:
        try:
            return next(left)
        except StopIteration:
            raise ValueError("The script has no reply left; write one for every request.") from None

    return reply
