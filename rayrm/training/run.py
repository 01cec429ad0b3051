"""Read and write a run's config.json: its config, and what its first start decided.

Does not know about training.
"""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from pyarrow import fs

from rayrm.training.config import TrainConfig, TrainSection

CONFIG_FILE = "config.json"


def read_config(run: str) -> TrainConfig | None:
    """Return the config that the run at a path or URI was started with; None if it has none.

    Fields that an older version did not write get their defaults.
    """
    filesystem, path = fs.FileSystem.from_uri(run)
    if filesystem.get_file_info(f"{path}/{CONFIG_FILE}").type == fs.FileType.NotFound:
        return None
    with filesystem.open_input_file(f"{path}/{CONFIG_FILE}") as file:
        values = json.loads(file.read())
    # Older runs lack these fields: they used the template and did not split a prompt's pairs.
    values["data"].setdefault("rule", "template")
    values["train"].setdefault("pairs_per_group", None)
    if values["loss"]["objective"] == "plackett_luce":  # older runs wrote settings of pairs too
        for name in ("centering", "label_smoothing"):
            values["loss"].pop(name, None)
    return TrainConfig(**values)


def write_config(config: TrainConfig, run: str) -> None:
    filesystem, path = fs.FileSystem.from_uri(run)
    filesystem.create_dir(path, recursive=True)
    partial = f"{path}/.{CONFIG_FILE}"  # renamed when it is complete
    with filesystem.open_output_stream(partial) as out:
        out.write(config.model_dump_json(indent=2).encode())
    filesystem.move(partial, f"{path}/{CONFIG_FILE}")


def with_decisions(config: TrainConfig, noted: TrainConfig) -> TrainConfig:
    """Return the config with its open fields set as the run's first start decided them (noted)."""
    if config.train.dtype == "auto":
        config = with_dtype(config, noted.train.dtype)
    never_split = noted.train.pairs_per_group is None
    if never_split and config.train.pairs_per_group == TrainSection().pairs_per_group:
        train = config.train.model_copy(update={"pairs_per_group": None})
        config = config.model_copy(update={"train": train})
    decided: dict[str, Any] = {}
    if config.data.rule == "auto":
        decided["rule"] = noted.data.rule
    if config.data.date is None:
        decided["date"] = noted.data.date
    return config.model_copy(update={"data": config.data.model_copy(update=decided)})


def with_date(config: TrainConfig) -> TrainConfig:
    """Return the config with a date for the chat template's clock, by default today."""
    data = config.data.model_copy(update={"date": config.data.date or date.today()})
    return config.model_copy(update={"data": data})


def with_dtype(config: TrainConfig, dtype: str) -> TrainConfig:
    """Return the config with this train.dtype."""
    train = config.train.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"train": train})
