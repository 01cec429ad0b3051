"""deterministic: a row's reward has the same bits, whatever is beside it and whoever scores it.

What is compared is scored without the mode too, and must differ there: else no test could fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray import serve

from rayrm.model.engine import RewardModel
from rayrm.packing import Ids, TokenGroup
from rayrm.rows import make_rows
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from tests.makers import make_export

PROMPTS = ["Hi", "What is the capital of France?", "Why? " * 20]
RESPONSES = ["x", "It is Paris, the capital of France.", "apples and plums " * 5, "because " * 12]
ROWS = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]
N = len(ROWS)

# Wide enough for kernels that cut a sum over the inner width by the number of threads.
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 1024},  # by our layers
    "gpt2": {"n_inner": 1024},  # by transformers' layers
}

Bits = NDArray[np.int32]
Dtype = Literal["float32", "bfloat16"]
Scorer = RewardModel | RewardClient


def score(scorer: Scorer, order: Any, rows: Any = ROWS, **options: Any) -> Bits:
    """The bits of those rows' rewards, in one call."""
    chosen = [rows[i] for i in order]
    rewards = scorer.score([p for p, _ in chosen], [r for _, r in chosen], **options)
    assert rewards.errors == [None] * len(chosen)
    bits: Bits = rewards.values.view(np.int32)
    return bits


def alone(scorer: Scorer) -> Bits:
    return np.concatenate([score(scorer, [i]) for i in range(N)])


def beside_others(scorer: Scorer) -> dict[str, Bits]:
    """The bits of all rows, in their order, by what was beside them."""
    order = np.random.default_rng(0).permutation(N)
    quarters = [score(scorer, quarter) for quarter in np.split(order, 4)]
    return {
        "together": score(scorer, range(N)),
        "shuffled": score(scorer, order)[order.argsort()],
        "in other groups": np.concatenate(quarters)[order.argsort()],
        "twice in a call": score(scorer, [*order, *range(N)])[N:],
    }


def in_every_way(model: RewardModel) -> dict[str, Bits]:
    prompts, responses = map(list, zip(*ROWS, strict=True))
    ids = cast(list[Ids], model.template.encode(make_rows(prompts, responses)))
    cut = [(row[:3], row[3:]) for row in ids]
    groups = [TokenGroup.from_rows(ids[i : i + 4]) for i in range(0, N, 4)]
    made_by = model.template.spec.fingerprint
    return {
        "alone": alone(model),
        **beside_others(model),
        "as ids": score(model, range(N), cut, tokenizer=made_by),
        "in groups made elsewhere": np.concatenate(model.score_groups(groups)).view(np.int32),
    }


def on_replicas(export: Path, dtype: Dtype, *, deterministic: bool) -> dict[str, Bits]:
    """In every way, by models with other numbers of threads and other packs."""
    scored = {}
    try:
        for threads, tokens_per_pack in ((1, 8192), (2, 200), (3, 8192), (3, 8)):
            torch.set_num_threads(threads)
            model = RewardModel.load(
                export, "cpu", dtype, tokens_per_pack=tokens_per_pack, deterministic=deterministic
            )
            for way, found in in_every_way(model).items():
                scored[f"{way}; {threads} threads; packs of {tokens_per_pack}"] = found
    finally:
        torch.set_num_threads(1)
    return scored


def moved(scored: dict[str, Bits], expected: Bits) -> list[str]:
    return [way for way, found in scored.items() if not np.array_equal(found, expected)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_neighbour_order_pack_or_thread_moves_a_bit(
    family: str, dtype: Dtype, tmp_path: Path
) -> None:
    export = make_export(tmp_path, family, dtype, **WIDE[family])
    strict = on_replicas(export, dtype, deterministic=True)
    expected = strict["alone; 1 threads; packs of 8192"]
    assert len(np.unique(expected)) == N
    assert moved(strict, expected) == []

    loose = moved(on_replicas(export, dtype, deterministic=False), expected)
    ways = {"together", "shuffled", "in other groups", "as ids", "in groups made elsewhere"}
    assert ways <= {way.split(";")[0] for way in loose}
    if dtype == "float32":  # in bf16 no kernel of a model this small looks at the threads
        assert "alone; 3 threads; packs of 8192" in loose


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_neighbour_or_order_moves_a_bit_on_cuda(dtype: Dtype, tmp_path: Path) -> None:
    export = make_export(tmp_path, dtype=dtype, **WIDE["llama"])
    strict = in_every_way(RewardModel.load(export, "cuda", dtype, deterministic=True))
    assert moved(strict, strict["alone"]) == []
    loose = in_every_way(RewardModel.load(export, "cuda", dtype))
    assert "together" in moved(loose, strict["alone"])


def test_the_tokens_that_a_replica_counts_are_those_it_computes(tiny_export: Path) -> None:
    model = RewardModel.load(tiny_export, "cpu", "float32", deterministic=True)
    prompts, responses = map(list, zip(*ROWS, strict=True))
    encoded = model.encode(make_rows(prompts, responses))
    assert sum(group.tokens for group in encoded.groups) == encoded.tokens.sum()
    model.score(prompts, responses)
    assert model.forwards == N


@pytest.mark.slow
def test_replicas_of_one_and_of_three_threads_give_the_bits_of_one_process(
    cluster: None, tmp_path: Path
) -> None:
    export = make_export(tmp_path, **WIDE["llama"])
    served: dict[bool, dict[str, Bits]] = {True: {}, False: {}}
    for deterministic, cpus in ((True, 1), (True, 3), (False, 3)):
        deploy(
            ServeConfig(
                export=str(export),
                dtype="float32",
                app="strict",
                cpus_per_replica=cpus,
                tokens_per_pack=512,
                deterministic=deterministic,
            )
        )
        client = RewardClient("strict")
        for way, found in (beside_others(client) | {"alone": alone(client)}).items():
            served[deterministic][f"{way}; {cpus} threads"] = found
    serve.delete("strict")
    expected = alone(RewardModel.load(export, "cpu", "float32", deterministic=True))
    assert moved(served[True], expected) == []
    assert {"together; 3 threads", "alone; 3 threads"} <= set(moved(served[False], expected))
