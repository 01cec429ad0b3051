"""A new export takes the place of the one that is served, while four actors go on scoring."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from rayrm.errors import ExportError, ServiceError, UnknownReward, VersionGone
from rayrm.model.engine import RewardModel
from rayrm.rows import Rewards
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.loaded_models import Models
from rayrm.serving.metrics import ServeMetrics
from rayrm.serving.operations import compare, delete, deploy, promote, rollback, swap, try_out
from rayrm.serving.queue import TokenQueue
from rayrm.serving.record import Record, Served, Trial, change_record, delete_record, read_record
from rayrm.serving.replica import Replica
from rayrm.serving.reward_cache import RewardCache
from tests.service import assert_same, before_each_pack, stats, texts, until

APP = "versions"
SECONDS_PER_PACK = 0.1
LOADING = 4.0


class SlowReplica(Replica):
    """Takes a while for each pack, and longer to load a model; longer yet beside a file "not yet".

    Beside a file "faulty" it fails.
    """

    def _load(self, config: ServeConfig) -> RewardModel:
        time.sleep(LOADING)
        while (Path(config.export).parent / "not yet").exists():
            time.sleep(0.05)
        if (Path(config.export).parent / "faulty").exists():
            raise RuntimeError("out of memory")
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
        patch.setattr("rayrm.serving.application.Replica", SlowReplica)
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


def test_a_rollback_to_a_version_under_its_old_name_serves_it(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    """An older rayrm has recorded what was served before; replicas rename it while they load it."""
    old, new = models
    deploy(config.model_copy(update={"export": str(other_export)}))
    export = models[old].export
    assert export

    def rename_previous(record: Record | None) -> Record:
        assert record and record.previous and record.previous.version == old
        name = min(export.old_versions)
        previous = record.previous.model_copy(update={"version": name})
        return record.model_copy(update={"previous": previous})

    change_record(APP, rename_previous)
    assert rollback(APP).version == old
    record = read_record(APP)
    assert record and record.current.version == old and record.staged is None
    assert record.previous and record.previous.version == new
    assert_same(client.score(*texts(2, 2)), models[old].score(*texts(2, 2)))


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
        swap(APP, Served(export=str(other_export), version="tiny@0"))
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
    change_record(APP, lambda _: record.model_copy(update={"current": news}))
    assert_same(client.score(*texts(40, 2), version=new), models[new].score(*texts(40, 2)))
    until(lambda: all(replica["version"] == new for replica in stats(APP)))


def status() -> str:
    return serve.status().applications[APP].status


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: status() == "UNHEALTHY")


def found() -> Record:
    record = read_record(APP)
    assert record is not None
    return record


def test_all_that_ends_or_starts_a_version_works_while_a_replica_is_dead(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old, new = models
    deploy(config)
    dead, alive = (replica["pid"] for replica in stats(APP))
    kill(dead)
    deploy(config.model_copy(update={"export": str(other_export)}))
    assert found().previous == Served(export=config.export, version=old)
    assert alive in {replica["pid"] for replica in stats(APP)}, "swapped, not started again"
    until(lambda: len(stats(APP)) == 2 and status() == "RUNNING")
    kill(alive)
    assert rollback(APP).version == old
    assert_same(client.score(*texts(2, 2)), models[old].score(*texts(2, 2)))
    until(lambda: len(stats(APP)) == 2 and status() == "RUNNING")
    kill(stats(APP)[0]["pid"])
    try_out(APP, str(other_export))
    assert compare(APP).rows == 0
    assert promote(APP).version == new
    assert set(client.score(*texts(2, 2)).versions) == {new}


def test_a_rollback_ends_replicas_that_die_of_what_is_served(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old = next(iter(models))
    deploy(config)
    deploy(config.model_copy(update={"export": str(other_export)}))
    (faulty := other_export.parent / "faulty").touch()
    try:
        pids = [replica["pid"] for replica in stats(APP)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: status() == "UNHEALTHY")
        assert rollback(APP).version == old
        assert_same(client.score(*texts(2, 2)), models[old].score(*texts(2, 2)))
    finally:
        faulty.unlink()
    until(lambda: status() == "RUNNING" and len(stats(APP)) == 2, 120)
    assert {replica["version"] for replica in stats(APP)} == {old}


def test_an_interrupted_deployment_leaves_nothing_staged(
    client: RewardClient,
    config: ServeConfig,
    other_export: Path,
    models: dict[str, RewardModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, _ = models
    deploy(config)
    before = found()

    def interrupt(_: float) -> None:
        assert found().staged
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rayrm.serving.operations.time.sleep", interrupt)
        deploy(config.model_copy(update={"export": str(other_export)}))
    assert found() == before
    until(lambda: all(replica["versions"] == [old] for replica in stats(APP)))


def test_what_a_killed_deployment_has_staged_is_dropped(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old, new = models
    deploy(config)
    script = f"""
        import ray
        from rayrm.serving.operations import swap
        from rayrm.serving.record import Served
        ray.init(log_to_driver=False)
        swap({APP!r}, Served(export={str(other_export)!r}, version={new!r}))
    """
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    deploying = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    until(lambda: found().staged is not None)
    deploying.kill()
    deploying.wait()
    until(lambda: found().staged is None)
    assert found().current.version == old
    until(lambda: all(replica["versions"] == [old] for replica in stats(APP)))


def test_what_a_killed_task_has_staged_is_dropped(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    """Its job goes on: this one."""
    old, new = models
    deploy(config)
    served = Served(export=str(other_export), version=new)
    swapping = ray.remote(num_cpus=0, max_retries=0)(swap).remote(APP, served)
    until(lambda: found().staged is not None)
    ray.cancel(swapping, force=True)
    until(lambda: found().staged is None)
    assert found().current.version == old


def test_of_two_deployments_at_once_one_wins_and_the_other_is_told(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    old, new = models
    deploy(config)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(deploy, config.model_copy(update={"export": str(other_export)}))
        until(lambda: found().staged is not None)
        assert try_out(APP, str(other_export), 1.0).version == new
        with pytest.raises(ServiceError, match="another process deployed meanwhile"):
            first.result()
    record = found()
    assert record.current.version == old and record.staged is None
    assert record.trial and record.trial.served.version == new
    rollback(APP)


def test_a_deployment_is_not_told_of_an_earlier_ones_failure(
    client: RewardClient, config: ServeConfig, other_export: Path, models: dict[str, RewardModel]
) -> None:
    deploy(config)
    until(lambda: all(len(replica["versions"]) == 1 for replica in stats(APP)))
    other = config.model_copy(update={"export": str(other_export)})
    (faulty := other_export.parent / "faulty").touch()
    with pytest.raises(ServiceError, match=r"cannot load .*: RuntimeError: out of memory"):
        deploy(other)
    faulty.unlink()
    deploy(other)
    assert found().current.version == list(models)[1]


def test_a_reward_that_is_not_served_is_named_also_where_the_record_is_gone(
    client: RewardClient,
) -> None:
    record = found()
    delete_record(APP)
    try:
        with pytest.raises(UnknownReward, match="no reward 'nope'; there are 'default'"):
            client.score(["a"], ["b"], rewards=["nope"])
    finally:
        change_record(APP, lambda _: record)


def test_a_deleted_application_is_forgotten(cluster: None, tiny_export: Path) -> None:
    deploy(ServeConfig(export=str(tiny_export), app="gone"))
    command = [sys.executable, "jobs/serve.py", "--delete", "gone"]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    told = subprocess.run(command, env=os.environ | address, text=True, stdout=subprocess.PIPE)
    assert told.returncode == 0 and "'gone' is deleted" in told.stdout
    assert "gone" not in serve.status().applications and read_record("gone") is None
    with pytest.raises(ServiceError, match="no application 'gone' to delete; deployed: "):
        delete("gone")
    with pytest.raises(ServiceError, match="does not run"):
        rollback("gone")


@pytest.fixture
def held(tiny_export: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """The models of a replica that serves the tiny export, and compares itself when it is told."""
    monkeypatch.setattr(Models, "_follow", lambda _: None)

    def load(config: ServeConfig) -> RewardModel:
        loads.append(config.export)
        return RewardModel.load(config.export, "cpu")

    loads: list[str] = []
    config = ServeConfig(export=str(tiny_export), app="held")
    models = Models("held", config, load, lambda *_: None)
    models.loads = loads  # type: ignore[attr-defined]
    yield models
    delete_record("held")


class Followed(dict[str, RewardModel]):
    """What is held; "old@1" is dropped by another thread just after somebody has looked for it."""

    def __contains__(self, version: object) -> bool:
        there = super().__contains__(version)
        self.pop("old@1", None)
        return there


def test_a_version_dropped_while_it_is_looked_for_is_there_or_gone(
    cluster: None, held: Models
) -> None:
    held.held = Followed(held.held | {"old@1": held.model})
    assert asyncio.run(held.get("old@1")) is held.model
    assert "old@1" in held.held and "old@1" not in held.held
    with pytest.raises(VersionGone, match="old@1 is not served"):
        asyncio.run(held.get("old@1"))


def test_what_is_current_answers_while_the_follower_changes_it(cluster: None, held: Models) -> None:
    """Between what is current and what is held, a switch and a drop may lie."""
    current = held.model
    held.held = {}
    assert asyncio.run(held.get("")) is current
    replica = Replica.__new__(Replica)
    replica.models, replica.calls, replica.refused = held, 0, 0
    replica.queue, replica.cache = TokenQueue(512, 1000), RewardCache(0)
    assert replica.stats()["version"] == current.version


def test_a_record_that_was_read_before_a_switch_does_not_undo_it(
    cluster: None, held: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that waits for another one, which switches, reads what that one has read."""
    first, reading = read_record("held"), threading.Event()
    assert first is not None
    news = Served(export="/news", version="news@1")

    def read(app: str) -> Record | None:
        reading.set()
        return read_record(app)

    monkeypatch.setattr("rayrm.serving.loaded_models.read_record", read)
    with held._changing:
        waiting = threading.Thread(target=held.compare)
        waiting.start()
        assert not reading.wait(0.2)
        held.held["news@1"] = held.model
        change_record("held", lambda _: first.model_copy(update={"current": news}))
    waiting.join()
    assert held.current == "news@1"


