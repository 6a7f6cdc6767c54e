"""Pairs per CPU second and peak memory of preference training: ours, TRL's, the official recipe's way, and the floor.

    pip install trl==1.16.0
    python -m benchmarks.preference_step [--lengths 500 1000 2000 4000] [--vocabularies 3000 32000 128000]
        [--micro 2] [--json FILE]
    python -m benchmarks.preference_step --profile --lengths 2000 --vocabularies 32000     where our time goes

All sides train the same new Llama on the same pairs in the same batches, in bfloat16 where the machine multiplies in
it and in float32 elsewhere, each in a process of its own, one after the
other; DPO's loss, so that all compute the same. The first training of one step is a warm-up, the second is timed.

    ours        `pipeline.training.run_preference`, as the stage `train` runs it
    padded      the same on padded rows, chosen and rejected apart in all (pipeline/packing.py left out)
    TRL         DPOTrainer with what makes it fastest here: reference log-probs precomputed, its fused output layer,
                no gradient checkpointing
    official    as the DMPO and ETO scripts do: policy and reference forward in every step, chosen and rejected padded
                to one length, log-softmax in float32 over the whole vocabulary at every position
    floor       the matrix products and the attention of the step alone, forward and backward, on unpadded rows, what a
                pair's sides begin with once in the products, the output layer on the policy's tokens only; neither
                norms nor optimizer nor Python

Speed is pairs per second of processor time, which other programs on the machine hardly move; with OMP_NUM_THREADS=1
this is also the time on a machine of one's own. TRL trains on the environment's tokens too (its mask is prompt or
completion), which makes its loss another number and its work the same: on a CPU its output layer meets every position.
Peak memory is what a process held at most beyond what it held with its libraries loaded: weights, gradients, optimizer
and activations.

`--profile` prints instead the share of each kind of work in one step of ours, as torch.profiler sees it by the clock;
OMP_NUM_THREADS=1 keeps it on one thread. The profiler makes what is small and often done look larger than it is.
"""

import argparse
import contextlib
import json
import math
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from transformers import LlamaConfig, LlamaForCausalLM

from envs.processes import fresh_processes
from pipeline import training
from pipeline.config import PreferenceConfig
from pipeline.methods import Discount
from pipeline.precision import multiplies_bf16
from pipeline.rendering import Rendered
from pipeline.training import reference_turn_logprobs, run_preference

BATCH, STEPS = 4, 3
PROMPT, TURN, POLICY = 0.15, 150, 32
"""Share of a trajectory that is prompt, tokens of a turn with its observation, and the policy's among them: measured on
ScienceWorld's experts, of whose tokens 21 % are the policy's."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained."""

    length: int
    """Tokens of the longest trajectory."""
    vocabulary: int
    hidden: int
    layers: int
    micro: int
    """Pairs of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One side of one case."""

    side: str
    pairs_per_cpu_second: float | None = None
    """None where the side needs more than `--memory` GiB."""
    peak_mib: float | None = None
    loss: float | None = None
    """Of the first step of the timed training; the warm-up's step lies before it, on pairs in each side's own order."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[3000, 32000, 128000])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--micro", type=int, default=2, choices=(1, 2, 4), help="pairs of one; with 1 nothing is padded"
    )
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--memory", type=float, default=12.0, metavar="GIB", help="most that a side may take")
    parser.add_argument("--profile", action="store_true", help="where our time goes, in place of the sides")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for vocabulary in options.vocabularies:
        for length in options.lengths:
            sizes = {"hidden": options.hidden, "layers": options.layers, "micro": options.micro}
            case = Case(length=length, vocabulary=vocabulary, **sizes)
            if options.profile:
                with fresh_processes(1) as process:
                    found = [process.submit(profile, case).result()]
                show_shares(case, found[0])
            else:
                found = compared([_apart(side, case, options.memory) for side in options.sides])
                show(case, found, header=not rows)
            rows += [asdict(case) | one for one in found]
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1, allow_nan=False))


def compared(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row a side: what was measured, and `speed_ratio` and `memory_ratio`, ours over theirs; None without either."""
    ours = next((one for one in measured if one.side == "ours"), Measured(side="ours"))
    return [
        asdict(one)
        | {
            "speed_ratio": _over(ours.pairs_per_cpu_second, one.pairs_per_cpu_second),
            "memory_ratio": _over(ours.peak_mib, one.peak_mib),
        }
        for one in measured
    ]


