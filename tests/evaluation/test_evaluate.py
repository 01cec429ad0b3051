"""Figures by hand on small cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rayrm.data.records import Group, Preference
from rayrm.evaluation.evaluate import (
    REWARD_BENCH,
    ScoredGroup,
    calibration_error,
    equal_for_equals,
    evaluate,
    interval,
    summarize,
)
from rayrm.model.engine import RewardModel

NAN = float("nan")


def group(
    rewards: Sequence[float],
    pairs: Sequence[tuple[int, int]] = ((0, 1),),
    labels: Sequence[float] | None = None,
    lengths: Sequence[float] | None = None,
    subset: str = "",
) -> ScoredGroup:
    return ScoredGroup(
        np.array(rewards, dtype=np.float32),
        np.array(lengths or range(1, len(rewards) + 1), dtype=np.float64),
        np.array(pairs, dtype=np.int64).reshape(-1, 2),
        np.array(labels or [1.0] * len(pairs)),
        subset,
    )


def test_accuracy_margin_and_loss_by_hand() -> None:
    """Margins 1, -2, 0: one right, one wrong, one tie."""
    figures = summarize([group([1.5, 0.5]), group([0, 2]), group([3, 3])])
    assert figures["accuracy"] == 0.5
    assert figures["pairs"] == figures["groups"] == 3
    assert figures["margin"] == pytest.approx(-1 / 3)
    # log(1 + e^-1), log(1 + e^2), log 2
    assert figures["loss"] == pytest.approx((0.3132617 + 2.1269280 + 0.6931472) / 3)
    assert figures["reward_mean"] == pytest.approx(10 / 6)
    assert figures["reward_std"] == pytest.approx(1.1426091)
    assert figures["failed_responses"] == figures["failed_pairs"] == 0


@pytest.mark.parametrize(("label", "accuracy"), [(0.9, 1.0), (0.4, 0.0), (0.0, 0.0)])
def test_a_soft_label_below_a_half_turns_the_pair(label: float, accuracy: float) -> None:
    figures = summarize([group([1, 0], labels=[label])])
    assert figures["accuracy"] == accuracy
    assert figures["margin"] == (1 if accuracy else -1)


def test_a_label_of_a_half_prefers_nothing_and_has_not_failed() -> None:
    figures = summarize([group([1, 0], labels=[0.5]), group([1, 0])])
    assert (figures["pairs"], figures["failed_pairs"], figures["accuracy"]) == (1, 0, 1.0)


def test_rewards_that_failed_are_counted_and_left_out() -> None:
    figures = summarize(
        [
            group([1, NAN, 0], [(0, 1), (0, 2), (2, 1)]),
            group([NAN, NAN]),
            group([2, float("inf")]),
        ]
    )
    assert figures["failed_responses"] == 4
    assert figures["failed_pairs"] == 4 and figures["pairs"] == 1
    assert figures["accuracy"] == 1.0
    assert figures["reward_mean"] == 1.0 and figures["reward_std"] == pytest.approx(0.8164966)
    assert figures["best_of_n"] is None
    json.dumps(figures, allow_nan=False)


def test_nothing_scored_gives_no_figures() -> None:
    for groups in ([group([NAN, NAN])], [group([1, 2], [])]):
        figures = summarize(groups)
        for name in ("accuracy", "margin", "loss", "ece", "best_of_n"):
            assert figures[name] is None


def test_best_of_n_is_how_often_the_highest_reward_is_unbeaten() -> None:
    hit = group([0, 2, 1], [(1, 0), (1, 2)])
    miss = group([3, 2, 1], [(1, 0), (1, 2)])
    unjudged = group([0, 1, 2], [(0, 1)])  # nothing is preferred to the last
    pair = group([1, 0])
    assert summarize([hit, miss, pair])["best_of_n"] == 0.5
    assert summarize([hit, unjudged])["best_of_n"] == 1.0
    turned = group([3, 2, 1], [(1, 0), (1, 2)], labels=[0.2, 0.9])
    assert summarize([turned])["best_of_n"] == 1.0
    undecided = group([3, 2, 1], [(0, 1), (0, 2)], labels=[0.5, 0.5])
    assert summarize([undecided])["best_of_n"] == 1.0
    assert summarize([pair])["best_of_n"] is None


def test_best_of_n_gives_equal_rewards_what_chance_would() -> None:
    """A constant model does not win because the best response stands first in the data."""
    assert summarize([group([1, 1, 1, 1], [(0, 1), (0, 2), (0, 3)])])["best_of_n"] == 0.25
    assert summarize([group([2, 2, 1], [(0, 1), (0, 2)])])["best_of_n"] == 0.5


def test_calibration_error_by_hand() -> None:
    """σ(1) = 0.7310586 (bin 5 of ten over [0.5, 1]), σ(3) = 0.9525741 (bin 10)."""
    margins = np.array([1.0, 1.0, -1.0, 3.0])
    expected = (abs(3 * 0.7310586 - 2) + abs(0.9525741 - 1)) / 4
    assert calibration_error(margins) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(np.array([0.0])) == 0.0  # half sure, half right
    assert calibration_error(np.array([100.0, 100.0])) == pytest.approx(0, abs=1e-9)
    assert calibration_error(np.array([-100.0])) == pytest.approx(1)
    assert calibration_error(np.array([])) is None
    assert summarize([group([1, 0]), group([0, 1])])["ece"] == pytest.approx(0.2310586)


def test_the_interval_of_an_accuracy_by_hand() -> None:
    """Wilson's for 8 of 10, and for all of 10, where the normal approximation has no width."""
    assert interval(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert interval(1.0, 10) == pytest.approx((0.7224672, 1), abs=1e-6)


def test_length_correlation_is_within_groups() -> None:
    """Longer wins in each group; between groups the longer ones have the lower rewards."""
    short, long = group([10, 11], lengths=[1, 2]), group([0, 1], lengths=[101, 102])
    assert summarize([short, long])["length_correlation"] == pytest.approx(1)
    turned = group([1, 0], lengths=[1, 2])
    assert summarize([turned])["length_correlation"] == pytest.approx(-1)
    assert summarize([short, turned])["length_correlation"] == pytest.approx(0, abs=1e-9)
    assert summarize([group([1, 0], lengths=[5, 5])])["length_correlation"] is None
    assert summarize([group([1, NAN, 0], lengths=[5, 1, 6])])["length_correlation"] == (
        pytest.approx(-1)
    )


def test_subsets_have_their_own_accuracy() -> None:
    figures = summarize(
        [
            group([1, 0], subset="b"),
            group([0, 1], subset="a"),
            group([1, 0], subset="b"),
            group([1, NAN], subset="c"),
        ]
    )
    assert figures["subsets"] == {
        "a": {"accuracy": 0.0, "pairs": 1},
        "b": {"accuracy": 1.0, "pairs": 2},
        "c": {"accuracy": None, "pairs": 0},
    }
    assert list(figures["subsets"]) == ["a", "b", "c"]


# Benchmarks ---------------------------------------------------------------------------------------


def styled(chosen: Sequence[float], rejected: Sequence[float], subset: str) -> ScoredGroup:
    """RM-Bench's shape: three chosen and three rejected, each in three styles."""
    places = [(c, r) for c in range(3) for r in range(3)]
    return ScoredGroup(
        np.array([*chosen, *rejected], dtype=np.float32),
        np.arange(6),
        np.array([(c, 3 + r) for c, r in places]),
        np.ones(9),
        subset,
        np.array(places),
    )


def test_the_style_matrix_by_hand() -> None:
    """chat: chosen 1 2 3 over rejected 0 2 2.5, and 0 0 5 over 1 1 1; math: 3 2 1 over 0 1 2."""
    figures = summarize(
        [
            styled([1, 2, 3], [0, 2, 2.5], "chat"),
            styled([0, 0, 5], [1, 1, 1], "chat"),
            styled([3, 2, 1], [0, 1, 2], "math"),
        ]
    )["rm_bench"]
    # Chosen down, rejected across; a tie is wrong.
    assert figures["domains"]["chat"]["matrix"] == [[0.5, 0, 0], [0.5, 0, 0], [1, 1, 1]]
    assert figures["domains"]["math"]["matrix"] == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert figures["domains"]["chat"]["pairs"] == [[2] * 3] * 3
    averages = {
        name: [figures["domains"][name][key] for key in ("easy", "normal", "hard", "mean")]
        for name in ("chat", "math")
    }
    assert averages["chat"] == pytest.approx([2.5 / 3, 1.5 / 3, 0, 4 / 9])
    assert averages["math"] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 6 / 9])
    # A domain weighs the same with two prompts as with one.
    assert figures["matrix"] == [[0.75, 0.5, 0.5], [0.75, 0.5, 0], [1, 0.5, 0.5]]
    assert figures["pairs"] == [[3] * 3] * 3
    assert [figures[key] for key in ("easy", "normal", "hard", "mean")] == pytest.approx(
        [0.75, 1.75 / 3, 1 / 3, 5 / 9]
    )


