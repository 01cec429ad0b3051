"""The report: each number recomputed from the rewards by other means, and a page safe to open."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from rayrm.data.records import Group, Preference, Text, read_groups
from rayrm.evaluation import pictures
from rayrm.evaluation.evaluate import Bin, Judged, ScoredGroup, equal_bins, interval, signed_bins
from rayrm.evaluation.report import PAGE, Evaluated, block_of_text, number, worst, write_report

WORDS = ["red", "blue", "green", "black", "white", "pink", "grey"]
HISTORY = [
    {
        "step": step,
        "loss": 1 / step,
        "accuracy": 0.5 + step / 100,
        "margin": step / 10,
        "learning_rate": 1e-5 * step,
        "grad_norm": None,
        "pairs": 16,
        "tokens": 1000 * step,
        "seconds": 2.0,
        **({"eval_loss": 2 / step, "eval_accuracy": 0.6, "eval_margin": 1.0} if step > 28 else {}),
    }
    for step in range(1, 31)
]


class Page(HTMLParser):
    """A page's tags, its text, its tables by id as rows of cells, and the sources of its images."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[str] = []
        self.text = ""
        self.cell: str | None = None
        self.table = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, found := dict(attributes)))
        if tag == "table":
            self.table = found["id"] or ""
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "img":
            self.images.append(found["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[self.table][-1].append(self.cell or "")
            self.cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell is not None:
            self.cell += data


def invented(seed: int = 0) -> tuple[list[Group], list[ScoredGroup]]:
    """60 groups of two to four responses in three subsets, with ties, soft labels and failures."""
    rng = np.random.default_rng(seed)
    groups, scored = [], []
    for i in range(60):
        count = int(rng.integers(2, 5))
        pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
        labels = rng.choice([1.0, 0.9, 0.2, 0.5], len(pairs), p=[0.7, 0.1, 0.15, 0.05])
        margins = rng.choice([0.0, 1.0, 2.0], len(pairs))
        rewards = rng.normal(np.arange(count, 0, -1), 1.5).astype(np.float32)
        if i % 10 == 0:
            rewards[1] = rewards[0]
        if i % 13 == 5:
            rewards[0] = np.nan
        responses: list[Text] = [" ".join(rng.choice(WORDS, 5)) + f" {i}.{k}" for k in range(count)]
        preferences = [
            Preference(a, b, float(m), float(label))
            for (a, b), m, label in zip(pairs, margins, labels, strict=True)
        ]
        subset = ("one", "two", "three")[i % 3]
        finished = [True] * count
        groups.append(Group(f"prompt {i}", responses, preferences, finished, subset, f"d:{i + 1}"))
        lengths = rng.integers(5, 30, count)
        scored.append(ScoredGroup(rewards, lengths, np.array(pairs), labels, subset))
    return groups, scored


Pair = tuple[int, int, int, float, float, int, str, float]
"""Group, winner, loser, reward of winner, of loser, tokens longer, subset, margin in the data."""


def pairs_of(groups: Sequence[Group], scored: Sequence[ScoredGroup]) -> list[Pair]:
    """The judged pairs, one by one in plain Python."""
    found: list[Pair] = []
    for g, (group, scores) in enumerate(zip(groups, scored, strict=True)):
        for p in group.preferences:
            winner, loser = (p.rejected, p.chosen) if p.label < 0.5 else (p.chosen, p.rejected)
            rewards = float(scores.rewards[winner]), float(scores.rewards[loser])
            if p.label == 0.5 or any(map(math.isnan, rewards)):
                continue
            longer = int(scores.lengths[winner] - scores.lengths[loser])
            found.append((g, winner, loser, *rewards, longer, group.subset, p.margin))
    return found


def accuracy(pairs: Sequence[Pair]) -> float:
    return statistics.fmean(0.5 if p[3] == p[4] else float(p[3] > p[4]) for p in pairs)


def written(
    directory: Path, *evaluated: Evaluated, groups: Sequence[Group], data: str = ""
) -> Page:
    page = write_report(directory, groups, evaluated, data)
    assert page == directory / PAGE
    return Page(page.read_text())


def one(scored: list[ScoredGroup], version: str = "m@1", history: Any = ()) -> Evaluated:
    return Evaluated(version, scored, list(history))


def column(rows: Sequence[Sequence[str]], place: int) -> list[float]:
    return [float(row[place]) for row in rows[1:]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, list[Group], list[ScoredGroup]]:
    groups, scored = invented()
    directory = tmp_path_factory.mktemp("report")
    found = written(directory, one(scored, history=HISTORY), groups=groups, data="some data")
    return found, groups, scored


def test_the_figures_are_those_of_the_rewards(page: Any) -> None:
    found, groups, scored = page
    pairs = pairs_of(groups, scored)
    margins = [p[3] - p[4] for p in pairs]
    rewards = [float(r) for g in scored for r in g.rewards if not math.isnan(r)]
    table = {row[0].split(" (")[0].split(":")[0]: row[1] for row in found.tables["figures"][1:]}
    expected = {
        "accuracy": accuracy(pairs),
        "pairs with both rewards": len(pairs),
        "groups": 60,
        "mean margin": statistics.fmean(margins),
        "Bradley-Terry loss": statistics.fmean(math.log1p(math.exp(-m)) for m in margins),
        "mean reward": statistics.fmean(rewards),
        "standard deviation of rewards": statistics.pstdev(rewards),
        "responses that could not be scored": 5,
        "pairs without both rewards": sum(p.label != 0.5 for g in groups for p in g.preferences)
        - len(pairs),
        "responses whose prompt was cut": 0,
    }
    assert {name: table[name] for name in expected} == {n: number(v) for n, v in expected.items()}
    assert float(table["accuracy"]) not in (0, 0.5, 1)
    z, n, p = 1.959964, len(pairs), accuracy(pairs)
    ends = [
        (p + z * z / (2 * n) + sign * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
        / (1 + z * z / n)
        for sign in (-1, 1)
    ]
    assert f"{p:.3f} on {n} pairs (95 % interval {ends[0]:.3f} to {ends[1]:.3f})" in found.text
    assert "Data: some data" in found.text


def test_the_training_table_holds_steps_of_the_history(page: Any) -> None:
    head, *rows = page[0].tables["training"]
    assert [row[0] for row in rows] == ["29", "30"]  # those that were evaluated
    last = ["30", "0.033", "0.800", "3.000", "3.00e-04", "n/a", "16", "15000.0", "0.067", "0.600"]
    assert rows[-1] == last
    assert len(head) == len(last)


def test_reward_statistics_are_over_pairs(page: Any) -> None:
    found, groups, scored = page
    pairs = pairs_of(groups, scored)
    for row, place in zip(found.tables["rewards"][1:], (3, 4), strict=True):
        rewards = [float(p[place]) for p in pairs]
        expected = [len(rewards), statistics.fmean(rewards), statistics.pstdev(rewards)]
        twentieths = statistics.quantiles(rewards, n=20, method="inclusive")
        expected += [twentieths[i] for i in (0, 4, 9, 14, 18)]
        assert row[1:] == [number(value) for value in expected]


def test_reliability_bins_hold_the_pairs_of_their_confidence(page: Any) -> None:
    found, groups, scored = page
    pairs = pairs_of(groups, scored)
    rows = found.tables["reliability"][1:]
    gap = 0.0
    for row in rows:
        low, high = map(float, row[0].split(" to "))
        inside = [
            (sure, p)
            for p in pairs
            for sure in [1 / (1 + math.exp(-abs(p[3] - p[4])))]
            if low <= sure < high or (high == 1 and sure == 1)
        ]
        sure, right = statistics.fmean(s for s, _ in inside), accuracy([p for _, p in inside])
        assert row[1:] == [number(v) for v in (len(inside), sure, right, right - sure)]
        gap += abs(right - sure) * len(inside) / len(pairs)
    assert sum(int(row[1]) for row in rows) == len(pairs)
    assert f"Expected calibration error {number(gap)}" in found.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("margin", lambda p: round(abs(p[3] - p[4]), 2)),
        ("given-margin", lambda p: p[7]),
        ("length", lambda p: p[5]),
    ],
)
def test_bins_cover_all_pairs_once_and_tell_their_accuracy(
    page: Any, name: str, value: Callable[[Pair], float]
) -> None:
    found, groups, scored = page
    pairs = pairs_of(groups, scored)
    rows = found.tables[name][1:]
    for i, row in enumerate(rows):
        count = int(row[1])
        low, *high = map(float, row[0].split(" to "))
        # Margins stand rounded: of the pairs in order, these are the row's.
        start = sum(int(r[1]) for r in rows[:i])
        inside = sorted(pairs, key=lambda p: abs(p[3] - p[4]) if name == "margin" else value(p))
        inside = inside[start : start + count]
        assert {value(inside[0]), value(inside[-1])} == {low, *high}
        ends = interval(accuracy(inside), count)
        assert row[2:] == [number(v) for v in (accuracy(inside), *ends)]
    assert sum(int(row[1]) for row in rows) == len(pairs)
    assert len(rows) == {"margin": 8, "given-margin": 3}.get(name, 9)


def test_length_is_compared_within_groups(page: Any) -> None:
    found, _, scored = page
    lengths, rewards = [], []
    for group in scored:
        known = [(n, float(r)) for n, r in zip(group.lengths, group.rewards) if not math.isnan(r)]  # noqa: B905
        if len(known) < 2:
            continue
        lengths += [n - statistics.fmean(m for m, _ in known) for n, _ in known]
        rewards += [r - statistics.fmean(s for _, s in known) for _, r in known]
    fit = statistics.linear_regression(lengths, rewards)
    table = dict(row for row in found.tables["reward-length"] if row[0])
    assert table == {
        "responses": str(len(rewards)),
        "correlation": number(statistics.correlation(lengths, rewards)),
        "reward per 10 tokens (least squares)": number(10 * fit.slope),
    }


def test_subsets_have_their_own_rows(page: Any) -> None:
    found, groups, scored = page
    rows = found.tables["subsets"][1:]
    assert [row[0] for row in rows] == ["one", "three", "two"]
    for row in rows:
        inside = [p for p in pairs_of(groups, scored) if p[6] == row[0]]
        right = accuracy(inside)
        assert row[1:] == [number(v) for v in (len(inside), right, *interval(right, len(inside)))]


def test_the_worst_pair_of_each_group_is_shown_worst_first(page: Any) -> None:
    found, groups, scored = page
    worst_of: dict[int, Pair] = {}
    for p in pairs_of(groups, scored):
        if (
            p[3] < p[4]
            and p[3] - p[4]
            < worst_of.get(p[0], (0,) * 3 + (9.0, 9.0))[3]
            - (worst_of.get(p[0], (0,) * 3 + (9.0, 9.0))[4])
        ):
            worst_of[p[0]] = p
    expected = sorted(worst_of.values(), key=lambda p: p[3] - p[4])[:10]
    text = found.text[found.text.index("Worst mistakes") :]
    articles = re.split(r"(?=d:\d+ · )", text)[1:]
    assert len(articles) == 10
    for article, (g, winner, loser, high, low, longer, subset, _) in zip(
        articles, expected, strict=True
    ):
        assert article.startswith(
            f"d:{g + 1} · {subset} · margin {number(high - low)} · "
            f"chosen - rejected {longer:+d} tokens"
        )
        assert groups[g].prompt in article
        chosen = f"chosen, reward {number(high)}{groups[g].responses[winner]}"
        assert f"{chosen}rejected, reward {number(low)}{groups[g].responses[loser]}" in article


def test_two_exports_stand_side_by_side(tmp_path: Path) -> None:
    groups, scored = invented()
    rng = np.random.default_rng(7)
    noisy = [
        ScoredGroup(g.rewards + rng.normal(0, 2, len(g.rewards)), g.lengths, g.pairs, g.labels, "")
        for g in scored
    ]
    noisy[3].rewards[:] = np.nan
    noisy = [
        ScoredGroup(n.rewards, n.lengths, n.pairs, n.labels, g.subset)
        for n, g in zip(noisy, groups, strict=True)
    ]
    found = written(tmp_path, one(scored), one(noisy, "other@2", HISTORY), groups=groups)
    mine, theirs = pairs_of(groups, scored), pairs_of(groups, noisy)
    rows = {row[0]: row[1:] for row in found.tables["figures"]}
    values = accuracy(mine), accuracy(theirs)
    assert rows[""] == ["A", "B", "B - A"]
    expected = [number(v) for v in (*values, values[1] - values[0])]
    assert rows["accuracy (a tie is half right)"] == expected
    won = {p[:3]: p[3] > p[4] for p in mine}
    other = {p[:3]: p[3] > p[4] for p in theirs}
    counts = {
        name: sum((won[key], other[key]) == case for key in won.keys() & other.keys())
        for name, case in (
            ("both", (True, True)),
            ("A only", (True, False)),
            ("B only", (False, True)),
            ("neither", (False, False)),
        )
    }
    assert min(counts.values()) > 0
    assert {row[0]: int(row[1]) for row in found.tables["agreement"][1:]} == counts
    assert len(other) < len(won)
    assert {"rewardsA", "rewardsB", "reliabilityB", "lengthA", "trainingB"} <= found.tables.keys()
    assert "trainingA" not in found.tables
    (subset,) = [row for row in found.tables["subsets"] if row[0] == "two"]
    assert subset[1] == str(sum(p[6] == "two" for p in mine))
    assert subset[5] == str(sum(p[6] == "two" for p in theirs))
    assert subset[6] == number(accuracy([p for p in theirs if p[6] == "two"]))
    assert "m@1" in found.text and "other@2" in found.text
    assert len(found.images) == len({*found.images}) == len([*tmp_path.glob("*.png")])


HOSTILE = '</pre><script>alert("1")</script><img src=http://x.test/a.png onerror=x> & $x^{$ \\frac'


def test_the_page_needs_nothing_else_and_text_stays_text(tmp_path: Path) -> None:
    groups = [
        Group(
            [{"role": HOSTILE, "content": HOSTILE}],
            [[{"role": "assistant", "content": f"{HOSTILE}{k}"}] for k in range(2)],
            [Preference(0, 1)],
            [True, False],
            HOSTILE if i else "_plain",
            f"{HOSTILE}:1",
        )
        for i in range(2)
    ]
    scored = [
        ScoredGroup(np.array([0, 1]), np.array([3, 4]), np.array([[0, 1]]), np.ones(1), g.subset)
        for g in groups
    ]
    found = written(tmp_path, one(scored, HOSTILE, HISTORY), groups=groups, data=HOSTILE)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg"}
    for tag, attributes in found.tags:
        assert attributes.keys() <= {"id", "class", "src", "alt", "lang", "charset", "name"} | {
            "content",
            "http-equiv",
        }, tag
    files = {base64.b64encode(file.read_bytes()).decode() for file in tmp_path.glob("*.png")}
    assert {image.removeprefix("data:image/png;base64,") for image in found.images} == files
    assert len(found.images) == 8
    html = (tmp_path / PAGE).read_text()
    assert "url(" not in html and "@import" not in html
    # title, heading, data, subset in its table; twice in source, subset, prompt, role and responses
    assert found.text.count(HOSTILE) == 4 + 1 + 2 * 5
    assert "cut off by the sampler" in found.text


def test_nothing_judged_is_said_and_not_drawn(tmp_path: Path) -> None:
    groups = [Group("p", ["a", "b"], [Preference(0, 1)], [True] * 2, "", "f:1")]
    failed = ScoredGroup(np.full(2, np.nan), np.array([1, 2]), np.array([[0, 1]]), np.ones(1), "")
    found = written(tmp_path, one([failed]), groups=groups)
    assert "No pair has a winner and both its rewards." in found.text
    assert not found.images and list(found.tables) == ["figures"]


def test_one_perfect_pair_makes_a_page(tmp_path: Path) -> None:
    groups = [Group("p", ["a", "b"], [Preference(0, 1)], [True] * 2, "", "f:1")]
    scored = ScoredGroup(np.array([2, 1]), np.array([3, 3]), np.array([[0, 1]]), np.ones(1), "")
    found = written(tmp_path, one([scored], history=HISTORY[:1]), groups=groups)
    assert found.tables["length"][1][:3] == ["0", "1", "1.000"]
    assert "subsets" not in found.tables and "reward-length" not in found.tables
    assert "None." in found.text[found.text.index("Worst mistakes") :]


def test_of_a_very_long_text_the_middle_is_left_out_and_counted() -> None:
    text = "a" * 3000 + "b" * 3000
    shown = Page(block_of_text("prompt", text, "")).text
    assert "a" * 1000 + "\n[… 4000 characters left out …]\n" + "b" * 1000 in shown
    assert "a" * 1001 not in shown
    assert "left out" not in Page(block_of_text("prompt", "a" * 2000, "")).text


# Benchmarks ---------------------------------------------------------------------------------------


def test_rm_bench_matrices_are_on_the_page(tmp_path: Path) -> None:
    """A model that prefers chosen, but fancy style more: hard is lost, normal and easy are won."""
    file = tmp_path / "rm-bench.json"
    records = [
        {
            "id": str(i),
            "prompt": f"p{i}",
            "chosen": [f"good {style}" for style in range(3)],
            "rejected": [f"bad {style}" for style in range(3)],
            "domain": domain,
        }
        for i, domain in enumerate(["chat", "safety-refuse", "safety-response"])
    ]
    file.write_text(json.dumps(records))
    groups, _ = read_groups(str(file))
    scored = []
    for group in groups:
        kinds = [str(text).split() for text in group.responses]
        scored.append(
            ScoredGroup(
                np.array([2 * int(style) + (kind == "good") for kind, style in kinds]),
                np.arange(6),
                np.array([(p.chosen, p.rejected) for p in group.preferences]),
                np.ones(9),
                group.subset,
                np.array([p.styles for p in group.preferences]),
            )
        )
    found = written(tmp_path / "report", one(scored), groups=groups)
    assert found.tables["rm-bench"][1:] == [
        ["chat", "1.000", "1.000", "0.000", "0.667", "9"],
        ["safety", "1.000", "1.000", "0.000", "0.667", "18"],
        ["mean of the domains", "1.000", "1.000", "0.000", "0.667", "27"],
    ]
    assert [row[1:] for row in found.tables["styles"][1:]] == [
        ["1.000 (3)", "0.000 (3)", "0.000 (3)"],
        ["1.000 (3)", "1.000 (3)", "0.000 (3)"],
        ["1.000 (3)", "1.000 (3)", "1.000 (3)"],
    ]


def test_reward_bench_sections_are_on_the_page(tmp_path: Path) -> None:
    groups, scored = [], []
    for i, (subset, won) in enumerate(
        [("math-prm", 1), ("math-prm", 0), ("hep-cpp", 1), ("mt-bench-easy", 0)]
    ):
        groups.append(Group(f"p{i}", ["a", "b"], [Preference(0, 1)], [True] * 2, subset, "f:1"))
        rewards = np.array([won, 1 - won])
        scored.append(ScoredGroup(rewards, np.ones(2), np.array([[0, 1]]), np.ones(1), subset))
    table = written(tmp_path, one(scored), groups=groups).tables["reward-bench"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["Reasoning"] == ["", number((984 * 0.5 + 164) / (984 + 164))]
    assert rows["· math-prm"] == ["984", "0.500"]
    assert rows["· hep-go"] == ["164", "n/a"]
    assert rows["Chat"] == ["", "0.000"]
    assert "Safety" not in rows
    assert rows["mean of the four sections"] == ["", "n/a"]


# Pictures -----------------------------------------------------------------------------------------


def ys(line: Line2D) -> list[float]:
    heights: list[float] = np.asarray(line.get_ydata(), dtype=float).tolist()
    return heights


def test_curves_show_every_step_their_running_mean_and_held_out_points() -> None:
    axes = pictures.draw_curve(
        [("", [dict(h, step=h["step"]) for h in HISTORY * 2])], "loss", "x"
    ).axes[0]
    raw, mean, held_out = axes.get_lines()
    losses = [h["loss"] for h in HISTORY * 2]
    assert ys(raw) == losses
    assert mean.get_label() == "training, mean of 3 steps"
    np.testing.assert_allclose(ys(mean)[:4], [1, 0.75, 11 / 18, (1 / 2 + 1 / 3 + 1 / 4) / 3])
    assert ys(held_out) == [2 / 29, 2 / 30] * 2


def test_histograms_hold_every_pair() -> None:
    judged = Judged.of(invented()[1])
    axes = pictures.draw_rewards(judged).axes[0]
    chosen, rejected = axes.patches
    edges = np.histogram_bin_edges([*judged.winner_reward, *judged.loser_reward], bins=40)
    for patch, rewards in ((chosen, judged.winner_reward), (rejected, judged.loser_reward)):
        heights = np.asarray(patch.get_path().vertices)[1::2, 1][:40]
        np.testing.assert_array_equal(heights, np.histogram(rewards, edges)[0])
    assert f"n = {len(judged)} pairs" in axes.get_title()


def test_bars_are_as_long_as_accuracy_and_tell_the_number_of_pairs() -> None:
    bins = [Bin(0, 1, 10, 0.5, 0.3), Bin(1, 2, 250, 1.5, 0.9)]
    axes = pictures.draw_bins(["a", "b"], bins, "x", "#000000").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.3, 0.9]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["0.30  n = 10", "0.90  n = 250"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.yaxis_inverted()
    (whiskers,) = axes.collections
    for segment, b in zip(whiskers.get_segments(), bins, strict=True):  # type: ignore[attr-defined]
        np.testing.assert_allclose(segment[:, 0], interval(b.accuracy, b.pairs))


def test_subsets_are_drawn_by_name_and_export_whatever_the_name(tmp_path: Path) -> None:
    names = ["$x^{$", "_plain", "long " * 20]
    found = {name: {"accuracy": 0.1 * i, "pairs": 9} for i, name in enumerate(names, 1)}
    figure = pictures.draw_subsets(names, [("A", found), ("B", found)])
    pictures.save(figure, tmp_path / "subsets.png")
    axes = figure.axes[0]
    widths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([0.1, 0.2, 0.3] * 2)
    labels = [label.get_text().replace("\\$", "$") for label in axes.get_yticklabels()]
    assert labels == ["$x^{$", "_plain", "long long long long long long l…"]


def test_reliability_is_drawn_as_it_was_counted() -> None:
    bins = [Bin(0.5, 0.55, 7, 0.52, 0.6), Bin(0.9, 0.95, 9, 0.93, 0.8)]
    axes = pictures.draw_reliability(bins, 0.123, "#000000").axes[0]
    _, line = axes.get_lines()
    assert np.asarray(line.get_xydata()).tolist() == [[0.52, 0.6], [0.93, 0.8]]
    assert {"7", "9"} <= {text.get_text() for text in axes.texts}
    assert "ECE = 0.123" in str(line.get_label())


def test_the_style_matrix_is_drawn_chosen_down_and_rejected_across() -> None:
    matrix = [[0.5, 0.1, 0.2], [0.7, 0.6, None], [0.9, 0.8, 0.55]]
    pairs = [[1, 2, 3], [4, 5, 0], [7, 8, 9]]
    axes = pictures.draw_styles({"matrix": matrix, "pairs": pairs}).axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[(1, 0)] == "0.100\nhard, n = 2"
    assert texts[(0, 2)] == "0.900\neasy, n = 7"
    assert texts[(2, 2)] == "0.550\nnormal, n = 9"
    assert texts[(2, 1)] == "n/a\nhard, n = 0"


# Bins ---------------------------------------------------------------------------------------------


def test_bins_have_about_as_many_pairs_and_equal_values_share_one() -> None:
    values = np.array([5, 1, 2, 3, 4, 6, 7, 8])
    right = np.array([0, 1, 1, 1, 0, 0, 0, 1.0])
    bins = equal_bins(values, right, 4)
    assert [(b.low, b.high, b.pairs, b.accuracy) for b in bins] == [
        (1, 2, 2, 1),
        (3, 4, 2, 0.5),
        (5, 6, 2, 0),
        (7, 8, 2, 0.5),
    ]
    assert [b.mean for b in bins] == [1.5, 3.5, 5.5, 7.5]
    assert [b.pairs for b in equal_bins(np.array([1, 1, 1, 1, 1, 2]), np.ones(6), 3)] == [5, 1]
    assert equal_bins(np.empty(0), np.empty(0), 3) == []


def test_signed_bins_part_at_zero() -> None:
    values = np.array([-3, -2, -1, 0, 0, 1, 5, 9, 9])
    bins = signed_bins(values, np.ones(9), 2)
    assert [(b.low, b.high, b.pairs) for b in bins] == [
        (-3, -2, 2),
        (-1, -1, 1),
        (0, 0, 2),
        (1, 5, 2),
        (9, 9, 2),
    ]


def test_the_worst_are_one_a_group_and_never_ranked_right() -> None:
    scored = [
        ScoredGroup(np.array([0, 1, 3]), np.ones(3), np.array([[0, 1], [0, 2]]), np.ones(2), ""),
        ScoredGroup(np.array([1, 0]), np.ones(2), np.array([[0, 1]]), np.ones(1), ""),
        ScoredGroup(np.array([0, 0]), np.ones(2), np.array([[0, 1]]), np.ones(1), ""),
        ScoredGroup(np.array([0, 9]), np.ones(2), np.array([[0, 1]]), np.ones(1), ""),
    ]
    judged = Judged.of(scored)
    assert [(judged.group[i], judged.pair[i]) for i in worst(judged)] == [(3, 0), (0, 1)]
