"""POST /get_reward: OpenRLHF's remote reward model.

OpenRLHF sends sampled text with its special tokens, and its protocol has no error for a single row.
Does not know about replicas.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import HTTPException
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast

from rayrm.errors import RowError
from rayrm.rows import Rewards, Row
from rayrm.serving.http.scoring import Body, Scoring
from rayrm.text.sampled import sampled_row, without_left_pads
from rayrm.text.template import Template


class RewardRequest(BaseModel):
    """A request as OpenRLHF sends it; its labels are ignored, a reward model does not need them."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    query: Annotated[list[str], FailFast()]
    """Prompt and response, decoded with their special tokens. A response without its end-of-turn
    token was cut off."""
    prompts: Annotated[list[str], FailFast()]
    """The prompt that each query begins with: rendered by this model's chat template, or plain
    text."""


class RewardResponse(Body):
    rewards: list[float]
    scores: list[float]
    """The rewards again."""
    extra_logs: dict[str, list[float]]
    """`unfinished` and `truncated`: 1 or 0 for each row."""


def handler(scoring: Scoring) -> Callable[[RewardRequest], Awaitable[RewardResponse]]:
    async def get_reward(request: RewardRequest) -> RewardResponse:
        """Score queries as OpenRLHF's remote reward model. One bad row fails the whole request."""
        scoring.check_count(len(request.query))
        if len(request.query) != len(request.prompts):
            raise HTTPException(
                422,
                f"{len(request.query)} queries, {len(request.prompts)} prompts: send one prompt "
                "for each query",
            )
        read = partial(read_rows, queries=request.query, prompts=request.prompts)
        return respond(await scoring.score_sampled(read))

    return get_reward


def read_rows(
    template: Template, queries: Sequence[str], prompts: Sequence[str]
) -> tuple[list[Row], dict[int, RowError]]:
    """Return the rows of the valid queries, and the errors of the others by index."""
    rows: list[Row] = []
    errors: dict[int, RowError] = {}
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        try:
            if not query.startswith(prompt):  # a batch may pad only its queries on the left
                query, prompt = without_left_pads(template, query, prompt)
            rows.append(sampled_row(template, prompt, query[len(prompt) :]))
        except RowError as error:
            errors[i] = error
    return rows, errors


def respond(rewards: Rewards) -> RewardResponse:
    """Return the answer for rows that all have a reward."""
    values = rewards.values.tolist()
    logs = {"unfinished": _ones(rewards.unfinished), "truncated": _ones(rewards.truncated)}
    return RewardResponse(rewards=values, scores=values, extra_logs=logs)


def _ones(flags: NDArray[np.bool_]) -> list[float]:
    ones: list[float] = flags.astype(float).tolist()
    return ones
