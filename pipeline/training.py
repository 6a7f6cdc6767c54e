"""Supervised and preference training: one Trainer, two objectives, both on per-turn log-probs.

How a run is laid out decides most of what can go wrong, so it is fixed before the first step: `order_examples` says
which example stands at which place of which optimizer step, for all epochs. From that follow, without more machinery:

- An optimizer step holds the same examples however it is split into micro-batches and processes, and its loss is the
  mean over *its* items (tokens in SFT, pairs in preference training): each example carries 1 / (items of its step).
- A step with too few examples (the end of an epoch) is filled up with places that weigh nothing, so that every process
  does the same number of passes and nothing is dropped or seen twice.
- Resuming skips the places already done; the order does not hang on any random state.
- Micro-batches hold sequences of like length (little padding), while the optimizer's batches stay random ones.

Shapes: P examples of a micro-batch, L tokens of its longest sequence, T turns of its longest trajectory. A *side* is
one trajectory of each example: SFT has one, a preference pair has two, chosen and rejected, padded apart.
"""

import contextlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from pipeline.config import PreferenceConfig, SftConfig, TrainingConfig
from pipeline.logprobs import turn_logprobs
from pipeline.losses import discount, preference_loss
from pipeline.methods import Discount
from pipeline.models import reference_mode
from pipeline.records import JsonlAppender, read_jsonl, write_jsonl
from pipeline.rendering import Rendered

LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
_TURNS_IN_TENSORBOARD = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One trajectory of an example."""

    rendered: Rendered
    reference: Sequence[float] = ()
    """Log-prob of each turn under the reference policy."""
    weights: Sequence[float] = ()
    """Discount phi(t, T) of each turn."""


class Placed(NamedTuple):
    """An example at its place in the run."""

    sides: tuple[Side, ...]
    weight: float
    """1 / (items of its optimizer step); 0 where the place is empty."""


def collate(places: Sequence[Placed]) -> dict[str, Any]:
    """Pad a micro-batch on the right, each side to its own longest sequence.

    No attention mask: behind right padding a causal model's real tokens see no padded one, and without a mask attention
    takes its fast path. Padding has id 0, turn -1, log-prob and weight 0.

    Worked example, two pairs, sides A/B and C/D, of a step of four pairs:

        A  ids 5 6 7 8  turn_index -1  0 -1  1  reference -1.5 -2.0  weights 1.0 0.5
        B  ids 5 9 4    turn_index -1  0  0     reference -3.0       weights 1.0
        C  ids 5 6      turn_index -1  0        reference -0.5       weights 1.0
        D  ids 5 7 7 7  turn_index -1  0 -1  1  reference -4.0 -1.0  weights 1.0 0.5

        weight [0.25, 0.25]
        sides[0] (A, C)  input_ids   [[ 5, 6, 7, 8], [ 5, 6, 0, 0]]
                         turn_index  [[-1, 0,-1, 1], [-1, 0,-1,-1]]
                         reference   [[-1.5, -2.0], [-0.5, 0.0]]
                         weights     [[ 1.0,  0.5], [ 1.0, 0.0]]
        sides[1] (B, D)  input_ids   [[ 5, 9, 4, 0], [ 5, 7, 7, 7]]
                         turn_index  [[-1, 0, 0,-1], [-1, 0,-1, 1]]
                         reference   [[-3.0, 0.0], [-4.0, -1.0]]
                         weights     [[ 1.0, 0.0], [ 1.0, 0.5]]

    Returns:
        `weight` [P] and `sides`, for each a dict of `input_ids` [P, L], `turn_index` [P, L], `reference` [P, T] and
        `weights` [P, T]; the last two are [P, 0] where the objective needs none.
    """
    return {
        "weight": torch.tensor([place.weight for place in places]),
        "sides": [_pad(sides) for sides in zip(*(place.sides for place in places), strict=True)],
    }


def _pad(sides: Sequence[Side]) -> dict[str, Tensor]:
    def padded(rows: Iterable[Sequence[float]], value: float, dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded((side.rendered.ids for side in sides), 0, torch.long),
        "turn_index": padded((side.rendered.turn_index for side in sides), -1, torch.long),
        "reference": padded((side.reference for side in sides), 0.0, torch.float32),
        "weights": padded((side.weights for side in sides), 0.0, torch.float32),
    }


def order_examples(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Which example stands at each place of a whole run.

    An epoch is a random permutation cut into optimizer steps. Within a step the longest example comes first, so that a
    micro-batch holds like lengths; which examples share a step is left to chance.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples of one optimizer step.
        epochs: may end within an epoch, after a whole number of steps.
        seed: of the permutations.

    Returns:
        Indices into `lengths`, a multiple of `batch_size` of them; -1 fills up the last step of each epoch.
    """
    steps_per_epoch = math.ceil(len(lengths) / batch_size)
    steps = math.ceil(epochs * steps_per_epoch)
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        shuffled = random.Random(f"{seed}/{epoch}").sample(range(len(lengths)), len(lengths))
        for start in range(0, len(shuffled), batch_size):
            step = sorted(shuffled[start : start + batch_size], key=lambda index: -lengths[index])
            order += step + [-1] * (batch_size - len(step))
    return order[: steps * batch_size]


