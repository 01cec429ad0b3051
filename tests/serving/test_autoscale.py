"""As many replicas as callers' outstanding tokens need, and none that goes takes a row with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from rayrm.errors import ConfigError
from rayrm.model.engine import RewardModel
from rayrm.serving.autoscale import OUTSTANDING, OutstandingTokens
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from rayrm.serving.replica import Replica
from tests.service import assert_same, before_each_pack, texts, until

APP = "elastic"
SECONDS_PER_PACK = 0.2


@dataclass
class Context:
    """What Serve's controller tells a policy."""

    current_num_replicas: int
    total_queued_requests: float = 0.0
    raw_metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def reports(cls, *outstanding: list[float]) -> Context:
        series = [[SimpleNamespace(value=value) for value in values] for values in outstanding]
        return cls(len(outstanding), 0.0, {OUTSTANDING: dict(enumerate(series))})


def test_a_replica_for_every_so_many_outstanding_tokens() -> None:
    policy = OutstandingTokens(1000)
    assert policy(Context.reports([9000.0, 2500.0], [2200.0]))[0] == 5  # the latest of both
    assert policy(Context.reports([0.0]))[0] == 0
    assert policy(Context(2))[0] == 2  # nobody has reported yet
    assert policy(Context(0, 0.0))[0] == 0
    assert policy(Context(0, 7.0))[0] == 1


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"autoscale\.min_replicas \(3\) is above"):
        ServeConfig(export="e", autoscale={"min_replicas": 3, "max_replicas": 2})


class SlowReplica(Replica):
    def _load(self, config: ServeConfig) -> RewardModel:
        return before_each_pack(super()._load(config), lambda: time.sleep(SECONDS_PER_PACK))


@pytest.fixture(scope="module")
def client(cluster: None, tiny_export: Path) -> Iterator[RewardClient]:
    config = ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app=APP,
        tokens_per_pack=1024,
        cache_bytes=0,
        autoscale={
            "min_replicas": 0,
            "max_replicas": 3,
            "tokens_per_replica": 4000,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 2.0,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.serving.application.Replica", SlowReplica)
        deploy(config)
    yield RewardClient(APP)
    serve.delete(APP)


def replicas() -> int:
    states = serve.status().applications[APP].deployments["Replica"].replica_states
    return sum(n for state, n in states.items() if state == "RUNNING")


@pytest.mark.slow
def test_replicas_come_with_the_work_and_go_without_a_lost_row(
    client: RewardClient, tiny_export: Path
) -> None:
    assert replicas() == 0
    prompts, responses = texts(400, 6)
    local = RewardModel.load(tiny_export, "cpu", "float32")
    expected = local.score(prompts, responses)
    small = client.score(*texts(2, 2), timeout_s=120)  # a request that waits brings the first one
    assert_same(small, local.score(*texts(2, 2)))
    most, deadline = 0, time.monotonic() + 300
    while most < 3 and time.monotonic() < deadline:
        step = client.submit(prompts, responses, timeout_s=300)
        while not step.done():
            most = max(most, replicas())
            time.sleep(0.2)
        assert_same(step.result(), expected)
    assert most == 3
    # Steps go on while replicas are drained, too few for three.
    deadline = time.monotonic() + 300
    while replicas() > 1 and time.monotonic() < deadline:
        assert_same(client.score(*texts(8, 6)), local.score(*texts(8, 6)))
    assert replicas() <= 1
    until(lambda: replicas() == 0)
