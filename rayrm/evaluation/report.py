"""Write the evaluation report: one self-contained HTML page, and its pictures as files next to it.

Shows the figures of evaluate.py as pictures, tables and text; every picture has a table. Does not
know about models, training or Ray.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from rayrm.data.records import MESSAGE_KEYS, Group, Message, Text
from rayrm.evaluation.evaluate import (
    REWARD_BENCH,
    Bin,
    Floats,
    Judged,
    ScoredGroup,
    equal_bins,
    interval,
    reliability,
    signed_bins,
    summarize,
    within_groups,
)
from rayrm.evaluation.pictures import (
    STYLES,
    colour,
    draw_bins,
    draw_curve,
    draw_lengths,
    draw_reliability,
    draw_rewards,
    draw_styles,
    draw_subsets,
    save,
)

PAGE = "report.html"


class Macros(Protocol):
    """The template's macros by name; each returns a part of the page."""

    def __getattr__(self, name: str) -> Callable[..., Markup]: ...


HERE = Path(__file__).parent
HTML = cast(
    Macros,
    Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    .get_template("report.html.jinja")
    .module,
)

# Most mistakes shown, most characters shown of each text, most subsets drawn.
MISTAKES, SHOWN, SUBSETS = 10, 2000, 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
AVERAGES = ("easy", "normal", "hard", "mean")
STEP = ["step", "loss", "accuracy", "margin", "learning rate", "gradient norm", "pairs"]
STEP += ["tokens/s", "held-out loss", "held-out accuracy"]
WHISKERS = "Whiskers and the columns from and to: 95 % intervals, assuming independent pairs."


@dataclass(frozen=True)
class Evaluated:
    """An export's scores of the report's groups, in their order. history: its metrics by step."""

    version: str
    scored: list[ScoredGroup]
    history: list[dict[str, Any]]

    @cached_property
    def figures(self) -> dict[str, Any]:
        return summarize(self.scored)

    @cached_property
    def judged(self) -> Judged:
        return Judged.of(self.scored)


def write_report(
    directory: Path, groups: Sequence[Group], evaluated: Sequence[Evaluated], data: str
) -> Path:
    """Write the page and its pictures, and return the page's path.

    Two evaluated exports are shown side by side. data: a description of the groups.
    """
    directory.mkdir(parents=True, exist_ok=True)
    html = Report(directory, groups, evaluated, data).html()
    page = directory / PAGE
    page.write_text(html, encoding="utf-8")
    return page


