"""What the latest rewards look like, from the figures by hand to those of a replica."""

from __future__ import annotations

import numpy as np
import pytest

from rayrm.rows import Row
from rayrm.serving.chunk import Step
from rayrm.serving.drift import RECENT, RecentRewards


def test_figures_by_hand() -> None:
    latest = RecentRewards()
    assert latest.drift() is None
    rewards = np.array([1, 2, np.nan, 3, 6], dtype=np.float32)
    lengths, responses = np.array([10.0, 30, 99, 20, 20]), np.array([7, 8, 9, 7, 7])
    latest.add(rewards, lengths, responses)
    drift = latest.drift()
    assert drift
    assert drift.reward_mean == 3 and drift.reward_std == pytest.approx(np.sqrt(3.5))
    assert drift.response_tokens == 20
    # Products of the deviations: (-2)(-10) + (-1)(10) + 0 + 0 over four rows.
    assert drift.reward_length_correlation == pytest.approx(2.5 / np.sqrt(3.5 * 50))
    assert drift.repeated_responses == 0.5, "two of four came before; a row without reward is none"


def test_what_does_not_vary_does_not_correlate() -> None:
    latest = RecentRewards()
    latest.add(np.full(4, 2, np.float32), np.arange(4.0), np.arange(4))
    drift = latest.drift()
    assert drift and drift.reward_length_correlation == 0 and drift.repeated_responses == 0


def test_only_the_latest_rows_count() -> None:
    latest = RecentRewards()
    for value, rows, mean in ((3, RECENT, 3), (5, RECENT // 2, 4), (7, RECENT // 2, 6)):
        latest.add(np.full(rows, value, np.float32), np.full(rows, float(value)), np.arange(rows))
        drift = latest.drift()
        assert drift and drift.reward_mean == drift.response_tokens == mean
        assert drift.repeated_responses == (0.5 if value == 7 else 0)


def test_a_chunk_tells_lengths_and_equal_responses_whatever_the_prompt() -> None:
    texts = [("a", "Plum"), ("b", "Plum"), ("a", "Plum"), ("a", "Two plums.")]
    step = Step([*(Row(*text) for text in texts), Row([1], [5, 6, 7])])
    chunk = step.chunk(list(step.places), None)
    assert chunk.copies.tolist() == [2, 1, 1, 1], "one group gave it twice"
    assert chunk.responses.tokens.tolist() == [1, 1, 2.5, 3]
    hashes = chunk.responses.hashes
    assert hashes[0] == hashes[1] and len(set(hashes.tolist())) == 3
