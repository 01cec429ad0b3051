"""Run the layers of a Llama-shaped backbone for scoring on CPU, in fewer passes.

transformers' layers run each projection, rotation and norm separately and keep the residual stream
in the weights' dtype. Here query, key and value are one matrix product, gate and up another; the
residual stream is fp32; and the last layer's output is computed only where a reward is read. Not
for training. Does not know how packs are planned or what rewards are used for.

Shapes: T tokens of the pack, K responses, W width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from rayrm.model.attention import Layout, attend_last, shared_prefix_attention

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}

# The projections that each of a layer's matrix products fuses.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Norm:
    """A root mean square norm in fp32, cast to a given dtype (Zhang and Sennrich 2019)."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(_exact(module.weight.detach()), module.variance_epsilon)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight).to(dtype)


@dataclass(frozen=True)
class LowRank:
    """A low-rank update b·a·x that is added to a layer's output for x.

    a: [R, in]. b: [out, R], with the adapter's scale applied.
    """

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)

    @classmethod
    def beside(cls, parts: Sequence[LowRank | None], widths: Sequence[int]) -> LowRank | None:
        """Combine the updates of projections of the same input into one, or None if all are None.

        widths: the projections' output widths.
        """
        given = [part for part in parts if part]
        if not given:
            return None
        first = given[0].b
        blocks = [
            part.b if part else first.new_zeros(width, 0)
            for part, width in zip(parts, widths, strict=True)
        ]
        return cls(torch.cat([part.a for part in given]), torch.block_diag(*blocks))