def _over(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def show(case: Case, rows: list[dict[str, Any]], *, header: bool) -> None:
    """One line a side."""
    if header:
        print(f"{'tokens':>7}{'vocabulary':>11}  {'side':10}{'pairs/s':>9}{'ours is':>9}{'peak MiB':>10}{'ours is':>9}")
    formats = {"pairs_per_cpu_second": "9.3f", "speed_ratio": "7.2f", "peak_mib": "10.0f", "memory_ratio": "7.2f"}
    for row in rows:
        cells = [
            (format(row[name], how) + " x" * name.endswith("ratio")) if row[name] is not None else ""
            for name, how in formats.items()
        ]
        told = f"{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{cells[3]:>9}"
        if row["pairs_per_cpu_second"] is None:
            told = "needs more memory than --memory"
        print(f"{case.length:7}{case.vocabulary:11}  {row['side']:10}{told}", flush=True)


def _apart(side: str, case: Case, gib: float) -> Measured:
    with fresh_processes(1) as process:
        try:
            return process.submit(_limited, side, case, gib).result()
        except (MemoryError, BrokenProcessPool):
            return Measured(side=side)


def _limited(side: str, case: Case, gib: float) -> Measured:
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)
    try:
        return SIDES[side](case)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise


def make_pairs(case: Case) -> list[tuple[Rendered, Rendered]]:
    """Pairs that share their prompt; the longer side has `length` tokens, the other one from 0.4 of it."""
    draw = random.Random(case.length)
    prompt = int(PROMPT * case.length)

    def side(length: int, ids: list[int]) -> Rendered:
        turn_index = [-1] * prompt
        for place in range(length - prompt):
            turn, offset = divmod(place, TURN)
            turn_index.append(turn if offset < POLICY else -1)
        ids = ids + [draw.randrange(3, case.vocabulary) for _ in range(length - prompt)]
        return Rendered(ids=ids, turn_index=turn_index)

    pairs = []
    for _ in range(STEPS * BATCH):
        shared = [draw.randrange(3, case.vocabulary) for _ in range(prompt)]
        lengths = [case.length, int(case.length * draw.uniform(0.4, 1.0))]
        draw.shuffle(lengths)
        pairs.append((side(lengths[0], shared), side(lengths[1], shared)))
    return pairs


def make_model(case: Case) -> LlamaForCausalLM:
    """The same weights in every process."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.hidden,
            intermediate_size=3 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=case.hidden // 64,
            num_key_value_heads=case.hidden // 64,
            max_position_embeddings=case.length + 8,
            tie_word_embeddings=True,
        )
    )


def ours(case: Case) -> Measured:
    """`run_preference`, reference log-probs computed beforehand."""
    with peak_memory() as peak, _training(case, STEPS) as train:
        train(1)
        started = time.process_time()
        facts = train(STEPS)
        seconds = time.process_time() - started
    return Measured(
        side="ours",
        pairs_per_cpu_second=STEPS * BATCH / seconds,
        peak_mib=peak(),
        loss=facts["first_loss"],
    )


@contextmanager
def _training(case: Case, most: int) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Our training, by the number of its steps, on pairs for so many; reference log-probs are computed beforehand."""
    pairs, model = make_pairs(case)[: most * BATCH], make_model(case)
    config = PreferenceConfig(
        learning_rate=1e-6, batch_size=BATCH, micro_batch_size=case.micro, epochs=1, save_steps=1000
    )
    reference = reference_turn_logprobs(model, pairs, config)
    with tempfile.TemporaryDirectory() as folder:

        def train(steps: int) -> dict[str, Any]:
            timed = config.model_copy(update={"max_steps": steps})
            anew = Path(tempfile.mkdtemp(dir=folder))
            return run_preference(model, pairs, reference, Discount.TRAJECTORY, timed, anew, 0)

        yield train


