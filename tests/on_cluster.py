"""A head, two train nodes and a serve node on this machine, labelled as cluster.yaml's groups are.

Run by test_cluster.py in a process of its own, since a process has one Ray. Every node has
temporary files and a cache of its own, as machines do. A train node is lost in the middle of the
run, and another comes. Writes down what happened where; the tests read it.

    python -m tests.on_cluster DIRECTORY
"""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.train import Checkpoint
from ray.train.v2._internal.execution.storage import StorageContext

from rayrm import RewardClient, RewardModel, ServeConfig, TrainConfig, deploy, fit
from rayrm.training import fit as train
from rayrm.training import loop
from rayrm.training.loop import train_loop
from tests.makers import make_base
from tests.training.test_kill import (
    Noting,
    configure,
    notes,
    wait_for_uploads,
    wait_until,
    whole_upload,
    write_pairs,
)

ROOT = Path(__file__).parent.parent
GROUPS = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]

# Room for two on the serve node: without labels both workers would go there, a replica elsewhere.
CPUS = {"head": 0, "train": 1, "serve": 2}


class Here(Noting):
    """A rank that notes where it runs and what it writes; the first rank 1 waits for its end."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.first = len(notes(self.notes, self.rank)) == 1

    def train_step(self) -> None:
        if self.first and self.rank == 1 and self.step == 4:
            wait_for_uploads()
            self.note("waiting", node=node_id())
            threading.Event().wait()
        super().train_step()

    def save(self) -> None:
        StorageContext.persist_current_checkpoint = partialmethod(  # type: ignore[method-assign, assignment]
            upload, rank=self
        )
        super().save()


def upload(storage: StorageContext, checkpoint: Checkpoint, name: str, rank: Here) -> Checkpoint:
    """What Ray Train does, and a note of what this rank wrote where."""
    written = Path(checkpoint.path)
    rank.note(
        "written",
        node=node_id(),
        temporary=str(written.parent),
        directory=written.name,
        files=sorted(file.name for file in written.rglob("*.pt")),
    )
    return whole_upload(storage, checkpoint, name)


def loop_here(values: dict[str, Any], steps: Any) -> dict[str, Any]:
    loop.Rank = Here  # type: ignore[misc]
    return train_loop(values, steps)


def node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def main(directory: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=node(directory, "head", 1))
    trains = [cluster.add_node(**node(directory, "train", n)) for n in (2, 3)]
    serving = cluster.add_node(**node(directory, "serve", 4))
    ray.init(address=cluster.address, log_to_driver=False)
    names = {
        n.node_id: name
        for n, name in zip([*trains, serving], ("train", "train", "serve"), strict=True)
    }

    base = make_base(directory / "base", "gpt2")
    data = write_pairs(directory / "train.jsonl", seed=0)
    train.train_loop = loop_here  # type: ignore[attr-defined]
    labels = TrainConfig.load(ROOT / "jobs/configs/train-gpu.yaml").cluster.labels
    group = {"workers": 2, "retries": 1, "labels": labels}
    storage = f"fsspec+file://{directory}/storage"  # pyarrow takes it for a remote one
    config = configure(base, data, directory, cluster=group).model_copy(update={"storage": storage})
    with ThreadPoolExecutor(1) as driver:  # nodes start and stop in the main thread alone
        running = driver.submit(fit, config)
        file = directory / "storage/notes/rank1.jsonl"
        wait_until(lambda: running.done() or (file.exists() and '"waiting"' in file.read_text()))
        gone = notes(file.parent, 1)[-1]["node"]
        kind = names[gone]
        lost = next(n for n in (*trains, serving) if n.node_id == gone)
        cluster.remove_node(lost, allow_graceful=False)
        names[cluster.add_node(**node(directory, kind, 5)).node_id] = kind
        result = running.result()

    labels = ServeConfig.load(ROOT / "jobs/configs/serve-gpu.yaml").labels
    deploy(ServeConfig(export=result.export, dtype="float32", labels=labels, replicas=2))
    rows = ["red", "blue"], ["green", "pink"]
    replicas = [a for a in actors().values() if a["Name"].startswith("SERVE_REPLICA")]
    found = {
        "groups": names,
        "export": result.export,
        "served": [float(x) for x in RewardClient().score(*rows).values],
        "replicas": [a["Address"]["NodeID"] for a in replicas if a["State"] == "ALIVE"],
        "here": [
            float(x) for x in RewardModel.load(result.export, "cpu", "float32").score(*rows).values
        ],
    }
    (directory / "found.json").write_text(json.dumps(found))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def node(directory: Path, group: str, n: int) -> dict[str, Any]:
    """Arguments of a node of a group of cluster.yaml, but for its size."""
    own = {"TMPDIR": f"{directory}/node{n}/tmp", "XDG_CACHE_HOME": f"{directory}/node{n}/cache"}
    for path in own.values():
        Path(path).mkdir(parents=True)
    return {
        "num_cpus": CPUS[group],
        "labels": GROUPS[group].get("labels", {}),
        "include_dashboard": False,
        "env_vars": own,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
