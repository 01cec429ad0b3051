"""Define every error that a user can cause; each can be pickled, so Ray transports it unchanged::

    RayrmError
    ├── ConfigError          a wrong config key or value; raised before any model loads
    ├── DataError            a wrong preference record; names file, row and field
    ├── ModelError           a base model that is missing or that cannot be scored exactly
    ├── ExportError          an export that is missing, too new, pickled, or differs from its record
    ├── UnknownReward        a reward's name that the model or the application does not have
    ├── TrainingError        a run that cannot continue: NaN, a name used for another config
    ├── ServiceError         the reward service as a whole: no such application, retries exhausted
    │   ├── Overloaded       the queues are full; says when to retry
    │   ├── VersionGone      the version that a step is pinned to is no longer served
    │   └── StepTimeout      a step was not scored within its timeout
    └── RowError             one row of a scoring call; the other rows are scored
        ├── EmptyResponse
        ├── RowTooLong
        ├── InvalidRow       not text, messages or token ids; or the chat template refuses it
        ├── InvalidTokenIds  out of range, or made by another tokenizer
        ├── NonFiniteReward
        └── RowFailed        the model raises an error for this row

Messages say what is wrong, where, and what would be right. Does not know about the rest of the
package.
"""

from __future__ import annotations


class RayrmError(Exception):
    """Base class of all errors that rayrm raises for its users; constructed from the message."""


class ConfigError(RayrmError, ValueError):
    """A config key or value is wrong."""


class DataError(RayrmError, ValueError):
    """A preference record is wrong, or its file is missing or unreadable."""


class ModelError(RayrmError, ValueError):
    """A base model is missing, or rayrm cannot compute its rewards exactly."""


class ExportError(RayrmError, ValueError):
    """An export is missing, has a newer format, is pickled, or differs from its recorded hash."""


class UnknownReward(RayrmError, LookupError):
    """The model or application has no reward of that name: neither its own nor an adapter's."""


class TrainingError(RayrmError, RuntimeError):
    """A training run cannot continue."""


class ServiceError(RayrmError, RuntimeError):
    """The reward service cannot answer."""


class Overloaded(ServiceError):
    """The replicas' queues are full. retry_after_s: seconds to wait before a retry."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class VersionGone(ServiceError):
    """The version that a step is pinned to is not served, or no longer."""


class StepTimeout(ServiceError, TimeoutError):
    """A step was not scored within its timeout_s; its unfinished rows are cancelled."""


class RowError(RayrmError, ValueError):
    """One row cannot be scored; returned in the result, next to the rewards of the other rows."""


class EmptyResponse(RowError):
    """The response has no tokens to score."""


class RowTooLong(RowError):
    """Prompt and response together exceed the model's maximum row length."""


class InvalidRow(RowError):
    """The row is not text, messages or token ids, or the chat template refuses it."""


class InvalidTokenIds(RowError):
    """Token ids are out of range, or come from another tokenizer."""


class NonFiniteReward(RowError):
    """The model returned NaN or infinity."""


class RowFailed(RowError):
    """The model raised an error for this row, also when computed alone; the message holds it."""