def padded(case: Case) -> Measured:
    """Ours without packing."""
    with mock.patch.object(training, "packed_attention", return_value=contextlib.nullcontext()):
        return replace(ours(case), side="padded")


def profile(case: Case) -> dict[str, float]:
    """The share of each of `KINDS` in a training of one step, by the clock; in all 1."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with _training(case, 1) as train, profiling(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        train(1)
        seconds = time.perf_counter() - started
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        spent[kind(event, case.vocabulary)] += event.self_cpu_time_total / 1e6
    spent["between operations"] += seconds - sum(spent.values())
    return {name: part / seconds for name, part in spent.items()}


KINDS = ("matrix products", "attention", "output layer", "optimizer", "other operations", "between operations")
"""Products and attention of the layers, forward and backward; whatever meets the vocabulary (what is computed again for
the backward pass, and the embedding's gradient); AdamW and the gradients' norm; elementwise operations and copies;
Python, batches, the log and the checkpoint at the end."""


def kind(event: Any, vocabulary: int) -> str:
    """Which of `KINDS` an operation of a profile belongs to, by its name, its arguments' shapes and what called it."""
    callers = [event]
    while callers[-1].cpu_parent is not None:
        callers.append(callers[-1].cpu_parent)
    names = [one.name for one in callers]
    if any(name.startswith(("Optimizer.", "aten::_foreach_")) for name in names):
        return "optimizer"
    if any(vocabulary in shape for one in callers for shape in one.input_shapes):
        return "output layer"
    if any("scaled_dot_product" in name for name in names):
        return "attention"
    return "matrix products" if names[0] in ("aten::mm", "aten::addmm", "aten::bmm") else "other operations"


def show_shares(case: Case, shares: dict[str, float]) -> None:
    """One line a kind of work."""
    for name, share in shares.items():
        print(f"{case.length:7}{case.vocabulary:11}  {name:20}{share:6.0%}", flush=True)


def trl(case: Case) -> Measured:
    """DPOTrainer on the same ids: its tokenizer has a word for each id."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(case.vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0", unk_token="t0")
    model, prompt = make_model(case), int(PROMPT * case.length)

    def text(ids: list[int]) -> str:
        return "".join(f" t{number}" for number in ids)

    rows = [
        {"prompt": text(chosen.ids[:prompt])}
        | {name: text(side.ids[prompt:-1]) for name, side in (("chosen", chosen), ("rejected", rejected))}
        for chosen, rejected in make_pairs(case)
    ]
    with peak_memory() as peak, tempfile.TemporaryDirectory() as folder:
        seconds, loss = math.nan, math.nan
        for steps in (1, STEPS):
            arguments = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=case.micro,
                gradient_accumulation_steps=BATCH // case.micro,
                max_steps=steps,
                learning_rate=1e-6,
                beta=0.1,
                max_length=None,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                bf16=multiplies_bf16(),
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            )
            data = Dataset.from_list(rows)
            trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
            started = time.process_time()
            trainer.train()
            seconds = time.process_time() - started
            loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return Measured(side="TRL", pairs_per_cpu_second=STEPS * BATCH / seconds, peak_mib=peak(), loss=loss)


def official(case: Case) -> Measured:
    """The scripts' step in plain PyTorch, with their optimizer."""
    pairs, policy, reference = make_pairs(case), make_model(case), make_model(case).eval().requires_grad_(False)

    def logprobs(model: LlamaForCausalLM, ids: torch.Tensor, turn_index: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found: torch.Tensor = (each * (turn_index[:, 1:] >= 0)).sum(1)
        return found

    def micro_loss(batch: list[tuple[Rendered, Rendered]]) -> torch.Tensor:
        rows = [pair[side] for side in (0, 1) for pair in batch]
        ids = torch.zeros(len(rows), case.length, dtype=torch.long)
        turn_index = torch.full_like(ids, -1)
        for row, rendered in enumerate(rows):
            ids[row, : len(rendered.ids)] = torch.tensor(rendered.ids)
            turn_index[row, : len(rendered.ids)] = torch.tensor(rendered.turn_index)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
            with torch.no_grad():
                before = logprobs(reference, ids, turn_index)
            ratio = logprobs(policy, ids, turn_index) - before
        chosen, rejected = ratio.chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum() / BATCH

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)

    def train(steps: int) -> float:
        first = math.nan
        for step in range(steps):
            total = 0.0
            for start in range(step * BATCH, (step + 1) * BATCH, case.micro):
                loss = micro_loss(pairs[start : start + case.micro])
                torch.autograd.backward(loss)
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            first = total if step == 0 else first
        return first

    with peak_memory() as peak:
        train(1)
        started = time.process_time()
        loss = train(STEPS)
        seconds = time.process_time() - started
    return Measured(side="official", pairs_per_cpu_second=STEPS * BATCH / seconds, peak_mib=peak(), loss=loss)


def floor(case: Case) -> Measured:
    """The kernels of the step alone, on as many tokens as the pairs have, row by row; the best of three.

    What a pair's sides begin with passes through the layers once; attention alone goes over it in both.
    """
    rows = [side for pair in make_pairs(case) for side in pair]
    hidden, width, heads = case.hidden, 3 * case.hidden, case.hidden // 64
    seconds = 0.0
    for batch in (rows[start : start + 2 * case.micro] for start in range(0, len(rows), 2 * case.micro)):
        shared = int(PROMPT * case.length) * (len(batch) // 2)
        tokens = sum(len(row.ids) for row in batch) - shared
        trained = sum(row.trained_tokens for row in batch)
        seconds += case.layers * sum(
            count * _product(tokens, *shape)
            for count, shape in ((4, (hidden, hidden)), (2, (hidden, width)), (1, (width, hidden)))
        )
        seconds += case.layers * sum(_attention(len(row.ids), heads) for row in batch)
        seconds += _product(trained, hidden, case.vocabulary)
    return Measured(side="floor", pairs_per_cpu_second=len(rows) / 2 / seconds)


def _product(tokens: int, inputs: int, outputs: int) -> float:
    """Seconds of a linear layer's three products."""
    x, w = (torch.randn(*shape, dtype=_dtype()) for shape in ((tokens, inputs), (outputs, inputs)))
    grad = torch.randn(tokens, outputs, dtype=_dtype())
    return _best(lambda: (x @ w.T, grad @ w, grad.T @ x))


def _attention(length: int, heads: int) -> float:
    """Seconds of one row's causal attention, forward and backward."""
    q, k, v = (torch.randn(1, heads, length, 64, dtype=_dtype(), requires_grad=True) for _ in range(3))
    grad = torch.randn(1, heads, length, 64, dtype=_dtype())
    return _best(lambda: torch.autograd.backward(F.scaled_dot_product_attention(q, k, v, is_causal=True), grad))


def _dtype() -> torch.dtype:
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def _best(work: Callable[[], Any]) -> float:
    found = []
    for _ in range(3):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Most MiB that this process holds inside the block beyond what it held at its beginning, sampled each 5 ms."""
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before, most, over = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: (most - before) / 2**20
    finally:
        over.set()
        thread.join()


SIDES: dict[str, Callable[[Case], Measured]] = {
    "ours": ours, "padded": padded, "TRL": trl, "official": official, "floor": floor
}  # fmt: skip

if __name__ == "__main__":
    main()
