"""Draw the pictures of an evaluation report as matplotlib figures, without display or global state.

Each can be read on a phone, distinguishes chosen from rejected and one export from the other even
in grey, and shows the number of pairs or responses. Does not know about the page around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rayrm.evaluation.evaluate import Bin, Floats, Judged, interval

STYLES = ("concise", "detailed", "detailed, Markdown")
COLOURS = ("#1b5e9e", "#c75b12")
CHOSEN, REJECTED = "#0f766e", "#a8326e"


def save(figure: Figure, file: Path) -> None:
    figure.savefig(file, format="png", dpi=160)


def colour(mark: str) -> str:
    """Return an export's colour: the second for B, the first for A or a single export."""
    return COLOURS[1] if mark == "B" else COLOURS[0]


def canvas(height: float = 3.6) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes, with text large enough to read on a phone."""
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curve(runs: Sequence[tuple[str, list[dict[str, Any]]]], key: str, label: str) -> Figure:
    """Draw a training metric by step: raw, as a running mean, and on held-out pairs."""
    figure, axes = canvas()
    for (mark, history), colour in zip(runs, COLOURS, strict=False):
        known = [h for h in history if h[key] is not None]
        steps, values = [h["step"] for h in known], [h[key] for h in known]
        window = max(1, len(history) // 20)
        means = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.5)
        name = "training" if window == 1 else f"training, mean of {window} steps"
        axes.plot(steps, means, color=colour, linewidth=2, label=f"{mark} {name}".strip())
        held_out = [(h["step"], h.get(f"eval_{key}")) for h in history]
        held_out = [(step, value) for step, value in held_out if value is not None]
        if held_out:
            name = f"{mark} held-out".strip()
            axes.plot(*zip(*held_out, strict=True), "o--", color=colour, label=name)
    axes.set(xlabel="optimizer step", ylabel=label)
    if key == "accuracy":
        axes.set_ylim(0, 1.02)
    axes.legend()
    return figure


def draw_rewards(judged: Judged) -> Figure:
    figure, axes = canvas()
    chosen, rejected = judged.winner_reward, judged.loser_reward
    edges = np.histogram_bin_edges([*chosen, *rejected], bins=40).tolist()
    label = f"chosen, mean {chosen.mean():.2f}"
    axes.hist(chosen, edges, histtype="stepfilled", color=CHOSEN, alpha=0.45, label=label)
    label = f"rejected, mean {rejected.mean():.2f}"
    axes.hist(rejected, edges, histtype="step", color=REJECTED, linewidth=2, label=label)
    axes.axvline(chosen.mean(), color=CHOSEN, linestyle="--")
    axes.axvline(rejected.mean(), color=REJECTED, linestyle=":")
    axes.set(xlabel="reward", ylabel="pairs", title=f"n = {len(judged)} pairs")
    axes.legend()
    return figure


def draw_reliability(bins: Sequence[Bin], ece: float, colour: str) -> Figure:
    figure, axes = canvas(4.4)
    axes.plot([0.5, 1], [0.5, 1], color="#777777", linestyle="--", label="perfect calibration")
    for b in bins:
        axes.bar(b.low, b.accuracy, b.high - b.low, align="edge", color=colour, alpha=0.25)
        axes.text((b.low + b.high) / 2, 0.02, f"{b.pairs}", ha="center", fontsize=9)
    axes.plot(
        [b.mean for b in bins],
        [b.accuracy for b in bins],
        color=colour,
        marker="o",
        label=f"accuracy, ECE = {ece:.3f}",
    )
    axes.set(
        xlabel="confidence, sigmoid(|margin|)",
        ylabel="accuracy",
        xlim=(0.5, 1),
        ylim=(0, 1.05),
    )
    axes.text(0.505, 0.09, "pairs in each bin:", fontsize=9)
    axes.legend(loc="upper left")
    return figure


def draw_bins(names: Sequence[str], bins: Sequence[Bin], label: str, colour: str) -> Figure:
    """Draw each bin's accuracy, from the top down, with its 95 % interval and number of pairs."""
    figure, axes = canvas(1.2 + 0.42 * len(bins))
    draw_accuracies(axes, np.arange(len(bins)), [(b.accuracy, b.pairs) for b in bins], colour)
    axes.set_yticks(range(len(bins)), names)
    axes.set_ylabel(label, fontsize=10)
    return figure