# ---- Objectives ----

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name: a sum and the number of what was summed, both scalars or both [T] (by turn)."""


class SftObjective:
    """Mean negative log-prob of the policy's tokens: the items of a step are its tokens."""

    def items(self, example: tuple[Side, ...]) -> int:
        """How many items of the step an example is."""
        return example[0].rendered.trained_tokens

    def __call__(self, logprobs: list[Tensor], batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the step's loss, from one side's [P, T], and what to log."""
        loss = -(logprobs[0].sum(1) * batch["weight"]).sum()
        present = _present_turns(batch, 0)
        return loss, {"logprob_by_turn": _by_turn(logprobs[0], present)}


@dataclass(frozen=True)
class PreferenceObjective:
    """Mean preference loss: the items of a step are its pairs. See `losses.preference_loss`.

    Logged, means over the pairs since the last line:

    - `chosen_logprob`, `rejected_logprob`: of a whole trajectory; with `_by_turn`, of each turn, over the pairs that
      have one of that number;
    - `chosen_reward`, `rejected_reward` (Phi of the paper), their difference `margin`, and `accuracy`, the share of
      pairs with a positive one;
    - `kl`: an estimate of KL(reference || policy) in nats a turn, from the rejected trajectories, which the reference
      played: mean over turns of r - 1 - log r, r = policy / reference. Unbiased where the reference sampled them at
      temperature 1, never negative, and of low variance near 0 (Schulman's k3, http://joschu.net/blog/kl-approx.html).
    """

    beta: float

    def items(self, example: tuple[Side, ...]) -> int:
        """How many items of the step an example is."""
        return 1

    def __call__(self, logprobs: list[Tensor], batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the step's loss, from [P, T] of chosen and rejected, and what to log."""
        chosen, rejected = batch["sides"]
        losses, logits, chosen_rewards, rejected_rewards = preference_loss(
            logprobs[0],
            logprobs[1],
            chosen["reference"],
            rejected["reference"],
            chosen["weights"],
            rejected["weights"],
            self.beta,
        )
        loss = (losses * batch["weight"]).sum()
        with torch.no_grad():
            pairs = (batch["weight"] > 0).float()
            sides = [_present_turns(batch, 0), _present_turns(batch, 1)]
            ratio = (logprobs[1] - rejected["reference"]).where(sides[1] > 0, 0.0)
            metrics = {
                "chosen_logprob": _over(logprobs[0].sum(1), pairs),
                "rejected_logprob": _over(logprobs[1].sum(1), pairs),
                "chosen_reward": _over(chosen_rewards, pairs),
                "rejected_reward": _over(rejected_rewards, pairs),
                "margin": _over(logits, pairs),
                "accuracy": _over((logits > 0).float(), pairs),
                "kl": _over(ratio.expm1() - ratio, sides[1]),
                "chosen_logprob_by_turn": _by_turn(logprobs[0], sides[0]),
                "rejected_logprob_by_turn": _by_turn(logprobs[1], sides[1]),
            }
        return loss, metrics


def _present_turns(batch: dict[str, Any], side: int) -> Tensor:
    """[P, T], 1.0 where a trajectory of a real example has a turn of that number."""
    turns = batch["sides"][side]["turn_index"].amax(1) + 1
    width = int(turns.max())
    turns = turns * (batch["weight"] > 0)
    present: Tensor = torch.arange(width, device=turns.device) < turns[:, None]
    return present.float()


def _over(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values that are present."""
    return (values.detach() * present).sum(), present.sum()


def _by_turn(logprobs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number over the examples, for each turn: [T] both."""
    return (logprobs.detach() * present).sum(0), present.sum(0)


# ---- Running ----


def run_sft(model: Any, examples: Sequence[Rendered], config: SftConfig, folder: Path, seed: int) -> dict[str, Any]:
    """Fine-tune a policy on the policy's turns of trajectories.

    Goes on from the last checkpoint in `folder`, if a run was killed. Writes `log.jsonl`, `tensorboard/` and
    `checkpoints/`; call `drop_checkpoints` once the policy is saved.

    Args:
        model: the policy; trained in place.
        examples: trajectories that fit into the model.
        config: how.
        folder: where the log and the checkpoints go.
        seed: of the order of the examples.

    Returns:
        Facts for the manifest: counts, seconds, speed, first and last loss.

    Raises:
        ValueError: no examples, one without a token of the policy, or a batch size that the processes cannot share.
        RuntimeError: the loss is no number.
    """
    sides = [(Side(rendered=example),) for example in examples]
    return _train(model, sides, SftObjective(), config, folder, seed, "sft")


def run_preference(
    model: Any,
    pairs: Sequence[tuple[Rendered, Rendered]],
    reference: Sequence[tuple[Sequence[float], Sequence[float]]],
    method: Discount,
    config: PreferenceConfig,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Train a policy on pairs of trajectories; otherwise as `run_sft`.

    Args:
        model: the policy, equal to the reference at the start; trained in place.
        pairs: chosen and rejected trajectory.
        reference: for each pair, each turn's log-prob under the reference, from `reference_turn_logprobs`.
        method: the discount.
        config: beta, gamma and how to train.
        folder: where the log and the checkpoints go.
        seed: of the order of the pairs and of the `permuted` discount, which is drawn anew for every trajectory.

    Raises:
        ValueError: also when `reference` does not go with `pairs`.
    """
    if len(reference) != len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs and {len(reference)} reference log-probs: run the stage `reference` again on them."
        )
    sides = [
        Side(rendered=rendered, reference=logprobs, weights=weights)
        for rendered, logprobs, weights in zip(
            (side for pair in pairs for side in pair),
            (side for pair in reference for side in pair),
            _weights([side.turns for pair in pairs for side in pair], method, config.gamma, seed),
            strict=True,
        )
    ]
    examples = list(zip(sides[::2], sides[1::2], strict=True))
    return _train(model, examples, PreferenceObjective(config.beta), config, folder, seed, method)


def reference_turn_logprobs(
    model: Any, pairs: Sequence[tuple[Rendered, Rendered]], config: TrainingConfig
) -> list[tuple[list[float], list[float]]]:
    """The log-prob of every turn of every pair under the reference, computed just as training computes the policy's.

    Same autocast, same padding, no gradients, so that the first training step sees a ratio of one. The reference is the
    model as it is given, with its LoRA adapter off. With several processes each does its share, and all get the whole.

    Args:
        model: the reference policy.
        pairs: chosen and rejected trajectory.
        config: precision and micro-batch size of the training to come.

    Returns:
        For each pair (chosen [T_w], rejected [T_l]), numbers that float32 holds exactly.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    model.to(state.device).eval()
    rows = [Side(rendered=rendered) for pair in pairs for rendered in pair]
    longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row].rendered.ids))
    batches = [
        longest_first[start : start + config.micro_batch_size] for start in range(0, len(rows), config.micro_batch_size)
    ][state.process_index :: state.num_processes]
    found: list[tuple[int, list[float]]] = []
    autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=uses_bf16(config))
    with torch.no_grad(), reference_mode(model), autocast:
        for batch in tqdm(batches, desc="reference", disable=not state.is_main_process, dynamic_ncols=True):
            side = {key: value.to(state.device) for key, value in _pad([rows[row] for row in batch]).items()}
            for row, logprobs in zip(batch, _side_logprobs(model, side).tolist(), strict=True):
                found.append((row, logprobs[: rows[row].rendered.turns]))
    by_row = dict(gather_object(found) if state.num_processes > 1 else found)
    return [(by_row[2 * pair], by_row[2 * pair + 1]) for pair in range(len(pairs))]


