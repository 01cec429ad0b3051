"""Callers are alive until their process is killed, whatever else of their job goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from rayrm.serving.callers import is_alive, this_caller
from rayrm.serving.ticket import Caller
from tests.service import until

pytestmark = pytest.mark.usefixtures("cluster")


@ray.remote(num_cpus=0, max_retries=0)
def wait(note: str) -> None:
    part = Path(f"{note}.part")
    part.write_text(json.dumps(asdict(this_caller()) | {"pid": os.getpid()}))
    part.rename(note)
    time.sleep(600)


class Waiting:
    def caller(self) -> Caller:
        return this_caller()


def test_a_task_that_was_killed_is_dead_though_its_job_lives(tmp_path: Path) -> None:
    note = tmp_path / "note"
    running = wait.remote(str(note))
    until(note.exists)
    values = json.loads(note.read_text())
    pid = values.pop("pid")
    task = Caller(**values)
    assert task.worker and not task.actor and is_alive(task)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(task))
    with pytest.raises(RayError):
        ray.get(running)
    assert is_alive(this_caller())


def test_an_actor_that_was_killed_is_dead() -> None:
    actor: Any = ray.remote(num_cpus=0)(Waiting).remote()
    caller = ray.get(actor.caller.remote())
    assert caller.actor and not caller.worker and is_alive(caller)
    ray.kill(actor)
    until(lambda: not is_alive(caller))


def test_a_process_that_was_never_there_is_dead() -> None:
    job = this_caller().job
    assert not is_alive(Caller("me", job, "", worker="00" * 28))
    assert is_alive(Caller("me", job, "")), "named by an older rayrm, by its job alone"
    assert not is_alive(Caller("me", "ff000000", ""))
