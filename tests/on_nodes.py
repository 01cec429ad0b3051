"""A head and two serving nodes on this machine, four actors that score, and a fault of a node.

Run by test_lost_node.py. What the actors got is compared here; what happened where is written down.

    python -m tests.on_nodes node|store ROUNDS EXPORT FOUND
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray._private.state import actors as actor_table
from ray.cluster_utils import Cluster

from rayrm import RewardClient, RewardModel, ServeConfig
from rayrm.errors import RowTooLong
from rayrm.serving import application
from rayrm.serving import operations as service
from tests.service import texts, until
from tests.serving.test_faults import APP, Actor, FaultyReplica, under_load

STORE_BYTES = 100 * 2**20


def main(fault: str, rounds: int, export: str, found_file: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**node(0), "resources": {"head": 1}})
    serving = [cluster.add_node(**node(1)) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    application.Replica = FaultyReplica  # type: ignore[attr-defined]
    service.deploy(
        ServeConfig(
            export=export, dtype="float32", app=APP, replicas=2, tokens_per_pack=1024, cache_bytes=0
        )
    )
    local = RewardModel.load(export, "cpu", "float32")
    expected = {r: local.score(*texts(24, r)).values.tolist() for r in range(2, 7)}
    actors = [Actor.options(resources={"head": 0.1}).remote(n) for n in range(4)]  # type: ignore[attr-defined]
    found: dict[str, Any] = {"lost": []}
    still_there: list[Any] = []

    def lose() -> None:
        until(lambda: len(homes()) == 2)
        gone = next(n for n in serving if n.node_id in homes())
        found["lost"].append(gone.node_id)
        serving.remove(gone)
        cluster.remove_node(gone, allow_graceful=False)
        serving.append(cluster.add_node(**node(1)))

    def fill() -> None:
        found["store_bytes"] = STORE_BYTES
        size = 8 * 2**20
        held: list[Any] = []
        while sum(array.nbytes for array in held) + size < STORE_BYTES:
            held.append(ray.get(ray.put(np.zeros(size, dtype=np.uint8))))
        found["held_bytes"] = sum(array.nbytes for array in held)
        # Beside what fits into a message: a chunk that has to go through the store.
        large = RewardClient(APP).score(["a", "b"], ["c", "x" * 400_000])
        assert large.errors[0] is None
        alone = local.score(["a"], ["c"]).values[0]  # where the service packs it with the actors'
        np.testing.assert_allclose(large.values[0], alone, atol=1e-5)
        assert isinstance(large.errors[1], RowTooLong)
        still_there.append(held)

    faults: dict[str, Callable[[], None]] = {"node": lose, "store": fill}
    names = {"node": "node lost", "store": "object store full"}
    under_load(names[fault], actors, faults[fault], expected, rounds)
    until(lambda: len(homes()) == 2 and not {*found["lost"]} & {*homes()}, 120)
    found["replicas"] = homes()
    Path(found_file).write_text(json.dumps(found))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def node(cpus: int) -> dict[str, Any]:
    return {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
    }


def homes() -> list[str]:
    """Nodes of the replicas that live."""
    replicas = [a for a in actor_table().values() if a["Name"].startswith("SERVE_REPLICA")]
    return [a["Address"]["NodeID"] for a in replicas if a["State"] == "ALIVE"]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
