"""Fingerprint a model's config.json: what its weights compute.

Two directories with equal weights and equal fingerprints compute the same hidden states. Does not
know about exports or tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CONFIG = "config.json"

# Keys that do not affect a reward: where a model came from, how it is stored and generates, and the
# names of its outputs. The shape of the embedding is that of the weights, and a row's reward is
# read at its last token, whatever the ids of pad, BOS and EOS are.
UNRELATED = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


def fingerprint_config(directory: Path) -> str:
    """Return the sha256 of config.json, parsed, without the keys in UNRELATED.

    Raises ValueError if it is not a JSON object, FileNotFoundError if there is none.
    """
    values = json.loads((directory / CONFIG).read_bytes())
    if not isinstance(values, dict):
        raise ValueError(f"{type(values).__name__} instead of an object")
    return hash_config(values)


def hash_config(values: dict[str, Any]) -> str:
    """Return the sha256 of a config's values without the keys in UNRELATED."""
    return hashlib.sha256(
        json.dumps(_related(values), sort_keys=True, default=str).encode()
    ).hexdigest()


def _related(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values, also of nested configs, without the keys in UNRELATED."""
    return {
        key: _related(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in UNRELATED
    }
