"""What a machine computes fast in: bfloat16 where it multiplies it in hardware, float32 elsewhere.

A CPU without such instructions multiplies bfloat16 at a seventh of the speed of float32 and less.
Knows nothing of models.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from typing import Literal

import torch
from torch.nn.functional import linear

from rayrm.files import cache_directory, whole_file

Dtype = Literal["bfloat16", "float32"]

# Where oneDNN is told to use no more than these instructions, it emulates bfloat16.
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"} | {
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}

# Where a CPU's kind says nothing, bfloat16 must be so many times as fast to be taken.
MARGIN = 2.0


def choose_dtype(asked: Literal["auto"] | Dtype, device: str) -> Dtype:
    """What is asked for, or for auto what the device is fast in.

    Warns where a CPU is asked for bfloat16 that it is slow in, and says how slow.
    """
    if asked == "auto":
        return fast_dtype(device)
    if asked == "bfloat16" and is_cpu(device) and fast_dtype(device) == "float32":
        warnings.warn(
            "this CPU is slow in bfloat16: its matrix products take "
            f"{1 / bf16_speedup():.1f} times as long as in float32, which dtype auto would take",
            stacklevel=3,
        )
    return asked


def fast_dtype(device: str) -> Dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    if is_cpu(device):
        known = cpu_has_bf16()
        fast = remembered_speedup() >= MARGIN if known is None else known
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def cpu_has_bf16() -> bool | None:
    """Whether this CPU multiplies bfloat16 in hardware; None where its kind does not say."""
    can = torch.cpu.get_capabilities()
    if "avx512_bf16" in can:  # x86
        limits = (os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL"))
        limit = next(filter(None, limits), "").upper()
        return bool(can["avx512_bf16"] or can["amx_bf16"]) and limit not in WITHOUT_BF16
    if "bf16" in can and sys.platform == "linux":  # ARM; elsewhere torch does not use it
        return bool(can["bf16"])
    return None


def bf16_speedup() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16, measured."""
    return matrix_rate(torch.bfloat16, 0.1) / matrix_rate(torch.float32, 0.1)


def matrix_rate(dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations a second of products of a small model's size, measured so long."""
    weight, x = torch.randn(1536, 576).to(dtype), torch.randn(512, 576).to(dtype)
    linear(x, weight)
    products, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds:
        linear(x, weight)
        products += 1
    return 2 * weight.numel() * len(x) * products / took


def remembered_speedup() -> float:
    """bf16_speedup, measured once on a machine and kept in the user's cache."""
    file = cache_directory() / f"bf16-speedup-{platform.node()}-torch-{torch.__version__}"
    if not file.exists():
        speedup = f"{bf16_speedup():.3f}\n".encode()
        with whole_file(file) as found:
            found.write(speedup)
    return float(file.read_text())
