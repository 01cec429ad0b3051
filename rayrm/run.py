"""A run's note of itself: config.json, what it was started with and what its first start decided.

Knows where it lies and how it gets there whole; nothing of training.
"""

from __future__ import annotations

import json

from pyarrow import fs

from rayrm.config import TrainConfig

NOTE = "config.json"


def read_config(run: str) -> TrainConfig | None:
    """The config that the run at a path or URI was started with; None where it was not yet.

    What it does not name, an older version's, has its default.
    """
    filesystem, path = fs.FileSystem.from_uri(run)
    if filesystem.get_file_info(f"{path}/{NOTE}").type == fs.FileType.NotFound:
        return None
    with filesystem.open_input_file(f"{path}/{NOTE}") as noted:
        return TrainConfig(**json.loads(noted.read()))


def write_config(config: TrainConfig, run: str) -> None:
    filesystem, path = fs.FileSystem.from_uri(run)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/.{NOTE}") as out:
        out.write(config.model_dump_json(indent=2).encode())
    filesystem.move(f"{path}/.{NOTE}", f"{path}/{NOTE}")  # whole or not there


def with_dtype(config: TrainConfig, dtype: str) -> TrainConfig:
    """The config with what it computes in decided."""
    train = config.train.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"train": train})