class Report:
    """A report being built; each method writes the pictures of one part and returns its HTML."""

    def __init__(
        self, directory: Path, groups: Sequence[Group], evaluated: Sequence[Evaluated], data: str
    ) -> None:
        self.directory, self.groups, self.data = directory, groups, data
        self.evaluated = evaluated
        self.marks = "AB" if len(evaluated) > 1 else [""]
        self.marked = list(zip(self.marks, evaluated, strict=True))

    def html(self) -> str:
        parts = [self.head(), self.figures(), self.training()]
        if all(len(e.judged) for e in self.evaluated):
            parts += [
                self.rewards(),
                self.reliability(),
                self.by_margin(),
                self.by_length(),
                self.reward_by_length(),
                self.subsets(),
                self.rm_bench(),
                self.reward_bench(),
                self.mistakes(),
            ]
        title = "Evaluation of " + " and ".join(e.version for e in self.evaluated)
        return str(HTML.page(title, Markup((HERE / "report.css").read_text()), parts))

    # parts -----------------------------------------------------------------------------------

    def head(self) -> Markup:
        title = " and ".join(
            f"{mark} {e.version}" if mark else e.version for mark, e in self.marked
        )
        lines = []
        for mark, e in self.marked:
            accuracy, pairs = e.figures["accuracy"], e.figures["pairs"]
            if accuracy is None:
                lines.append(f"{mark} No pair has a winner and both its rewards.")
                continue
            low, high = interval(accuracy, pairs)
            lines.append(
                f"{mark} Accuracy {accuracy:.3f} on {pairs} pairs (95 % interval {low:.3f} to "
                f"{high:.3f})."
            )
        return HTML.head(title, lines, self.data)

    def figures(self) -> Markup:
        names = {
            "accuracy": "accuracy (a tie is half right)",
            "pairs": "pairs with both rewards",
            "groups": "groups",
            "best_of_n": "best of N: highest reward on an unbeaten response",
            "margin": "mean margin (chosen - rejected reward)",
            "loss": "Bradley-Terry loss (nats per pair)",
            "ece": "expected calibration error",
            "length_correlation": "correlation of reward and length within groups",
            "reward_mean": "mean reward",
            "reward_std": "standard deviation of rewards",
            "failed_responses": "responses that could not be scored",
            "failed_pairs": "pairs without both rewards",
            "truncated": "responses whose prompt was cut",
        }
        rows = []
        for key, name in names.items():
            values = [e.figures[key] for e in self.evaluated]
            if len(values) > 1:
                values.append(None if None in values else values[1] - values[0])
            rows.append([name, *map(number, values)])
        head = [self.marks[0], self.marks[1], "B - A"] if self.marks[0] else ["value"]
        tables = [table("figures", ["", *head], rows)]
        if self.marks[0]:
            tables.append(self.agreement())
        return section("Figures", "", tables)

    def agreement(self) -> Markup:
        """Count the pairs that both, one or neither export ranks right, among those both scored."""
        won: list[dict[tuple[int, int], bool]] = []
        for e in self.evaluated:
            pairs = zip(e.judged.group.tolist(), e.judged.pair.tolist(), strict=True)
            won.append(dict(zip(pairs, (e.judged.margins > 0).tolist(), strict=True)))
        both = [(won[0][key], won[1][key]) for key in won[0] if key in won[1]]
        cases = {
            "both": (True, True),
            "A only": (True, False),
            "B only": (False, True),
            "neither": (False, False),
        }
        rows = [
            [name, number(both.count(case)), share(both.count(case), len(both))]
            for name, case in cases.items()
        ]
        caption = "Pairs ranked right (a tie is wrong), among those that both exports scored"
        return table("agreement", ["ranked right by", "pairs", "share"], rows, caption)

    def training(self) -> Markup:
        if not any(e.history for e in self.evaluated):
            return Markup()
        blocks = []
        for key, label in (("loss", "loss (nats)"), ("accuracy", "accuracy (share of pairs)")):
            figure = draw_curve([(m, e.history) for m, e in self.marked], key, label)
            blocks.append(self.picture(key, figure, f"Training {key} by optimizer step"))
        for mark, e in self.marked:
            evaluated = [h for h in e.history if "eval_loss" in h]
            history = evaluated or e.history
            places = np.unique(np.linspace(0, len(history) - 1, 12).round().astype(int))
            rows = [training_row(history[i]) for i in places if history]
            if rows:
                caption = f"{len(rows)} of {len(e.history)} steps"
                found = table(f"training{mark}", STEP[: len(rows[0])], rows, caption)
                blocks.append(wide(self.titled(mark, e, found)))
        text = (
            "Thin: each optimizer step on its own training pairs. Thick: mean over the last steps. "
            "Dots: held-out pairs."
        )
        return section("Training", text, blocks)

    def rewards(self) -> Markup:
        blocks = []
        for mark, e in self.marked:
            judged = e.judged
            sides = {"chosen": judged.winner_reward, "rejected": judged.loser_reward}
            rows = [
                [name, *map(number, (len(r), r.mean(), r.std(), *np.quantile(r, QUANTILES)))]
                for name, r in sides.items()
            ]
            head = ["", "n", "mean", "std", *(f"{q:.0%}" for q in QUANTILES)]
            picture = self.picture(
                f"rewards{mark}", draw_rewards(judged), "Histogram of chosen and rejected rewards"
            )
            found = table(f"rewards{mark}", head, rows, "Rewards over pairs, with quantiles")
            blocks.append(self.block(mark, e, picture, found))
        text = "A response counts once for each of its pairs."
        return section("Chosen and rejected rewards", text, blocks)

    def reliability(self) -> Markup:
        blocks = []
        for mark, e in self.marked:
            bins = reliability(e.judged.margins)
            rows = [
                [
                    f"{b.low:.2f} to {b.high:.2f}",
                    number(b.pairs),
                    number(b.mean),
                    number(b.accuracy),
                    number(b.accuracy - b.mean),
                ]
                for b in bins
            ]
            picture = self.picture(
                f"reliability{mark}",
                draw_reliability(bins, e.figures["ece"], colour(mark)),
                "Accuracy against confidence",
            )
            head = ["confidence", "pairs", "mean", "accuracy", "difference"]
            caption = f"Expected calibration error {number(e.figures['ece'])}"
            blocks.append(
                self.block(mark, e, picture, table(f"reliability{mark}", head, rows, caption))
            )
        text = (
            "Confidence is sigmoid(|margin|): how sure the model is of the response with the "
            "higher reward. On the dashed line, accuracy equals confidence; below it, the model is "
            "overconfident. The error is the mean distance from the line, weighted by pairs."
        )
        return section("Reliability", text, blocks)

    def by_margin(self) -> Markup:
        blocks = []
        for mark, e in self.marked:
            bins = equal_bins(np.abs(e.judged.margins), e.judged.right, 8)
            name, label = f"margin{mark}", "|reward of chosen - reward of rejected|"
            blocks.append(self.binned(mark, e, name, bins, label, ".2f"))
            given = self.given_margins(e)
            if len(set(given)) > 1:
                bins = equal_bins(given, e.judged.right, 8)
                name, label = f"given-margin{mark}", "margin in the data"
                blocks.append(self.binned(mark, e, name, bins, label, ".3g"))
        return section(
            "Accuracy by margin", f"Bins hold about as many pairs each. {WHISKERS}", blocks
        )

    def given_margins(self, e: Evaluated) -> Floats:
        """Return the margin in the data of each judged pair; 0 if it has none."""
        return np.array(
            [
                self.groups[g].preferences[p].margin
                for g, p in zip(e.judged.group, e.judged.pair, strict=True)
            ]
        )

    def by_length(self) -> Markup:
        blocks = []
        for mark, e in self.marked:
            bins = signed_bins(e.judged.longer, e.judged.right, 4)
            label = "tokens that chosen is longer than rejected"
            blocks.append(self.binned(mark, e, f"length{mark}", bins, label, ".0f"))
        text = (
            "If accuracy is lower at the top, where chosen is shorter, than at the bottom, longer "
            f"responses get higher rewards for their length. {WHISKERS}"
        )
        return section("Accuracy by length difference", text, blocks)

    def binned(
        self, mark: str, e: Evaluated, name: str, bins: Sequence[Bin], label: str, form: str
    ) -> Markup:
        names = [span(b, form) for b in bins]
        rows = [
            [text, *map(number, (b.pairs, b.accuracy, *interval(b.accuracy, b.pairs)))]
            for text, b in zip(names, bins, strict=True)
        ]
        figure = draw_bins(names, bins, label, colour(mark))
        picture = self.picture(name, figure, f"Accuracy by {label}")
        head = ["bin", "pairs", "accuracy", "from", "to"]
        return self.block(mark, e, picture, table(name, head, rows, label))

    def reward_by_length(self) -> Markup:
        blocks = []
        for mark, e in self.marked:
            lengths, rewards = within_groups(e.scored)
            r = e.figures["length_correlation"]
            if r is None:
                continue
            slope = r * rewards.std() / lengths.std()
            rows = [
                ["responses", number(len(rewards))],
                ["correlation", number(r)],
                ["reward per 10 tokens (least squares)", number(10 * slope)],
            ]
            picture = self.picture(
                f"reward-length{mark}",
                draw_lengths(lengths, rewards, slope, colour(mark)),
                "Reward against length, both less the mean of their group",
            )
            blocks.append(
                self.block(mark, e, picture, table(f"reward-length{mark}", ["", ""], rows))
            )
        text = (
            "Each dot is a response, compared with the mean of the responses to its prompt, so "
            "that prompts with long answers do not count as a preference for length."
        )
        return section("Reward and length", text, blocks) if blocks else Markup()

    def subsets(self) -> Markup:
        subsets = [e.figures["subsets"] for e in self.evaluated]
        names = sorted(subsets[0], key=lambda name: -subsets[0][name]["pairs"])
        if len(names) < 2:
            return Markup()
        rows = []
        for name in sorted(names):
            cells = [name or "(none)"]
            for figures in subsets:
                found = figures[name]
                limits: tuple[float | None, float | None] = (None, None)
                if found["pairs"]:
                    limits = interval(found["accuracy"], found["pairs"])
                cells += map(number, (found["pairs"], found["accuracy"], *limits))
            rows.append(cells)
        head = ["subset"]
        for mark in self.marks:
            head += [f"{mark} {column}".strip() for column in ("pairs", "accuracy", "from", "to")]
        drawn = sorted(n for n in names[:SUBSETS] if all(s[n]["pairs"] for s in subsets))
        if not drawn:
            return Markup()
        figure = draw_subsets(drawn, list(zip(self.marks, subsets, strict=True)))
        left_out = f" Drawn: {len(drawn)} of {len(names)}." if len(drawn) < len(names) else ""
        blocks = [
            self.picture("subsets", figure, "Accuracy by subset"),
            wide(table("subsets", head, rows)) if self.marks[0] else table("subsets", head, rows),
        ]
        return section("Accuracy by subset", WHISKERS + left_out, blocks)

    def rm_bench(self) -> Markup:
        blocks = []
        for mark, e in self.marked:
            found = e.figures["rm_bench"]
            if found is None:
                continue
            picture = self.picture(
                f"styles{mark}", draw_styles(found), "Accuracy by style of chosen and of rejected"
            )
            rows = [
                [name, *(number(d[key]) for key in AVERAGES), number(sum(map(sum, d["pairs"])))]
                for name, d in [*found["domains"].items(), ("mean of the domains", found)]
            ]
            averages = table(f"rm-bench{mark}", ["domain", *AVERAGES, "pairs"], rows)
            cells = [
                [style, *(f"{number(a)} ({n})" for a, n in zip(accuracies, pairs, strict=True))]
                for style, accuracies, pairs in zip(
                    STYLES, found["matrix"], found["pairs"], strict=True
                )
            ]
            caption = "Accuracy (pairs): style of chosen by row, of rejected by column"
            matrix = table(f"styles{mark}", ["", *STYLES], cells, caption)
            blocks.append(self.block(mark, e, picture, averages + matrix))
        text = (
            "RM-Bench (Liu et al. 2024). Easy: chosen has the fancier style; normal: both have the "
            "same; hard: rejected has the fancier. A tie is wrong; every domain weighs the same."
        )
        return section("RM-Bench: accuracy by style", text, blocks) if blocks else Markup()

    def reward_bench(self) -> Markup:
        found = [e.figures["reward_bench"] for e in self.evaluated]
        if None in found:
            return Markup()
        rows = []
        for name, weights in REWARD_BENCH.items():
            sections = [f["sections"].get(name, {"score": None, "subsets": {}}) for f in found]
            if not any(s["subsets"] for s in sections):
                continue
            rows.append([name, "", *(number(s["score"]) for s in sections)])
            for subset, weight in weights.items():
                accuracies = [s["subsets"].get(subset, {}).get("accuracy") for s in sections]
                rows.append([f"· {subset}", number(weight), *map(number, accuracies)])
        rows.append(["mean of the four sections", "", *(number(f["mean"]) for f in found)])
        head = ["section", "weight", *(f"{mark} score".strip() for mark in self.marks)]
        text = (
            "RewardBench (Lambert et al. 2024). A section's score is the weighted mean of its "
            "subsets; a tie is wrong. The mean is given only if every subset is present."
        )
        return section("RewardBench: scores by section", text, [table("reward-bench", head, rows)])

    def mistakes(self) -> Markup:
        parts = [
            HTML.mistakes(title_of(mark, e), [self.mistake(e, place) for place in worst(e.judged)])
            for mark, e in self.marked
        ]
        text = f"The {MISTAKES} pairs with the lowest margins below 0, at most one per group."
        return section("Worst mistakes", text, parts, "")

    def mistake(self, e: Evaluated, place: int) -> Markup:
        judged = e.judged
        g, winner, loser = (
            int(judged.group[place]),
            int(judged.winner[place]),
            int(judged.loser[place]),
        )
        group = self.groups[g]
        others = []
        for mark, other in self.marked:
            if other is not e:
                rewards = other.scored[g].rewards
                others.append(
                    f"{mark}: chosen {number(rewards[winner])}, rejected {number(rewards[loser])}"
                )
        about = [
            group.source,
            *([group.subset] if group.subset else []),
            f"margin {number(judged.margins[place])}",
            f"chosen - rejected {judged.longer[place]:+.0f} tokens",
            *others,
        ]
        texts = [block_of_text("prompt", group.prompt, "")]
        for name, i, reward in (
            ("chosen", winner, judged.winner_reward[place]),
            ("rejected", loser, judged.loser_reward[place]),
        ):
            cut = "" if group.finished[i] else ", cut off by the sampler"
            title = f"{name}, reward {number(reward)}{cut}"
            texts.append(block_of_text(title, group.responses[i], name))
        return HTML.article(" · ".join(about), texts)

    # page ------------------------------------------------------------------------------------

    def picture(self, name: str, figure: Figure, alt: str) -> Markup:
        """Write a picture and return it embedded."""
        file = self.directory / f"{name}.png"
        save(figure, file)
        data = b64encode(file.read_bytes()).decode()
        return HTML.picture(alt, data)

    def block(self, mark: str, e: Evaluated, picture: Markup, text: Markup) -> Markup:
        """Put a picture and its table side by side; of two exports, one below the other."""
        return self.titled(mark, e, picture, text) if mark else HTML.beside(picture, text)

    def titled(self, mark: str, e: Evaluated, *blocks: Markup) -> Markup:
        return HTML.titled(title_of(mark, e), blocks)


