"""The plan of GPUs: its arithmetic by hand, and that a better split is not overlooked."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from rayrm.commands.plan import (
    Run,
    best,
    describe,
    fits,
    learner_gb,
    replica_gb,
    rollout_gb,
    seconds,
    splits,
)

ROUND = Run(
    policy=1e9, reward=2e9, memory=80, activations=10, cache=1e5, prompts=10, responses=4,
    prompt=100, response=50, epochs=2, score=1000, generate=100, train=500,
)  # fmt: skip


def test_seconds_by_hand() -> None:
    split = seconds(ROUND, learner=3, rollout=4, replicas=2)
    assert split.sampling == pytest.approx(10 * 4 * 50 / (100 * 4))
    assert split.scoring == pytest.approx(10 * (100 + 4 * 50) / (1000 * 2)), "a prompt once"
    assert split.learning == pytest.approx(2 * 2 * 40 * 150 / (500 * 3)), "policy and critic"
    assert split.waiting == 0 and split.step == split.sampling + split.learning
    late = seconds(ROUND, learner=3, rollout=40, replicas=1)
    assert late.waiting == pytest.approx(3 - 0.5) and late.step == pytest.approx(3 + late.learning)


def test_memory_by_hand() -> None:
    assert learner_gb(ROUND, 2) == pytest.approx((16 + 16 + 2) / 2 + 10)
    assert rollout_gb(ROUND, 4) == pytest.approx(2 + 3 * 4 * 150 * 1e5 / 1e9)
    assert replica_gb(ROUND) == pytest.approx(2 * 2 * 2 + 4)


def test_the_best_split_fits_and_no_other_that_fits_is_shorter() -> None:
    run = Run()
    for gpus in (8, 32):
        plan = best(run, gpus)
        assert plan and plan.learner + plan.rollout + plan.replicas == gpus
        assert fits(run, plan.learner, plan.rollout)
        every = [s for s in itertools.product(range(1, gpus), repeat=3) if sum(s) == gpus]
        shortest = min(seconds(run, *s).step for s in every if fits(run, *s[:2]))
        assert plan.step == shortest
    assert len(list(splits(run, 8))) < len(list(splits(Run(memory=1000), 8)))


def test_what_does_not_fit_is_said() -> None:
    assert best(Run(policy=70e9), 8) is None
    assert "does not fit" in describe(Run(policy=70e9), 8)


def test_the_command_prints_its_assumptions_and_a_row_for_each_cluster() -> None:
    command = [sys.executable, "jobs/plan.py", "--gpus", "8", "16", "--score", "1234"]
    printed = subprocess.check_output(command, text=True)
    assert "score 1234," in printed
    assert [line.split()[1] for line in printed.splitlines()[-2:]] == ["8", "16"]
