"""Choose the dtype that a machine computes fast in: bfloat16 if in hardware, else float32.

A CPU without bfloat16 instructions multiplies it at a seventh of the speed of float32 or less.
Does not know about models.
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

# Limits of the instruction set under which oneDNN emulates bfloat16.
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"} | {
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}

# Measured speedup from which bfloat16 is chosen if the CPU does not report its instructions.
MARGIN = 2.0


def choose_dtype(asked: Literal["auto"] | Dtype, device: str) -> Dtype:
    """Return the dtype asked for, or for auto the one that the device is fast in.

    Warns if bfloat16 is asked for on a CPU that is slow in it, and says how slow.
    """
    if asked == "auto":
        return fast_dtype(device)
    if asked == "bfloat16" and is_cpu(device) and fast_dtype(device) == "float32":
        warnings.warn(
            "this CPU is slow in bfloat16: its matrix products take "
            f"{1 / bf16_speedup():.1f} times as long as in float32, which dtype auto would choose",
            stacklevel=3,
        )
    return asked


def fast_dtype(device: str) -> Dtype:
    """Return bfloat16 if the device multiplies it in hardware, else float32."""
    if is_cpu(device):
        known = cpu_has_bf16()
        fast = remembered_speedup() >= MARGIN if known is None else known
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def cpu_has_bf16() -> bool | None:
    """Return whether this CPU multiplies bfloat16 in hardware; None if it does not report that."""
    can = torch.cpu.get_capabilities()
    if "avx512_bf16" in can:  # x86
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
        in_hardware = bool(can["avx512_bf16"] or can["amx_bf16"])
        return in_hardware and limit.upper() not in WITHOUT_BF16
    if "bf16" in can and sys.platform == "linux":  # ARM; elsewhere torch does not use it
        return bool(can["bf16"])
    return None


def bf16_speedup() -> float:
    """Measure how many times as fast this CPU multiplies matrices in bfloat16 as in float32."""
    return matrix_rate(torch.bfloat16, 0.1) / matrix_rate(torch.float32, 0.1)


def matrix_rate(dtype: torch.dtype, seconds: float) -> float:
    """Measure the floating-point operations per second of a small model's matrix products.

    seconds: how long to measure.
    """
    weight, x = torch.randn(1536, 576).to(dtype), torch.randn(512, 576).to(dtype)
    linear(x, weight)
    products, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds:
        linear(x, weight)
        products += 1
    return 2 * weight.numel() * len(x) * products / took


def remembered_speedup() -> float:
    """Return bf16_speedup, measured once per machine and torch version and kept in the cache."""
    file = cache_directory() / f"bf16-speedup-{platform.node()}-torch-{torch.__version__}"
    if not file.exists():
        speedup = f"{bf16_speedup():.3f}\n".encode()
        with whole_file(file) as found:
            found.write(speedup)
    return float(file.read_text())
