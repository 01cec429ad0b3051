"""Shared-prefix attention against its definition: a dense mask over the whole pack, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rayrm.model import attention
from rayrm.model.attention import (
    Layout,
    _BlockedAttention,
    _masked,
    attend_last,
    shared_prefix_attention,
)
from rayrm.packing import Pack, TokenGroup
from tests.tiny import random_ids

SCALING = 0.3

# (prompt, responses): an empty prefix, a one-token prefix, one-token suffixes, a lone row.
SHAPES: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "groups": [(6, (3, 5)), (9, (2, 4, 1))],
    "empty prefix": [(0, (3, 4)), (5, (2, 2))],
    "one-token prefix": [(1, (3, 1))],
    "one-token suffixes": [(7, (1, 1, 1))],
    "lone row": [(4, (5,))],
    "one token in all": [(0, (1,))],
}


def layout(shape: Sequence[tuple[int, tuple[int, ...]]]) -> Layout:
    rng = np.random.default_rng(0)
    groups = [
        TokenGroup(random_ids(rng, prefix), tuple(random_ids(rng, n) for n in suffixes))
        for prefix, suffixes in shape
    ]
    return Layout(Pack.from_groups(groups).segments, torch.device("cpu"))


def inputs(layout: Layout, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = layout.segments[-1].end
    return [
        torch.randn(1, h, tokens, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]


def dense(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, softcap: float | None
) -> Tensor:
    """Every token's distance to every other along its row; -1 where it may not look."""
    tokens = q.shape[2]
    distance = torch.full((tokens, tokens), -1)
    for s in layout.segments:
        seen = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        for i in range(s.start, s.end):
            visible = [j for j in seen if j <= i]
            for back, j in enumerate(reversed(visible)):
                distance[i, j] = back
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * SCALING
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def assert_same(
    ours: Callable[[Tensor, Tensor, Tensor], Tensor],
    theirs: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: list[Tensor],
) -> None:
    out, expected = ours(*qkv), theirs(*qkv)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad((out * weights).sum(), qkv)
    for grad, wanted in zip(
        grads, torch.autograd.grad((expected * weights).sum(), qkv), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_merged_attention_and_its_gradients_are_those_of_a_dense_mask(
    shape: str, kv_heads: int
) -> None:
    plan = layout(SHAPES[shape])
    assert_same(
        lambda q, k, v: shared_prefix_attention(
            torch.nn.Module(), q, k, v, None, layout=plan, scaling=SCALING
        )[0],
        lambda q, k, v: dense(q, k, v, plan, None, None),
        inputs(plan, 4, kv_heads),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "softcap"), [(3, None), (None, 0.5), (3, 0.5), (1, None)])
def test_windows_and_soft_caps_are_those_of_a_dense_mask(
    shape: str, window: int | None, softcap: float | None
) -> None:
    plan = layout(SHAPES[shape])
    assert_same(
        lambda q, k, v: shared_prefix_attention(
            torch.nn.Module(),
            q,
            k,
            v,
            None,
            layout=plan,
            scaling=SCALING,
            sliding_window=window,
            softcap=softcap,
        )[0],
        lambda q, k, v: dense(q, k, v, plan, window, softcap),
        inputs(plan, 4, 2),
    )


def test_the_masked_reference_agrees_without_a_window_too() -> None:
    plan = layout(SHAPES["groups"])
    assert_same(
        lambda q, k, v: _masked(q, k, v, plan, SCALING, None, None),
        lambda q, k, v: dense(q, k, v, plan, None, None),
        inputs(plan, 4, 2),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [1, 1 << 16])