@dataclass(frozen=True)
class Linear:
    """Projections of the same input, fused into one matrix product."""

    weight: Tensor
    bias: Tensor | None
    low_rank: LowRank | None = None

    @classmethod
    def of(cls, *modules: nn.Linear) -> Linear:
        weight = torch.cat([module.weight.detach() for module in modules])
        parts = weight.split([module.out_features for module in modules])
        for module, part in zip(modules, parts, strict=True):
            module.weight.data = part  # a view, so that the weights are in memory once
        if modules[0].bias is None:
            return cls(weight, None)
        return cls(weight, torch.cat([module.bias.detach() for module in modules]))

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.low_rank is None else out.add_(self.low_rank(x))


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights. window: most tokens that a query sees, None for all."""

    module: Any
    window: int | None
    norm_in: Norm
    qkv: Linear
    norm_q: Norm | None
    norm_k: Norm | None
    out: Linear
    norm_mlp: Norm
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, module: Any, config: PretrainedConfig) -> Layer:
        a, mlp = module.self_attn, module.mlp
        # Qwen's layers record their own window; Mistral's all slide, Llama's never do.
        window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
        return cls(
            module=module,
            window=getattr(a, "sliding_window", window),
            norm_in=Norm.of(module.input_layernorm),
            qkv=Linear.of(a.q_proj, a.k_proj, a.v_proj),
            norm_q=Norm.of(a.q_norm) if hasattr(a, "q_norm") else None,
            norm_k=Norm.of(a.k_norm) if hasattr(a, "k_norm") else None,
            out=Linear.of(a.o_proj),
            norm_mlp=Norm.of(module.post_attention_layernorm),
            gate_up=Linear.of(mlp.gate_proj, mlp.up_proj),
            down=Linear.of(mlp.down_proj),
        )

    def adapted(self, low_rank: Mapping[str, LowRank]) -> Layer:
        """Return this layer with updates added to the named projections; weights are shared."""
        fused = {
            name: replace(
                getattr(self, name),
                low_rank=LowRank.beside(
                    [low_rank.get(part) for part in parts],
                    [self.module.get_submodule(part).out_features for part in parts],
                ),
            )
            for name, parts in FUSED.items()
        }
        return replace(self, **fused)


class Decoder:
    """A backbone's layers, which turn token ids into the hidden states that the head reads."""

    def __init__(self, model: PreTrainedModel) -> None:
        assert model.config.model_type in FAMILIES and model.device.type == "cpu"
        config = model.config
        backbone: Any = model.base_model
        self.embed, self.rotary = backbone.embed_tokens, backbone.rotary_emb
        self.layers = [Layer.of(layer, config) for layer in backbone.layers]
        self.norm = Norm.of(backbone.norm)
        attention = backbone.layers[0].self_attn
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.key_heads: int = config.num_key_value_heads
        self.dtype: torch.dtype = self.embed.weight.dtype
        self.exact = torch.promote_types(self.dtype, torch.float32)

    def adapted(self, low_rank: Mapping[str, LowRank]) -> Decoder:
        """Return a decoder with updates added to the linear layers that they are named after.

        Both decoders share all weights; this one stays unchanged.
        """
        projections = [part for parts in FUSED.values() for part in parts]
        full_names = [
            {part: f"layers.{i}.{part}" for part in projections} for i in range(len(self.layers))
        ]
        assert low_rank.keys() <= {name for names in full_names for name in names.values()}
        decoder = copy(self)
        decoder.layers = [
            layer.adapted(
                {part: low_rank[name] for part, name in names.items() if name in low_rank}
            )
            for layer, names in zip(self.layers, full_names, strict=True)
        ]
        return decoder

    def __call__(self, ids: Tensor, positions: Tensor, last: Tensor, layout: Layout) -> Tensor:
        """Return the last layer's normed output at `last`, fp32 or wider [K, W].

        ids, positions: int64 [T]. last: int64 [K].
        """
        x = self.embed(ids).to(self.exact)
        cos, sin = (
            table[0, :, None, : self.head_size // 2] for table in self.rotary(x, positions[None])
        )
        for layer in self.layers[:-1]:
            q, k, v = self.project(layer, x, cos, sin)
            x += layer.out(self.attend(layer, q, k, v, layout))
            x += self.mlp(layer, x)
        return self.finish(self.layers[-1], x, cos, sin, last, layout)

    def finish(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, last: Tensor, layout: Layout
    ) -> Tensor:
        """Run the last layer and the final norm; return the tokens at `last` only."""
        q, k, v = self.project(layer, x, cos, sin)
        if layer.window is not None and layer.window < layout.longest:
            out = self.attend(layer, q, k, v, layout)[last]
        else:
            out = attend_last(
                q[last],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                last,
                layout,
                self.scaling,
            ).flatten(1)
        x = x[last]
        x += layer.out(out)
        x += self.mlp(layer, x)
        return self.norm(x, self.exact)

    def project(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries [T, H, D], keys [T, G, D] and values [T, G, D].

        Queries and keys are rotated and stay in fp32 or wider.
        """
        qkv = layer.qkv(layer.norm_in(x, self.dtype)).unflatten(-1, (-1, self.head_size))
        qk, v = qkv[:, : -self.key_heads].to(self.exact), qkv[:, -self.key_heads :]
        if layer.norm_q and layer.norm_k:
            q, k = qk[:, : -self.key_heads], qk[:, -self.key_heads :]
            qk = torch.cat([layer.norm_q(q, self.exact), layer.norm_k(k, self.exact)], dim=1)
        qk = rotate(qk, cos, sin)
        return qk[:, : -self.key_heads], qk[:, -self.key_heads :], v

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, _ = shared_prefix_attention(
            layer.module,
            query,
            key,
            value,
            None,
            layout=layout,
            scaling=self.scaling,
            sliding_window=layer.window,
        )
        return out[0].flatten(1)

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(layer.norm_mlp(x, self.dtype)).chunk(2, dim=-1)
        hidden: Tensor = layer.module.mlp.act_fn(gate)
        return layer.down(hidden.mul_(up))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021) to the halves of D: x [T, ·, D].

    cos, sin: [T, 1, D / 2].
    """
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out
