"""rayrm: reward models on Ray, from preferences to served rewards. The public names, lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrm.client import RewardClient
    from rayrm.config import ServeConfig, TrainConfig
    from rayrm.engine import RewardModel, Rewards
    from rayrm.serve import deploy
    from rayrm.template import fingerprint
    from rayrm.train import TrainResult, fit

_HOME = {
    "RewardClient": "client",
    "RewardModel": "engine",
    "Rewards": "engine",
    "ServeConfig": "config",
    "TrainConfig": "config",
    "TrainResult": "train",
    "deploy": "serve",
    "fingerprint": "template",
    "fit": "train",
}

__version__ = "0.1.0"
__all__ = [
    "RewardClient",
    "RewardModel",
    "Rewards",
    "ServeConfig",
    "TrainConfig",
    "TrainResult",
    "deploy",
    "fingerprint",
    "fit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rayrm' has no attribute {name!r}")
    return getattr(import_module(f"rayrm.{_HOME[name]}"), name)
