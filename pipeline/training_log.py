"""What training writes down: a line of averages every few steps, TensorBoard, a progress bar."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from pipeline.objectives import Metrics
from pipeline.records import JsonlAppender, recover_jsonl, write_jsonl

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
_TURNS_IN_TENSORBOARD = 5


class Window:
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


def scalars(means: dict[str, float | list[float | None] | None]) -> dict[str, float]:
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


def callbacks(name: str, folder: Path, done: int) -> list[Any]:
    """The progress bar and, on the main process, TensorBoard, without what it holds of steps after `done`."""
    found: list[Any] = [_LogLastStep(), _Bar(name)]
    if PartialState().is_main_process:
        writer = SummaryWriter(folder / TENSORBOARD, purge_step=done + 1 if done else None)
        found.append(TensorBoardCallback(writer))
    return found


def open_log(folder: Path, done: int) -> JsonlAppender:
    """The log, cut back to step `done`."""
    path = folder / LOG
    if path.exists():
        write_jsonl(path, [line for line in recover_jsonl(path, dict[str, Any])[0] if line["step"] <= done])
    return JsonlAppender(path)
