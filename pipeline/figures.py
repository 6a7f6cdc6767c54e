"""The report's figures: for a paper as SVG and PDF, and for the page the same SVG in the colours of its theme."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from pipeline.axes import Axis

Row = Mapping[str, Any]
Logs = Mapping[tuple[str, int], Sequence[Row]]
"""Training log lines by method (`sft` among them) and seed."""

INK, RULE = "#1c1c1a", "#d8d6cf"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b5ea7")
"""Told apart with any colour vision: Okabe & Ito 2008, its yellow darkened and a violet added; one for each method."""
GREY = "#77756f"
"""Of those who are not trained by preference: random, sft, expert."""
STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
TITLES = {
    "loss": "Loss",
    "margin": "Margin",
    "accuracy": "Accuracy",
    "kl": "KL to the reference (nats a turn)",
    "nll": "Negative log-prob of a token",
    "logprob": "Log-prob of the trajectory",
    "logp": "Log-prob of the trajectory",
    "reward": r"$\Phi$ of the trajectory",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
"""What the training curves are of, in this order; any other number that a log holds comes after them."""
NO_CURVE = {"step", "epoch", "seconds", "time", "items", "examples", "tokens"}
SIDES = {"chosen": "-", "rejected": "--"}
THIRDS = ((0.6, 0.45), (1.1, 0.7), (1.8, 1.0))
"""Thickness and opacity of the first, the second and the last third of training."""


def draw(
    env: str, summary: Sequence[Row], by_seed: Sequence[Row], logs: Logs, methods: Sequence[str], axis: Axis | None
) -> dict[str, Figure]:
    """Every figure of one environment that there are data for, by its file name.

    Args:
        env: name of the environment.
        summary: rows of `statistics.summary` of this environment.
        by_seed: rows of `statistics.rewards_table` of the same.
        logs: of SFT and of each method.
        methods: the preference methods, in the order of their colours.
        axis: the number that the run varies, if it does.
    """
    sft = {key: log for key, log in logs.items() if key[0] == "sft"}
    preference = {key: log for key, log in logs.items() if key[0] in methods}
    with mpl.rc_context(STYLE):
        drawn = {
            f"rewards-{env}": _rewards(summary, by_seed, methods),
            f"axis-{env}": _over_axis(summary, axis) if axis else None,
            f"sft-{env}": _curves(sft, methods),
            f"preference-{env}": _curves(preference, methods),
            f"turns-{env}": _turns(preference, methods),
        }
    return {name: figure for name, figure in drawn.items() if figure}


def _colours(methods: Sequence[str]) -> dict[str, str]:
    """One colour a method, the same in every figure."""
    return {method: COLOURS[place % len(COLOURS)] for place, method in enumerate(methods)}


def _rewards(summary: Sequence[Row], by_seed: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Mean rewards with their intervals, one panel a split; small dots are single seeds."""
    splits = list(dict.fromkeys(row["split"] for row in summary))
    names = list(dict.fromkeys(row["method"] for row in summary))
    colour = _colours(methods)
    figure = Figure(figsize=(7.2, 0.7 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for panel, split in zip(panels, splits, strict=True):
        for row in (row for row in summary if row["split"] == split):
            place, paint = names.index(row["method"]), colour.get(row["method"], GREY)
            seeds = [one["reward"] for one in by_seed if (one["method"], one["split"]) == (row["method"], split)]
            if len(seeds) > 1:
                panel.plot(seeds, [place + 0.22] * len(seeds), "o", ms=2, color=paint, mew=0)
            if row["reward_low"] is not None:
                panel.plot([row["reward_low"], row["reward_high"]], [place, place], color=paint, lw=1.6)
            panel.plot(row["reward"], place, "o", ms=5, color=paint, mew=0)
        panel.set(title=f"{split} ({row['n']} tasks)", xlabel="mean reward, 95 % CI", xlim=(-0.02, 1.02))
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
    return figure


def _over_axis(summary: Sequence[Row], axis: Axis) -> Figure:
    """Mean rewards with their intervals over the values of a key, one panel a split; the SFT policy as a band."""
    splits = list(dict.fromkeys(row["split"] for row in summary))
    cells = {(row["method"], row["split"]): row for row in summary}
    colour = _colours(list(axis.lines))
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    spread = np.linspace(-0.12, 0.12, len(axis.lines)) if len(axis.lines) > 1 else [0.0]
    for panel, split in zip(panels, splits, strict=True):
        sft = cells["sft", split]
        if sft["reward_low"] is not None:
            panel.axhspan(sft["reward_low"], sft["reward_high"], color=GREY, alpha=0.15, lw=0)
        panel.axhline(sft["reward"], color=GREY, lw=0.8)
        for (line, arms), aside in zip(axis.lines.items(), spread, strict=True):
            rows = [cells[arm, split] for _, arm in sorted(arms.items())]
            places = [axis.values.index(value) + aside for value in sorted(arms)]
            panel.plot(places, [row["reward"] for row in rows], "o-", ms=4, color=colour[line])
            for place, row in zip(places, rows, strict=True):
                if row["reward_low"] is not None:
                    panel.plot([place] * 2, [row["reward_low"], row["reward_high"]], color=colour[line], lw=0.8)
        panel.set(title=f"{split} ({sft['n']} tasks)", xlabel=axis.key)
        panel.set_xticks(range(len(axis.values)), [f"{value:g}" for value in axis.values])
    panels[0].set_ylabel("mean reward, 95 % CI")
    _legend(figure, {"sft": GREY} | colour, two_sided=False)
    return figure


def _curves(logs: Logs, methods: Sequence[str]) -> Figure | None:
    """Every number in the logs over steps: one panel a quantity, one line a method and seed, rejected dashed."""
    found = {key for log in logs.values() for line in log for key, value in line.items() if _is_number(value)}
    order = [*TITLES, *sorted(found)]
    quantities = sorted({_quantity(key) for key in found - NO_CURVE}, key=order.index)
    if not quantities:
        return None
    colour = _colours(methods)
    width = min(3, len(quantities))
    height = math.ceil(len(quantities) / width)
    figure = Figure(figsize=(2.4 * max(width, 2), 1.6 * height + 0.3), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).ravel()
    for panel in grid[len(quantities) :]:
        panel.set_axis_off()
    for panel, quantity in zip(grid, quantities, strict=False):
        for (method, _), log in logs.items():
            for key in sorted(key for key in found if _quantity(key) == quantity):
                points = [(line["step"], line[key]) for line in log if _is_number(line.get(key)) and "step" in line]
                if points:
                    style, marker = SIDES.get(key.partition("_")[0], "-"), "o" if len(points) == 1 else ""
                    panel.plot(*zip(*points, strict=True), style, color=colour.get(method, INK), marker=marker)
        panel.set(title=TITLES.get(quantity, quantity.replace("_", " ")), xlabel="step")
    two_sided = any(key.partition("_")[0] in SIDES for key in found)
    _legend(
        figure, {method: colour[method] for method in methods if any(name == method for name, _ in logs)}, two_sided
    )
    return figure


def _turns(logs: Logs, methods: Sequence[str]) -> Figure | None:
    """Log-ratio of each turn to the reference in each third of training (`THIRDS`), a panel a method.

    A mean over the log lines in the third, of all seeds. At the start it is 0 for whatever pairs, so that which pairs a
    line is of matters little: what falls below 0 has become less likely than under the reference.
    """
    told = {method for (method, _), log in logs.items() if any(line.get(_ratio("chosen")) for line in log)}
    if not told:
        return None
    colour = _colours(methods)
    shown = [method for method in methods if method in told]
    width = min(3, len(shown))
    height = math.ceil(len(shown) / width)
    figure = Figure(figsize=(2.4 * max(width, 2), 1.8 * height + 0.3), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False, sharey=True).ravel()
    for panel in grid[len(shown) :]:
        panel.set_axis_off()
    for panel, method in zip(grid, shown, strict=False):
        panel.axhline(0, color=GREY, lw=0.8)
        for side, style in SIDES.items():
            thirds = [_thirds(log, side) for (name, _), log in logs.items() if name == method]
            for lines, (thickness, alpha) in zip(zip(*thirds, strict=True), THIRDS, strict=True):
                mean = _mean([values for of_seed in lines for values in of_seed])
                panel.plot(range(len(mean)), mean, style, lw=thickness, alpha=alpha, color=colour[method])
        panel.set(title=method, xlabel="turn")
        panel.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel("log-ratio to the reference")
    _legend(figure, {}, two_sided=True)
    return figure


def _quantity(key: str) -> str:
    """What a key of a log is of, whichever side."""
    side, _, rest = key.partition("_")
    return rest if side in SIDES and rest else key


def _ratio(side: str) -> str:
    """The key of a log line that holds the side's log-ratios by turn."""
    return f"{side}_logratio_by_turn"


def _thirds(log: Sequence[Row], side: str) -> list[list[list[float | None]]]:
    """The side's log-ratios by turn of the log lines in each third of training; one of few lines has none."""
    found = [values for line in log if (values := line.get(_ratio(side)))]
    cuts = [round(third * len(found) / len(THIRDS)) for third in range(len(THIRDS) + 1)]
    return [found[start:end] for start, end in itertools.pairwise(cuts)]


def _mean(lists: Sequence[Sequence[float | None]]) -> list[float]:
    """Mean of each place over lists of unlike lengths, over those that have it."""
    longest = max(map(len, lists), default=0)
    table = np.full((len(lists), longest), np.nan)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = [math.nan if value is None else value for value in values]
    return [float(column[~np.isnan(column)].mean()) if (~np.isnan(column)).any() else math.nan for column in table.T]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _legend(figure: Figure, colour: Mapping[str, str], two_sided: bool) -> None:
    """One legend below all panels: methods by colour, sides by dashes."""
    line = mpl.lines.Line2D
    handles = [line([], [], color=paint, label=method) for method, paint in colour.items()] if len(colour) > 1 else []
    handles += [line([], [], color=INK, ls=style, label=side) for side, style in SIDES.items()] if two_sided else []
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))


def save(figure: Figure, kind: str, name: str) -> bytes:
    """A figure as the bytes of an `svg` or `pdf` file, the same for the same figure."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        dates = {"Date": None} if kind == "svg" else {"CreationDate": None}
        figure.savefig(file, format=kind, metadata=dates, transparent=True)
    return file.getvalue()


def themed(svg: bytes) -> str:
    """An SVG file as an element for a page: its colours become the page's, and it names no outside address."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # what nothing refers to, and other figures have too
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = text.replace(INK, "currentColor").replace(RULE, "var(--rule)").replace(GREY, "var(--muted)")
    for place, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{place})")
    return text
