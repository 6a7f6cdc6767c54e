"""What k checkpoints of one shape cost the engine: a start and k - 1 loads, against a start each.

    python -m benchmarks.many_policies [--policies 8] [--json FILE]

Random policies of the size of `tiny`'s, in one process tree; every load is a new checkpoint's. A start is without the
imports, which a process does once. The greedy reply to one prompt has to be the same both ways.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.engines import Engine, EngineSettings, Sampling, load_engine
from tests.tiny_policy import save_tiny_policy

END, MAX_LENGTH = 2, 2048
PROMPT, SAMPLING = list(range(3, 103)), Sampling(max_tokens=32, temperature=0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policies = [
            save_tiny_policy(
                Path(folder, str(seed)), vocab_size=3000, hidden_size=256, layers=4, max_length=MAX_LENGTH, seed=seed
            )
            for seed in range(options.policies)
        ]
        with started(policies[0]):
            pass  # imports, and what else a process does once
        each = started_each(policies)
        one = loaded_one_after_another(policies)
    if each[1] != one[1]:
        raise ValueError("a policy that was loaded says something else than it does in an engine of its own")
    found = {"policies": options.policies, "starts": each[0], "loads": one[0], "ratio": each[0] / one[0]}
    print(
        f"{options.policies} starts {each[0]:.1f} s; a start and {options.policies - 1} loads {one[0]:.1f} s; ", end=""
    )
    print(f"{found['ratio']:.1f} times; the same replies")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


@contextlib.contextmanager
def started(policy: Path) -> Iterator[Engine]:
    """An engine of the policy."""
    settings = EngineSettings(kv_cache_gib=0.5, dtype="float32")
    with contextlib.closing(load_engine(settings, policy, MAX_LENGTH, [END])) as engine:
        yield engine


def started_each(policies: list[Path]) -> tuple[float, list[list[int]]]:
    """Seconds, and each policy's reply."""
    began, replies = time.perf_counter(), []
    for policy in policies:
        with started(policy) as engine:
            replies.append(reply(engine))
    return time.perf_counter() - began, replies


def loaded_one_after_another(policies: list[Path]) -> tuple[float, list[list[int]]]:
    """Seconds, and each policy's reply."""
    began, replies = time.perf_counter(), []
    with started(policies[0]) as engine:
        for policy in policies:
            if policy != policies[0]:
                engine.load(policy, [END])
            replies.append(reply(engine))
    return time.perf_counter() - began, replies


def reply(engine: Engine) -> list[int]:
    """What the policy says to the prompt."""
    return list(asyncio.run(engine.generate(PROMPT, SAMPLING)).token_ids)


if __name__ == "__main__":
    main()
