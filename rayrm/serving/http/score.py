"""POST /score: rows of prompts and responses as JSON, and their rewards.

Defines request and answer, and converts requests to rows and rewards to answers. Does not know
about replicas.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import numpy as np
from fastapi import HTTPException
from pydantic import FailFast, Field, WithJsonSchema

from rayrm.config import OWN
from rayrm.data.records import MESSAGE_KEYS
from rayrm.errors import RowError
from rayrm.rows import Rewards, Row, is_ids
from rayrm.serving.http.failures import Failure
from rayrm.serving.http.scoring import Body, Scoring, caller_name

# Any value is accepted here: a row that fits none of these gets an error, the others are scored.
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


class ScoreRow(Body):
    prompt: TextOrIds
    """Text, messages, or token ids."""
    response: TextOrIds
    """Of the same kind as the prompt."""
    finished: bool = True
    """False if the sampler cut the response off."""
    tools: Schemas = None
    """JSON schemas of the functions that can be called, for the chat template."""


class ScoreRequest(Body):
    rows: Annotated[list[ScoreRow], FailFast()]
    tokenizer: str | None = None
    """Fingerprint (rayrm.fingerprint) of the tokenizer that made the ids; required with ids."""
    rewards: list[str] | None = Field(None, min_length=1)
    """Names of the requested rewards: "default" is the model's own, the others are its adapters'.
    If set, the answer has rewards by name."""
    version: str | None = None
    """Score by this version only: `version` of the answer to the first part of the same step."""
    step: str | None = Field(None, max_length=100)
    """Id of the step, the same in all requests that send parts of it."""
    part: str = Field("", max_length=20)
    """Number of this request in the step."""
    outstanding: int = Field(0, ge=0, le=2**53)
    """Approximate number of the step's tokens that have no reward yet, including these rows."""
    caller: str = Field("", max_length=100)
    """Name of the caller: queues are fair between callers, and a canary scores whole callers."""

    def to_rows(self) -> list[Row]:
        """Return the rows. Raises HTTPException 422 for token ids without `tokenizer`."""
        rows = [Row(row.prompt, row.response, row.finished, row.tools) for row in self.rows]
        if self.tokenizer is None and any(is_ids(row.response) for row in rows):
            raise HTTPException(
                422, "rows hold token ids: send the fingerprint of their tokenizer as `tokenizer`"
            )
        return rows


class RowRewards(Body):
    """Results row by row, in the order of the request."""

    values: list[float | None]
    """Raw rewards; null where the row failed."""
    errors: list[Failure | None]
    truncated: list[bool]
    """The prompt was cut from the left."""
    unfinished: list[bool]
    versions: list[str]
    """The version that scored the row."""

    @classmethod
    def of(cls, rewards: Rewards, **more: Any) -> RowRewards:
        """Convert rewards; a reward that is not finite becomes None."""
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
    """The version that scored the rows: send it with the other parts of the same step."""


class NamedScoreResponse(Body):
    rewards: dict[str, RowRewards]
    """Results by the requested names of rewards."""
    version: str
    """The version that scored the rows: send it with the other parts of the same step."""


def handler(
    scoring: Scoring,
) -> Callable[[ScoreRequest], Awaitable[ScoreResponse | NamedScoreResponse]]:
    async def score(request: ScoreRequest) -> ScoreResponse | NamedScoreResponse:
        """Score rows, each a prompt and a response. A bad row gets an error, the others rewards."""
        scoring.check_count(len(request.rows))
        rewards, version = await scoring.score_rows(
            request.to_rows(),
            request.tokenizer,
            caller=caller_name(request.caller),
            rewards=request.rewards or (OWN,),
            version=request.version,
            step=request.step,
            part=f"{request.part}." if request.part else "",
            outstanding=request.outstanding,
        )
        return respond(rewards, version, named=request.rewards is not None)

    return score


def respond(
    rewards: dict[str, Rewards], version: str, named: bool
) -> ScoreResponse | NamedScoreResponse:
    """Return the answer, with rewards by name if the request has named them."""
    if named:
        by_name = {name: RowRewards.of(of) for name, of in rewards.items()}
        return NamedScoreResponse(rewards=by_name, version=version)
    response = ScoreResponse.of(rewards[OWN], version=version)
    assert isinstance(response, ScoreResponse)
    return response


def _failure(error: RowError | None) -> Failure | None:
    return None if error is None else Failure(error=type(error).__name__, message=str(error))
