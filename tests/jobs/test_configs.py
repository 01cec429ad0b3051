"""Every shipped config loads, and cluster.yaml is one that Ray takes and the configs agree with."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private.runtime_env.packaging import create_package

from rayrm.serving.config import ServeConfig
from rayrm.training.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "jobs/configs").glob("*.yaml"))


def load(path: Path) -> TrainConfig | ServeConfig:
    is_serve = "export" in yaml.safe_load(path.read_text())
    return ServeConfig.load(path) if is_serve else TrainConfig.load(path)


@pytest.fixture(scope="module")
def cluster_yaml() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return values


def test_a_job_uploads_the_code_and_nothing_that_was_made(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rayrm", tmp_path / "here/rayrm")
    for made in (".git/objects/pack", ".venv/lib", "runs/quickstart/export", "rayrm/__pycache__"):
        (tmp_path / "here" / made).mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / made / "large").write_text("large")
    excludes = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())["excludes"]
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "here"), package, include_gitignore=False, excludes=excludes)
    names = ZipFile(package).namelist()
    assert "rayrm/training/loop.py" in names
    assert not [name for name in names if "large" in name]
    create_package(str(ROOT), tmp_path / "all.zip", include_gitignore=True, excludes=excludes)
    assert (tmp_path / "all.zip").stat().st_size < 5e6, "Ray takes 100 MB at most"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    load(path)


def test_cluster_yaml_follows_rays_own_schema(cluster_yaml: dict[str, Any]) -> None:
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(cluster_yaml, json.loads(schema.read_text()))


def test_nothing_is_scheduled_on_the_head(cluster_yaml: dict[str, Any]) -> None:
    head = cluster_yaml["available_node_types"][cluster_yaml["head_node_type"]]
    assert head["resources"] == {"CPU": 0}


def test_the_nodes_install_what_the_code_imports(cluster_yaml: dict[str, Any]) -> None:
    (command,) = cluster_yaml["setup_commands"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}
    assert needed <= with_dependencies(shlex.split(command)[2:])


def with_dependencies(asked: list[str]) -> set[str]:
    """Names of all that pip installs for these, as the packages that are installed here tell it."""
    left, seen = [*map(Requirement, asked)], set[str]()
    while left:
        wanted = left.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        for each in map(Requirement, requires(wanted.name) or []):
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            if each.marker is None or any(map(each.marker.evaluate, extras)):
                left.append(each)
    return {canonicalize_name(Requirement(each).name) for each in seen}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_gpu_configs_fit_the_node_group_they_ask_for(
    path: Path, cluster_yaml: dict[str, Any]
) -> None:
    config = load(path)
    if isinstance(config, TrainConfig):
        labels, copies = config.cluster.labels, config.cluster.workers
        gpus, cpus = config.cluster.gpus_per_worker, config.cluster.cpus_per_worker
    else:
        labels, copies = config.labels, config.replicas
        gpus, cpus = config.gpus_per_replica, config.cpus_per_replica
    if not gpus:
        assert not labels
        return
    groups = [
        group
        for group in cluster_yaml["available_node_types"].values()
        if labels and labels.items() <= group.get("labels", {}).items()
    ]
    assert len(groups) == 1
    room = groups[0]["resources"]
    per_node = min(room["GPU"] // gpus, room["CPU"] // cpus)
    assert copies <= per_node * groups[0]["max_workers"]