def uses_bf16(config: TrainingConfig) -> bool:
    """Whether autocast computes in bfloat16: as configured, else where the hardware multiplies in it."""
    if config.bf16 is not None:
        return config.bf16
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished training, once its policy is saved."""
    if PartialState().is_main_process:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _weights(turns: Sequence[int], method: Discount, gamma: float, seed: int) -> list[list[float]]:
    """The discount of each trajectory."""
    seeds = [seed * len(turns) + row for row in range(len(turns))]
    table = discount(method, torch.tensor(turns), gamma, seed=seeds).tolist()
    return [row[:length] for row, length in zip(table, turns, strict=True)]


def _side_logprobs(model: Any, side: dict[str, Tensor]) -> Tensor:
    """Per-turn log-probs [P, T] of one side of a micro-batch.

    The mask is all ones although rows are padded: see `collate`.
    """
    ids = side["input_ids"]
    return turn_logprobs(model, ids, torch.ones_like(ids), side["turn_index"])


def _train(
    model: Any,
    examples: Sequence[tuple[Side, ...]],
    objective: SftObjective | PreferenceObjective,
    config: TrainingConfig,
    folder: Path,
    seed: int,
    name: str,
) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one."""
    _check(examples)
    arguments = training_arguments(config, folder, seed)
    run = _Run(examples, objective, config, seed)
    state = PartialState()
    with state.main_process_first():
        checkpoint, done = _last_checkpoint(folder / CHECKPOINTS)
    with _open_log(folder, done) if state.is_main_process else contextlib.nullcontext() as log:
        trainer = _TurnTrainer(model, arguments, run, objective, log, _callbacks(name, folder, done))
        started = time.time()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.time() - started
    trainer.release_model()
    state.wait_for_everyone()
    losses = [line["loss"] for line in read_jsonl(folder / LOG, dict[str, Any])[0]]
    return {
        "examples": len(examples),
        "steps": run.steps,
        "resumed_at_step": done,
        "tokens": run.tokens(),
        "trained_tokens": run.tokens(trained=True),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(run.tokens(since=done) / seconds),
        "first_loss": losses[0],
        "final_loss": losses[-1],
        "bf16": arguments.bf16,
        "processes": arguments.world_size,
    }


