"""What a rank starts with: the base model and its head, encoded data, the DeepSpeed engine.

Knows nothing of steps.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from ray.train import (
    get_context,
)
from transformers import PreTrainedModel

from rayrm.data.records import Group, read_groups
from rayrm.errors import ConfigError, DataError, ModelError
from rayrm.model.hardware import choose_dtype, fast_dtype
from rayrm.model.net import (
    RewardNet,
    check_max_length,
    find_model,
    load_base,
    read_ends,
)
from rayrm.text.chat import ChatTemplate
from rayrm.text.template import Template, TemplateSpec
from rayrm.training.config import TrainConfig
from rayrm.training.dataset import PreferenceData, encode_groups
from rayrm.training.lora import add_adapters
from rayrm.training.run import read_config, with_dtype, write_config

log = logging.getLogger(__name__)

# Elements. DeepSpeed's default of 5e8 is a buffer of 2 GB for every rank, however small the model.
BUCKET = 50_000_000


def decide_dtype(config: TrainConfig, rank: int) -> TrainConfig:
    """The config with what all ranks compute in: what the run's note says, or rank 0 decides."""
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    told: list[Any] = [config.train.dtype]
    if told == ["auto"]:
        if rank == 0:
            run = f"{config.storage}/{config.name}"
            noted = read_config(run)
            told = [noted.train.dtype if noted else "auto"]
            if told == ["auto"]:
                told = [fast_dtype(device)]
                if noted:
                    write_config(with_dtype(noted, told[0]), run)
        dist.broadcast_object_list(told)
    dtype = choose_dtype(told[0], device)
    if rank == 0:
        log.info("%s computes in %s", config.name, dtype)
    return with_dtype(config, dtype)


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, Template]:
    """The base model with its head and adapters, and the template its rows are built by."""
    model, tokenizer, made_by = load_base(
        config.model.path,
        seed=config.train.seed,
        dropout=config.model.dropout,
        chat_template=config.data.chat_template,
        date=config.data.date,
        trust_remote_code=config.model.trust_remote_code,
    )
    form = config.data.format
    if form == "auto":
        form = "chat" if tokenizer.chat_template else "text"
    elif form == "chat" and not tokenizer.chat_template:
        raise ConfigError("data.format is chat, but the tokenizer has no chat template")
    check_max_length(config.data.max_length, model.config)
    if config.lora.rank:
        add_adapters(model, config.lora, config.train.seed)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ends = read_ends(find_model(config.model.path), tokenizer)
    rule = config.data.rule
    if rule == "auto":
        rewrites = form == "chat" and ChatTemplate(tokenizer, ends).rewrites
        rule = "continue" if rewrites else "template"
    spec = TemplateSpec(
        form,
        config.data.separator,
        config.data.max_length,
        made_by,
        rule,
        config.data.thoughts,
        ends,
    )
    return model, Template(tokenizer, spec)


def load_data(
    config: TrainConfig, template: Template
) -> tuple[PreferenceData, PreferenceData | None]:
    """Training and held-out groups as ids; each node's first rank encodes, the others read."""
    if get_context().get_local_rank() > 0:
        dist.barrier()
    data = config.data
    encoded = []
    for paths, split in ((data.train, "train"), (data.eval, "test")):
        if paths:
            loss, training = config.loss, split == "train"
            groups, read = read_groups(
                paths, split=split, on_bad_record=data.on_bad_record, ties=loss.uses_ties
            )
            limit = config.train.pairs_per_group if training else None
            if loss.ranks:
                check_ranked(groups, limit)
            encoded.append(
                encode_groups(
                    groups,
                    template,
                    data.overlong_rows,
                    cut_alike=training,
                    pairs_per_group=limit,
                    whole_choices=loss.ranks,
                    on_bad_record=data.on_bad_record,
                )
            )
            log.info("%s: %s; %s", split, read, encoded[-1].report)
    if get_context().get_local_rank() == 0:
        dist.barrier()
    held_out = encoded[1] if data.eval else None
    if held_out and held_out.undecided and config.train.keep_best:
        raise DataError(
            f"{', '.join(data.eval)}: no held-out pair has a winner (every label is 0.5), so there "
            f"is no {config.train.keep_best} for train.keep_best: leave it out, or name other data"
        )
    return encoded[0], held_out


def check_ids(data: Sequence[PreferenceData | None], model: PreTrainedModel, path: str) -> None:
    """Raises ModelError where encoded rows hold ids that the model has no embedding for."""
    largest, there = max(d.largest_id for d in data if d), model.config.vocab_size
    if largest >= there:
        raise ModelError(
            f"the data, as the tokenizer of {path} encodes it, holds token id {largest}; the model "
            f"has embeddings for {there} tokens: use the tokenizer that it was trained with"
        )


def check_ranked(groups: Sequence[Group], limit: int | None) -> None:
    """Raises DataError where a preference is more than an order, which is all a ranking has.

    And where a choice has more pairs than a group may have, since it cannot be split.
    """
    for group in groups:
        pairs = max(Counter(p.choice for p in group.preferences).values())
        if limit is not None and pairs > limit:
            raise DataError(
                f"{group.source}: a record of this prompt ranks a response above {pairs} others, "
                f"and train.pairs_per_group is {limit}: a choice of loss.objective = "
                f"'plackett_luce' cannot be split; set it to {pairs} or more"
            )
        for preference in group.preferences:
            if preference.margin != 0.0 or preference.label != 1.0:
                raise DataError(
                    f"{group.source}: a record of this prompt has margin {preference.margin:g} and "
                    f"label {preference.label:g}, which loss.objective = 'plackett_luce' has no "
                    "use for: remove the columns, or train with bradley_terry"
                )


def start_engine(config: TrainConfig, model: PreTrainedModel) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed around the model: fp32 weights and optimizer state, autocast inside the forward.

    DeepSpeed's own bf16 mode would cast the head to bf16, whose spacing is 0.0625 at 8.
    """
    train = config.train
    autocast = torch.bfloat16 if train.dtype == "bfloat16" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=train.learning_rate,
        betas=train.betas,
        fused=True,
    )
    in_cpu_memory = {"device": "cpu", "pin_memory": config.cluster.gpus_per_worker > 0}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.clip,
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "offload_optimizer": in_cpu_memory if config.deepspeed.offload_optimizer else None,
            "offload_param": in_cpu_memory if config.deepspeed.offload_param else None,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Used by inference alone, yet compiled at start: a worker killed meanwhile leaves a lock behind
    # on which every later run would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=RewardNet(model, autocast),
        optimizer=optimizer,
        config=merge(settings, config.deepspeed.overrides),
    )
    return engine


def merge(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """overrides into settings, section by section."""
    merged = dict(settings)
    for key, value in overrides.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merge(inner, value)
        merged[key] = value
    return merged