def test_blocks_of_queries_and_their_gradients_are_those_of_a_dense_mask(
    shape: str, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 2)
    monkeypatch.setattr(attention, "BLOCK_SCORES", block)
    plan = layout(SHAPES[shape])
    assert_same(
        lambda q, k, v: _BlockedAttention.apply(q * SCALING, k, v, plan),  # type: ignore[no-untyped-call]
        lambda q, k, v: dense(q, k, v, plan, None, None),
        inputs(plan, 4, kv_heads),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_the_last_tokens_alone_get_what_a_dense_mask_gives(shape: str, kv_heads: int) -> None:
    plan = layout(SHAPES[shape])
    q, k, v = inputs(plan, 4, kv_heads)
    last = torch.tensor([s.end - 1 for s in plan.segments])
    ours = attend_last(q[0].transpose(0, 1)[last], k, v, last, plan, SCALING)
    expected = dense(q, k, v, plan, None, None)[0, last]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_bf16_on_cpu_goes_by_blocks_and_fp32_by_merged_kernels() -> None:
    plan = layout(SHAPES["groups"])
    q, k, v = (x.bfloat16() for x in inputs(plan, 4, 2))
    out, _ = shared_prefix_attention(torch.nn.Module(), q, k, v, None, layout=plan, scaling=SCALING)
    assert "_BlockedAttention" in str(out.grad_fn)
    out, _ = shared_prefix_attention(
        torch.nn.Module(), q.float(), k.float(), v.float(), None, layout=plan, scaling=SCALING
    )
    assert "_MergedAttention" in str(out.grad_fn)


def test_merged_gradients_pass_gradcheck() -> None:
    plan = layout([(3, (2, 1))])
    assert torch.autograd.gradcheck(
        lambda q, k, v: shared_prefix_attention(
            torch.nn.Module(), q, k, v, None, layout=plan, scaling=SCALING
        )[0],
        inputs(plan, 2, 1),
    )


def test_a_window_at_least_as_long_as_every_row_changes_nothing() -> None:
    plan = layout(SHAPES["groups"])
    assert plan.longest == 13  # a prefix of 9 and a suffix of 4
    q, k, v = inputs(plan, 4, 2)

    def attend(window: int | None) -> Tensor:
        return shared_prefix_attention(
            torch.nn.Module(),
            q,
            k,
            v,
            None,
            layout=plan,
            scaling=SCALING,
            sliding_window=window,
        )[0]

    free, wide, narrow = attend(None), attend(13), attend(12)
    assert torch.equal(free, wide)
    assert not torch.allclose(free, narrow)


def test_large_scores_stay_finite_and_exact() -> None:
    plan = layout(SHAPES["groups"])
    q, k, v = inputs(plan, 4, 2)
    assert_same(
        lambda q, k, v: shared_prefix_attention(
            torch.nn.Module(), q * 30, k * 30, v, None, layout=plan, scaling=SCALING
        )[0],
        lambda q, k, v: dense(q * 30, k * 30, v, plan, None, None),
        [q, k, v],
    )


def test_other_groups_are_invisible() -> None:
    plan = layout(SHAPES["groups"])
    q, k, v = inputs(plan, 4, 2)
    before, _ = shared_prefix_attention(
        torch.nn.Module(), q, k, v, None, layout=plan, scaling=SCALING
    )
    second = plan.segments[3].start  # the second group's prefix
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, :second] = torch.nan
    after, _ = shared_prefix_attention(
        torch.nn.Module(), q, k, v, None, layout=plan, scaling=SCALING
    )
    assert torch.equal(before[:, second:], after[:, second:])


def test_under_autocast_the_output_is_what_the_next_layer_takes() -> None:
    """Rotary embedding leaves query and key in fp32, value comes in bf16."""
    plan = layout(SHAPES["groups"])
    q, k, v = (x.detach().float() for x in inputs(plan, 4, 2))
    module = torch.nn.Module()
    exact, _ = shared_prefix_attention(module, q, k, v, None, layout=plan, scaling=SCALING)
    for window in (None, 100, 3):
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = shared_prefix_attention(
                module,
                q,
                k,
                v.bfloat16(),
                None,
                layout=plan,
                scaling=SCALING,
                sliding_window=window,
            )
        assert out.dtype == torch.bfloat16
        if window != 3:
            torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
