"""Ten thousand requests that attack: python -m pytest -m soak tests/soak_input.py"""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from schemathesis.generation import GenerationMode

from rayrm.model.engine import RewardModel
from tests.service import ask
from tests.serving import test_input
from tests.serving.test_input import (
    APP,
    AUTHORIZED,
    FUZZ,
    bodies,
    check_request,
    check_rows,
    check_schema,
    many_rows,
    paths,
    processes,
    tokenizers,
    tokens,
)

port, local = test_input.port, test_input.local

# Of each kind: 10 000 requests over HTTP, and rows through the client.
EXAMPLES = {"schema": 2_500, "bodies": 5_000, "rows": 500}

# MiB that a process may hold more than before: tokenizers keep up to 10 000 words each.
GROWTH = 48


def attack(port: int, local: RewardModel, share: float) -> None:
    def so_many(examples: int) -> settings:
        return settings(FUZZ, max_examples=round(examples * share), derandomize=False)

    for mode in GenerationMode:
        check_schema(port, mode, so_many(EXAMPLES["schema"]))

    @so_many(EXAMPLES["bodies"])
    @given(paths, bodies, tokens)
    def any_body(path: str, body: bytes, headers: dict[str, str]) -> None:
        check_request(port, path, body, headers)

    @so_many(EXAMPLES["rows"])
    @given(many_rows, tokenizers)
    def any_row(given_rows: list[Any], made_by: Any) -> None:
        check_rows(port, local, given_rows, made_by)

    any_body()
    any_row()


def resident() -> dict[str, int]:
    """MiB of each process that takes part."""
    return {name: p.memory_info().rss >> 20 for name, p in processes().items()}


@pytest.mark.soak
def test_ten_thousand_attacks_leave_no_trace(port: int, local: RewardModel) -> None:
    attack(port, local, 0.1)
    before, start = resident(), time.monotonic()
    pids = {name: p.pid for name, p in processes().items()}
    attack(port, local, 1.0)
    after = resident()
    print(f"\n{APP}: {time.monotonic() - start:.0f} s; MiB before {before}, after {after}")
    assert {name: p.pid for name, p in processes().items()} == pids, "nothing was restarted"
    assert all(after[name] - before[name] <= GROWTH for name in before)
    assert ask(port, "/health", headers=AUTHORIZED)[0] == 200
