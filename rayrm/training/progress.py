"""Show a progress bar on the driver for steps that workers take elsewhere in the cluster.

Workers report to an actor, which a thread of the driver polls. Does not know what a step is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm.auto import tqdm


class RunProgress:
    """A Ray actor that holds the progress of a run."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, str] = (0, 0, "")

    def put(self, done: int, total: int, note: str) -> None:
        self.latest = (done, total, note)

    def get(self) -> tuple[int, int, str]:
        return self.latest


@contextmanager
def progress_bar(description: str) -> Iterator[Any]:
    """Show a progress bar while the block runs; yields the actor that workers report to.

    The actor runs on the driver's node, since a worker's node may be lost. It is restarted if it
    dies.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    steps: Any = ray.remote(RunProgress).options(**options, scheduling_strategy=here).remote()
    # In a log file every update is a new line, so update less often.
    bar = tqdm(desc=description, unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    finished = threading.Event()

    def follow() -> None:
        while True:
            stop = finished.wait(1.0)
            bar.n, bar.total, note = ray.get(steps.get.remote())
            bar.set_postfix_str(note, refresh=False)
            bar.update(0)
            if stop:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield steps
    finally:
        finished.set()
        thread.join()
        bar.refresh()
        bar.close()
        ray.kill(steps)
