"""Plain transformers, one request at a time: slow and plain, the reference that the vLLM engine is tested against."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pipeline import precision
from pipeline.engines import Completion, EngineSettings, Sampling, check_prompt, check_shape


class HfEngine:
    """One model in this process; requests wait for one another.

    Args:
        path: checkpoint folder.
        max_length: most tokens of a prompt and its completion together.
        end_token_ids: ids that end a completion.
        settings: only `dtype` has an effect.

    Raises:
        ValueError: a setting other than `dtype` was changed.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_length: int,
        end_token_ids: Sequence[int],
        settings: EngineSettings | None = None,
    ) -> None:
        settings = settings or EngineSettings(name="hf")
        self.max_length = max_length
        self._ends = frozenset(end_token_ids)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = precision.resolve(settings.dtype)
        self._read(path)
        # One thread is both the queue and the lock: a cancelled request ends before the next one starts.
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, episode: str = "") -> Completion:
        """See `Engine.generate`. There is no prefix cache, so `episode` makes no difference."""
        if self._thread is None:
            raise RuntimeError("The engine is closed.")
        check_prompt(prompt_ids, self.max_length, self._model.config.vocab_size)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._complete, list(prompt_ids), sampling
        )

    def load(self, path: Path, end_token_ids: Sequence[int]) -> None:
        """See `Engine.load`."""
        if self._thread is None:
            raise RuntimeError("The engine is closed.")
        self._ends = frozenset(end_token_ids)
        if path != self._path:
            check_shape(self._path, path)
            self._thread.submit(self._read, path).result()

    def close(self) -> None:
        """See `Engine.close`."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            del self._model

    def _read(self, path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, local_files_only=True)
        self._model, self._path = model.to(self._device).eval(), path

    @torch.inference_mode()
    def _complete(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        generator = torch.Generator().manual_seed(sampling.seed)
        cache, new_ids = DynamicCache(config=self._model.config), prompt_ids
        token_ids: list[int] = []
        logprobs: list[float] = []
        for _ in range(min(sampling.max_tokens, self.max_length - len(prompt_ids))):
            inputs = torch.tensor([new_ids], device=self._device)
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[0, -1].float().cpu()
            token = draw(logits, sampling.temperature, sampling.top_p, generator)
            token_ids.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            if token in self._ends:
                return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason="stop")
            new_ids = [token]
        return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason="length")


def draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw one id.

    Args:
        logits: `[vocabulary]`.
        temperature: 0 takes the likeliest id.
        top_p: draws among the fewest likeliest ids whose probabilities sum to this or more.
        generator: of the random number; it is not used when greedy.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    probability_before = probabilities.cumsum(-1) - probabilities
    probabilities[probability_before >= top_p] = 0.0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