def test_both_halves_of_safety_are_one_domain_and_others_stand_alone() -> None:
    won, lost = ([1, 1, 1], [0, 0, 0]), ([0, 0, 0], [1, 1, 1])
    figures = summarize(
        [
            styled(*won, "safety-refuse"),
            styled(*won, "safety-refuse"),
            styled(*lost, "safety-response"),
            styled(*won, "mine"),
        ]
    )["rm_bench"]
    assert {n: d["mean"] for n, d in figures["domains"].items()} == pytest.approx(
        {"mine": 1, "safety": 2 / 3}
    )
    assert figures["mean"] == pytest.approx(5 / 6)


def test_a_cell_without_pairs_has_no_accuracy_and_nor_has_what_needs_it() -> None:
    figures = summarize([styled([NAN, 2, 3], [0, 1, 1], "chat")])["rm_bench"]
    assert figures["matrix"] == [[None] * 3, [1, 1, 1], [1, 1, 1]]
    assert figures["pairs"] == [[0] * 3, [1] * 3, [1] * 3]
    assert [figures[key] for key in ("easy", "normal", "hard", "mean")] == [1, None, None, None]
    json.dumps(figures, allow_nan=False)


def test_there_is_no_style_matrix_unless_every_pair_has_styles() -> None:
    figures = summarize([styled([1, 1, 1], [0, 0, 0], "chat"), group([1, 0])])
    assert figures["rm_bench"] is None and figures["reward_bench"] is None
    assert summarize([group([NAN, 0])])["rm_bench"] is None


