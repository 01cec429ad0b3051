"""Read and write a run's config.json: its config, and what its first start decided.

Knows where it lies and how it gets there whole; nothing of training.
"""

from __future__ import annotations

import json
from datetime import date

from pyarrow import fs

from rayrm.training.config import TrainConfig, TrainSection

NOTE = "config.json"


def read_config(run: str) -> TrainConfig | None:
    """The config that the run at a path or URI was started with; None where it was not yet.

    What it does not name, an older version's, has its default.
    """
    filesystem, path = fs.FileSystem.from_uri(run)
    if filesystem.get_file_info(f"{path}/{NOTE}").type == fs.FileType.NotFound:
        return None
    with filesystem.open_input_file(f"{path}/{NOTE}") as noted:
        values = json.loads(noted.read())
    # Runs that do not name these knew no other rule, and no parts of a prompt's pairs.
    values["data"].setdefault("rule", "template")
    values["train"].setdefault("pairs_per_group", None)
    if values["loss"]["objective"] == "plackett_luce":  # which named settings of pairs, then
        for name in ("centering", "label_smoothing"):
            values["loss"].pop(name, None)
    return TrainConfig(**values)


def write_config(config: TrainConfig, run: str) -> None:
    filesystem, path = fs.FileSystem.from_uri(run)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/.{NOTE}") as out:
        out.write(config.model_dump_json(indent=2).encode())
    filesystem.move(f"{path}/.{NOTE}", f"{path}/{NOTE}")  # whole or not there


def as_decided(config: TrainConfig, noted: TrainConfig) -> TrainConfig:
    """The config with what it leaves open as the run's first start decided it."""
    if config.train.dtype == "auto":
        config = with_dtype(config, noted.train.dtype)
    whole = noted.train.pairs_per_group is None
    if whole and config.train.pairs_per_group == TrainSection().pairs_per_group:
        train = config.train.model_copy(update={"pairs_per_group": None})
        config = config.model_copy(update={"train": train})
    left_open = {"rule": "auto", "date": None}
    decided = {
        key: getattr(noted.data, key)
        for key, value in left_open.items()
        if getattr(config.data, key) == value
    }
    return config.model_copy(update={"data": config.data.model_copy(update=decided)})


def with_date(config: TrainConfig) -> TrainConfig:
    """The config with the day that a chat template's clock shows: by default today."""
    data = config.data.model_copy(update={"date": config.data.date or date.today()})
    return config.model_copy(update={"data": data})


def with_dtype(config: TrainConfig, dtype: str) -> TrainConfig:
    """The config with what it computes in decided."""
    train = config.train.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"train": train})
