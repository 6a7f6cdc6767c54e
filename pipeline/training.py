"""Supervised and preference training on transformers' Trainer: one Trainer, two objectives, on per-turn log-probs.

The order of the examples is `pipeline.batches`', the losses are `pipeline.objectives`'; the Trainer brings the
optimizer, the schedule, mixed precision, checkpoints and several processes.
"""

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline import qlora
from pipeline.batches import Run, Side, check, collate, pad
from pipeline.config import PreferenceConfig, TrainingConfig
from pipeline.logprobs import causal_lm_of, turn_logprobs
from pipeline.losses import discount
from pipeline.methods import Discount
from pipeline.models import reference_mode
from pipeline.objectives import PreferenceObjective, SftObjective
from pipeline.packing import packed_attention
from pipeline.precision import uses_bf16
from pipeline.records import JsonlAppender, read_jsonl
from pipeline.rendering import Rendered
from pipeline.training_log import LOG, Window, callbacks, open_log, scalars

CHECKPOINTS = "checkpoints"


def run_sft(
    model: Any, examples: Sequence[Rendered], config: TrainingConfig, folder: Path, seed: int
) -> dict[str, Any]:
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
        ValueError: no examples, one without a token of the policy, a batch size that the processes cannot share, or a
            base in 4 bits under FSDP or DeepSpeed.
        RuntimeError: the loss is no number.
    """
    sides = [(Side(rendered=example),) for example in examples]
    return _train(model, sides, SftObjective(), config, folder, seed, "sft")


def run_preference(
    model: Any,
    pairs: Sequence[tuple[Rendered, Rendered]],
    reference: Sequence[tuple[Sequence[float], Sequence[float]]],
    weighting: Discount,
    config: PreferenceConfig,
    folder: Path,
    seed: int,
    *,
    per_token: bool = False,
) -> dict[str, Any]:
    """Train a policy on pairs of trajectories; otherwise as `run_sft`.

    Args:
        model: the policy, equal to the reference at the start; trained in place.
        pairs: chosen and rejected trajectory.
        reference: for each pair, each turn's log-prob under the reference, from `reference_turn_logprobs`.
        weighting: the discount.
        config: beta, gamma, the terms of the loss, and how to train.
        folder: where the log and the checkpoints go.
        per_token: whether a trajectory's weights are divided by its number of the policy's tokens.
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
            _weights([side for pair in pairs for side in pair], weighting, config.gamma, seed, per_token=per_token),
            strict=True,
        )
    ]
    examples = list(zip(sides[::2], sides[1::2], strict=True))
    objective = PreferenceObjective(config.beta, config.label_smoothing, config.nll)
    return _train(model, examples, objective, config, folder, seed, "train")


def reference_turn_logprobs(
    model: Any, pairs: Sequence[tuple[Rendered, Rendered]], config: TrainingConfig
) -> list[tuple[list[float], list[float]]]:
    """The log-prob of every turn of every pair under the reference, computed just as training computes the policy's.

    Same autocast, same packing, no gradients, so that the first training step sees a ratio of one. The reference is the
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
    qlora.compute_as_autocast(model, bf16=uses_bf16(config))
    longest_first = sorted(range(len(pairs)), key=lambda pair: -sum(len(side.ids) for side in pairs[pair]))
    batches = [
        longest_first[start : start + config.micro_batch_size]
        for start in range(0, len(pairs), config.micro_batch_size)
    ][state.process_index :: state.num_processes]
    found: list[tuple[int, tuple[list[float], list[float]]]] = []
    autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=uses_bf16(config))
    with torch.no_grad(), reference_mode(model), autocast, packed_attention(causal_lm_of(model)):
        for batch in tqdm(batches, desc="reference", disable=not state.is_main_process, dynamic_ncols=True):
            sides = [pad([Side(rendered=pairs[pair][side]) for pair in batch]) for side in (0, 1)]
            on_device = [{key: value.to(state.device) for key, value in side.items()} for side in sides]
            both = (logprobs.tolist() for logprobs in _sides_logprobs(model, on_device))
            for pair, chosen, rejected in zip(batch, *both, strict=True):
                first, second = pairs[pair]
                found.append((pair, (chosen[: first.turns], rejected[: second.turns])))
    by_pair = dict(gather_object(found) if state.num_processes > 1 else found)
    return [by_pair[pair] for pair in range(len(pairs))]


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished training, once its policy is saved."""
    if PartialState().is_main_process:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _weights(
    sides: Sequence[Rendered], weighting: Discount, gamma: float, seed: int, *, per_token: bool
) -> list[list[float]]:
    """The discount of each trajectory's turns; T is its own number of turns, those that were cut off included."""
    seeds = [seed * len(sides) + row for row in range(len(sides))]
    lengths = torch.tensor([side.turns + side.dropped_turns for side in sides])
    table = discount(weighting, lengths, gamma, seed=seeds)
    if per_token:
        table /= torch.tensor([side.trained_tokens for side in sides])[:, None]
    return [row[: side.turns] for row, side in zip(table.tolist(), sides, strict=True)]


