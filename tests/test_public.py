"""The public names, and what importing them does not load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import rayrm
from rayrm import errors

NAMES = {
    "RewardClient",
    "RewardModel",
    "Rewards",
    "ServeConfig",
    "TrainConfig",
    "TrainResult",
    "deploy",
    "fingerprint",
    "fit",
}

HEAVY = ["torch", "transformers", "ray", "deepspeed", "datasets", "pandas", "matplotlib"]


def loaded_by(statement: str) -> set[str]:
    """Which heavy packages a fresh process has loaded after the statement."""
    found = f"[m for m in {HEAVY} if m in sys.modules]"
    code = f"import sys, json; {statement}; print(json.dumps({found}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}


def test_the_public_names_are_these_and_every_error() -> None:
    assert set(rayrm.__all__) == NAMES | ERRORS
    assert rayrm.__all__ == sorted(rayrm.__all__)


@pytest.mark.parametrize("name", sorted((NAMES | ERRORS) - {"TrainResult", "fit"}))
def test_a_public_name_is_where_it_says(name: str) -> None:
    assert getattr(rayrm, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Reward'"):
        rayrm.Reward  # noqa: B018


def test_import_rayrm_loads_nothing_heavy() -> None:
    assert loaded_by("import rayrm") == set()


def test_configs_load_nothing_heavy() -> None:
    assert loaded_by("from rayrm import TrainConfig, ServeConfig; import rayrm.errors") == set()


def test_a_client_and_its_rows_load_nothing_heavy_before_the_first_call() -> None:
    clients = 'RewardClient(), RewardClient("app"), RewardClient(url="http://localhost:8000")'
    assert loaded_by(f"from rayrm import RewardClient, Rewards, fingerprint; {clients}") == set()
    assert loaded_by("import rayrm.rows, rayrm.serving.client") == set()


def test_scoring_in_one_process_needs_neither_ray_nor_deepspeed_nor_pictures() -> None:
    modules = "rayrm.evaluation.evaluate, rayrm.model.export"
    loaded = loaded_by(f"from rayrm import RewardModel; import {modules}")
    assert not loaded & {"ray", "deepspeed", "matplotlib"}


def test_serving_and_calling_need_no_deepspeed_and_no_pictures() -> None:
    loaded = loaded_by("from rayrm import RewardClient, deploy")
    assert not loaded & {"deepspeed", "matplotlib"}
