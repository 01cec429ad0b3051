"""The CUDA path: varlen attention and a model in bf16 against the written-out definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrm.model.attention import Layout, _masked, _varlen
from rayrm.packing import Pack
from tests.tiny import FAMILIES, random_groups, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_varlen_kernel_equals_the_definition_and_so_do_its_gradients(
    window: int | None, key_heads: int
) -> None:
    device = torch.device("cuda")
    pack = Pack.from_groups(random_groups())
    layout = Layout(pack.segments, device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, len(pack.input_ids), 64) for heads in (4, key_heads, key_heads)]
    exact = [torch.randn(s, generator=generator, device=device).requires_grad_() for s in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    q, k, v = exact
    expected = _masked(q, k, v, layout, 0.125, window, None)
    q, k, v = rounded
    got = _varlen(q, k, v, layout, 0.125, window)
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn(expected.shape, generator=generator, device=device)
    (expected * weights).sum().backward()
    (got.float() * weights).sum().backward()
    for a, b in zip(exact, rounded, strict=True):
        assert a.grad is not None and b.grad is not None
        scale = float(a.grad.abs().max())
        np.testing.assert_allclose(b.grad.float().cpu(), a.grad.cpu(), atol=2e-2 * scale, rtol=5e-2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_in_bf16_gives_nearly_the_rewards_of_fp64(family: str) -> None:
    """A pack's rewards, in standard deviations; the head stays in fp32."""
    pack = Pack.from_groups(random_groups())
    net = tiny_model(family, torch.float32).to("cuda")
    for weight in net.model.base_model.parameters():  # buffers, such as frequencies, stay in fp32
        weight.data = weight.data.bfloat16()
    with torch.inference_mode():
        exact = tiny_model(family).for_scoring().score_pack(pack)
        found = net.for_scoring().score_pack(pack)
    assert found.dtype == torch.float32
    spread = exact.std()
    torch.testing.assert_close(found.cpu().double() / spread, exact / spread, atol=0.15, rtol=0)