def _sides_logprobs(model: Any, sides: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Per-turn log-probs [P, T] of each side of a micro-batch, from one pass over all of them."""

    def stacked(name: str, fill: int) -> Tensor:
        width = max(side[name].shape[1] for side in sides)
        return torch.cat([
            nn.functional.pad(side[name], (0, width - side[name].shape[1]), value=fill) for side in sides
        ])  # fmt: skip

    found = turn_logprobs(
        model,
        stacked("input_ids", 0),
        stacked("attention_mask", 0),
        stacked("turn_index", -1),
        twins=len(sides) == 2,
    )
    turns = [int(side["turn_index"].max()) + 1 for side in sides]
    return [part[:, :width] for part, width in zip(found.chunk(len(sides)), turns, strict=True)]


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
    if qlora.is_in_4bit(model) and (sharing := _sharing()):
        raise ValueError(
            f"{sharing} does not share out weights in 4 bits (model.load_in_4bit); launch with "
            "pipeline/accelerate/ddp.yaml, by which every GPU holds them all."
        )
    transformers.utils.logging.disable_progress_bar()  # its bars for written files would tear the training's apart
    check(examples)
    qlora.compute_as_autocast(model, bf16=uses_bf16(config))
    arguments = training_arguments(config, folder, seed)
    per_epoch = math.ceil(len(examples) / config.batch_size)
    run = Run(
        examples,
        [objective.items(example) for example in examples],
        batch_size=config.batch_size,
        epochs=config.epochs if config.max_steps is None else Fraction(config.max_steps, per_epoch),
        seed=seed,
    )
    state = PartialState()
    with state.main_process_first():
        checkpoint, done = _last_checkpoint(folder / CHECKPOINTS)
    with open_log(folder, done) if state.is_main_process else contextlib.nullcontext() as log:
        trainer = _TurnTrainer(
            model, arguments, run, objective, log, callbacks(name, folder, done), bf16=uses_bf16(config)
        )
        started = time.time()
        with packed_attention(causal_lm_of(model)):
            trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.time() - started
    trainer.release_model()
    state.wait_for_everyone()
    losses = [line["loss"] for line in read_jsonl(folder / LOG, dict[str, Any])]
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
        "bf16": uses_bf16(config),
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
        bf16=uses_bf16(config) and _sharing() != "DeepSpeed",  # which would hold weights in bfloat16
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
        # FSDP would keep whole gradients on every GPU until the last micro-batch of a step; DDP has them anyway.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": _sharing() == "FSDP"}},
    )
    if arguments.n_gpu > 1:
        # One GPU a process: the Trainer would wrap the model in DataParallel, which splits batches its own way.
        # `accelerate launch` uses every GPU.
        arguments._n_gpu = 1
    return arguments


class _TurnTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' Trainer with a loss on per-turn log-probs."""

    loss_is_scaled_for_ga = True  # each example carries 1 / (items of its step)

    def __init__(
        self,
        model: Any,
        arguments: Any,
        run: Run,
        objective: SftObjective | PreferenceObjective,
        log: JsonlAppender | None,
        extra_callbacks: list[Any],
        *,
        bf16: bool,
    ) -> None:
        super().__init__(model=model, args=arguments, data_collator=collate, train_dataset=run)
        _share_out_in_float32(self.accelerator, model, bf16=bf16)
        self.remove_callback(ProgressCallback)  # prints every line of the log into the bar; `_Bar` does not
        for callback in extra_callbacks:
            self.add_callback(callback)
        self._objective = objective
        self._steps_per_epoch = run.steps_per_epoch
        self._window = Window(run.max_turns)
        self._log = log
        self._bf16 = bf16

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's share of its step's loss.

        Gradients are averaged over the processes, and shares add up: hence the factor.
        """
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16):
            logprobs = _sides_logprobs(model, inputs["sides"])
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
        super().log({**logs, **scalars(means)}, start_time)
        if self._log is not None:
            self._log.append({"step": step, "epoch": self.state.epoch, **logs, **means})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the Trainer's estimate does not know our batches; `Run.tokens` counts."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's weights; DeepSpeed writes them with the moments, and the Trainer would have it do so twice."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Silent about output weights tied to the embedding: a checkpoint holds them once, and they stay tied.

        transformers 5.19 warns of them as missing; drop this when it no longer does.
        """
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def release_model(self) -> None:
        """Undo what training did to the model besides learning."""
        if self.is_deepspeed_enabled:
            self.deepspeed.destroy()
            unset_hf_deepspeed_config()  # or transformers would share out the next model while it loads it
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("forward", None)  # a bound copy of the class's own, which deepcopy would share
        self.model.config.use_cache = True
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()


def _sharing() -> str | None:
    """What `accelerate launch` was told to share weights out by."""
    keys = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, key in keys.items() if os.environ.get(key, "false").lower() == "true"), None)


def _share_out_in_float32(accelerator: Any, model: Any, *, bf16: bool) -> None:
    """Have weights gathered and gradients added up in float32, autocast computing, as where nothing is shared out.

    By itself accelerate has FSDP cast everything to bfloat16, the log-probs that leave the output layer included.
    DeepSpeed switches off autocast but its own, which casts what it sends of the modules that it is told of: none here.

    Raises:
        ValueError: a way of sharing out weights that is not supported.
    """
    state = accelerator.state
    if plugin := getattr(state, "deepspeed_plugin", None):
        if plugin.zero_stage != 3 or plugin.zero3_init_flag:
            raise ValueError(
                "DeepSpeed needs zero_stage: 3 and zero3_init_flag: false here; launch with "
                "pipeline/accelerate/deepspeed.yaml."
            )
        own = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        plugin.deepspeed_config["torch_autocast"] = own
        # DeepSpeed 0.19 calls functions that torch 2.13 deprecates, which would warn again and again.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        # The Trainer hides the accumulation from accelerate, which would say so.
        accelerator.gradient_accumulation_steps = plugin.deepspeed_config["gradient_accumulation_steps"]
        model.float()  # a frozen base, too, as accelerate does for FSDP
    elif plugin := getattr(state, "fsdp_plugin", None):
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "FSDP needs fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false here; launch with "
                "pipeline/accelerate/fsdp.yaml."
            )
        plugin.mixed_precision_policy = MixedPrecisionPolicy()


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