def training_arguments(config: TrainingConfig, folder: Path, seed: int) -> Any:
    """The Trainer's settings for a recipe's.

    Raises:
        ValueError: the processes cannot share `batch_size` evenly.
    """
    cpu = not torch.cuda.is_available()
    processes = PartialState(cpu=cpu).num_processes
    micro = min(config.micro_batch_size, max(config.batch_size // processes, 1))
    accumulation, rest = divmod(config.batch_size, micro * processes)
    if rest:
        raise ValueError(
            f"batch_size {config.batch_size} is no multiple of micro_batch_size {micro} x {processes} processes; "
            "change one of the two or the number of processes."
        )
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,  # the dataset is the whole run
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=uses_bf16(config),
        use_cpu=cpu,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # A checkpoint must fall on a line of the log, or what was gathered since the last line is lost on resuming.
        logging_steps=max(steps for steps in range(1, 6) if config.save_steps % steps == 0),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,  # every pass uses every weight
    )
    if arguments.n_gpu > 1:
        # One GPU a process: the Trainer would wrap the model in DataParallel, which splits batches its own way.
        # `accelerate launch` uses every GPU.
        arguments._n_gpu = 1
    return arguments


class _Run(Dataset[Placed]):
    """All places of a run, in order, as the Trainer's dataset: its one epoch is the whole run."""

    def __init__(
        self,
        examples: Sequence[tuple[Side, ...]],
        objective: SftObjective | PreferenceObjective,
        config: TrainingConfig,
        seed: int,
    ) -> None:
        self.examples = examples
        self.batch_size = config.batch_size
        lengths = [sum(len(side.rendered.ids) for side in example) for example in examples]
        self._order = order_examples(lengths, config.batch_size, config.epochs, seed)
        self._items = [objective.items(example) for example in examples]
        self._empty = (_EMPTY,) * len(examples[0])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Placed:
        index = self._order[place]
        if index < 0:
            return Placed(self._empty, 0.0)
        return Placed(self.examples[index], 1 / sum(self._items[other] for other in self._step(place)))

    def _step(self, place: int) -> list[int]:
        """The examples of a place's optimizer step."""
        start = place - place % self.batch_size
        return [index for index in self._order[start : start + self.batch_size] if index >= 0]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self._order) // self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return math.ceil(len(self.examples) / self.batch_size)

    @property
    def max_turns(self) -> int:
        """Turns of the longest trajectory."""
        return max(side.rendered.turns for example in self.examples for side in example)

    def tokens(self, since: int = 0, trained: bool = False) -> int:
        """Tokens seen from optimizer step `since` to the end, padding not counted; or the policy's among them."""
        seen = (self.examples[index] for index in self._order[since * self.batch_size :] if index >= 0)
        sides = (side.rendered for example in seen for side in example)
        return sum(side.trained_tokens if trained else len(side.ids) for side in sides)


