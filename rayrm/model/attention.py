"""Compute shared-prefix attention over a pack, registered with transformers as "rayrm".

Each segment of a pack attends to its group's prefix and, causally, to itself. Four implementations
compute this: on CPU, matrix products by blocks of queries in bf16, and flash kernels merged by
log-sum-exp in fp32 (neither masks more than a block); on CUDA, one varlen kernel call; and a masked
reference for sliding windows, soft caps and fp32 on CUDA. Does not know about models, rewards or
losses; a model only needs to call transformers' attention interface.

Shapes: B = 1 batch, H query heads, G key/value heads, T tokens of the pack, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rayrm.packing import Segment

NAME = "rayrm"

# Attention scores per block and head; few enough that all heads' scores fit a core's cache.
BLOCK_SCORES = 1 << 16
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 128
USUAL_RESPONSE = 128


@dataclass(frozen=True, eq=False)
class Block:
    """A block of consecutive queries and the keys that they may attend to.

    All bounds are token positions in the pack. Queries: [start, end). Keys: the group's prefix
    [prefix_start, prefix_end), which every query sees in full, then [own, end); own is the start of
    the first query's segment. hidden: bool [queries, 1, end - own], True for keys after the query
    or of another response.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    own: int
    hidden: Tensor

    def seen(self, x: Tensor) -> Tensor:
        """Select the block's keys or values from x [G, T, D]: the prefix, then [own, end)."""
        if self.prefix_end == self.own:
            return x[:, self.prefix_start : self.end]
        prefix, own = x[:, self.prefix_start : self.prefix_end], x[:, self.own : self.end]
        return torch.cat([prefix, own], dim=1)

    def rows(self, x: Tensor) -> Tensor:
        """Select the block's queries from x [T, G, R, D] as rows [G, queries · R, D].

        The R query heads that share a key/value head become rows of one matrix.
        """
        return x[self.start : self.end].transpose(0, 1).flatten(1, 2)

    def put(self, rows: Tensor, x: Tensor) -> None:
        """Write rows [G, queries · R, D] into x [T, G, R, D]: the inverse of `rows`."""
        heads = rows.unflatten(1, (self.end - self.start, -1)).transpose(0, 1)
        x[self.start : self.end] = heads

    def weights(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Return the attention weights [G, queries · R, keys]: softmax of the masked scores."""
        scores = rows @ keys.mT
        own = scores[:, :, -self.hidden.shape[2] :]
        own.unflatten(1, (self.end - self.start, -1)).masked_fill_(self.hidden, -torch.inf)
        return scores.softmax(-1)


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of one pack and the indices that the attention needs, each computed once."""

    segments: tuple[Segment, ...]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        """Length of the longest row in tokens, prefix and suffix together."""
        return max(s.end - s.start + s.prefix_end - s.prefix_start for s in self.segments)

    @cached_property
    def cu_seq_q(self) -> Tensor:
        bounds = [0, *(s.end for s in self.segments)]
        return torch.tensor(bounds, dtype=torch.int32, device=self.device)

    @cached_property
    def cu_seq_k(self) -> Tensor:
        lengths = [s.end - s.start + s.prefix_end - s.prefix_start for s in self.segments]
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)

    @cached_property
    def gather(self) -> Tensor:
        """Key positions for the varlen kernel: each segment's prefix, then the segment itself."""
        parts = [
            torch.arange(a, b)
            for s in self.segments
            for a, b in ((s.prefix_start, s.prefix_end), (s.start, s.end))
        ]
        return torch.cat(parts).to(self.device)

    @cached_property
    def families(self) -> list[tuple[int, int, int, list[int]]]:
        """Groups as (prefix start, prefix end, group end, [prefix end, end of each suffix])."""
        families: list[tuple[int, int, int, list[int]]] = []
        for s in self.segments:
            if s.prefix_end == s.prefix_start:
                families.append((s.start, s.end, s.end, [s.end]))
            else:
                start, prefix_end, _, bounds = families[-1]
                families[-1] = (start, prefix_end, s.end, [*bounds, s.end])
        return families

    @cached_property
    def blocks(self) -> list[Block]:
        """The pack's queries, split into blocks whose scores fit the cache."""
        blocks: list[Block] = []
        for start, prefix_end, end, bounds in self.families:
            parts = [(start, prefix_end, start, [start])]
            if end > prefix_end:
                parts.append((prefix_end, end, prefix_end, bounds[:-1]))
            for first, stop, prefix, starts in parts:
                shared = prefix - start
                tokens = BLOCK_SCORES // (shared + USUAL_RESPONSE)
                tokens = min(max(tokens, SMALLEST_BLOCK), LARGEST_BLOCK)
                row = np.searchsorted(starts, np.arange(first, stop), side="right") - 1
                for a in range(first, stop, tokens):
                    b = min(a + tokens, stop)
                    own = starts[row[a - first]]
                    at, keys = np.arange(a, b), np.arange(own, b)
                    other = row[at - first][:, None] != row[keys - first]
                    hidden = torch.from_numpy(other | (keys > at[:, None]))
                    blocks.append(Block(a, b, start, prefix, own, hidden[:, None]))
        return blocks


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute a pack's attention: query [1, H, T, D], key, value [1, G, T, D] → [1, T, H, D].

    Implements transformers' attention interface; its models pass `layout` through unchanged.
    """
    assert attention_mask is None and dropout == 0.0 and query.shape[0] == 1
    window = sliding_window if sliding_window and sliding_window < layout.longest else None
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        # Cast as autocast does for torch's attention: rotary embedding leaves q and k in fp32.
        dtype = torch.get_autocast_dtype(query.device.type)
    if query.device.type == "cpu" and window is None and softcap is None:
        with torch.autocast("cpu", enabled=False):
            if dtype == torch.bfloat16:
                query, key, value = (query * scaling).to(dtype), key.to(dtype), value.to(dtype)
                return _BlockedAttention.apply(query, key, value, layout), None  # type: ignore[no-untyped-call]
            return _MergedAttention.apply(query, key, value, layout, scaling), None  # type: ignore[no-untyped-call]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        return _varlen(query, key, value, layout, scaling, window), None
    return _masked(query, key, value, layout, scaling, window, softcap), None


def attend_last(
    query: Tensor, key: Tensor, value: Tensor, last: Tensor, layout: Layout, scaling: float
) -> Tensor:
    """Compute attention for K queries only, each the last token of its segment.

    The last layer needs no other outputs. query [K, H, D], of the tokens at last [K]; key and value
    [1, G, T, D] → [K, H, D].
    """
    k, v = key[0].to(value.dtype), value[0]
    query = (query * scaling).to(v.dtype).unflatten(1, (len(k), -1))
    ends = {s.end: s for s in layout.segments}
    outs = []
    for q, at in zip(query, last.tolist(), strict=True):
        s = ends[at + 1]
        keys, values = (
            torch.cat([x[:, s.prefix_start : s.prefix_end], x[:, s.start : s.end]], dim=1)
            for x in (k, v)
        )
        outs.append((q @ keys.mT).softmax(-1) @ values)
    return torch.stack(outs).flatten(1, 2)


class _BlockedAttention(torch.autograd.Function):
    """Attention by one matrix product per block; in bf16 2 to 5 times as fast as the flash kernel.

    Queries must already be scaled. Key/value heads are not expanded: the query heads that share one
    are rows of the same product. Only the inputs are kept for the backward, which recomputes each
    block's weights.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout = layout
        q, k, v = _by_key_head(q, k, v)
        out = torch.empty_like(q)
        for block in layout.blocks:
            weights = block.weights(block.rows(q), block.seen(k))
            block.put(weights @ block.seen(v), out)
        return out.flatten(1, 2)[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = _by_key_head(*ctx.saved_tensors)
        grad_out = grads[0][0].view_as(q)
        grad_q = torch.empty_like(q)
        # Many blocks add to the same keys: a bf16 sum would lose the small terms.
        exact = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=exact) for x in (k, v))
        for block in ctx.layout.blocks:
            rows, grad, keys = block.rows(q), block.rows(grad_out), block.seen(k)
            weights = block.weights(rows, keys)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad @ block.seen(v).mT, weights, -1, weights.dtype
            )
            block.put(grad_scores @ keys, grad_q)
            shared = block.prefix_end - block.prefix_start
            for total, part in ((grad_k, grad_scores.mT @ rows), (grad_v, weights.mT @ grad)):
                total[:, block.prefix_start : block.prefix_end] += part[:, :shared]
                total[:, block.own : block.end] += part[:, shared:]
        grad_q = grad_q.flatten(1, 2).transpose(0, 1)
        return grad_q[None], grad_k.to(k.dtype)[None], grad_v.to(v.dtype)[None], None


