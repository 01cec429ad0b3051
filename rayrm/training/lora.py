"""Add LoRA adapters to a backbone with peft, export them, and merge them into the weights.

Adapters are injected into the backbone in place. So attention, gradient checkpointing and ZeRO see
the usual model, and the head stays one module: peft's own wrapper would train a copy of it. Does
not know how adapters are trained. peft is imported only when adapters are used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayrm.errors import ConfigError
from rayrm.model.adapters import save_adapter
from rayrm.model.export import AdapterRecord
from rayrm.training.config import LoraSection

ALL_LINEAR = "all-linear"


def add_adapters(model: PreTrainedModel, lora: LoraSection, seed: int) -> None:
    """Freeze the backbone and inject adapters drawn from the seed, which initially add 0.

    The head stays trainable. Raises ConfigError if a target names no linear layer.
    """
    from peft import inject_adapter_in_model

    everything = lora.targets == [ALL_LINEAR]
    if not everything:
        check_targets(model, lora.targets)
    config = peft_config(model, lora, ALL_LINEAR if everything else lora.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.base_model)


def peft_config(
    model: PreTrainedModel, lora: LoraSection, targets: str | list[str], **more: Any
) -> Any:
    """Return peft's LoraConfig for these targets."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes floats too
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",  # GPT-2's weights are transposed
        **more,
    )


def export_adapter(
    model: PreTrainedModel, lora: LoraSection, base: str, dtype: torch.dtype, directory: Path
) -> AdapterRecord:
    """Write the adapter and the head in the files that peft loads onto the base."""
    from peft.tuners.lora import LoraLayer

    layers = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    names = sorted({name.rpartition(".")[2] for name in layers})
    record = save_adapter(model, directory, base=base, dtype=dtype, scale=lora.alpha / lora.rank)
    targets = names if lora.targets == [ALL_LINEAR] else lora.targets
    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "inference_mode": True}
    config = peft_config(model, lora, targets, base_model_name_or_path=base, **kind)
    config.save_pretrained(directory)
    return record


def check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Raise ConfigError if a target is the end of no linear layer's name in the backbone."""
    layers = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in layers)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ConfigError(
            f"lora.targets: no linear layer is named {', '.join(unknown)}; the model has "
            f"{', '.join(known)}; {ALL_LINEAR} alone selects all of them"
        )


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Replace every adapted layer by W + alpha/rank · B·A, in the dtype of the weights."""
    from peft.tuners.lora import LoraLayer

    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())


def hash_frozen(model: nn.Module) -> str:
    """Return the sha256 of the frozen weights, which checkpoints do not hold."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
