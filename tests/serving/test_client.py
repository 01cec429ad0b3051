"""RewardClient against a replica that can be made to wait: futures, deadlines, who goes away."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from rayrm.errors import Overloaded, StepTimeout, VersionGone
from rayrm.model.engine import RewardModel
from rayrm.rows import Rewards, make_rows
from rayrm.serving.callers import this_caller
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from rayrm.serving.queue import PACKS_AT_THE_END, RETRY_AFTER
from rayrm.serving.replica import Replica
from rayrm.serving.ticket import Caller
from rayrm.serving.transports import Target
from rayrm.serving.transports.handle import HandleTransport
from tests.service import assert_same, before_each_pack, stats, texts, total, until

APP = "waiting"
LIMIT = 2048
PACK = 512


class WaitingReplica(Replica):
    """Computes nothing while a file is there."""

    def _load(self, config: ServeConfig) -> RewardModel:
        shut = Path(config.export).parent / "shut"

        def wait() -> None:
            while shut.exists():
                time.sleep(0.01)

        return before_each_pack(super()._load(config), wait)


@pytest.fixture(scope="module")
def client(cluster: None, tiny_export: Path) -> Iterator[RewardClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.serving.application.Replica", WaitingReplica)
        config = {"tokens_per_pack": PACK, "max_queue_tokens": LIMIT, "cache_bytes": 0}
        deploy(ServeConfig(export=str(tiny_export), dtype="float32", app=APP, **config))
    yield RewardClient(APP)
    serve.delete(APP)


@pytest.fixture
def shut(tiny_export: Path) -> Iterator[Path]:
    """The replica computes nothing until the file is removed."""
    file = tiny_export.parent / "shut"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def local(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


def waiting() -> int:
    return total(APP, "admitted_tokens")


def test_a_step_is_scored_while_the_caller_does_something_else(
    client: RewardClient, local: RewardModel, shut: Path
) -> None:
    steps = [texts(4, r) for r in (2, 3)]
    futures = [client.submit(*step) for step in steps]
    until(lambda: waiting() > 0)
    assert not any(future.done() for future in futures)
    shut.unlink()
    for step, future in zip(steps, futures, strict=True):
        assert_same(future.result(timeout=300), local.score(*step))


def test_a_cancelled_step_frees_the_replica(client: RewardClient, shut: Path) -> None:
    step = client.submit(*texts(40, 4))
    until(lambda: waiting() > 0)
    assert step.cancel()
    until(lambda: waiting() == 0)
    with pytest.raises(CancelledError):
        step.result()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.score_async(*texts(40, 3)), 0.5)

    asyncio.run(give_up())
    until(lambda: waiting() == 0)


def test_whoever_interrupts_a_step_waits_for_it_no_more(client: RewardClient, shut: Path) -> None:
    here = threading.get_ident()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    threading.Timer(1.0, signal.pthread_kill, (here, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        client.score(*texts(40, 4), timeout_s=60)
    signal.signal(signal.SIGINT, before)
    until(lambda: waiting() == 0)


def test_a_deadline_of_one_call(client: RewardClient, shut: Path) -> None:
    with pytest.raises(StepTimeout, match=r"did not score step [0-9a-f]{12} .* 0\.3"):
        client.score(*texts(2, 2), timeout_s=0.3)
    until(lambda: waiting() == 0)


@ray.remote(num_cpus=0)
class Actor:
    """Sends a step and never hears of it."""

    def send(self, client: RewardClient) -> Caller:
        self.step = client.submit(*texts(40, 4))
        return this_caller()


def test_what_a_dead_caller_left_behind_is_not_computed(client: RewardClient, shut: Path) -> None:
    actor = Actor.remote()  # type: ignore[attr-defined]
    ray.get(actor.send.remote(client))
    until(lambda: waiting() > 0)
    ray.kill(actor)
    until(lambda: waiting() == 0)
    calls = total(APP, "calls")
    computed = total(APP, "computed_tokens")
    shut.unlink()
    time.sleep(1.0)
    assert total(APP, "calls") == calls  # nobody sends the rest of it either
    # What was being computed: a replica that has nearly all of a step computes two packs at once.
    assert total(APP, "computed_tokens") - computed <= PACKS_AT_THE_END * PACK


def test_callers_that_are_refused_come_back_and_finish(
    client: RewardClient, local: RewardModel, shut: Path
) -> None:
    steps = [client.submit(*texts(60, r)) for r in (3, 4, 5)]
    refused = total(APP, "refused")
    until(lambda: total(APP, "refused") > refused + 4)
    assert 0 < waiting() <= LIMIT + 2100  # and the largest chunk
    shut.unlink()
    for r, step in zip((3, 4, 5), steps, strict=True):
        assert_same(step.result(timeout=300), local.score(*texts(60, r)))


def test_whoever_has_no_patience_hears_when_to_come_back(client: RewardClient, shut: Path) -> None:
    async def impatient() -> None:
        filling = [client.submit(*texts(60, r)) for r in (3, 4)]
        await asyncio.sleep(1.0)
        rows = make_rows(*texts(60, 5))
        with pytest.raises(Overloaded) as full:
            await client.score_rows(rows, None, patience_s=0.5)
        low, high = RETRY_AFTER
        assert low <= pickle.loads(pickle.dumps(full.value)).retry_after_s <= high < 1.0
        for step in filling:
            step.cancel()

    asyncio.run(impatient())
    until(lambda: waiting() == 0)


def test_a_version_that_is_not_served_is_an_error_that_says_which_is(
    client: RewardClient, local: RewardModel
) -> None:
    assert_same(client.score(["a"], ["b"], version=local.version), local.score(["a"], ["b"]))
    with pytest.raises(VersionGone, match=f"elsewhere@123 is not served.*{local.version}"):
        client.score(["a"], ["b"], version="elsewhere@123")


def test_a_step_whose_version_goes_is_scored_again_by_one_version(
    client: RewardClient, local: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was read a moment before it changed."""
    late, find = RewardClient(APP), HandleTransport._find
    old = ["gone@1", "gone@2"]

    def find_late(self: HandleTransport, *asked: Any) -> Target:
        found = find(self, *asked)
        return replace(found, version=old.pop(0)) if old else found

    monkeypatch.setattr(HandleTransport, "_find", find_late)
    assert_same(late.score(*texts(40, 4)), local.score(*texts(40, 4)))
    assert not old


