"""The picture of a comparison: loss by position, recall by distance, and memory against context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SurgeryError
from ..report import _bytes
from .comparison import Comparison, replacing
from .positions import by_position
from .result import Evaluation, Memory, Recall

INK, MUTED = "#1f2933", "#7b8794"
CONTROLS = ("#e08e0b", "#b5485d", "#7a5195")
CONVERTED = "#1f6fb2"
SMOOTHING = 1.2
"""The curve at position p is the mean from p / 1.2 to 1.2 p."""
MISSING = 'no plot without matplotlib: pip install "surgery[plot]"'


def plot(comparison: Comparison, path: Path) -> None:
    """Write a PNG; the file appears whole or not at all.

    Raises:
        SurgeryError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SurgeryError(MISSING) from None
    panels = [_losses, *([_needles] if needles(comparison.result) else []), _memory]
    figure = Figure(figsize=(5.5 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(panels), width_ratios=(1.25, *[1] * (len(panels) - 1)))
    for panel, axes in zip(panels, places, strict=True):
        panel(axes, comparison)
        _style(axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png", facecolor="white")


def smooth_loss(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n] and the loss around each, averaged over the domains of the mean (none: all)."""
    names = evaluation.mean_over or list(evaluation.domains)
    loss = np.mean([evaluation.domains[name].position_nll for name in names], 0)
    total = np.concatenate([[0.0], np.cumsum(loss)])
    at = np.unique(np.geomspace(1, len(loss), 160).round().astype(int))
    first = np.maximum(np.round(at / SMOOTHING).astype(int), 1)
    last = np.minimum(np.round(at * SMOOTHING).astype(int), len(loss))
    return at, (total[last] - total[first - 1]) / (last - first + 1)


def ranges(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each range of positions: its middle, the loss, the standard error (not known: 0)."""
    found = by_position(evaluation)
    ends = np.array([[float(end) for end in name.split("-")] for name in found])
    means = np.array([[mean.value, mean.stderr or 0.0] for mean in found.values()])
    return ends.mean(1), means[:, 0], means[:, 1]


def _losses(axes: Any, comparison: Comparison) -> None:
    length = comparison.result.length
    start = min(8, max(1, length // 8))
    seen: list[np.ndarray] = []
    for (name, evaluation), color in zip(comparison.named.items(), _colors(comparison), strict=True):
        at, loss = smooth_loss(evaluation)
        shown = at >= start
        axes.plot(at[shown], loss[shown], color=color, linewidth=2, label=name)
        centers, values, errors = ranges(evaluation)
        centers = centers * 1.04 ** len(seen)  # beside one another
        kept = centers >= start
        axes.errorbar(centers[kept], values[kept], errors[kept], color=color, fmt="o", markersize=4, capsize=3)
        seen.append(loss[shown])
    values = np.concatenate(seen)
    margin = 0.06 * (values.max() - values.min() or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.set_xscale("log", base=2)
    axes.set_xlim(start, length)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title("Loss by position", loc="left", fontweight="bold", color=INK)
    axes.set_xlabel("tokens before")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, loc="best", labelcolor=INK)


def needles(evaluation: Evaluation) -> dict[int, Recall]:
    """Distance -> what is recalled over it."""
    return {found.size: found for found in evaluation.recall if found.kind == "needle"}


def _needles(axes: Any, comparison: Comparison) -> None:
    asked = needles(comparison.result)
    for evaluation, color in zip(comparison.named.values(), _colors(comparison), strict=True):
        found = {size: own for size, own in needles(evaluation).items() if own.sha256 == asked.get(size, own).sha256}
        means = [own.second for own in found.values()]
        errors = [mean.stderr or 0.0 for mean in means]
        line = {"color": color, "linewidth": 2, "marker": "o", "markersize": 4, "capsize": 3}
        axes.errorbar(list(found), [mean.value for mean in means], errors, **line)
    axes.plot(list(asked), [own.first.value for own in asked.values()], color=MUTED, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title("Recall of words (dashed: the first time)", loc="left", fontweight="bold", color=INK)
    axes.set_xlabel("tokens since they were seen")
    axes.set_ylabel("nats per word")


def _colors(comparison: Comparison) -> list[str]:
    controls = [CONTROLS[i % len(CONTROLS)] for i in range(len(comparison.controls))]
    softmax = [] if comparison.softmax is None else [INK]
    return [*softmax, *controls, CONVERTED]


def _memory(axes: Any, comparison: Comparison) -> None:
    memory = comparison.result.memory
    lengths = np.geomspace(max(16, memory.length // 16), memory.length * 64, 200)
    lines = [(1, "keys and values", INK)]
    if comparison.result.attention != "softmax":
        lines.append((0, "converted", CONVERTED))
    for which, name, color in lines:
        held = np.array([memory.at(length)[which] for length in lengths.round().astype(int)])
        axes.plot(lengths, np.maximum(held, 1), color=color, linewidth=2)
        _label(axes, lengths[-1], memory, which, name, color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(lengths[0], lengths[-1])
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:,.0f}k" if value >= 1024 else f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: _bytes(value).replace(".0 ", " "))
    axes.set_title("Memory of one sequence", loc="left", fontweight="bold", color=INK)
    axes.set_xlabel("context length in tokens")


def _label(axes: Any, end: float, memory: Memory, which: int, name: str, color: str) -> None:
    held = memory.at(int(end))[which]
    style = {"ha": "right", "va": "bottom", "color": color, "xytext": (-4, 6), "textcoords": "offset points"}
    axes.annotate(f"{name}: {_bytes(held)}", (end, held), **style)


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, which="both", length=3, color=MUTED)
    axes.grid(True, which="major", color=MUTED, alpha=0.18, linewidth=0.8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
