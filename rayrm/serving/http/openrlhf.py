"""POST /get_reward: OpenRLHF's remote reward model.

It sends what it sampled as text with its special tokens, and knows no error of one row. Knows
nothing of replicas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast

from rayrm.errors import InvalidRow, RowError
from rayrm.packing import common_prefix
from rayrm.rows import Rewards, Row, check_row
from rayrm.serving.http.score import Body
from rayrm.text.chat import PROMPT
from rayrm.text.template import Template, turn

# What other models' chat templates put around turns: ChatML and Llama 3, DeepSeek, Gemma, Mistral.
_TURN_MARKS = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]"  # noqa: RUF001
)


class RewardRequest(BaseModel):
    """As OpenRLHF sends it; labels, which a reward model has no use for, are ignored."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    query: Annotated[list[str], FailFast()]
    """Prompt and response, decoded with their special tokens: a response without its end of turn
    was cut off."""
    prompts: Annotated[list[str], FailFast()]
    """What each query begins with: rendered by this model's chat template, or plain text."""


class RewardResponse(Body):
    rewards: list[float]
    scores: list[float]
    """The rewards again."""
    extra_logs: dict[str, list[float]]
    """unfinished and truncated, 1 or 0 for each row."""


def read_rows(
    template: Template, queries: Sequence[str], prompts: Sequence[str]
) -> tuple[list[Row], dict[int, RowError]]:
    """The rows of queries and their prompts; and errors, by place, of those that are none."""
    rows: list[Row] = []
    errors: dict[int, RowError] = {}
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        try:
            if not query.startswith(prompt):
                raise InvalidRow("the query does not begin with its prompt")
            rows.append(sampled_row(template, prompt, query[len(prompt) :]))
        except RowError as error:
            errors[i] = error
    return rows, errors


def respond(rewards: Rewards) -> RewardResponse:
    """Of rows that all have a reward."""
    values = rewards.values.tolist()
    logs = {"unfinished": _ones(rewards.unfinished), "truncated": _ones(rewards.truncated)}
    return RewardResponse(rewards=values, scores=values, extra_logs=logs)


def sampled_row(template: Template, prompt: str, sampled: str) -> Row:
    """The row of a prompt and the text that was sampled to it, special tokens and all.

    Padding on either side is left out, and the row is finished if the text ends in its end of turn
    (text format: EOS) or another end of the model. A prompt that this chat template has rendered
    already, with the start of the answer, is not rendered again: that row is the ids of the whole
    conversation. Raises InvalidRow for a prompt that another template has rendered and for lone
    surrogates, EmptyResponse where nothing was sampled, RowTooLong as Template.encode does.
    """
    check_row(Row(prompt, sampled))
    prompt = template.ends.without_left_pads(prompt, template.tokenizer.bos_token)
    content, finished = template.ends.split(sampled)
    if template.spec.format == "text":
        return Row(prompt, content, finished)
    chat = template.chat
    if not chat.opening.strip():
        raise InvalidRow(
            "this model's chat template does not mark where an answer starts, so a rendered "
            "prompt cannot be told from a plain one: send prompt and response"
        )
    if chat.opening not in prompt:
        marks = [t for t in chat.special_tokens if t in prompt]
        if marks or (marks := _TURN_MARKS.findall(prompt)):
            raise InvalidRow(
                f"the prompt holds {marks[0]!r}, but not {chat.opening!r}, with which this "
                "model's chat template starts an answer: it was rendered by another template, "
                "send its text or messages"
            )
        return Row(prompt, content, finished)
    before, _, prefill = prompt.rpartition(chat.opening)
    answer = [turn("user", PROMPT), turn("assistant", prefill + content)]
    if finished and template.spec.rule == "template":
        # The answer's turn as in training: a template may write more than it starts one with.
        template.refuse_dropped(answer, None, 1, True)
        text = before + template.render(answer, None, True).partition(PROMPT)[2]
    else:
        judged = chat.judged(answer[-1], template.spec.thoughts, finished)["content"]
        end = chat.closing[1] if finished else ""
        text = chat.join(before + chat.opening, judged) + end
    template.check_length([max(prompt, text, key=len)])
    prompt_ids, ids = (np.array(x, np.int32) for x in template.tokenize([prompt, text]))
    n = common_prefix([np.append(prompt_ids, -1), ids])
    return Row(ids[:n], ids[n:], finished)


def _ones(flags: NDArray[np.bool_]) -> list[float]:
    ones: list[float] = flags.astype(float).tolist()
    return ones