def title_of(mark: str, e: Evaluated) -> str:
    """Return the title of one of two exports; a single export has none."""
    return f"{mark} {e.version}" if mark else ""


def training_row(step: dict[str, Any]) -> list[str]:
    rate = step["tokens"] / step["seconds"] if step.get("seconds") else None
    keys = ("step", "loss", "accuracy", "margin", "learning_rate", "grad_norm", "pairs")
    held_out = [step["eval_loss"], step["eval_accuracy"]] if "eval_loss" in step else []
    return [number(value) for value in (*map(step.get, keys), rate, *held_out)]


def worst(judged: Judged) -> list[int]:
    """Return the indices of the pairs with the lowest negative margins, at most one per group."""
    places: dict[int, int] = {}
    for place in np.argsort(judged.margins, kind="stable"):
        if judged.margins[place] < 0:
            places.setdefault(int(judged.group[place]), int(place))
    return list(places.values())[:MISTAKES]


# Text → HTML --------------------------------------------------------------------------------------


def section(title: str, text: str, blocks: Iterable[Markup], kind: str = "grid") -> Markup:
    return HTML.section(title, text, list(blocks), kind)


def wide(block: Markup) -> Markup:
    """Stretch a block across all columns of its section."""
    return HTML.wide(block)


def table(
    name: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
) -> Markup:
    return HTML.table(name, head, rows, caption)


