"""Define and check the rows (prompt and response) that a caller sends, and their rewards.

Loads neither torch nor transformers, so that a client starts fast. Does not know how a row is
rendered, tokenised or scored.
"""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rayrm.config import OWN
from rayrm.data.records import MESSAGE_KEYS, Message, Text
from rayrm.errors import (
    InvalidRow,
    RowError,
    UnknownReward,
)

Tokens = Sequence[int] | NDArray[np.integer]
Tools = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """One prompt and one response: each text or messages, or both token ids.

    finished: False if the sampler's token limit cut the response, which then gets no end of turn
    and no EOS. tools: JSON schemas of the tools in the prompt, for the chat template.
    """

    prompt: Text | Tokens
    response: Text | Tokens
    finished: bool = True
    tools: Tools | None = None


def check_row(row: Row) -> None:
    """Raise InvalidRow unless prompt and response are both token ids, or each text or messages.

    An empty list or array counts as either: no prompt, or an empty response.
    """
    kinds = {_kind(value) for value in (row.prompt, row.response) if not is_empty(value)}
    if "none" in kinds or ("ids" in kinds and len(kinds) > 1):
        wrong = _wrong_key(row.prompt) or _wrong_key(row.response)
        raise InvalidRow(
            "prompt and response must both be text, messages "
            '({"role": …, "content": …} with text content) or token ids; '
            f"got {wrong or f'{_describe(row.prompt)} and {_describe(row.response)}'}"
        )
    if row.tools and "ids" in kinds:
        raise InvalidRow("tools given with token ids, which already contain them: leave tools out")
    if row.tools is not None and not (_is_objects(row.tools) and _is_json(row.tools)):
        raise InvalidRow(f"tools must be a list of JSON schemas, got {_describe(row.tools)}")


def is_empty(value: object) -> bool:
    """Return whether a prompt or response is an empty list or array."""
    if isinstance(value, np.ndarray):
        return not value.size
    return isinstance(value, list | tuple) and not value


def _kind(value: object) -> Literal["text", "messages", "ids", "none"]:
    if _is_text(value):
        return "text"
    if isinstance(value, np.ndarray):
        return "ids" if value.ndim == 1 and (value.dtype.kind in "iu" or not value.size) else "none"
    if isinstance(value, list | tuple):
        if all(issubclass(t, int | np.integer) and t is not bool for t in set(map(type, value))):
            return "ids"
        if is_messages(value) and _is_json(value):
            return "messages"
    return "none"


def is_messages(value: object) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt or response is a list of valid messages (or empty)."""
    return isinstance(value, list | tuple) and all(
        isinstance(m, dict) and _is_text(m.get("role")) and not any(_wrong_keys(m)) for m in value
    )


def _wrong_keys(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a message whose values have a type that no template renders."""
    content, calls = message.get("content"), message.get("tool_calls")
    if not _is_text(content) and not (content is None and calls):
        yield "content"
    if calls is not None and not _is_objects(calls):
        yield "tool_calls"
    for key in MESSAGE_KEYS:
        if key != "tool_calls" and message.get(key) is not None and not _is_text(message[key]):
            yield key


def _wrong_key(value: object) -> str | None:
    """Describe the first value of a wrong type in messages, None if there is none."""
    if isinstance(value, list | tuple):
        for i, message in enumerate(value):
            for key in _wrong_keys(message) if isinstance(message, dict) else ():
                return f"`{key}` of message {i + 1} as {reprlib.repr(message.get(key))}"
    return None


