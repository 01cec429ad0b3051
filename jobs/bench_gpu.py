"""Benchmark rayrm on a GPU against padded transformers, with random Llama and Qwen weights.

    jobs/bench_gpu.py ROWS PROMPTS FIGURES    (run by jobs/bench.py --device cuda)

Measures tokens per second of scoring a step of groups and of training on pairs, also as a share of
the device's measured bf16 matmul rate. Speed depends on shapes alone, so nothing is downloaded; the
rewards of both sides are still compared. Does not know about Ray.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rayrm.config import local_path
from rayrm.model.net import RewardNet, pack_tensors
from rayrm.packing import Pack, TokenGroup, plan_packs
from rayrm.training.loss import BradleyTerry, Pairs, bradley_terry

Figures = dict[str, Any]

# hidden, layers, heads, key/value heads, intermediate.
SHAPES = {
    ("llama", "0.5B"): (1024, 24, 16, 8, 4096),
    ("llama", "1.5B"): (2048, 22, 32, 8, 7168),
    ("llama", "7B"): (4096, 32, 32, 32, 11008),
    ("qwen2", "0.5B"): (896, 24, 14, 2, 4864),
    ("qwen2", "1.5B"): (1536, 28, 12, 2, 8960),
    ("qwen2", "7B"): (3584, 28, 28, 4, 18944),
}
VOCABULARY = 49152
TOKENS_PER_PACK = 16384
BATCH = 16
# Parameters. The fp32 weights, gradients and Adam state of a larger model leave no room for
# activations.
LARGEST_TRAINED = 2e9
SAME_ORDER = 0.99


def bench_gpu(
    rows: Sequence[list[int]], groups: Sequence[TokenGroup], device: str, repeats: int
) -> Figures:
    """Return the figures of every shape; `rows` and `groups` are the same step."""
    rate = matrix_rate(torch.device(device))
    print(f"\nmatrix products in bf16: {rate / 1e12:.1f} TFLOP/s\n\n{HEADER}")
    figures: Figures = {"matrix_flops_per_second": rate}
    for (family, size), shape in SHAPES.items():
        model: Any = make_model(family, shape, torch.bfloat16)
        model = model.to(device).eval()
        parameters = sum(p.numel() for p in model.base_model.layers.parameters())
        of_shape = bench_scoring(model, rows, groups, repeats, 2 * parameters / rate)
        del model  # training needs its memory
        if parameters < LARGEST_TRAINED:
            net = RewardNet(make_model(family, shape, torch.float32), torch.bfloat16).to(device)
            of_shape |= bench_training(net, groups, repeats, 6 * parameters / rate)
            del net
        figures[name := f"{family} {size}"] = of_shape
        print(row_of(name, of_shape), flush=True)
    return figures


def bench_scoring(
    model: PreTrainedModel,
    rows: Sequence[list[int]],
    groups: Sequence[TokenGroup],
    repeats: int,
    seconds_per_token: float,
) -> Figures:
    """Time packed and padded scoring alternately.

    seconds_per_token: seconds of the matrix products alone.
    """
    net = RewardNet(model).for_scoring()
    sides: dict[str, Callable[[], list[float]]] = {
        "packed": lambda: score_packs(net, groups),
        "padded": lambda: score_padded(model, rows),
    }
    given = {name: side() for name, side in sides.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side, model.device.type))
    packed, padded = (statistics.median(seconds[name]) for name in sides)
    same = float(np.corrcoef(given["packed"], given["padded"])[0, 1])
    tokens = sum(group.tokens for group in groups)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / packed,
        "of_matrix_rate": seconds_per_token * tokens / packed,
        "of_padded": padded / packed if same > SAME_ORDER else None,
        "correlation": same,
    }


def bench_training(
    net: RewardNet, groups: Sequence[TokenGroup], repeats: int, seconds_per_token: float
) -> Figures:
    """Time optimizer steps on each group's first two responses; fp32 weights, bf16 autocast."""
    device = net.model.device.type
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    pairs = [group.part(range(2)) for group in groups]
    tokens = sum(pair.tokens for pair in pairs)

    def step() -> None:
        for plan in plan_packs([pair.tokens for pair in pairs], TOKENS_PER_PACK):
            pack = Pack.from_groups([pairs[p] for p in plan])
            rewards = net(*pack_tensors(pack, torch.device(device)))
            loss = bradley_terry(rewards, all_pairs(len(plan), device), BradleyTerry())
            (loss / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    taken = statistics.median(timed(step, device) for _ in range(repeats))
    return {
        "train_tokens_per_second": tokens / taken,
        "train_of_matrix_rate": seconds_per_token * tokens / taken,
    }


def all_pairs(count: int, device: str) -> Pairs:
    """Return `count` pairs of consecutive rewards, the first of each two being the chosen one."""
    chosen = torch.arange(count, device=device) * 2
    ones = torch.ones(count, device=device)
    return Pairs(chosen, chosen + 1, torch.zeros_like(ones), ones, chosen // 2, ones, ones < 0)


def score_packs(net: RewardNet, groups: Sequence[TokenGroup]) -> list[float]:
    """Return the rewards in the order of the groups' rows."""
    rewards: dict[int, list[float]] = {}
    with torch.inference_mode():
        for plan in plan_packs([group.tokens for group in groups], TOKENS_PER_PACK):
            values = iter(net.score_pack(Pack.from_groups([groups[g] for g in plan])).tolist())
            for g in plan:
                rewards[g] = [next(values) for _ in groups[g].suffixes]
    return [reward for g in range(len(groups)) for reward in rewards[g]]


@torch.inference_mode()
def score_padded(model: PreTrainedModel, rows: Sequence[list[int]]) -> list[float]:
    """Return rewards from transformers' forward pass with SDPA, in batches padded on the right."""
    rewards: list[float] = []
    for at in range(0, len(rows), BATCH):
        batch = [torch.tensor(row) for row in rows[at : at + BATCH]]
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in batch], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
        hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(batch), device=model.device), lengths - 1]
        rewards += model.get_submodule("score")(last.float())[:, 0].tolist()
    return rewards