def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reorder q [1, H, T, D] to [T, G, H / G, D], k and v [1, G, T, D] to [G, T, D], contiguous."""
    by_token = q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1))
    return by_token.contiguous(), k[0].contiguous(), v[0].contiguous()


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, window: int | None
) -> Tensor:
    """Compute attention in one kernel call with the causal mask aligned bottom-right.

    Each segment's keys are gathered: its prefix, then the segment itself.
    """
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1)[layout.gather],
        v[0].transpose(0, 1)[layout.gather],
        layout.cu_seq_q,
        layout.cu_seq_k,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Compute the reference: one segment at a time, with scores and softmax written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outs = []
    for s in layout.segments:
        prefix, own = slice(s.prefix_start, s.prefix_end), slice(s.start, s.end)
        keys = torch.cat([k[:, :, prefix], k[:, :, own]], dim=2)
        values = torch.cat([v[:, :, prefix], v[:, :, own]], dim=2)
        scores = q[:, :, own] @ keys.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        k_at = torch.arange(keys.shape[2], device=q.device)
        q_at = k_at[-scores.shape[2] :, None]
        hidden = k_at > q_at
        if window is not None:
            hidden |= q_at - k_at >= window
        scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
        outs.append(weights @ values)
    return torch.cat(outs, dim=2).transpose(1, 2)


class _MergedAttention(torch.autograd.Function):
    """Attention by CPU flash kernels per block of keys, merged by log-sum-exp; exact both ways.

    Forward: a group's suffixes attend to the prefix in one call and each to itself in another; with
    l = logaddexp(l₁, l₂) the merged output is e^(l₁-l)·o₁ + e^(l₂-l)·o₂. Backward: the flash kernel
    recomputes its weights as exp(score - l); given the *merged* output and l, it returns each
    block's exact share of the gradient (as in ring attention, Liu et al. 2023, arXiv:2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float
    ) -> Tensor:
        _, H, T, D = q.shape
        out = q.new_empty(1, T, H, D).transpose(1, 2)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(1, T, H, dtype=lse_dtype, device=q.device).transpose(1, 2)
        for start, prefix_end, end, bounds in layout.families:
            for a, b in pairwise([start, *bounds]):
                own = slice(a, b)
                out[:, :, own], lse[:, :, own] = _flash(q, k, v, own, own, True, scaling)
            if end > prefix_end:
                suffixes = slice(prefix_end, end)
                o_p, l_p = _flash(q, k, v, suffixes, slice(start, prefix_end), False, scaling)
                o_s, l_s = out[:, :, suffixes], lse[:, :, suffixes]
                merged = torch.logaddexp(l_p, l_s)
                w_p, w_s = (l_p - merged).exp()[..., None], (l_s - merged).exp()[..., None]
                out[:, :, suffixes] = (w_p * o_p + w_s * o_s).to(q.dtype)
                lse[:, :, suffixes] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = grads[0].transpose(1, 2)
        heads_per_key = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(heads_per_key, dim=1) for x in (k, v))
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for at, keys, causal in _blocks(ctx.layout):
            flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            d_q, d_k, d_v = flash_backward(
                grad_out[:, :, at],
                q[:, :, at],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, at],
                lse[:, :, at],
                0.0,
                causal,
                scale=ctx.scaling,
            )
            grad_q[:, :, at] += d_q
            grad_k[:, :, keys] += d_k
            grad_v[:, :, keys] += d_v
        grad_k, grad_v = (
            x.unflatten(1, (-1, heads_per_key)).sum(2) if heads_per_key > 1 else x
            for x in (grad_k, grad_v)
        )
        return grad_q, grad_k, grad_v, None, None


def _blocks(layout: Layout) -> Iterator[tuple[slice, slice, bool]]:
    """Yield each block as (queries, keys, causal): segments on themselves, suffixes on prefixes."""
    for start, prefix_end, end, bounds in layout.families:
        for a, b in pairwise([start, *bounds]):
            yield slice(a, b), slice(a, b), True
        if end > prefix_end:
            yield slice(prefix_end, end), slice(start, prefix_end), False


def _flash(
    q: Tensor, k: Tensor, v: Tensor, at: slice, keys: slice, causal: bool, scaling: float
) -> Sequence[Tensor]:
    """Run torch's CPU flash kernel; return output [1, H, t, D] and log-sum-exp [1, H, t]."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Sequence[Tensor] = flash(
        q[:, :, at], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scaling
    )
    return result


ALL_ATTENTION_FUNCTIONS.register(NAME, shared_prefix_attention)
