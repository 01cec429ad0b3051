"""Ten minutes at twice what the service can do: python -m pytest -s -m soak tests/soak_load.py"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve

from rayrm.model.engine import RewardModel
from rayrm.rows import Rewards, make_rows
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from tests.service import stats, texts

APP = "soaked"
SECONDS = 600
ACTORS = 8

# Tokens that a replica takes, and prompts of a step: two steps of each actor are more than twice
# what both replicas take.
LIMIT = 4096
GROUPS = 40

# MiB that a replica or the controller may hold more at the end than after the first minute.
GROWTH = 48


@ray.remote(num_cpus=0)
class Actor:
    """Has two steps on their way at any time, and looks at every reward."""

    def __init__(self, number: int, expected: dict[int, list[float]]) -> None:
        self.client = RewardClient(APP, caller=f"actor {number}", timeout_s=300)
        self.expected = expected
        self.rows = 0
        self.latencies: list[float] = []
        self.stop = False
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        flying: deque[tuple[int, float, Future[Rewards]]] = deque()
        try:
            for n in range(10**9):
                if self.stop:
                    break
                r = 3 + n % 4
                flying.append((r, time.monotonic(), self.client.submit(*texts(GROUPS, r))))
                if len(flying) == 2:
                    self.land(*flying.popleft())
            for step in flying:
                self.land(*step)
        except BaseException as failure:
            self.failure = failure

    def land(self, r: int, sent: float, step: Future[Rewards]) -> None:
        rewards = step.result()
        assert not any(rewards.errors)
        np.testing.assert_allclose(rewards.values, self.expected[r], atol=1e-5)
        self.rows += len(rewards)
        self.latencies.append(time.monotonic() - sent)

    def answered(self) -> int:
        if self.failure:
            raise self.failure
        return self.rows

    def finish(self) -> tuple[int, list[float]]:
        self.stop = True
        self.thread.join()
        return self.answered(), self.latencies


@pytest.fixture
def served(cluster: None, tiny_export: Path) -> Iterator[None]:
    config = ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app=APP,
        replicas=2,
        tokens_per_pack=1024,
        max_queue_tokens=LIMIT,
        cache_bytes=0,
    )
    deploy(config)
    yield
    serve.delete(APP)


def resident() -> dict[str, int]:
    """MiB of the controller and of each replica."""
    titles = ("ray::ServeController", f"ray::ServeReplica:{APP}:Replica")
    return {
        f"{title.partition('Serve')[2]} {process.pid}": process.memory_info().rss >> 20
        for process in psutil.Process().children(recursive=True)
        for title in titles
        if " ".join(process.cmdline()).startswith(title)
    }


@pytest.mark.soak
def test_ten_minutes_at_twice_the_capacity(served: None, tiny_export: Path) -> None:
    local = RewardModel.load(tiny_export, "cpu", "float32")
    expected = {r: local.score(*texts(GROUPS, r)).values.tolist() for r in range(3, 7)}
    step = [g.tokens for g in local.encode(make_rows(*texts(GROUPS, 4))).groups]
    assert 2 * ACTORS * sum(step) > 2 * 2 * LIMIT, "that is twice what two replicas take"
    actors = [Actor.remote(n, expected) for n in range(ACTORS)]  # type: ignore[attr-defined]
    time.sleep(SECONDS / 10)
    before, most = resident(), 0
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        time.sleep(0.5)
        most = max(most, *(replica["admitted_tokens"] for replica in stats(APP)))
        ray.get([actor.answered.remote() for actor in actors])
    after, refused = resident(), sum(replica["refused"] for replica in stats(APP))
    results: list[Any] = ray.get([actor.finish.remote() for actor in actors])
    rows = [count for count, _ in results]
    latencies = np.concatenate([seconds for _, seconds in results])
    print(
        f"\n{sum(rows)} rows, each right; refused {refused} times; most admitted {most} of {LIMIT} "
        f"tokens; rows of callers {min(rows)} to {max(rows)}; a step took "
        f"{np.median(latencies):.2f} s, at most {latencies.max():.2f} s; MiB {before} → {after}"
    )
    assert refused > 0 and most <= LIMIT + max(2048, max(step)) + 512
    assert min(rows) > 0.8 * max(rows)
    assert after.keys() == before.keys(), "nothing was restarted"
    assert all(after[name] - before[name] <= GROWTH for name in before)
    assert sum(replica["admitted_tokens"] for replica in stats(APP)) == 0
