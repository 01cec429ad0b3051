"""Training and serving on several nodes, one of which is lost: see on_cluster.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_kill import notes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run on the cluster left behind."""
    directory = tmp_path_factory.mktemp("cluster")
    root = Path(__file__).parent.parent.parent
    path = os.pathsep.join(map(str, (root, root / "tests")))
    own = {"PYTHONPATH": path, "XDG_CACHE_HOME": str(directory / "driver")}
    command = [sys.executable, "-m", "tests.on_cluster", str(directory)]
    ran = subprocess.run(command, cwd=root, env=os.environ | own, capture_output=True, timeout=900)
    assert ran.returncode == 0, ran.stderr.decode()[-5000:]
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return values


def of_rank(directory: Path, rank: int, event: str) -> list[dict[str, Any]]:
    return [note for note in notes(directory / "storage/notes", rank) if note["event"] == event]


def having(directory: Path, what: str) -> set[str]:
    """The nodes with something in their cache."""
    return {path.parents[3].name for path in directory.glob(f"node*/cache/rayrm/{what}/*")}


def test_workers_and_replicas_land_on_their_groups(directory: Path, found: dict[str, Any]) -> None:
    trained_on = [n["node"] for rank in (0, 1) for n in of_rank(directory, rank, "start")]
    assert len(trained_on) == 4
    assert {found["groups"].get(node) for node in trained_on} == {"train"}
    assert [found["groups"][node] for node in found["replicas"]] == ["serve"] * 2


def test_a_lost_node_costs_the_steps_since_the_checkpoint(
    directory: Path, found: dict[str, Any]
) -> None:
    first, second = of_rank(directory, 1, "start")
    assert (first["step"], second["step"]) == (0, 4)
    nodes = {n["node"] for rank in (0, 1) for n in of_rank(directory, rank, "start")}
    assert len(nodes) == 3, "another node took the place of the lost one"
    steps = [note["step"] for note in of_rank(directory, 0, "step")]
    assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]


def test_each_rank_writes_its_own_shards_on_its_own_node(directory: Path) -> None:
    written = [of_rank(directory, rank, "written") for rank in (0, 1)]
    assert all(len({(n["node"], n["temporary"]) for n in notes}) <= 2 for notes in written)
    for rank, notes_of_rank in enumerate(written):
        for note in notes_of_rank:
            assert note["directory"].endswith(f"rank{rank}")
            shards = [name for name in note["files"] if "optim" in name]
            assert len(shards) == 1 and f"rank_{rank}_" in shards[0]
            assert Path(note["temporary"]).parent.parent == directory
    by_step = zip(*written, strict=True)
    assert all(mine["temporary"] != theirs["temporary"] for mine, theirs in by_step)
    assert not list(directory.glob("node*/tmp/rayrm-*")), "uploaded, then removed"


def test_every_train_node_has_its_own_cache_of_ids(directory: Path) -> None:
    assert having(directory, "encoded") == {"node2", "node3", "node5"}


def test_the_export_is_read_through_the_storage_path_by_the_serving_node(
    directory: Path, found: dict[str, Any]
) -> None:
    assert found["export"] == f"fsspec+file://{directory}/storage/run/export"
    assert having(directory, "exports") == {"node4"}
    assert found["served"] == pytest.approx(found["here"], abs=1e-5)