def test_a_step_is_followed_by_its_id(
    client: RewardClient, shut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Client and replica name the step, its part, the caller and the version in what they log."""
    named = RewardClient(APP, caller="rollout-3")
    with caplog.at_level(logging.WARNING, "rayrm"):
        step = named.submit(*texts(2, 2))
        until(lambda: waiting() > 0)
        pid = stats(APP)[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        shut.unlink()
        rewards = step.result()
    (lost,) = [r.message for r in caplog.records if "lost its replica" in r.message]
    id = lost.partition("step=")[2].split()[0]
    assert f"part=0 caller=rollout-3 version={rewards.versions[0]}" in lost
    node = ray._private.worker._global_node
    assert node is not None
    logs = Path(node.get_session_dir_path(), "logs", "serve")
    scored = [
        line
        for file in logs.glob(f"replica_{APP}_*.log")
        for line in file.read_text().splitlines()
        if f"step={id}" in line
    ]
    assert len(scored) == 1
    assert "caller=rollout-3" in scored[0] and "rows=4" in scored[0]
    assert f"version={rewards.versions[0]}" in scored[0]


def test_it_pickles_and_is_used_by_many_threads(client: RewardClient, local: RewardModel) -> None:
    copy = pickle.loads(pickle.dumps(client))
    results: dict[int, Rewards] = {}

    def score(r: int) -> None:
        results[r] = copy.score(*texts(3, r))

    threads = [threading.Thread(target=score, args=(r,)) for r in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for r in range(1, 6):
        assert_same(results[r], local.score(*texts(3, r)))
