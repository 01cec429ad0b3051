"""A run's note of itself: what its first start decided holds for every later one."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from rayrm.errors import TrainingError
from rayrm.training import fit as train
from rayrm.training import run
from rayrm.training.config import TrainConfig
from rayrm.training.fit import claim


def config(**data: object) -> TrainConfig:
    return TrainConfig(name="a", data={"train": ["x.jsonl"], **data})


class Tomorrow(date):
    @classmethod
    def today(cls) -> Tomorrow:
        return cls(2031, 1, 2)


def test_a_resume_on_another_day_shows_the_day_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = str(tmp_path / "a")
    first = claim(config(), there)
    assert first.data.date is not None
    monkeypatch.setattr(run, "date", Tomorrow)
    assert claim(config(), there) == first
    assert claim(config(date="2026-03-04"), str(tmp_path / "b")).data.date == date(2026, 3, 4)
    with pytest.raises(TrainingError, match=r"data\.date"):
        claim(config(date="2026-03-04"), there)


def test_a_run_of_before_goes_on_by_the_rule_it_was_started_with(tmp_path: Path) -> None:
    there = tmp_path / "a"
    claim(config(), str(there))
    noted = json.loads((there / run.CONFIG_FILE).read_text())
    for key in ("rule", "thoughts", "date"):
        del noted["data"][key]
    noted["train"]["dtype"] = "bfloat16"
    (there / run.CONFIG_FILE).write_text(json.dumps(noted))
    resumed = claim(config(), str(there))
    assert resumed.data.rule == "template" and resumed.train.dtype == "bfloat16"
    assert resumed.data.date is not None and claim(config(), str(there)) == resumed
    assert train.claim(config(), str(tmp_path / "new")).data.rule == "auto"
