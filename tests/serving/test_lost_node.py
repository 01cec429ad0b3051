"""A node that dies under load, and one whose object store is full, in a cluster of three nodes.

The cluster is in a process of its own, since a process has one Ray.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.faults


def run(fault: str, rounds: int, tmp_path: Path, export: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.on_nodes", fault, str(rounds), str(export)]
    result = subprocess.run(
        [*command, str(tmp_path / "found.json")], cwd=ROOT, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    print(*(line for line in result.stdout.splitlines() if "without a reward" in line), sep="\n")
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def test_a_lost_node_loses_no_row(tmp_path: Path, tiny_export: Path) -> None:
    found = run("node", 2, tmp_path, tiny_export)
    assert len(found["lost"]) == 2
    assert not set(found["lost"]) & set(found["replicas"]) and len(found["replicas"]) == 2


def test_a_full_object_store_loses_no_row(tmp_path: Path, tiny_export: Path) -> None:
    found = run("store", 1, tmp_path, tiny_export)
    assert found["held_bytes"] > 0.9 * found["store_bytes"]
