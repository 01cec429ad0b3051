"""A new export takes the place of the one that is served, while four actors go on scoring."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from rayrm.client import RewardClient
from rayrm.config import ServeConfig
from rayrm.engine import RewardModel, Rewards
from rayrm.errors import ExportError, ServiceError, VersionGone
from rayrm.metrics import ServeMetrics
from rayrm.serve import Replica, deploy, rollback, swap
from rayrm.versions import (
    Models,
    Record,
    Served,
    delete_record,
    read_record,
    write_record,
)
from tests.test_serve import assert_same, before_each_pack, stats, texts, until

APP = "versions"
SECONDS_PER_PACK = 0.1
LOADING = 4.0


class SlowReplica(Replica):
    """Takes a while for each pack, longer to load a model, and longer yet beside a file."""

    def _load(self, config: ServeConfig) -> RewardModel:
        time.sleep(LOADING)
        while (Path(config.export).parent / "not yet").exists():
            time.sleep(0.05)
        return before_each_pack(super()._load(config), lambda: time.sleep(SECONDS_PER_PACK))


@pytest.fixture(scope="module")
def config(tiny_export: Path) -> ServeConfig:
    return ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app=APP,
        replicas=2,
        tokens_per_pack=512,
        cache_bytes=0,
    )


@pytest.fixture(scope="module")
def client(cluster: None, config: ServeConfig) -> Iterator[RewardClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.serve.Replica", SlowReplica)
        deploy(config)
        yield RewardClient(APP)
    serve.delete(APP)


@pytest.fixture(scope="module")
def models(tiny_export: Path, other_export: Path) -> dict[str, RewardModel]:
    both = [RewardModel.load(export, "cpu", "float32") for export in (tiny_export, other_export)]
    assert len({model.version for model in both}) == 2
    return {model.version: model for model in both}


@ray.remote(num_cpus=0)
class Actor:
    """Scores step after step until it is told to stop."""

    def __init__(self, number: int) -> None:
        self.client = RewardClient(APP, caller=f"actor {number}")
        self.steps: list[tuple[int, Rewards]] = []
        self.arrivals: list[float] = []
        self.stop = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        def arrived(*_: Any) -> None:
            self.arrivals.append(time.monotonic())

        while not self.stop:
            r = 2 + len(self.steps) % 4
            self.steps.append((r, self.client.score(*texts(24, r), on_arrival=arrived)))

    def done(self) -> int:
        return len(self.steps)

    def finish(self) -> tuple[list[tuple[int, Rewards]], list[float]]:
        self.stop = True
        self.thread.join()
        return self.steps, self.arrivals


def test_deploying_while_four_actors_score(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old, new = models
    before = {replica["pid"] for replica in stats(APP)}
    actors = [Actor.remote(n) for n in range(4)]  # type: ignore[attr-defined]
    until(lambda: min(ray.get([a.done.remote() for a in actors])) >= 2)
    (loading := other_export.parent / "not yet").touch()
    with ThreadPoolExecutor(1) as operator:
        deploying = operator.submit(deploy, config.model_copy(update={"export": str(other_export)}))
        until(lambda: (record := read_record(APP)) is not None and record.staged is not None)
        started = time.monotonic()
        staged = [ray.get(a.done.remote()) for a in actors]
        until(lambda: min(ray.get([a.done.remote() for a in actors])) >= max(staged) + 3)
        assert not deploying.done(), "they score on while it is loaded"
        loading.unlink()
        deploying.result()
    ended = time.monotonic()
    deployed = [ray.get(a.done.remote()) for a in actors]
    until(lambda: min(ray.get([a.done.remote() for a in actors])) >= max(deployed) + 3)
    until(lambda: all(replica["versions"] == [new] for replica in stats(APP)))
    arrivals: list[float] = []
    for actor, count in zip(actors, deployed, strict=True):
        steps, of_actor = ray.get(actor.finish.remote())
        arrivals += of_actor
        versions = [rewards.versions[0] for _, rewards in steps]
        assert versions == sorted(versions, key=[old, new].index), "nobody goes back"
        assert versions[0] == old and set(versions[count + 1 :]) == {new}
        for r, rewards in steps:
            assert set(rewards.versions) == {rewards.versions[0]}, "a step has one version"
            assert_same(rewards, models[rewards.versions[0]].score(*texts(24, r)))
    meanwhile = sorted(at for at in arrivals if started < at < ended + 5)
    longest = max(later - earlier for earlier, later in pairwise([started, *meanwhile]))
    print(f"\n{ended - started:.1f} s to deploy; longest without a reward {longest:.2f} s")
    assert {replica["pid"] for replica in stats(APP)} == before, "no replica was replaced"


def test_a_rollback_serves_what_was_served_before(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old, new = models
    deploy(config.model_copy(update={"export": str(other_export)}))
    command = [sys.executable, "jobs/serve.py", "--rollback", APP]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    told = subprocess.run(command, env=os.environ | address, text=True, stdout=subprocess.PIPE)
    assert told.returncode == 0 and f"{APP!r} serves {old} again" in told.stdout
    assert_same(client.score(*texts(2, 2)), models[old].score(*texts(2, 2)))
    assert rollback(APP).version == new
    assert_same(client.score(*texts(2, 2)), models[new].score(*texts(2, 2)))
    with pytest.raises(ServiceError, match="does not run"):
        rollback("another")


def test_a_pinned_step_is_scored_by_its_version_or_not_at_all(
    client: RewardClient, models: dict[str, RewardModel]
) -> None:
    current = client.score(["a"], ["b"]).versions[0]
    (other,) = set(models) - {current}
    rollback(APP)  # to other; current lingers for steps that began with it
    pinned = client.score(*texts(4, 2), version=current)
    assert_same(pinned, models[current].score(*texts(4, 2)))
    assert set(client.score(*texts(4, 2)).versions) == {other}
    until(lambda: all(replica["versions"] == [other] for replica in stats(APP)))
    with pytest.raises(VersionGone, match=current):
        client.score(*texts(4, 2), version=current)


def test_an_export_that_cannot_be_loaded_leaves_the_old_one_served(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old = next(iter(models))
    deploy(config)
    record = read_record(APP)
    assert record is not None
    with pytest.raises(ServiceError, match=r"cannot load .*ExportError: .* not tiny@0"):
        swap(record, Served(export=str(other_export), version="tiny@0"))
    assert read_record(APP) == record
    assert_same(client.score(*texts(2, 2)), models[old].score(*texts(2, 2)))
    assert all(old in replica["versions"] for replica in stats(APP))


def test_a_replica_that_starts_later_serves_what_is_wanted(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    new = list(models)[1]
    deploy(config.model_copy(update={"export": str(other_export)}))
    killed = stats(APP)[0]["pid"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: len({replica["pid"] for replica in stats(APP)} - {killed}) == 2)
    assert {replica["version"] for replica in stats(APP)} == {new}


def test_a_replica_that_missed_the_news_finds_out_by_itself(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    """Nobody tells replicas: the record alone is changed, and steps are pinned to it at once."""
    deploy(config)
    new = list(models)[1]
    record = read_record(APP)
    assert record is not None and record.current.version != new
    news = Served(export=str(other_export), version=new)
    write_record(record.model_copy(update={"current": news}))
    assert_same(client.score(*texts(40, 2), version=new), models[new].score(*texts(40, 2)))
    until(lambda: all(replica["version"] == new for replica in stats(APP)))


def test_what_is_found_must_be_what_was_deployed(cluster: None, tiny_export: Path) -> None:
    config = ServeConfig(export=str(tiny_export), dtype="float32", app="changed")
    old = Served(export=str(tiny_export), version="old@1")
    write_record(Record(config=config, started=config.export, current=old))
    try:
        with pytest.raises(ExportError, match=r"holds .*, and not old@1"):
            load, tell = (
                (lambda c: RewardModel.load(c.export, "cpu", "float32")),
                ServeMetrics().holds,
            )
            Models("changed", config, load, tell)
    finally:
        delete_record("changed")