def _is_objects(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_text(value: object) -> TypeGuard[str]:
    """Return whether it is a string without lone surrogates, which no tokenizer accepts."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_ids(value: object) -> bool:
    """Return whether a prompt or response is token ids."""
    return _kind(value) == "ids"


def prompt_key(prompt: Text | Tokens, tools: Tools | None = None) -> object:
    """Return a hashable key that is equal for equal prompts; rows with equal keys form a group."""
    if tools:
        return prompt_key(prompt), json.dumps(tools)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, np.ndarray) or is_ids(prompt):
        return np.asarray(prompt, dtype=np.int32).tobytes()
    return json.dumps(prompt)


def _describe(value: object) -> str:
    kind = _kind(value)
    return kind if kind != "none" else f"{type(value).__name__} {reprlib.repr(value)}"


Texts = Sequence[Text | Tokens]


@dataclass(frozen=True)
class Rewards:
    """Rewards of N rows, in the order in which the rows were given.

    values: float32 [N], unnormalised, NaN for a row that failed. errors: [N], the row's RowError or
    None. truncated: bool [N], prompt cut from the left. unfinished: bool [N], response cut at the
    sampler's token limit. versions: [N], version of the model that scored the row.
    """

    values: NDArray[np.float32]
    errors: list[RowError | None]
    truncated: NDArray[np.bool_]
    unfinished: NDArray[np.bool_]
    versions: list[str]

    def __len__(self) -> int:
        return len(self.values)


def check_names(rewards: Sequence[str] | None) -> Sequence[str]:
    """Return the names of the rewards to compute, by default the model's own.

    Raises ValueError if `rewards` is empty or a string.
    """
    if rewards is not None and (isinstance(rewards, str) or not rewards):
        raise ValueError(f"rewards = {rewards!r}: give a list of names")
    return [OWN] if rewards is None else rewards


def check_served(rewards: Sequence[str], adapters: Collection[str]) -> None:
    """Raise UnknownReward if a name is neither the own reward nor an adapter's."""
    served = [OWN, *adapters]
    if unknown := [name for name in rewards if name not in served]:
        raise UnknownReward(
            f"no reward {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, served))}"
        )


def make_rows(
    prompts: Texts,
    responses: Texts | None,
    finished: Sequence[bool] | None = None,
    groups: Sequence[Texts] | None = None,
    tools: Sequence[Tools | None] | None = None,
) -> list[Row]:
    """Return the rows of N prompts and N responses, or of N prompts and N groups of responses.

    finished: one entry per row. tools: one entry per prompt. Raises ValueError unless either
    responses or groups are given, or if lengths differ.
    """
    tools = [None] * len(prompts) if tools is None else tools
    if len(tools) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, {len(tools)} tools: give a list of JSON schemas per prompt, "
            "or None"
        )
    if (responses is None) == (groups is None):
        raise ValueError("give either responses, one per prompt, or groups, a list per prompt")
    if groups is not None:
        if len(prompts) != len(groups) or any(isinstance(group, str) for group in groups):
            raise ValueError(
                f"{len(prompts)} prompts, {len(groups)} groups: give a list of responses per prompt"
            )
        tools = [t for t, group in zip(tools, groups, strict=True) for _ in group]
        prompts = [p for p, group in zip(prompts, groups, strict=True) for _ in group]
        responses = [response for group in groups for response in group]
    assert responses is not None
    finished = [True] * len(responses) if finished is None else finished
    if isinstance(prompts, str) or isinstance(responses, str):
        raise ValueError("prompts and responses must be lists, with one response per prompt")
    if not len(prompts) == len(responses) == len(finished):
        raise ValueError(
            f"{len(prompts)} prompts, {len(responses)} responses, {len(finished)} finished: "
            "give one of each per row"
        )
    columns = zip(prompts, responses, map(bool, finished), tools, strict=True)
    return [Row(*row) for row in columns]


def warn_unnamed_ids(rows: Sequence[Row], tokenizer: object) -> None:
    """Warn the caller of score if rows are token ids and no tokenizer is named."""
    if tokenizer is None and any(is_ids(row.response) for row in rows):
        warnings.warn(
            "token ids came without their tokenizer: pass tokenizer= to check that it is the "
            "model's, since ids of another one get plausible but wrong rewards",
            stacklevel=3,
        )
