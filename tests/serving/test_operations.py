"""A version on trial scores a share of the callers, or what the current one has answered."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import serve

from rayrm.errors import ConfigError, ServiceError
from rayrm.model.engine import RewardModel
from rayrm.rows import Rewards
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.metrics import SHADOW
from rayrm.serving.operations import compare, deploy, promote, rollback, try_out
from rayrm.serving.record import Record, Served, Trial, read_record
from rayrm.serving.replica import Replica
from rayrm.serving.shadow import Comparison, Difference, disagreement, merge, rank_correlation
from tests.service import assert_same, before_each_pack, stats, texts, until
from tests.test_metrics import REMEMBERED_S, scrape

APP = "trial"


class FaultyReplica(Replica):
    """The model of an export beside which lies a file "faulty" raises for every row."""

    def _load(self, config: ServeConfig) -> RewardModel:
        faulty = Path(config.export).parent / "faulty"

        def fail() -> None:
            if faulty.exists():
                raise RuntimeError("no")

        return before_each_pack(super()._load(config), fail)


@pytest.fixture(scope="module")
def app(cluster: None, tiny_export: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.serving.application.Replica", FaultyReplica)
        deploy(
            ServeConfig(
                export=str(tiny_export), dtype="float32", app=APP, replicas=2, tokens_per_pack=512
            )
        )
        yield
    serve.delete(APP)


@pytest.fixture(scope="module")
def old(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


@pytest.fixture(scope="module")
def new(other_export: Path) -> RewardModel:
    return RewardModel.load(other_export, "cpu", "float32")


def run(*arguments: str) -> str:
    """What jobs/serve.py prints."""
    address = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "jobs/serve.py", *arguments]
    return subprocess.check_output(command, env=address, text=True)


def score(caller: int, responses: int = 2) -> Rewards:
    return RewardClient(APP, caller=f"caller {caller}").score(*texts(2, responses))


def rewards(*values: float) -> Rewards:
    n = len(values)
    nothing = np.zeros(n, dtype=bool)
    return Rewards(np.array(values, np.float32), [None] * n, nothing, nothing, [""] * n)


def test_a_canary_scores_its_share_of_the_callers_always_the_same_ones(
    app: None, other_export: Path, old: RewardModel, new: RewardModel
) -> None:
    assert f"{new.version} scores 50% of the callers" in run(
        "--canary", "0.5", str(other_export), APP
    )
    by: dict[str, list[int]] = {old.version: [], new.version: []}
    for caller in range(20):
        (version,) = set(score(caller).versions)
        by[version].append(caller)
        model = old if version == old.version else new
        assert_same(score(caller, 3), model.score(*texts(2, 3)))
    assert all(5 <= len(callers) <= 15 for callers in by.values())
    assert rollback(APP).version == old.version
    assert {score(caller).versions[0] for caller in range(20)} == {old.version}
    with pytest.raises(ServiceError, match="no version on trial"):
        promote(APP)


def test_what_is_promoted_scores_all_callers_and_can_be_rolled_back(
    app: None, other_export: Path, old: RewardModel, new: RewardModel
) -> None:
    before = {replica["pid"] for replica in stats(APP)}
    try_out(APP, str(other_export), 0.1)
    assert f"{APP!r} serves {new.version}" in run("--promote", APP)
    assert {score(caller).versions[0] for caller in range(20)} == {new.version}
    assert rollback(APP).version == old.version
    assert {score(caller).versions[0] for caller in range(20)} == {old.version}
    assert {replica["pid"] for replica in stats(APP)} == before, "no replica was replaced"


def test_a_shadow_answers_nobody_and_tells_how_it_differs(
    app: None, other_export: Path, old: RewardModel, new: RewardModel
) -> None:
    assert f"{new.version} scores what" in run("--shadow", str(other_export), APP)
    until(lambda: all(replica["shadow"] == new.version for replica in stats(APP)))
    step = texts(40, 4)
    assert_same(RewardClient(APP).score(*step), old.score(*step))
    until(lambda: compare(APP).rows == len(step[0]))
    a, b = (model.score(*step).values.astype(float) for model in (old, new))
    wanted = Comparison()
    prompts = {prompt: p for p, prompt in enumerate(dict.fromkeys(step[0]))}
    wanted.add(np.array([prompts[p] for p in step[0]], np.int32), rewards(*a), rewards(*b))
    found, expected = compare(APP), wanted.difference()
    assert found.mean_shift == pytest.approx(expected.mean_shift, abs=1e-4)
    assert (found.pairs, found.disagreement) == (expected.pairs, expected.disagreement)
    assert "over 160 rows: mean shift" in run("--compare", APP)
    time.sleep(REMEMBERED_S)
    figures = {f"serve_{figure}" for figure in SHADOW}
    assert figures <= scrape("application", APP).keys()
    assert f"serves {old.version} again" in run("--rollback", APP)
    until(lambda: not figures & scrape("application", APP).keys())
    score(0)
    until(lambda: all(replica["versions"] == [old.version] for replica in stats(APP)))


def test_a_shadow_that_fails_harms_nobody(
    app: None, other_export: Path, old: RewardModel, new: RewardModel
) -> None:
    before = {replica["pid"] for replica in stats(APP)}
    try_out(APP, str(other_export))
    until(lambda: all(replica["shadow"] == new.version for replica in stats(APP)))
    (faulty := other_export.parent / "faulty").touch()
    prompts = [f"What is {n}?" for n in range(40)]
    try:
        for response in ("Yes.", "No."):
            step = prompts, [response] * 40
            assert_same(RewardClient(APP).score(*step), old.score(*step))
            time.sleep(1.0)
        assert compare(APP).rows == 0
        assert {replica["pid"] for replica in stats(APP)} == before
    finally:
        faulty.unlink()
        rollback(APP)


def test_trials_that_cannot_be_are_refused(app: None, tmp_path: Path, other_export: Path) -> None:
    record = read_record(APP)
    with pytest.raises(ConfigError, match=r"share = 1.5: must be from 0"):
        try_out(APP, str(other_export), 1.5)
    with pytest.raises(ServiceError, match="'elsewhere' does not run"):
        try_out("elsewhere", str(other_export))
    assert read_record(APP) == record


def test_a_share_of_the_callers_is_drawn_by_their_names() -> None:
    export = Served(export="e", version="old@1")

    def record(share: float, version: str = "new@1") -> Record:
        trial = Trial(served=Served(export="e", version=version), share=share, since=0)
        return Record(config=ServeConfig(export="e"), started="e", current=export, trial=trial)

    names = [f"actor {n}" for n in range(1000)]
    for share in (0, 0.2, 1):
        drawn = [record(share).version_for(name).version for name in names]
        assert abs(drawn.count("new@1") / 1000 - share) < 0.05 * (0 < share < 1) + 1e-9
    fewer, more = (
        {n for n in names if record(s).version_for(n).version == "new@1"} for s in (0.2, 0.4)
    )
    assert fewer < more, "who was on trial stays"
    others = {n for n in names if record(0.2, "next@1").version_for(n).version == "next@1"}
    assert len(fewer & others) < 80, "another trial, other callers"


def test_differences_by_hand() -> None:
    comparison = Comparison()
    comparison.add(
        np.array([0, 0, 0, 1, 1, 2], np.int32),
        rewards(1, 2, 3, 5, 4, np.nan),
        rewards(2, 1, 4, 5, 5, 6),
    )
    told = comparison.difference()
    # Of the first prompt's three pairs one is turned round, the second's is a tie for the shadow.
    assert (told.rows, told.pairs, told.disagreement) == (5, 4, 1.5 / 4)
    assert told.mean_shift == pytest.approx(2 / 5)
    # Ranks 1 2 3 5 4 and 2 1 3 4.5 4.5: 1 - of squares' sums, corrected for the tie.
    assert told.rank_correlation == pytest.approx(
        np.corrcoef([1, 2, 3, 5, 4], [2, 1, 3, 4.5, 4.5])[0, 1]
    )
    nothing = Comparison().difference()
    assert nothing.rows == 0 and np.isnan(nothing.disagreement)
    both = merge([told, nothing, Difference(15, 0, 1.2, 0.5, np.nan)])
    assert (both.rows, both.pairs, both.disagreement) == (20, 4, 1.5 / 4)
    assert both.mean_shift == pytest.approx(1.0)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))
    assert disagreement(np.zeros(2, np.int32), np.array([1.0, 2]), np.array([2.0, 1])) == (1, 1)


def test_a_comparison_is_over_the_latest_rows() -> None:
    comparison = Comparison()
    for shift in (5.0, 1.0, 1.0):
        many = np.arange(2048.0)
        comparison.add(np.arange(2048, dtype=np.int32), rewards(*many), rewards(*(many + shift)))
    told = comparison.difference()
    assert told.rows == 4096 and told.mean_shift == pytest.approx(1.0)
