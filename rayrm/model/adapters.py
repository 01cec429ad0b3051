"""Several rewards on one backbone: what each has of its own, and how it is put on what they share.

The backbone is the frozen base that the adapters were trained on, for every reward: the export's
merged weights are of its own reward alone, and subtracting its adapter from them gives the base
only up to rounding. Each reward has modules of its own around tensors that it shares, so that
nothing has to say which adapter is active and threads score different rewards at once. Knows
nothing of how adapters are trained.
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

# As peft names its files, and the tensors in them.
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"

# Keys of a model's config that say nothing of what its backbone computes.
UNRELATED = {
    "_name_or_path",
    "architectures",
    "dtype",
    "pad_token_id",
    "transformers_version",
    "vocab_size",  # the embedding is part of the hash
}


@dataclass(frozen=True)
class Adapter:
    """An export as one of several rewards: where it is, its record, and how its rows are built."""

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
    """All rewards by name, the export's own first, without their weights.

    max_length is that of each training unless given. Raises ExportError where one is no export of a
    LoRA run, ConfigError where one was trained on another backbone or with another template.
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
    """What of backbone and template is not the same, as "what: own's, other's"."""
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
    """The base that the adapter was trained on, in dtype; its head means nothing.

    Raises ModelError where it is not there, ExportError where it is another one by now.
    """
    record, where = adapter.record, f"the base of {adapter.directory}"
    exported = DTYPES[adapter.export.dtype]
    chat_template = adapter.template.tokenizer.chat_template
    model, _, _ = load_base(record.base, chat_template=chat_template, dtype=exported)
    found = hash_backbone(model, exported)
    if found != record.backbone_sha256:
        raise ExportError(
            f"{where}, {record.base}, is not what the adapter was trained on: the backbone's "
            f"sha256 is {found[:12]}…, recorded {record.backbone_sha256[:12]}…; put it back, or "
            "name another place of it as adapter.base in rayrm.json"
        )
    if unlike := _config_differences(load_config(str(adapter.directory)), model.config):
        raise ExportError(f"{where}, {record.base}, has another {'; '.join(unlike)} than then")
    for weight in model.base_model.parameters():  # buffers, such as frequencies, stay in fp32
        weight.data = weight.data.to(dtype)
    return RewardNet(model).to(device).for_scoring()


def hash_backbone(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """sha256 over the backbone's weights rounded to dtype, whatever adapters are on it."""
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


def put_on(net: RewardNet, adapter: Adapter) -> RewardNet:
    """The adapter's reward on the backbone of net, which stays as it is and shares its tensors."""
    model = net.model
    low_rank, head = _load(adapter, model.base_model_prefix, model.dtype, model.device)
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    own = RewardNet(deepcopy(model, shared))
    own.model.score = head
    if net.decoder:
        own.decoder = net.decoder.adapted(low_rank)
    else:
        for name, matrices in low_rank.items():
            layer = own.model.base_model.get_submodule(name)
            own.model.base_model.set_submodule(name, Adapted(layer, matrices))
    return own.for_scoring()


class Adapted(nn.Module):
    """A linear layer and what is added to it."""

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
    """Matrices in dtype by their layer's name within the backbone, and the head in fp32."""
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
    """Write a LoRA model's matrices and head, in fp32 and under peft's names; what is recorded."""
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
