"""Show a progress bar on the driver for steps that workers take elsewhere in the cluster.

Workers report to an actor, which a thread of the driver polls. Knows nothing of what a step
is.
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
    """How far a run is. A Ray actor."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, str] = (0, 0, "")

    def put(self, done: int, total: int, note: str) -> None:
        self.latest = (done, total, note)

    def get(self) -> tuple[int, int, str]:
        return self.latest


@contextmanager
def progress_bar(description: str) -> Iterator[Any]:
    """Yields the actor whose steps are shown until the block is left.

    It lives where the driver does, since a worker's node may be lost, and is restarted if it dies.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    steps: Any = ray.remote(RunProgress).options(**options, scheduling_strategy=here).remote()
    # In a log a bar is a line each time, so it moves less often there.
    bar = tqdm(desc=description, unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    left = threading.Event()

    def follow() -> None:
        while True:
            stop = left.wait(1.0)
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
        left.set()
        thread.join()
        bar.refresh()
        bar.close()
        ray.kill(steps)
