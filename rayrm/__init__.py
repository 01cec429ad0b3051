"""rayrm: train and serve reward models on Ray. Exports the public names, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrm.errors import (
        ConfigError,
        DataError,
        EmptyResponse,
        ExportError,
        InvalidRow,
        InvalidTokenIds,
        ModelError,
        NonFiniteReward,
        Overloaded,
        RayrmError,
        RowError,
        RowFailed,
        RowTooLong,
        ServiceError,
        StepTimeout,
        TrainingError,
        UnknownReward,
        VersionGone,
    )
    from rayrm.model.engine import RewardModel
    from rayrm.rows import Rewards
    from rayrm.serving.client import RewardClient
    from rayrm.serving.config import ServeConfig
    from rayrm.serving.operations import deploy
    from rayrm.text.fingerprints import fingerprint
    from rayrm.training.config import TrainConfig
    from rayrm.training.fit import TrainResult, fit

_HOME = {
    "ConfigError": "errors",
    "DataError": "errors",
    "EmptyResponse": "errors",
    "ExportError": "errors",
    "InvalidRow": "errors",
    "InvalidTokenIds": "errors",
    "ModelError": "errors",
    "NonFiniteReward": "errors",
    "Overloaded": "errors",
    "RayrmError": "errors",
    "RewardClient": "serving.client",
    "RewardModel": "model.engine",
    "Rewards": "rows",
    "RowError": "errors",
    "RowFailed": "errors",
    "RowTooLong": "errors",
    "ServeConfig": "serving.config",
    "ServiceError": "errors",
    "StepTimeout": "errors",
    "TrainConfig": "training.config",
    "TrainResult": "training.fit",
    "TrainingError": "errors",
    "UnknownReward": "errors",
    "VersionGone": "errors",
    "deploy": "serving.operations",
    "fingerprint": "text.fingerprints",
    "fit": "training.fit",
}

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DataError",
    "EmptyResponse",
    "ExportError",
    "InvalidRow",
    "InvalidTokenIds",
    "ModelError",
    "NonFiniteReward",
    "Overloaded",
    "RayrmError",
    "RewardClient",
    "RewardModel",
    "Rewards",
    "RowError",
    "RowFailed",
    "RowTooLong",
    "ServeConfig",
    "ServiceError",
    "StepTimeout",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "UnknownReward",
    "VersionGone",
    "deploy",
    "fingerprint",
    "fit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rayrm' has no attribute {name!r}")
    return getattr(import_module(f"rayrm.{_HOME[name]}"), name)
