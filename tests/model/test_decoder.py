"""The layers run for scoring give what transformers' own layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrm.model.decoder import FAMILIES
from rayrm.model.net import RewardNet, pack_tensors
from rayrm.packing import Pack
from tests import tiny
from tests.tiny import random_groups, scored, tiny_model

GROUPS = random_groups()

# What a config may change in the layers: biases, another activation, windows on some layers.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, one head each": ("llama", {"num_key_value_heads": 4}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, window in the first layer": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": tiny.WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3, window in the last layer": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": tiny.WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}
VARIANTS |= {family: (family, {}) for family in FAMILIES}


def plain_and_fused(family: str, dtype: torch.dtype) -> tuple[RewardNet, RewardNet]:
    """One model's weights behind transformers' layers, and behind ours."""
    plain, fused = (tiny_model(family, dtype) for _ in range(2))
    for net in (plain, fused):
        for name, parameter in net.model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return plain.eval(), fused.for_scoring()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rewards_are_those_of_transformers_layers(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = VARIANTS[variant]
    monkeypatch.setitem(tiny.FAMILIES, family, tiny.FAMILIES[family] | changes)
    plain, fused = plain_and_fused(family, torch.float64)
    assert fused.decoder is not None and plain.decoder is None
    # The others' RMSNorm computes in fp32 whatever it is given.
    expected = scored(plain, [GROUPS])
    torch.testing.assert_close(scored(fused, [GROUPS]), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_bf16_rewards_are_nearer_to_fp32_than_those_of_transformers_layers() -> None:
    plain, fused = plain_and_fused("llama", torch.bfloat16)
    exact = plain_and_fused("llama", torch.bfloat16)[0].float()
    expected = scored(exact, [GROUPS])
    ours = (scored(fused, [GROUPS]) - expected).square().mean()
    theirs = (scored(plain, [GROUPS]) - expected).square().mean()
    assert 0 < ours < theirs


@torch.no_grad()
def test_between_layers_nothing_is_rounded_to_bf16() -> None:
    _, fused = plain_and_fused("llama", torch.bfloat16)
    assert fused.decoder is not None
    read = fused.decoder(*pack_tensors(Pack.from_groups(GROUPS), torch.device("cpu")))
    assert read.dtype == torch.float32
    assert not torch.equal(read, read.bfloat16().float())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_weights_are_held_once(family: str) -> None:
    net = tiny_model(family, torch.float32).for_scoring()
    decoder = net.decoder
    assert decoder is not None
    attention = decoder.layers[0].module.self_attn
    fused = decoder.layers[0].qkv.weight
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert projection.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