def test_section_scores_weigh_subsets_as_reward_bench_does() -> None:
    """math-prm half right of two pairs, hep-go right; a tie in mt-bench-easy is wrong."""
    figures = summarize(
        [
            group([1, 0], subset="math-prm"),
            group([0, 1], subset="math-prm"),
            group([1, 0], subset="hep-go"),
            group([1, 1], subset="mt-bench-easy"),
            group([NAN, 1], subset="mt-bench-med"),
            group([1, 0], subset="my own"),
        ]
    )["reward_bench"]
    sections = figures["sections"]
    assert {n: s["score"] for n, s in sections.items()} == pytest.approx(
        {"Chat": 0, "Reasoning": (984 * 0.5 + 164) / 1148}
    )
    assert sections["Reasoning"]["subsets"] == {
        "math-prm": {"accuracy": 0.5, "weight": 984},
        "hep-go": {"accuracy": 1.0, "weight": 164},
    }
    assert sections["Chat"]["subsets"].keys() == {"mt-bench-easy"}
    assert figures["mean"] is None


def test_the_mean_of_sections_is_given_when_every_subset_is_there() -> None:
    names = [name for weights in REWARD_BENCH.values() for name in weights]
    groups = [group([0, 1] if n.startswith(("hep", "llmbar")) else [1, 0], subset=n) for n in names]
    figures = summarize(groups)["reward_bench"]
    scores = {name: section["score"] for name, section in figures["sections"].items()}
    expected = {"Chat": 1, "Chat Hard": 37 / 456, "Safety": 1, "Reasoning": 0.5}
    assert scores == pytest.approx(expected)
    assert figures["mean"] == pytest.approx(sum(expected.values()) / 4)
    assert len(names) == 23
    assert sum(REWARD_BENCH["Reasoning"].values()) == 2 * 984