def draw_subsets(
    names: Sequence[str], evaluated: Sequence[tuple[str, dict[str, dict[str, Any]]]]
) -> Figure:
    rows = len(names) * len(evaluated)
    figure, axes = canvas(1.2 + 0.3 * rows + 0.1 * len(names))
    for i, ((mark, subsets), colour) in enumerate(zip(evaluated, COLOURS, strict=False)):
        places = np.arange(len(names)) * (len(evaluated) + 0.4) + i
        found = [(subsets[name]["accuracy"], subsets[name]["pairs"]) for name in names]
        draw_accuracies(axes, places, found, colour, mark)
    middle = np.arange(len(names)) * (len(evaluated) + 0.4) + (len(evaluated) - 1) / 2
    axes.set_yticks(middle, [shortened(name or "(none)") for name in names])
    if len(evaluated) > 1:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.6 / figure.get_figheight()), ncols=2
        )
    return figure


def draw_accuracies(
    axes: Axes,
    places: NDArray[np.number],
    found: Sequence[tuple[float, int]],
    colour: str,
    label: str = "",
) -> None:
    """Draw horizontal bars of (accuracy, pairs), the first on top."""
    accuracies = np.array([accuracy for accuracy, _ in found])
    limits = np.array([interval(accuracy, pairs) for accuracy, pairs in found])
    whiskers = np.maximum(0, [accuracies - limits[:, 0], limits[:, 1] - accuracies])
    axes.barh(places, accuracies, 0.8, color=colour, alpha=0.75, label=label)
    axes.errorbar(accuracies, places, xerr=whiskers, fmt="none", ecolor="#333333", capsize=2.5)
    for place, (accuracy, pairs) in zip(places, found, strict=True):
        text = f"{accuracy:.2f}  n = {pairs}"
        axes.text(1.03, place, text, va="center", fontsize=9, clip_on=False)
    axes.set(xlabel="accuracy (dashed: chance)", xlim=(0, 1))
    axes.set_ylim(max(places[-1] + 0.6, axes.get_ylim()[0]), -0.6)
    axes.axvline(0.5, color="#777777", linestyle="--", linewidth=1)
    axes.grid(axis="y", visible=False)


def draw_lengths(lengths: Floats, rewards: Floats, slope: float, colour: str) -> Figure:
    figure, axes = canvas()
    alpha = float(np.clip(500 / len(rewards), 0.05, 0.6))
    axes.scatter(lengths, rewards, s=10, alpha=alpha, color=colour, linewidths=0)
    ends = np.array([lengths.min(), lengths.max()])
    label = f"{10 * slope:+.3f} reward per 10 tokens"
    axes.plot(ends, ends * slope, color="black", linewidth=2, label=label)
    axes.set(
        xlabel="tokens above the group's mean",
        ylabel="reward above the group's mean",
        title=f"n = {len(rewards)} responses",
    )
    axes.legend()
    return figure


def draw_styles(found: dict[str, Any]) -> Figure:
    """Draw RM-Bench's matrix: chosen down, rejected across, hard above the diagonal."""
    figure, axes = canvas(4.6)
    matrix = np.array(found["matrix"], dtype=float)
    axes.imshow(matrix, cmap="RdYlBu", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(matrix):
        if row == column:
            kind = "normal"
        elif row > column:
            kind = "easy"
        else:
            kind = "hard"
        known = "n/a" if np.isnan(value) else f"{value:.3f}"
        text = f"{known}\n{kind}, n = {found['pairs'][row][column]}"
        dark = abs(value - 0.5) > 0.4
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    names = [style.replace(", ", ",\n") for style in STYLES]
    axes.set_xticks(range(3), names)
    axes.set_yticks(range(3), names)
    axes.set(xlabel="style of rejected", ylabel="style of chosen")
    axes.grid(visible=False)
    return figure


def shortened(name: str) -> str:
    """Shorten a name from the data for a label and escape "$", which would start a formula."""
    return (name if len(name) <= 32 else f"{name[:31]}…").replace("$", r"\$")
