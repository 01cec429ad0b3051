"""POST /get_reward: OpenRLHF's remote reward model.

OpenRLHF sends sampled text with its special tokens, and its protocol has no error for a single row.
Does not know about replicas.
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

# Turn markers of other models' chat templates: ChatML and Llama 3, DeepSeek, Gemma, Mistral.
_TURN_MARKS = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]"  # noqa: RUF001
)


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


def without_left_pads(template: Template, query: str, prompt: str) -> tuple[str, str]:
    """Return a query and its prompt without padding on their left.

    Raises InvalidRow if the query does not begin with the prompt even so.
    """
    bos = template.tokenizer.bos_token
    bare, start = (template.ends.without_left_pads(text, bos) for text in (query, prompt))
    if not bare.startswith(start) or (prompt and not start):
        raise InvalidRow("the query does not begin with its prompt")
    return bare, start


def respond(rewards: Rewards) -> RewardResponse:
    """Return the answer for rows that all have a reward."""
    values = rewards.values.tolist()
    logs = {"unfinished": _ones(rewards.unfinished), "truncated": _ones(rewards.truncated)}
    return RewardResponse(rewards=values, scores=values, extra_logs=logs)


def sampled_row(template: Template, prompt: str, sampled: str) -> Row:
    """Return the row of a prompt and the text sampled for it, special tokens included.

    Padding on either side is removed. The row is finished if the text ends in the end-of-turn token
    (text format: EOS) or another end token of the model. A prompt that this chat template has
    already rendered, up to the start of the answer, is not rendered again: its row is the token ids
    of the whole conversation. Raises InvalidRow for a prompt rendered by another template and for
    lone surrogates, EmptyResponse if nothing was sampled, RowTooLong as Template.encode does.
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
            "prompt cannot be told from a plain one: send prompt and response to /score"
        )
    if chat.opening not in prompt:
        marks = [t for t in chat.special_tokens if t in prompt] or _TURN_MARKS.findall(prompt)
        if marks:
            raise InvalidRow(
                f"the prompt contains {marks[0]!r}, but not {chat.opening!r}, with which this "
                "model's chat template starts an answer: it was rendered by another template, "
                "send its text or messages"
            )
        return Row(prompt, content, finished)
    before, _, prefill = prompt.rpartition(chat.opening)
    answer = [turn("user", PROMPT), turn("assistant", prefill + content)]
    if finished and template.spec.rule == "template":
        # Render the answer's turn as in training: a template may write more than chat.opening.
        template.refuse_dropped(answer, None, 1, True)
        text = before + template.render(answer, None, True).partition(PROMPT)[2]
    else:
        judged = chat.judged(answer[-1], template.spec.thoughts, finished)["content"]
        end = chat.closing[1] if finished else ""
        text = chat.join(before + chat.opening, judged) + end
    template.check_length([max(prompt, text, key=len)])
    prompt_ids, ids = (np.array(x, np.int32) for x in template.tokenize([prompt, text]))
    # common_prefix leaves out the last token of the shorter row: -1 lets it find the whole prompt.
    n = common_prefix([np.append(prompt_ids, -1), ids])
    return Row(ids[:n], ids[n:], finished)


def _ones(flags: NDArray[np.bool_]) -> list[float]:
    ones: list[float] = flags.astype(float).tolist()
    return ones
