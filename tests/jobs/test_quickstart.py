"""The quickstart says first how long it will take, and computes in what the machine is fast in."""

from __future__ import annotations

import os
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.model.engine import RewardModel


class Reached(Exception):
    """The quickstart has come as far as it is looked at."""


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its functions and constants."""
    for name, value in os.environ.items():  # it sets some for itself
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        return runpy.run_path("jobs/quickstart.py")


@pytest.mark.parametrize(
    ("dtype", "steps"), [("bfloat16", "40 steps"), ("float32", "28 steps, not 40")]
)
def test_it_says_at_once_how_long_it_will_take_and_in_what_it_computes(
    quickstart: dict[str, Any],
    dtype: str,
    steps: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = quickstart["main"].__globals__
    threads = torch.get_num_threads()
    computed: list[Any] = []

    def evaluated(model: RewardModel, *_: Any, **__: Any) -> None:
        computed.append(model.dtype)
        raise Reached

    scope |= {
        "fast_dtype": lambda _: dtype,
        "matrix_rate": lambda of, seconds: 3e11 if of == torch.bfloat16 else 1.5e11,
        "evaluate": evaluated,
        "RUN": tmp_path,
    }
    with pytest.raises(Reached):
        quickstart["main"]()
    torch.set_num_threads(threads)
    first, *rest = capsys.readouterr().out.splitlines()
    minutes = {"bfloat16": 7, "float32": 10}[dtype]
    assert first == f"computing in {dtype}: about {minutes} minutes expected"
    assert (steps in rest[0]) == (dtype == "float32")
    assert computed == [dtype]