def make_model(family: str, shape: tuple[int, ...], dtype: torch.dtype) -> PreTrainedModel:
    hidden, layers, heads, key_heads, intermediate = shape
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    assert isinstance(model.score, nn.Linear)
    model.score.to(torch.float32)
    return model


def matrix_rate(device: torch.device, size: int = 8192, passes: int = 20) -> float:
    """Return the floating-point operations per second of bf16 matmuls, on CPU of smaller ones."""
    size = size if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = [timed(lambda: torch.mm(a, b), device.type) for _ in range(passes)]
    return 2.0 * size**3 / statistics.median(taken)


def timed(what: Callable[[], object], device: str) -> float:
    """Return the seconds that `what` takes, waiting for the GPU included."""
    finish: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    started = time.perf_counter()
    what()
    finish()
    return time.perf_counter() - started


HEADER = (
    f"{'':12}{'scored/s':>10}{'of rate':>9}{'x padded':>10}{'trained/s':>11}{'of rate':>9}   tokens"
)


def row_of(name: str, figures: Figures) -> str:
    padded, trained = figures["of_padded"], figures.get("train_tokens_per_second")
    row = f"{name:12}{figures['tokens_per_second']:10.0f}{figures['of_matrix_rate']:9.2f}"
    row += f"{padded:10.2f}" if padded else f"{'differ':>10}"
    return row + (f"{trained:11.0f}{figures['train_of_matrix_rate']:9.2f}" if trained else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("rows", "prompts", "figures"):
        parser.add_argument(name, type=local_path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows, prompts = (json.loads(file.read_text()) for file in (args.rows, args.prompts))
    families: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        families.setdefault(tuple(prompt), []).append(row)
    in_order = [row for family in families.values() for row in family]
    groups = [
        TokenGroup.from_rows([np.array(row, dtype=np.int32) for row in family])
        for family in families.values()
    ]
    figures = {"device": device_name(args.device)}
    print(figures["device"])
    figures |= bench_gpu(in_order, groups, args.device, args.repeats)
    args.figures.write_text(json.dumps(figures, indent=2))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
