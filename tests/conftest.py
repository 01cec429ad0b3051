"""What tests share: a local Ray cluster, a tiny random base and exports."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.makers import make_base, make_export


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One small local Ray cluster for the whole session, whose workers can import the tests."""
    here = Path(__file__).parent
    folders = [here.parent, here, *(path for path in here.iterdir() if path.is_dir())]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 Ray reads it so; 10000 by default
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, as a base model; nobody writes to it."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, in fp32, with a chat template."""
    return make_export(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of other weights and so another version."""
    return make_export(tmp_path_factory.mktemp("other"), initializer_range=0.3)
