"""What dies, hangs or lies under load: four actors go on scoring, and get every reward, once.

Run by `make faults`. Faults of nodes need a cluster of several: test_lost_node.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve

from rayrm.errors import NonFiniteReward, RowError, RowFailed
from rayrm.model.engine import RewardModel
from rayrm.packing import TokenGroup
from rayrm.rows import Rewards
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from rayrm.serving.queue import Values
from rayrm.serving.replica import Replica
from tests.service import ask, free_ports, rows, stats, texts, until

APP = "faults"
SECONDS_PER_PACK = 0.05

# Steps that every actor scores after a fault; a fault lasts for less.
STEPS_AFTER = 3

# How often a fault comes in its test, at other moments of a step each time.
ROUNDS = 3

pytestmark = pytest.mark.faults


class FaultyReplica(Replica):
    """Takes a while for each pack; what else it does stands in files named by fault and process."""

    def _load(self, config: ServeConfig) -> RewardModel:
        model = super()._load(config)
        compute, orders = model.score_groups, Path(config.export).parent

        def faulty(groups: Sequence[TokenGroup], **_: Any) -> list[Values]:
            ordered = {name for name in FAULTS if (orders / f"{name}-{os.getpid()}").exists()}
            time.sleep(SECONDS_PER_PACK * (5 if "slow" in ordered else 1))
            if "hang" in ordered:
                time.sleep(600)
            if "raise" in ordered:
                raise RuntimeError("no kernel works any more")
            values = compute(groups)
            for group, of_group in zip(groups, values, strict=True):
                poisoned = [POISON in row.tolist() for row in group.rows]
                if "refuse" in ordered and any(poisoned):
                    raise RuntimeError("the kernel gave up")
                if "nan" in ordered:
                    of_group[poisoned] = np.nan
            return values

        model.score_groups = faulty  # type: ignore[method-assign]
        return model


FAULTS = ("slow", "hang", "raise", "refuse", "nan")
POISON = 96  # "~", which no text here has


@ray.remote(num_cpus=0)
class Actor:
    """Scores step after step, by the handle or over HTTP, and notes when each reward came."""

    def __init__(self, number: int) -> None:
        self.client = RewardClient(APP, caller=f"actor {number}", timeout_s=120)

    def begin(self, port: int | None) -> None:
        self.port = port
        self.steps: list[Answered] = []
        self.stop = False
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            while not self.stop:
                r = 2 + len(self.steps) % 5
                step = Answered(r, time.monotonic())
                (self.over_http if self.port else self.by_handle)(step)
                self.steps.append(step)
        except BaseException as failure:
            self.failure = failure

    def by_handle(self, step: Answered) -> None:
        def arrived(places: Any, _: Rewards) -> None:
            step.places += places.tolist()
            step.arrivals.append(time.monotonic())

        rewards = self.client.score(*texts(24, step.responses), on_arrival=arrived)
        step.values = rewards.values.tolist()
        step.errors = rewards.errors

    def over_http(self, step: Answered) -> None:
        """As a careful caller: what got no answer is asked again."""
        assert self.port
        while True:
            try:
                status, answer = ask(self.port, "/score", rows(*texts(24, step.responses)))
            except (OSError, EOFError, ValueError):
                status, answer = 0, None
            if status == 200:
                break
            time.sleep(0.2)
        step.values = [np.nan if v is None else v for v in answer["values"]]
        step.errors = [None if e is None else RowError(e["message"]) for e in answer["errors"]]
        step.places = list(range(len(step.values)))
        step.arrivals.append(time.monotonic())

    def after(self, moment: float) -> int:
        """Steps that began after the moment and are scored."""
        if self.failure:
            raise self.failure
        return sum(step.began > moment for step in self.steps)

    def finish(self) -> list[Answered]:
        self.stop = True
        self.thread.join()
        if self.failure:
            raise self.failure
        return self.steps


@dataclass
class Answered:
    """A step as an actor saw it."""

    responses: int
    began: float
    arrivals: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    errors: Sequence[Exception | None] = ()


@pytest.fixture(scope="module")
def port(cluster: None, tiny_export: Path) -> Iterator[int]:
    """Two faulty replicas, and where they are to be asked over HTTP."""
    (port,) = free_ports(1)
    serve.shutdown()
    config = ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app=APP,
        replicas=2,
        tokens_per_pack=1024,
        hang_timeout_s=1,
        cache_bytes=0,
        http={"enabled": True, "port": port},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.serving.application.Replica", FaultyReplica)
        deploy(config)
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def actors(port: int) -> list[Any]:
    return [Actor.remote(n) for n in range(4)]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def expected(tiny_export: Path) -> dict[int, list[float]]:
    model = RewardModel.load(tiny_export, "cpu", "float32")
    return {r: model.score(*texts(24, r)).values.tolist() for r in range(2, 7)}


@pytest.fixture
def order(tiny_export: Path) -> Iterator[Callable[[str, int], None]]:
    """order(fault, pid): from its next pack on, that replica has the fault."""
    given: list[Path] = []

    def give(fault: str, pid: int) -> None:
        given.append(tiny_export.parent / f"{fault}-{pid}")
        given[-1].touch()

    yield give
    for file in given:
        file.unlink()


def under_load(
    name: str,
    actors: list[Any],
    fault: Callable[[], None],
    expected: dict[int, list[float]],
    rounds: int = ROUNDS,
    http: int | None = None,
) -> None:
    """Four actors score while the fault comes and after it, and get what they should.

    Where http is given, half of them ask there.
    """
    ports = [http, http, None, None] if http else [None] * 4
    ray.get([actor.begin.remote(port) for actor, port in zip(actors, ports, strict=True)])
    until(lambda: min(ray.get([a.after.remote(0.0) for a in actors])) >= 2)
    moments, recoveries = [], []
    for n in range(rounds):
        time.sleep(0.37 * n % 1)
        moments.append(time.monotonic())
        fault()
        until(lambda: min(ray.get([a.after.remote(moments[-1]) for a in actors])) >= STEPS_AFTER)
        recoveries.append(time.monotonic() - moments[-1])
    steps = [step for a in actors for step in ray.get(a.finish.remote())]
    for step in steps:
        assert sorted(step.places) == list(range(24 * step.responses)), "every row, once"
        np.testing.assert_allclose(step.values, expected[step.responses], atol=1e-5)
        assert not any(step.errors)
    arrivals = sorted(at for step in steps for at in step.arrivals)
    waits = [b - a for a, b in pairwise(arrivals) if b > moments[0]]
    print(
        f"\n{name}: {len(steps)} steps; longest without a reward for anybody {max(waits):.2f} s; "
        f"all had {STEPS_AFTER} more steps after {', '.join(f'{s:.1f}' for s in recoveries)} s"
    )


def test_a_killed_replica(port: int, actors: list[Any], expected: dict[int, list[float]]) -> None:
    def kill() -> None:
        until(lambda: len(stats(APP)) == 2)
        os.kill(stats(APP)[0]["pid"], signal.SIGKILL)

    under_load("replica killed", actors, kill, expected)


def test_a_killed_controller(
    port: int, actors: list[Any], expected: dict[int, list[float]]
) -> None:
    killed: set[int] = set()

    def kill() -> None:
        until(lambda: bool(find("ray::ServeController") - killed))
        (controller,) = find("ray::ServeController") - killed
        os.kill(controller, signal.SIGKILL)
        killed.add(controller)

    under_load("controller killed", actors, kill, expected)
    until(lambda: bool(find("ray::ServeController") - killed))


def test_a_killed_proxy(port: int, actors: list[Any], expected: dict[int, list[float]]) -> None:
    killed: set[int] = set()

    def kill() -> None:
        until(lambda: bool(find("ray::ProxyActor") - killed))
        for proxy in find("ray::ProxyActor") - killed:
            os.kill(proxy, signal.SIGKILL)
            killed.add(proxy)

    under_load("proxy killed", actors, kill, expected, http=port)


def test_a_replica_that_hangs(
    port: int,
    actors: list[Any],
    expected: dict[int, list[float]],
    order: Callable[[str, int], None],
) -> None:
    def hang() -> None:
        until(lambda: len(stats(APP)) == 2)
        order("hang", hung := stats(APP)[0]["pid"])
        until(lambda: hung not in [replica["pid"] for replica in stats(APP)], 120)

    under_load("replica hangs", actors, hang, expected)


def test_a_slow_replica(
    port: int,
    actors: list[Any],
    expected: dict[int, list[float]],
    order: Callable[[str, int], None],
) -> None:
    until(lambda: len(stats(APP)) == 2)
    slow = stats(APP)[0]["pid"]
    before = {replica["pid"]: replica["computed_tokens"] for replica in stats(APP)}
    under_load("replica five times slower", actors, lambda: order("slow", slow), expected, rounds=1)
    work = {r["pid"]: r["computed_tokens"] - before[r["pid"]] for r in stats(APP)}
    assert work.pop(slow) < 0.6 * min(work.values()), "it is given less"


def test_an_engine_that_raises_for_every_row(
    port: int,
    actors: list[Any],
    expected: dict[int, list[float]],
    order: Callable[[str, int], None],
) -> None:
    def broken() -> None:
        until(lambda: len(stats(APP)) == 2)
        order("raise", raising := stats(APP)[0]["pid"])
        until(lambda: not psutil.pid_exists(raising))

    under_load("engine raises", actors, broken, expected)


@pytest.mark.parametrize(("fault", "error"), [("refuse", RowFailed), ("nan", NonFiniteReward)])
def test_an_engine_that_fails_on_one_row(
    port: int,
    actors: list[Any],
    expected: dict[int, list[float]],
    order: Callable[[str, int], None],
    tiny_export: Path,
    fault: str,
    error: type[RowError],
) -> None:
    """It gets its error; its neighbours, in the step and in others, their rewards."""
    local = RewardModel.load(tiny_export, "cpu", "float32")
    made_by = local.template.spec.fingerprint
    prompts = [[5, 6, 7]] * 12
    responses = [[20 + r, POISON if r == 7 else 30] for r in range(12)]
    right = local.score(prompts, responses, tokenizer=made_by).values

    def poison() -> None:
        until(lambda: len(stats(APP)) == 2)
        for replica in stats(APP):
            order(fault, replica["pid"])
        rewards = RewardClient(APP).score(prompts, responses, tokenizer=made_by)
        assert [type(e) for e in rewards.errors if e] == [error]
        assert isinstance(rewards.errors[7], error) and np.isnan(rewards.values[7])
        others = [r for r in range(12) if r != 7]
        np.testing.assert_allclose(rewards.values[others], right[others], atol=1e-5)

    until(lambda: len(stats(APP)) == 2)
    before = {replica["pid"] for replica in stats(APP)}
    under_load(f"engine: {fault} for a row", actors, poison, expected, rounds=1)
    assert {replica["pid"] for replica in stats(APP)} == before


def find(title: str) -> set[int]:
    """Processes of this cluster with the title."""
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith(title)
    }