def block_of_text(title: str, text: Text, kind: str) -> Markup:
    """Render a prompt or response; a note replaces the middle of a very long text."""
    messages = [{"role": "", "content": text}] if isinstance(text, str) else text
    parts = []
    for message in messages:
        content = shown_message(message)
        left_out = len(content) - SHOWN
        if left_out > 0:
            half = SHOWN // 2
            note = f"\n[… {left_out} characters left out …]\n"
            content = content[:half] + note + content[-half:]
        parts.append((message["role"], content))
    return HTML.text(title, kind, [part for part in parts if any(part)])


def shown_message(message: Message) -> str:
    """Return a message's content, after its tool calls and thoughts, each labelled by its key."""
    keyed = {key: message[key] for key in MESSAGE_KEYS if key in message}
    lines = [
        f"[{key}] {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in keyed.items()
    ]
    return "\n".join([*lines, message["content"] or ""]) if lines else str(message["content"])


def number(value: Any) -> str:
    """Format a figure: integers as they are, others by their size; None as n/a."""
    if value is None:
        return "n/a"
    if isinstance(value, int | np.integer):
        return str(value)
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def share(count: int, total: int) -> str:
    return number(count / total if total else None)


def span(b: Bin, form: str) -> str:
    low, high = format(b.low, form), format(b.high, form)
    return low if low == high else f"{low} to {high}"
