"""Cut a step of rows into chunks, the flat arrays that a client sends to replicas.

Equal rows are sent once, a group stays in one chunk if it fits, and chunks cost about the same.
Does not know about Ray, tokenizers or models: a token is counted as four bytes, which is exact for
ids and close for English text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rayrm.data.records import Text
from rayrm.errors import InvalidRow, RowError
from rayrm.packing import balance
from rayrm.rows import Rewards, Row, Tokens, check_row, is_ids

BYTES_PER_TOKEN = 4

# A chunk is at most half a pack, so that a slow or dying replica holds little of a step, and other
# replicas wait only briefly for the last chunk.
CHUNKS_PER_PACK = 2
MIN_CHUNK_TOKENS = 1024

# Maximum chunk if the size of packs is unknown.
MAX_CHUNK_TOKENS = 131072

# Chunks per replica, cut from a step and in flight: enough that replicas end together, and that one
# pack is queued while the next is on its way.
CHUNKS_PER_REPLICA = 4

# Minimum size of a split group's pieces, in lengths of its prompt: computing the prompt again then
# costs at most an eighth of a piece.
MIN_PROMPTS_PER_PIECE = 8

TEXT, IDS, JSON, TOOLS = range(4)

Payload = tuple[int, bytes]
"""A prompt or response on the wire: (kind, bytes). TOOLS: a prompt and its tools, as JSON."""


def to_payload(value: Text | Tokens) -> Payload:
    """Encode text as UTF-8, token ids as int32, and messages or ids beyond int32 as JSON."""
    if isinstance(value, str):
        return TEXT, value.encode()
    if not is_ids(value):
        return JSON, json.dumps(value).encode()
    ids = np.asarray(value)
    if ids.dtype != np.int32 and len(ids) and (ids.min() < -(2**31) or ids.max() >= 2**31):
        return JSON, json.dumps([int(i) for i in cast(Tokens, value)]).encode()
    return IDS, ids.astype(np.int32).tobytes()


def prompt_payload(row: Row) -> Payload:
    """Encode a row's prompt; if it has tools, together with them, as JSON."""
    if not row.tools:
        return to_payload(row.prompt)
    return TOOLS, json.dumps([row.prompt, row.tools]).encode()


def from_payload(kind: int, data: NDArray[np.uint8]) -> Text | Tokens:
    """Decode a payload: the inverse of to_payload, with token ids as an int32 array.

    TOOLS gives the list [prompt, tools].
    """
    if kind == IDS:
        return data.view(np.int32)
    text = data.tobytes().decode()
    return text if kind == TEXT else json.loads(text)


@dataclass(frozen=True)
class Column:
    """N payloads, concatenated.

    kinds: uint8 [N]. data: uint8 [bytes]. ends: int64 [N], the end of each payload in data.
    """

    kinds: NDArray[np.uint8]
    data: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def pack(cls, payloads: Sequence[Payload]) -> Column:
        return cls(
            np.array([kind for kind, _ in payloads], dtype=np.uint8),
            np.frombuffer(b"".join(data for _, data in payloads), dtype=np.uint8),
            np.cumsum([len(data) for _, data in payloads], dtype=np.int64),
        )

    def unpack(self) -> list[Text | Tokens]:
        return [from_payload(k, part) for k, part in zip(self.kinds, self._parts(), strict=True)]

    @property
    def tokens(self) -> NDArray[np.float64]:
        """Approximate token count of each payload, float64 [N]."""
        return np.diff(self.ends, prepend=0) / BYTES_PER_TOKEN

    @property
    def hashes(self) -> NDArray[np.int64]:
        """Hash of each payload, int64 [N]; comparable only within this process."""
        return np.array([hash(part.tobytes()) for part in self._parts()], dtype=np.int64)

    def _parts(self) -> Iterator[NDArray[np.uint8]]:
        return (self.data[start:end] for start, end in pairwise([0, *self.ends.tolist()]))


@dataclass(frozen=True)
class Chunk:
    """N distinct rows, as sent to a replica.

    prompts: each distinct prompt once. prompt_of: int32 [N], index of each row's prompt. responses:
    N payloads. finished: bool [N]. copies: int32 [N], number of equal rows in the step. tokenizer:
    fingerprint of the tokenizer that made the ids, None if unknown.
    """

    prompts: Column
    prompt_of: NDArray[np.int32]
    responses: Column
    finished: NDArray[np.bool_]
    copies: NDArray[np.int32]
    tokenizer: str | None

    @property
    def cost(self) -> int:
        """Approximate number of tokens, each prompt once."""
        return (len(self.prompts.data) + len(self.responses.data)) // BYTES_PER_TOKEN

    def rows(self) -> list[Row]:
        prompts: list[Any] = [
            prompt if kind == TOOLS else (prompt, None)
            for kind, prompt in zip(self.prompts.kinds, self.prompts.unpack(), strict=True)
        ]
        responses = self.responses.unpack()
        return [
            Row(prompts[p][0], response, bool(finished), prompts[p][1])
            for p, response, finished in zip(self.prompt_of, responses, self.finished, strict=True)
        ]


