"""The record of what an application serves: written by several at once, read by everybody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list, _internal_kv_put

from rayrm.errors import ServiceError
from rayrm.serving import record as records
from rayrm.serving.callers import this_caller
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import with_current
from rayrm.serving.record import (
    BEFORE,
    FORMAT,
    KEPT,
    NAMESPACE,
    Record,
    Served,
    Staged,
    Trial,
    change_record,
    delete_record,
    read_record,
    remove_staged,
    rename_version,
)

pytestmark = pytest.mark.usefixtures("cluster")

APP = "recorded"
OLD, NEW = (Served(export=f"/{name}", version=f"{name}@1") for name in ("old", "new"))


def record(app: str = APP, **more: Any) -> Record:
    return Record(config=ServeConfig(export="/old", app=app), started="/old", current=OLD, **more)


def noting(label: str) -> records.Change:
    """Adds the label to those that replicas land on: something that writes can lose."""

    def change(found: Record | None) -> Record:
        assert found is not None
        labels = {**found.config.labels, label: ""}
        config = found.config.model_copy(update={"labels": labels})
        return found.model_copy(update={"config": config})

    return change


def noted(app: str = APP) -> set[str]:
    found = read_record(app)
    assert found is not None
    return set(found.config.labels)


@pytest.fixture(autouse=True)
def written() -> Iterator[None]:
    change_record(APP, lambda _: record())
    yield
    delete_record(APP)


@ray.remote(num_cpus=0)
class Writer:
    def write(self, name: str, times: int) -> None:
        for n in range(times):
            change_record(APP, noting(f"{name}{n}"))


def test_two_processes_that_write_200_times_each_lose_none() -> None:
    writers = {name: Writer.remote() for name in "ab"}  # type: ignore[attr-defined]
    ray.get([writer.__ray_ready__.remote() for writer in writers.values()])
    writing = [writer.write.remote(name, 200) for name, writer in writers.items()]
    read, running = 0, writing
    while running:
        _, running = ray.wait(running, num_returns=len(running), timeout=0.1)
        assert len(noted()) >= read, "what was read once stays"
        read = len(noted())
    ray.get(writing)
    assert noted() == {f"{name}{n}" for name in writers for n in range(200)}
    assert len(_internal_kv_list(APP.encode() + b"/", namespace=NAMESPACE)) <= KEPT + 2


@pytest.mark.parametrize("meanwhile", [1, KEPT - 1, KEPT, KEPT + 1, KEPT + 2, 99])
def test_who_reads_and_writes_late_loses_nothing(meanwhile: int) -> None:
    """Also where the number that comes next was written and pruned since it was read."""
    left = [meanwhile]

    def change(found: Record | None) -> Record | None:
        while left[0]:
            left[0] -= 1
            change_record(APP, noting(f"other {left[0]}"))
        return noting("late")(found)

    change_record(APP, change)
    assert noted() == {"late", *(f"other {n}" for n in range(meanwhile))}


def test_who_lists_before_others_prune_reads_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = records._numbers

    def slow(app: str) -> list[int]:
        found = numbers(app)
        monkeypatch.setattr(records, "_numbers", numbers)
        for n in range(KEPT + 2):
            change_record(APP, noting(str(n)))
        return found

    monkeypatch.setattr(records, "_numbers", slow)
    assert len(noted()) == KEPT + 2


def test_reading_asks_the_gcs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(KEPT + 2):
        change_record(APP, noting(str(n)))
    asked = []

    def counted(ask: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            asked.append(args)
            return ask(*args, **more)

        return call

    for ask in ("_internal_kv_get", "_internal_kv_list"):
        monkeypatch.setattr(records, ask, counted(getattr(records, ask)))
    read_record(APP)
    assert len(asked) == 2


def test_what_changes_nothing_writes_nothing() -> None:
    before = records._latest(APP)
    change_record(APP, lambda found: found)
    assert records._latest(APP) == before
    with pytest.raises(ServiceError, match="no"):
        change_record(APP, refuse)
    assert records._latest(APP) == before


def refuse(found: Record | None) -> Record | None:
    raise ServiceError("no")


def test_names_of_applications_do_not_collide() -> None:
    names = [
        "a",
        "a/",
        "a/000000000001",
        "a%2F",
        "a b",
        "A",
        "\u00e4",
        "a\u0308",
        "数/1",
        "a\n",
        "*",
        "a?",
    ]
    try:
        for name in names:
            change_record(name, lambda _, name=name: record(name))  # type: ignore[misc]
            change_record(name, noting(name))
        for name in names:
            assert noted(name) == {name}
        assert delete_record("a") and read_record("a") is None
        assert all(noted(name) == {name} for name in names[1:])
    finally:
        for name in names:
            delete_record(name)


def test_a_record_of_an_older_rayrm_is_read_and_replaced() -> None:
    """It has one key, no format, and what is staged has no owner, so that it would stay."""
    values = record("older", trial=Trial(served=NEW, share=0.5, since=1.0)).model_dump(mode="json")
    values = {k: v for k, v in values.items() if k != "format"} | {"staged": NEW.model_dump()}
    _internal_kv_put(b"older", json.dumps(values).encode(), namespace=BEFORE)
    found = read_record("older")
    assert found == record("older", trial=Trial(served=NEW, share=0.5, since=1.0))
    for n in range(KEPT + 1):
        change_record("older", noting(str(n)))
    assert len(noted("older")) == KEPT + 1
    assert _internal_kv_get(b"older", namespace=BEFORE) is None
    assert delete_record("older") and read_record("older") is None


def test_an_older_record_can_be_deleted() -> None:
    _internal_kv_put(b"oldest", record("oldest").model_dump_json().encode(), namespace=BEFORE)
    assert delete_record("oldest") and read_record("oldest") is None


def test_a_record_of_a_newer_rayrm_says_so_and_can_be_deleted() -> None:
    change_record(APP, lambda _: record().model_copy(update={"format": FORMAT + 1}))
    for use in (read_record, lambda app: change_record(app, refuse)):
        with pytest.raises(ServiceError, match=f"'{APP}' has a record of format {FORMAT + 1}, and"):
            use(APP)
    assert delete_record(APP)
    assert read_record(APP) is None and not delete_record(APP)


def test_who_read_before_a_deletion_does_not_undo_it() -> None:
    found: list[Record | None] = []

    def change(before: Record | None) -> Record | None:
        if not found:
            delete_record(APP)
        found.append(before)
        return before and noting("late")(before)

    assert change_record(APP, change) is None
    assert found == [record(), None] and read_record(APP) is None
    change_record(APP, lambda _: record())
    assert read_record(APP) == record()


def test_what_is_staged_is_known_by_its_deployment_whatever_its_version_is_called() -> None:
    named_before = Served(export="/new", version="new@0")
    staged = Staged(served=named_before, owner=this_caller(), id="1")
    now = rename_version(named_before, NEW)(record(staged=staged, previous=named_before))
    assert now and now.staged and now.staged.served == now.previous == NEW
    removed = remove_staged(staged)(now)
    assert removed and removed.staged is None
    another = staged.model_copy(update={"id": "2"})
    assert remove_staged(another)(now) == now


def test_a_switch_leaves_nothing_staged_or_tried() -> None:
    other = Served(export="/other", version="other@1")
    staged = Staged(served=other, owner=this_caller(), id="1")
    before = record(staged=staged, trial=Trial(served=NEW, share=0.5, since=0))
    after = with_current(before, NEW)
    assert (after.wanted, after.previous, after.config.export) == ([NEW], OLD, "/new")
    assert with_current(after, NEW).previous == OLD, "served again, it is not what was there before"