def test_a_model_that_cannot_be_loaded_is_not_tried_with_every_chunk(
    cluster: None, held: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrm.serving.loaded_models.RETRY_S", (1000.0, 3000.0))
    bad = Served(export="/nowhere", version="bad@1")

    def stage(share: float) -> None:
        trial = Trial(served=bad, share=share, since=0)
        change_record("held", lambda r: r and r.model_copy(update={"trial": trial}))

    def tried() -> int:
        return int(held.loads.count("/nowhere"))  # type: ignore[attr-defined]

    stage(0.5)
    for _ in range(20):
        with pytest.raises(VersionGone, match=r"bad@1"):
            asyncio.run(held.get("bad@1"))
        held.compare()
    with pytest.raises(VersionGone, match=r"cannot load bad@1 for now: ExportError: .*nowhere"):
        asyncio.run(held.get("bad@1"))
    assert tried() == 1
    for pause in (2000, 3000, 3000):
        held.failed["bad@1"] = replace(held.failed["bad@1"], again_at=0.0)
        held.compare()
        assert held.failed["bad@1"].again_at - time.monotonic() == pytest.approx(pause, abs=60)
    assert tried() == 4
    stage(0.6)
    held.compare()
    assert tried() == 5 and held.failed["bad@1"].times == 1, "another record, another try"


def test_what_is_found_must_be_what_was_deployed(cluster: None, tiny_export: Path) -> None:
    config = ServeConfig(export=str(tiny_export), dtype="float32", app="changed")
    old = Served(export=str(tiny_export), version="old@1")
    record = Record(config=config, started=config.export, current=old)
    change_record("changed", lambda _: record)
    try:
        with pytest.raises(ExportError, match=r"holds .*, not old@1"):
            load, tell = (
                (lambda c: RewardModel.load(c.export, "cpu", "float32")),
                ServeMetrics().holds,
            )
            Models("changed", config, load, tell)
    finally:
        delete_record("changed")
