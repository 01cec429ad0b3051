"""Compute several rewards (LoRA adapters) on one shared backbone.

Every reward runs on the frozen base that the adapters were trained on. An export's merged weights
cannot replace that base: they include the export's own adapter, and subtracting it recovers the
base only up to rounding. Each reward has its own modules around the shared tensors, so no adapter
is switched on or off, and threads can score different rewards at the same time. Does not know how
adapters are trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rayrm.config import OWN
from rayrm.errors import ConfigError, ExportError
from rayrm.model.architecture import UNRELATED
from rayrm.model.decoder import LowRank
from rayrm.model.export import (
    ADAPTER,
    AdapterRecord,
    Export,
    hash_weights,
    load_template,
    read_adapter,
)
from rayrm.model.net import DTYPES, RewardHead, RewardNet, load_base, load_config
from rayrm.text.template import Template

# peft's names of its files and of the tensors in them.
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"


@dataclass(frozen=True)
class Adapter:
    """An export that serves as one of several rewards: its directory, record and template."""

    directory: Path
    export: Export
    template: Template

    @property
    def record(self) -> AdapterRecord:
        assert self.export.adapter
        return self.export.adapter


def read_adapters(
    export: str | Path, adapters: Mapping[str, str | Path], max_length: int | None = None
) -> dict[str, Adapter]:
    """Return all rewards by name, the export's own first; weights are not read.

    max_length defaults to that of each training run. Raises ExportError if one is not the export of
    a LoRA run, ConfigError if one was trained on another backbone or with another template.
    """
    own = _read(export, max_length)
    read = {OWN: own}
    for name, path in adapters.items():
        read[name] = _read(path, max_length)
        if unlike := _differences(own, read[name]):
            raise ConfigError(
                f"adapters.{name}: {path} cannot share a backbone with {export}; they differ in "
                f"{'; '.join(unlike)}"
            )
    return read


def _read(path: str | Path, max_length: int | None) -> Adapter:
    directory, export = read_adapter(path)
    return Adapter(directory, export, load_template(directory, export, max_length))


def _differences(own: Adapter, other: Adapter) -> list[str]:
    """List the differences of backbone and template, each as "what: own's, other's"."""
    a, b = own.record, other.record
    found = []
    if own.export.dtype != other.export.dtype:
        found.append(f"train.export_dtype: {own.export.dtype}, {other.export.dtype}")
    elif a.backbone_sha256 != b.backbone_sha256:
        found.append(
            f"the frozen backbone: sha256 {a.backbone_sha256[:12]}… ({a.base}), "
            f"{b.backbone_sha256[:12]}… ({b.base})"
        )
    found += _config_differences(load_config(str(own.directory)), load_config(str(other.directory)))
    theirs = vars(other.template.spec)
    for key, value in vars(own.template.spec).items():
        if value != theirs[key]:
            found.append(f"the template's {key}: {value!r}, {theirs[key]!r}")
    if own.template.tokenizer.chat_template != other.template.tokenizer.chat_template:
        found.append("the chat template")
    return found


def _config_differences(own: PretrainedConfig, other: PretrainedConfig) -> list[str]:
    a, b = own.to_dict(), other.to_dict()
    keys = sorted((a.keys() | b.keys()) - UNRELATED)
    return [f"config.{k}: {a.get(k)!r}, {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def load_backbone(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> RewardNet:
    """Load the base that the adapter was trained on, in dtype; its head is not a trained one.

    Raises ModelError if the base is not found, ExportError if it has changed since training.
    """
    record, where = adapter.record, f"the base of {adapter.directory}"
    exported = DTYPES[adapter.export.dtype]
    chat_template = adapter.template.tokenizer.chat_template
    model, _, _ = load_base(record.base, chat_template=chat_template, dtype=exported)
    found = hash_backbone(model, exported)
    if found != record.backbone_sha256:
        raise ExportError(
            f"{where}, {record.base}, is not what the adapter was trained on: the backbone's "
            f"sha256 is {found[:12]}…, recorded {record.backbone_sha256[:12]}…; restore "
            "that base, or set adapter.base in rayrm.json to a copy of it"
        )
    if unlike := _config_differences(load_config(str(adapter.directory)), model.config):
        raise ExportError(
            f"{where}, {record.base}, does not match the export's config.json (export's value, "
            f"base's value): {'; '.join(unlike)}"
        )
    for weight in model.base_model.parameters():  # buffers (rotary frequencies) stay in fp32
        weight.data = weight.data.to(dtype)
    return RewardNet(model).to(device).for_scoring()


def hash_backbone(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Return the sha256 of the backbone's weights rounded to dtype, without any adapters on it."""
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in model.base_model.named_parameters()
        if ".lora_" not in name
    }
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        rounded = weights[name].detach().to("cpu", dtype).contiguous()
        digest.update(rounded.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_adapter(net: RewardNet, adapter: Adapter) -> RewardNet:
    """Return a net that computes the adapter's reward on the backbone of net.

    net stays unchanged; both nets share the backbone's tensors.
    """
    model = net.model
    low_rank, head = _load(adapter, model.base_model_prefix, model.dtype, model.device)
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    own = RewardNet(deepcopy(model, shared))
    own.model.score = head
    if net.decoder:
        own.decoder = net.decoder.adapted(low_rank)
    else:
        backbone = own.model.base_model
        for name, matrices in low_rank.items():
            layer = backbone.get_submodule(name)
            backbone.set_submodule(name, Adapted(layer, matrices))
    return own.for_scoring()


class Adapted(nn.Module):
    """A linear layer with a low-rank update added to its output."""

    def __init__(self, layer: nn.Module, low_rank: LowRank) -> None:
        super().__init__()
        self.layer = layer
        self.low_rank = low_rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out + self.low_rank(x)


def _load(
    adapter: Adapter, backbone: str, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, LowRank], RewardHead]:
    """Load an adapter: its matrices in dtype by layer name in the backbone, its head in fp32."""
    state = load_file(adapter.directory / ADAPTER / WEIGHTS)
    weight = state.pop(HEAD)
    head = RewardHead(weight.shape[1], 1, bias=False, dtype=torch.float32)
    head.weight.data = weight
    start, end = f"{PREFIX}{backbone}.", ".lora_A.weight"
    layers = [name[len(start) : -len(end)] for name in state if name.endswith(end)]
    low_rank = {
        layer: LowRank(
            state[f"{start}{layer}.lora_A.weight"].to(device, dtype),
            (state[f"{start}{layer}.lora_B.weight"] * adapter.record.scale).to(device, dtype),
        )
        for layer in layers
    }
    return low_rank, head.to(device)


def save_adapter(
    model: PreTrainedModel, directory: Path, *, base: str, dtype: torch.dtype, scale: float
) -> AdapterRecord:
    """Write a LoRA model's matrices and head, in fp32 and under peft's names; return the record."""
    state = {
        PREFIX + name.replace(".default.", "."): weight.contiguous()
        for name, weight in model.state_dict().items()
        if ".lora_" in name or name == "score.weight"
    }
    directory.mkdir(parents=True)
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    return AdapterRecord(
        base=base,
        backbone_sha256=hash_backbone(model, dtype),
        weights_sha256=hash_weights(directory),
        scale=scale,
    )
