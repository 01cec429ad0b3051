"""How a step is cut into chunks, and that a chunk arrives as it was sent."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from rayrm.rows import Row, is_ids, make_rows
from rayrm.serving.chunk import CHUNKS_PER_REPLICA, MIN_CHUNK_TOKENS, Key, Step, _cost

PACK = 8192


def step_of(groups: int, responses: int, prompt: int = 200, response: int = 100) -> Step:
    """Token ids of about the given lengths, half of each to one and a half."""
    draw = np.random.default_rng(0)
    prompts: list[Any] = []
    answers: list[Any] = []
    for g in range(groups):
        ids = np.full(draw.integers(prompt // 2, prompt * 3 // 2), g)
        for r in range(responses):
            prompts.append(ids)
            answers.append(np.full(draw.integers(response // 2, response * 3 // 2), r))
    return Step(make_rows(prompts, answers))


def test_rows_arrive_as_they_were_sent() -> None:
    chat = [{"role": "user", "content": "Grüße 😀"}, {"role": "assistant", "content": ""}]
    rows: list[Row] = [
        Row("ask", "answer"),
        Row("ask", "äöü", False),
        Row("", "x"),
        Row(chat, [{"role": "assistant", "content": "hi", "name": "a"}]),
        Row(chat, "text"),
        Row([1, 2, 3], np.array([4, 5], dtype=np.uint8)),
        Row([], (7, 2**31 - 1)),
        Row([2**31], [2**70]),
    ]
    step = Step(rows)
    (keys,) = step.cut(1, PACK)
    chunk = pickle.loads(pickle.dumps(step.chunk(keys, "fingerprint")))
    sent = [rows[step.places[key][0]] for key in keys]
    assert [_plain(row) for row in chunk.rows()] == [_plain(row) for row in sent]
    assert chunk.tokenizer == "fingerprint"
    # One prompt is shared by two rows and stands once.
    assert len(chunk.prompts.kinds) == 6


def _plain(row: Row) -> list[Any]:
    values: list[Any] = list(row)
    return [list(map(int, x)) if is_ids(x) else x for x in values]


def test_chunks_hold_every_distinct_row_once_and_whole_groups() -> None:
    many = step_of(64, 8)
    chunks = many.cut(2, PACK)
    assert sorted(map(str, (key for chunk in chunks for key in chunk))) == sorted(
        map(str, many.places)
    )
    prompts = [prompt for chunk in chunks for prompt in {key[0] for key in chunk}]
    assert len(prompts) == len(set(prompts)) == 64


def test_chunks_cost_about_the_same() -> None:
    for groups, replicas in ((64, 2), (16, 2), (256, 8)):
        chunks = step_of(groups, 8).cut(replicas, PACK)
        costs = [_tokens(chunk) for chunk in chunks]
        low, high = MIN_CHUNK_TOKENS, PACK / 2
        assert min(costs) > 0.7 * max(costs)
        assert 0.5 * low < np.mean(costs) < 1.1 * high
        assert len(chunks) >= min(CHUNKS_PER_REPLICA * replicas, sum(costs) // low)


def _tokens(chunk: list[Key]) -> float:
    prompts = {key[0] for key in chunk}
    return sum(_cost([key for key in chunk if key[0] == prompt]) for prompt in prompts)


def test_only_a_group_larger_than_a_chunk_is_cut_and_not_for_its_prompt() -> None:
    chunks = step_of(1, 64, prompt=100, response=200).cut(2, PACK)
    assert len(chunks) > 4
    assert max(map(_tokens, chunks)) < 1.2 * PACK / 2

    long_prompt = step_of(1, 64, prompt=8000, response=200)
    assert len(long_prompt.cut(2, PACK)) == 1


def test_the_same_row_under_another_end_or_type_is_another_row() -> None:
    rows = [Row("a", "b"), Row("a", "b", False), Row("a", "[1]"), Row("a", "b")]
    assert list(Step(rows).places.values()) == [[0, 3], [1], [2]]
