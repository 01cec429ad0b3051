"""The layers of a Llama-shaped backbone, run for scoring on CPU in fewer passes.

transformers' layers run every projection, rotation and norm by itself and keep the residual stream
in the weights' dtype. Here query, key and value are one matrix product, gate and up another, the
residual stream is fp32, and the last layer computes only keys and values where no reward is read.
Knows nothing of packs' plans or rewards' use; not for training.

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

# What a layer's products are made of.
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
    """Root mean square norm in fp32, out in the weights' dtype (Zhang and Sennrich 2019)."""

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
    """b a x, which is added to what a layer gives for x: a [R, in], b [out, R], already scaled."""

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)

    @classmethod
    def beside(cls, parts: Sequence[LowRank | None], widths: Sequence[int]) -> LowRank | None:
        """Those of projections of the same input, which are so wide, as one; None where all are."""
        given = [part for part in parts if part]
        if not given:
            return None
        nothing = given[0].b
        blocks = [
            part.b if part else nothing.new_zeros(width, 0)
            for part, width in zip(parts, widths, strict=True)
        ]
        return cls(torch.cat([part.a for part in given]), torch.block_diag(*blocks))


@dataclass(frozen=True)
class Linear:
    """Projections of the same input as one matrix product."""

    weight: Tensor
    bias: Tensor | None
    low_rank: LowRank | None = None

    @classmethod
    def of(cls, *modules: nn.Linear) -> Linear:
        weight = torch.cat([module.weight.detach() for module in modules])
        for module, part in zip(
            modules, weight.split([m.out_features for m in modules]), strict=True
        ):
            module.weight.data = part  # one copy in memory, whoever uses it
        if modules[0].bias is None:
            return cls(weight, None)
        return cls(weight, torch.cat([module.bias.detach() for module in modules]))

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.low_rank is None else out.add_(self.low_rank(x))


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; window: tokens that a query sees at most, None for all."""

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
        # Qwen's layers know whether they slide, Mistral's all do, Llama's never.
        window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
        return cls(
            module,
            getattr(a, "sliding_window", window),
            Norm.of(module.input_layernorm),
            Linear.of(a.q_proj, a.k_proj, a.v_proj),
            Norm.of(a.q_norm) if hasattr(a, "q_norm") else None,
            Norm.of(a.k_norm) if hasattr(a, "k_norm") else None,
            Linear.of(a.o_proj),
            Norm.of(module.post_attention_layernorm),
            Linear.of(mlp.gate_proj, mlp.up_proj),
            Linear.of(mlp.down_proj),
        )

    def adapted(self, low_rank: Mapping[str, LowRank]) -> Layer:
        """This layer, its weights shared, with matrices added to the projections of those names."""
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
    """A backbone's layers, from token ids to what the head reads."""

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
        """This decoder with matrices added to the linear layers that they are named after.

        It shares all weights, and neither knows of the other.
        """
        projections = [part for parts in FUSED.values() for part in parts]
        at = [{part: f"layers.{i}.{part}" for part in projections} for i in range(len(self.layers))]
        assert low_rank.keys() <= {name for names in at for name in names.values()}
        decoder = copy(self)
        decoder.layers = [
            layer.adapted({part: low_rank[n] for part, n in names.items() if n in low_rank})
            for layer, names in zip(self.layers, at, strict=True)
        ]
        return decoder

    def __call__(self, ids: Tensor, positions: Tensor, last: Tensor, layout: Layout) -> Tensor:
        """int64 [T], [T], [K] → the last layer's normed output at `last`, fp32 or more [K, W]."""
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
        """The last layer, of whose output only the tokens at `last` are read."""
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
        """Queries [T, H, D] and keys [T, G, D], rotated but not rounded, and values [T, G, D]."""
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
    """Rotary positions (Su et al. 2021): x [T, ·, D] in halves, cos and sin [T, 1, D / 2]."""
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out
