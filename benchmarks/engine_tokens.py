"""Generated tokens per second: our asyncio engine against bare vLLM, and requests at once against one at a time.

    python -m benchmarks.engine_tokens [--requests 128] [--json FILE]

Both sides get like requests and the same vLLM arguments (`pipeline.engines.vllm_engine.running_vllm`), one after the
other in one process: vLLM's own engine with every prompt added up front, and ours asked by that many tasks. Best of
three, since other programs may run. "Per CPU second" counts the process's processor time and hardly notices them.
"""

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.engines import EngineSettings, Sampling, load_engine
from pipeline.engines.vllm_engine import running_vllm, sampling_params
from tests.tiny_policy import save_tiny_policy

VOCABULARY, MAX_LENGTH, END = 3000, 2048, 2
SAMPLING = Sampling(max_tokens=40, temperature=0.7)


@dataclass(frozen=True)
class Measurement:
    """One way of asking."""

    name: str
    tokens: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Generated tokens per second of processor time."""
        return self.tokens / self.cpu_seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policy = save_tiny_policy(
            Path(folder), vocab_size=VOCABULARY, hidden_size=256, layers=4, heads=4, max_length=MAX_LENGTH
        )
        start_seconds, measurements = measure(policy, arguments.requests)
    rows = compared(measurements)
    show(start_seconds, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"start_seconds": start_seconds, "measurements": rows}, indent=1))


def measure(policy: Path, requests: int) -> tuple[float, list[Measurement]]:
    """Bare vLLM, then ours with all requests, 64, 16 and 1 at once; and how long vLLM took to start."""
    settings = EngineSettings(concurrency=64)
    started = time.perf_counter()
    with running_vllm(policy, MAX_LENGTH, settings) as bare:
        start_seconds = time.perf_counter() - started
        measurements = [best("vLLM alone, all at once", lambda run: ask_bare(bare, prompts(run, requests)))]
    with contextlib.closing(load_engine(settings, policy, MAX_LENGTH, [END])) as engine:
        for at_once in dict.fromkeys((requests, 64, 16, 1)):
            name = "ours, all at once" if at_once == requests else f"ours, {at_once} at once"
            count = max(16, min(requests, 8 * at_once))

            def ask(run: int, count: int = count, at_once: int = at_once) -> int:
                return asyncio.run(ask_ours(engine, prompts(run, count), at_once))

            measurements.append(best(name, ask))
    return start_seconds, measurements


def best(name: str, ask: Callable[[int], int]) -> Measurement:
    """The least wall and processor time of three runs, after a warm-up.

    `ask` gets a run's number and returns the tokens it generated.
    """
    tokens, seconds, cpu_seconds = [], [], []
    for run in range(4):
        started, cpu_started = time.perf_counter(), time.process_time()
        tokens.append(ask(run))
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    # The random policy all but never draws the end token, so runs have the same number of tokens.
    return Measurement(name, max(tokens), min(seconds[1:]), min(cpu_seconds[1:]))


def prompts(run: int, count: int) -> list[list[int]]:
    """Prompts of 100 to 500 tokens; those of one run were in no other, so that no side finds them cached."""
    draw = random.Random(f"{run} {count} {time.perf_counter_ns()}")
    lengths = random.Random(count)
    return [[draw.randrange(3, VOCABULARY) for _ in range(lengths.randint(100, 500))] for _ in range(count)]


def ask_bare(engine: Any, batch: list[list[int]]) -> int:
    """Tokens that vLLM's engine generates for a batch added up front."""
    from vllm.inputs.engine import tokens_input

    for number, ids in enumerate(batch):
        engine.add_request(str(number), tokens_input(ids), sampling_params(SAMPLING, SAMPLING.max_tokens, [END]))
    tokens = 0
    while engine.has_unfinished_requests():
        tokens += sum(len(output.outputs[0].token_ids) for output in engine.step() if output.finished)
    return tokens


async def ask_ours(engine: Any, batch: list[list[int]], at_once: int) -> int:
    """Tokens that our engine generates for a batch, at most `at_once` requests waiting at a time."""
    turnstile = asyncio.Semaphore(at_once)

    async def ask(ids: list[int]) -> int:
        async with turnstile:
            return len((await engine.generate(ids, SAMPLING)).token_ids)

    return sum(await asyncio.gather(*(ask(ids) for ids in batch)))


def compared(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """A row each, with its two rates and their ratios to the first one's, which is vLLM alone."""
    bare = measurements[0]
    return [
        asdict(one)
        | {"tokens_per_second": one.rate, "ratio": one.rate / bare.rate}
        | {"tokens_per_cpu_second": one.cpu_rate, "cpu_ratio": one.cpu_rate / bare.cpu_rate}
        for one in measurements
    ]


def show(start_seconds: float, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(f"vLLM started in {start_seconds:.1f} s, imports included\n")
    print(f"{'':26}{'tokens':>8}{'tokens/s':>10}{'ratio':>7}{'per CPU s':>11}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['name']:26}{row['tokens']:8}{row['tokens_per_second']:10.0f}{row['ratio']:7.2f}"
            f"{row['tokens_per_cpu_second']:11.0f}{row['cpu_ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
