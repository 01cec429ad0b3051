"""POST /score: rows of prompts and responses as JSON, and their rewards.

What a request and its answer look like, and how they become rows and come from rewards. Knows
nothing of replicas.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, FailFast, Field, WithJsonSchema

from rayrm.config import OWN
from rayrm.data.records import MESSAGE_KEYS
from rayrm.errors import RowError
from rayrm.rows import Rewards, Row, is_ids
from rayrm.serving.http.failures import Failure

# Whatever it is, a row that is none of these gets its own error, and the others are scored.
TextOrIds = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "role": {"type": "string"},
                            "content": {"type": ["string", "null"]},
                            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
                            **{key: {"type": ["string", "null"]} for key in MESSAGE_KEYS[1:]},
                        },
                        "required": ["role"],
                    },
                },
                {"type": "array", "items": {"type": "integer"}},
            ]
        }
    ),
]


Schemas = Annotated[
    Any,
    WithJsonSchema({"type": ["array", "null"], "items": {"type": "object"}}),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ScoreRow(Body):
    prompt: TextOrIds
    """Text, messages, or token ids."""
    response: TextOrIds
    """As the prompt is."""
    finished: bool = True
    """False where the sampler cut the response off."""
    tools: Schemas = None
    """What can be called, as JSON schemas, for the chat template."""


class ScoreRequest(Body):
    rows: Annotated[list[ScoreRow], FailFast()]
    tokenizer: str | None = None
    """Fingerprint (rayrm.fingerprint) of the tokenizer that made the ids; needed with ids."""
    rewards: list[str] | None = Field(None, min_length=1)
    """Names of the rewards that are wanted: "default" is the model's own, the others are its
    adapters'. With them the answer has each by its name."""
    version: str | None = None
    """Score by this version and no other: `version` of the answer to the same step's first part."""
    step: str | None = Field(None, max_length=100)
    """Of a step that is sent in several requests: its id, the same in all of them."""
    part: str = Field("", max_length=20)
    """This request's number in the step."""
    outstanding: int = Field(0, ge=0, le=2**53)
    """Tokens of the step, about, that have no reward yet, these rows included."""
    caller: str = Field("", max_length=100)
    """Who sends the step: queues are fair between callers, and a canary scores all of one's."""

    def to_rows(self) -> list[Row]:
        """Raises HTTPException 422 where rows hold ids of a tokenizer that nobody named."""
        rows = [Row(row.prompt, row.response, row.finished, row.tools) for row in self.rows]
        if self.tokenizer is None and any(is_ids(row.response) for row in rows):
            raise HTTPException(
                422, "rows hold token ids: send the fingerprint of their tokenizer as `tokenizer`"
            )
        return rows


class RowRewards(Body):
    """Row by row, in the order of the request."""

    values: list[float | None]
    """Raw rewards; null where the row failed."""
    errors: list[Failure | None]
    truncated: list[bool]
    """The prompt was cut from the left."""
    unfinished: list[bool]
    versions: list[str]
    """The model that scored the row."""

    @classmethod
    def of(cls, rewards: Rewards, **more: Any) -> RowRewards:
        return cls(
            values=[value if np.isfinite(value) else None for value in rewards.values.tolist()],
            errors=[_failure(error) for error in rewards.errors],
            truncated=rewards.truncated.tolist(),
            unfinished=rewards.unfinished.tolist(),
            versions=rewards.versions,
            **more,
        )


class ScoreResponse(RowRewards):
    version: str
    """What scored the rows: send it with the other parts of the same step."""


class NamedScoreResponse(Body):
    rewards: dict[str, RowRewards]
    """By the reward's name, as asked for."""
    version: str
    """What scored the rows: send it with the other parts of the same step."""


def respond(
    rewards: dict[str, Rewards], version: str, named: bool
) -> ScoreResponse | NamedScoreResponse:
    """The answer to a request that names its rewards, or does not."""
    if named:
        by_name = {name: RowRewards.of(of) for name, of in rewards.items()}
        return NamedScoreResponse(rewards=by_name, version=version)
    response = ScoreResponse.of(rewards[OWN], version=version)
    assert isinstance(response, ScoreResponse)
    return response


def _failure(error: RowError | None) -> Failure | None:
    return None if error is None else Failure(error=type(error).__name__, message=str(error))
