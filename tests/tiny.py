"""Tiny random models of every backbone family, and tokenizers of single bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rayrm.model.net import RewardNet, quiet
from rayrm.packing import Ids, Pack, TokenGroup

torch.set_num_threads(1)

VOCABULARY = 99
WINDOW = 5
"""Sliding window of the families that have one: shorter than most rows."""

_GATED = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = {**_GATED, **_HEADS, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_GATED, "num_attention_heads": 4},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "llama": {**_GATED, **_HEADS},
    "mistral": {**_GATED, **_HEADS, "sliding_window": WINDOW},
    "qwen2": {**_GATED, **_HEADS},
    "qwen3": {**_GATED, **_HEADS, "head_dim": 8},
    "phi": {**_GATED, "num_attention_heads": 4},
    "phi3": {**_GATED, **_HEADS},
    "gemma": {**_GATED, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> RewardNet:
    """A random reward model of two layers, in train mode, head included in dtype."""
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, num_labels=1, **special, **FAMILIES[model_type]
    )
    config.initializer_range = config.init_std = 0.2  # so that tokens matter and rewards differ
    for key in ("resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "attn_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    for key in ("attention_dropout", "activation_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    with quiet():
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="rayrm")
    return RewardNet(model.to(dtype).train())


def random_ids(rng: np.random.Generator, length: int) -> Ids:
    return rng.integers(3, VOCABULARY, length).astype(np.int32)


def random_groups(seed: int = 0) -> list[TokenGroup]:
    """Groups of four, three and two rows over prompts of 7, 1 and 12 tokens, and one single row."""
    rng = np.random.default_rng(seed)
    groups = []
    for prompt, responses in ((7, (4, 1, 9, 3)), (1, (1, 2, 6)), (12, (1, 1)), (8, (5,))):
        shared = random_ids(rng, prompt)
        rows = [np.concatenate([shared, random_ids(rng, n)]) for n in responses]
        groups.append(TokenGroup.from_rows(rows))
    return groups


def singles(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The same rows, nothing shared."""
    return [TokenGroup.from_rows([row]) for group in groups for row in group.rows]


def scored(net: RewardNet, packs: Sequence[Sequence[TokenGroup]]) -> torch.Tensor:
    """Rewards of all packs, one after the other."""
    return torch.cat([net.score_pack(Pack.from_groups(groups)) for groups in packs])


def transformers_rewards(model: torch.nn.Module, rows: Sequence[Ids]) -> torch.Tensor:
    """What transformers' own forward gives each row, unpadded, one at a time."""
    ids = [torch.from_numpy(row.astype(np.int64))[None] for row in rows]
    return torch.cat([model(x).logits[:, 0] for x in ids])


def gradients(net: RewardNet, rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random combination of rewards, by parameter; clears them again."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(rewards), generator=generator, dtype=torch.float64)
    (rewards * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return grads


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two gradients, each tensor's beside max(1, its largest entry)."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / max(1.0, float(a[n].abs().max()))) for n in a)


def byte_tokenizer(
    special: Sequence[str],
    *,
    template: str | None = None,
    adds_bos: bool = False,
    **named: str,
) -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes behind special tokens; named: eos_token, bos_token, …"""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if adds_bos:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path