# With a model -------------------------------------------------------------------------------------


def preferences(prompt: str, responses: list[str], *pairs: tuple[int, int]) -> Group:
    wins = [Preference(*pair) for pair in pairs]
    return Group(prompt, list(responses), wins, [True] * len(responses), prompt[:1], "f:1")


def test_evaluating_is_scoring_and_summing_up(tiny_export: Path) -> None:
    model = RewardModel.load(tiny_export, device="cpu", dtype="float32")
    groups = [
        preferences("a prompt", ["red", "blue and red", "apples"], (0, 1), (0, 2)),
        preferences("another", ["Paris", "London is"], (1, 0)),
        preferences("b", ["x", "word " * 200], (0, 1)),
    ]
    figures = evaluate(model, groups)
    values = model.score(
        [g.prompt for g in groups for _ in g.responses], [r for g in groups for r in g.responses]
    ).values
    margins = [values[0] - values[1], values[0] - values[2], values[4] - values[3]]
    assert figures["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))
    assert figures["margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert (figures["pairs"], figures["failed_pairs"], figures["failed_responses"]) == (3, 1, 1)
    assert figures["subsets"]["b"] == {"accuracy": None, "pairs": 0}
    assert figures["truncated"] == 0
    json.dumps(figures, allow_nan=False)


def test_rewards_that_differ_by_rounding_are_equal_for_rows_of_the_same_ids() -> None:
    rows = [np.array(ids, dtype=np.int32) for ids in ([1, 2], [1, 3], [1, 2], [1, 2, 3])]
    rewards = np.array([0.1, 0.2, 0.1 + 1e-7, 0.1 - 1e-7])
    found = equal_for_equals(rows, rewards).tolist()
    assert found == [0.1, 0.2, 0.1, 0.1 - 1e-7]


def test_responses_that_are_equal_as_ids_tie(tiny_export: Path) -> None:
    """Computed in one pack they would differ by rounding, and be half right only now and then."""
    model = RewardModel.load(tiny_export, device="cpu")
    groups = [
        preferences(f"{i} blue", ["red", f"apples {i}", "red<|im_end|>"], (0, 2)) for i in range(9)
    ]
    figures = evaluate(model, groups)
    assert (figures["accuracy"], figures["margin"], figures["pairs"]) == (0.5, 0.0, 9)


def test_length_counts_response_tokens_even_where_some_prompts_were_cut(tiny_export: Path) -> None:
    """Responses of 5 to 120 characters to one prompt that only the longer ones do not fit with."""
    model = RewardModel.load(
        tiny_export, device="cpu", dtype="float32", max_length=150, overlong="truncate"
    )
    groups = [preferences("@" * 60, ["#" * n for n in (5, 20, 60, 100, 120)], (0, 1))]
    figures = evaluate(model, groups)
    assert 0 < figures["truncated"] < 5
    values = model.score(["@" * 60] * 5, groups[0].responses).values
    expected = np.corrcoef(values, [5, 20, 60, 100, 120])[0, 1]
    assert figures["length_correlation"] == pytest.approx(expected, abs=1e-4)
