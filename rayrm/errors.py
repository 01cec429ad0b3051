"""Every error that a user can cause, as a tree; each pickles, so it crosses Ray whole::

    RayrmError
    ├── ConfigError          a config key or value, before any model loads
    ├── DataError            a preference record: file, row and field
    ├── ModelError           a base model that is missing or that cannot be scored exactly
    ├── ExportError          an export that is missing, too new, pickled, or not what was recorded
    ├── UnknownReward        a reward's name that the model or the application does not have
    ├── TrainingError        a run that cannot go on: NaN, a name used for another config
    ├── ServiceError         the reward service as a whole: no such application, gave up retrying
    │   ├── Overloaded       its queues are full: when to come back
    │   ├── VersionGone      a step is pinned to a model that is not served any more
    │   └── StepTimeout      a step was not scored in time
    └── RowError             one row of a scoring call; the other rows are scored
        ├── EmptyResponse
        ├── RowTooLong
        ├── InvalidRow       not text, messages or ids; a template that refuses the messages
        ├── InvalidTokenIds  out of range, or made by another tokenizer
        ├── NonFiniteReward
        └── RowFailed        the model raises for this row, and not for others

Knows nothing of the rest of the package. Messages say what, where and what would be right.
"""

from __future__ import annotations


class RayrmError(Exception):
    """Base of all errors that rayrm raises for its users. Takes one argument: the message."""


class ConfigError(RayrmError, ValueError):
    """A config key or value is wrong."""


class DataError(RayrmError, ValueError):
    """A preference record is wrong, or its file is missing."""


class ModelError(RayrmError, ValueError):
    """A base model is missing, or its rewards could not be computed exactly."""


class ExportError(RayrmError, ValueError):
    """An export is missing, of a newer format, pickled, or differs from its recorded hash."""


class UnknownReward(RayrmError, LookupError):
    """No reward of that name: neither the model's or application's own, nor an adapter's."""


class TrainingError(RayrmError, RuntimeError):
    """A training run cannot go on."""


class ServiceError(RayrmError, RuntimeError):
    """The reward service cannot answer."""


class Overloaded(ServiceError):
    """The replicas have as much waiting as they take. retry_after_s: when to come back, seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class VersionGone(ServiceError):
    """The version that a step is pinned to is not served, or not any more."""


class StepTimeout(ServiceError, TimeoutError):
    """A step was not scored within its timeout_s; what was left of it is cancelled."""


class RowError(RayrmError, ValueError):
    """One row cannot be scored; carried in the result beside the other rows' rewards."""


class EmptyResponse(RowError):
    """The response has no tokens to pool."""


class RowTooLong(RowError):
    """Prompt and response exceed the longest row that the model scores."""


class InvalidRow(RowError):
    """The row is not text, messages or token ids, or the chat template refuses it."""


class InvalidTokenIds(RowError):
    """Token ids are out of range, or come from another tokenizer."""


class NonFiniteReward(RowError):
    """The model gave NaN or infinity."""


class RowFailed(RowError):
    """The model raised for this row and for no other: the message says what."""