_EMPTY = Side(rendered=Rendered(ids=[0, 0], turn_index=[-1, 0]), reference=(0.0,), weights=(1.0,))
"""Stands at an empty place and weighs nothing. It has a turn, so that every weight of the model has a gradient."""


def _check(examples: Sequence[tuple[Side, ...]]) -> None:
    """Refuse what cannot be trained on."""
    if not examples:
        raise ValueError("There is nothing to train on: no example is left. The stages before say what was dropped.")
    for number, example in enumerate(examples):
        for name, side in zip(("chosen", "rejected") if len(example) == 2 else ("trajectory",), example, strict=True):
            if not side.rendered.trained_tokens:
                raise ValueError(
                    f"Example {number}, {name}: none of its {len(side.rendered.ids)} tokens is the policy's, so "
                    "there is nothing to learn from it. Leave it out."
                )
            if len(example) == 2 and len(side.reference) != side.rendered.turns:
                raise ValueError(
                    f"Pair {number}, {name}: {side.rendered.turns} turns and {len(side.reference)} reference "
                    "log-probs. Run the stage `reference` again on these pairs."
                )


class _TurnTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' Trainer with a loss on per-turn log-probs."""

    loss_is_scaled_for_ga = True  # each example carries 1 / (items of its step)

    def __init__(
        self,
        model: Any,
        arguments: Any,
        run: _Run,
        objective: SftObjective | PreferenceObjective,
        log: JsonlAppender | None,
        callbacks: list[Any],
    ) -> None:
        super().__init__(model=model, args=arguments, data_collator=collate, train_dataset=run)
        self.remove_callback(ProgressCallback)  # prints every line of the log into the bar; `_Bar` does not
        for callback in callbacks:
            self.add_callback(callback)
        self._objective = objective
        self._steps_per_epoch = run.steps_per_epoch
        self._window = _Window(run.max_turns)
        self._log = log

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's share of its step's loss.

        Gradients are averaged over the processes, and shares add up: hence the factor.
        """
        logprobs = [_side_logprobs(model, side) for side in inputs["sides"]]
        loss, metrics = self._objective(logprobs, inputs)
        self._window.add(metrics)
        share: Tensor = loss * self.accelerator.num_processes
        return share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's averages: scalars to TensorBoard, and everything to `log.jsonl`.

        Raises:
            RuntimeError: the loss is no number; raised before a checkpoint of this step can be written.
        """
        if "loss" not in logs:
            return  # the Trainer's closing summary; `_train` returns facts
        step = self.state.global_step
        if not math.isfinite(logs["loss"]):
            raise RuntimeError(
                f"The loss is {logs['loss']} at step {step}: lower learning_rate, or set bf16=false for float32."
            )
        self.state.epoch = step / self._steps_per_epoch  # the Trainer's epoch is our whole run
        means = self._window.drain(self.accelerator)
        super().log({**logs, **_scalars(means)}, start_time)
        if self._log is not None:
            self._log.append({"step": step, "epoch": self.state.epoch, **logs, **means})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the Trainer's estimate does not know our batches; `_Run.tokens` counts."""
        return 0

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Silent about output weights tied to the embedding: a checkpoint holds them once, and they stay tied.

        transformers 5.19 warns of them as missing; drop this when it no longer does.
        """
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def release_model(self) -> None:
        """Undo what training did to the model besides learning."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("forward", None)  # a bound copy of the class's own, which deepcopy would share
        self.model.config.use_cache = True
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()