Key = tuple[Payload, Payload, bool]
"""Prompt with its tools, response, finished; rows with equal keys are sent once."""

Arrival = tuple[NDArray[np.int64], Rewards]
"""Indices of rows in a step, int64 [n], and their rewards."""


class Step:
    """The N rows of one call: deduplicate them, cut them into chunks and collect their rewards."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.errors: list[RowError | None] = [None] * len(rows)
        self.places: dict[Key, list[int]] = {}
        for i, row in enumerate(rows):
            try:
                check_row(row)
            except InvalidRow as error:
                self.errors[i] = error
                continue
            key = prompt_payload(row), to_payload(row.response), row.finished
            self.places.setdefault(key, []).append(i)

    def cut(self, replicas: int, tokens_per_pack: int) -> list[list[Key]]:
        """Return the distinct valid rows as chunks of about equal cost, costliest first.

        tokens_per_pack: the replicas' token budget of a pack, 0 if unknown.
        """
        groups: dict[Payload, list[Key]] = {}
        for key in self.places:
            groups.setdefault(key[0], []).append(key)
        total = sum(map(_cost, groups.values()))
        largest = tokens_per_pack // CHUNKS_PER_PACK if tokens_per_pack else MAX_CHUNK_TOKENS
        largest = max(MIN_CHUNK_TOKENS, largest)
        size = np.clip(total / (CHUNKS_PER_REPLICA * replicas), MIN_CHUNK_TOKENS, largest)
        pieces = [piece for group in groups.values() for piece in _pieces(group, size)]
        costs = [round(_cost(piece)) for piece in pieces]
        bins = balance(costs, max(1, int(np.ceil(total / size))))  # empty rows cost 0
        return [[key for p in indices for key in pieces[p]] for indices in bins if indices]

    def chunk(self, keys: Sequence[Key], tokenizer: str | None) -> Chunk:
        """Return the rows of these keys as flat arrays."""
        prompts = {prompt: p for p, prompt in enumerate(dict.fromkeys(key[0] for key in keys))}
        return Chunk(
            Column.pack(list(prompts)),
            np.array([prompts[key[0]] for key in keys], dtype=np.int32),
            Column.pack([key[1] for key in keys]),
            np.array([key[2] for key in keys], dtype=bool),
            np.array([len(self.places[key]) for key in keys], dtype=np.int32),
            tokenizer,
        )

    def arrived(self, chunk: Sequence[Key], reply: Rewards) -> Arrival:
        """Return a chunk's rewards for all rows of the step that equal one of its rows."""
        at = [(i, k) for k, key in enumerate(chunk) for i in self.places[key]]
        places, ks = np.array(at, dtype=np.int64).reshape(-1, 2).T
        return places, Rewards(
            reply.values[ks],
            [reply.errors[k] for k in ks],
            reply.truncated[ks],
            np.array([not self.rows[i].finished for i in places], dtype=bool),
            [reply.versions[k] for k in ks],
        )

    def collect(self, arrivals: Sequence[Arrival]) -> Rewards:
        """Return the rewards of all N rows, in the order of the rows.

        An invalid row was never sent: it has its InvalidRow, and version "".
        """
        n = len(self.rows)
        values = np.full(n, np.nan, dtype=np.float32)
        truncated = np.zeros(n, dtype=bool)
        errors, versions = list(self.errors), [""] * n
        for places, rewards in arrivals:
            values[places], truncated[places] = rewards.values, rewards.truncated
            for i, error, version in zip(places, rewards.errors, rewards.versions, strict=True):
                errors[i], versions[i] = error, version
        unfinished = np.array([not row.finished for row in self.rows], dtype=bool)
        return Rewards(values, errors, truncated, unfinished, versions)


def _cost(group: Sequence[Key]) -> float:
    """Return the approximate tokens of rows with the same prompt, which is counted once."""
    payloads = [group[0][0], *(key[1] for key in group)]
    return sum(len(data) for _, data in payloads) / BYTES_PER_TOKEN


def _pieces(group: Sequence[Key], size: float) -> Iterator[Sequence[Key]]:
    """Yield the group, split into pieces of about `size` tokens if it is larger."""
    prompt = len(group[0][0][1]) / BYTES_PER_TOKEN
    size = max(size, MIN_PROMPTS_PER_PIECE * prompt)
    start, cost = 0, prompt
    for i, key in enumerate(group):
        response = len(key[1][1]) / BYTES_PER_TOKEN
        if i > start and cost + response > size:
            yield group[start:i]
            start, cost = i, prompt
        cost += response
    yield group[start:]