class _Window:
    """Sums of metrics since the last line of the log; they stay on the device until then."""

    def __init__(self, max_turns: int) -> None:
        self._max_turns = max_turns
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add a micro-batch's."""
        for name, (total, count) in metrics.items():
            both = torch.stack([total, count])
            if both.dim() == 2:
                both = nn.functional.pad(both, (0, self._max_turns - both.shape[1]))
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def drain(self, accelerator: Any) -> dict[str, float | list[float | None] | None]:
        """The means over all processes, None where there was nothing, and an empty window."""
        sums, self._sums = self._sums, {}
        packed = accelerator.reduce(torch.cat([both.reshape(-1) for both in sums.values()]), "sum").tolist()
        means: dict[str, float | list[float | None] | None] = {}
        for name, both in sums.items():
            numbers, packed = packed[: both.numel()], packed[both.numel() :]
            half = len(numbers) // 2
            each = [
                total / count if count else None for total, count in zip(numbers[:half], numbers[half:], strict=True)
            ]
            means[name] = each if both.dim() == 2 else each[0]
        return means


def _scalars(means: dict[str, float | list[float | None] | None]) -> dict[str, float]:
    """What TensorBoard can show: numbers, and the first turns of what is by turn."""
    flat: dict[str, float] = {}
    for name, mean in means.items():
        if isinstance(mean, list):
            first = enumerate(mean[:_TURNS_IN_TENSORBOARD])
            flat |= {f"{name}/{turn}": value for turn, value in first if value is not None}
        elif mean is not None:
            flat[name] = mean
    return flat


class _LogLastStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """A line of the log for the last step, whatever its number."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True


class _Bar(ProgressCallback):  # type: ignore[misc]  # transformers is untyped here
    """A progress bar with the loss beside it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)


def _callbacks(name: str, folder: Path, done: int) -> list[Any]:
    """The progress bar and, on the main process, TensorBoard, without what it holds of steps after `done`."""
    callbacks = [_LogLastStep(), _Bar(name)]
    if PartialState().is_main_process:
        writer = SummaryWriter(folder / TENSORBOARD, purge_step=done + 1 if done else None)
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def _open_log(folder: Path, done: int) -> JsonlAppender:
    """The log, cut back to step `done`."""
    path = folder / LOG
    if path.exists():
        write_jsonl(path, [line for line in read_jsonl(path, dict[str, Any])[0] if line["step"] <= done])
    return JsonlAppender(path)


def _last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """The newest whole checkpoint and its step; (None, 0) without one. Half-written ones are removed.

    The Trainer writes `trainer_state.json` last: a checkpoint that has it is whole.
    """
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_text("utf-8"))["global_step"]
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            whole[step] = path
    return (str(whole[max(whole)]), max(whole)) if whole else (None, 0)
