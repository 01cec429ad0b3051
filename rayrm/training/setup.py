"""Set up a rank: the base model and its head, the encoded data, and the DeepSpeed engine.

Does not know about training steps.
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

# Elements. DeepSpeed's default of 5e8 takes 2 GB on every rank, even for a small model.
BUCKET = 50_000_000


def decide_dtype(config: TrainConfig, rank: int) -> TrainConfig:
    """Return the config with the dtype that all ranks compute in.

    If the config says auto, it is the dtype recorded for the run. If none is recorded, rank 0
    decides by its hardware and records it.
    """
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    choice: Any = config.train.dtype
    if choice == "auto":
        if rank == 0:
            run = f"{config.storage}/{config.name}"
            recorded = read_config(run)
            if recorded:
                choice = recorded.train.dtype
            if choice == "auto":
                choice = fast_dtype(device)
                if recorded:
                    write_config(with_dtype(recorded, choice), run)
        from_rank_0 = [choice]
        dist.broadcast_object_list(from_rank_0)
        choice = from_rank_0[0]
    dtype = choose_dtype(choice, device)
    if rank == 0:
        log.info("%s computes in %s", config.name, dtype)
    return with_dtype(config, dtype)


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, Template]:
    """Load the base model with its head and adapters, and the template that builds its rows."""
    model, tokenizer, fingerprint = load_base(
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
        format=form,
        separator=config.data.separator,
        max_length=config.data.max_length,
        fingerprint=fingerprint,
        rule=rule,
        thoughts=config.data.thoughts,
        ends=ends,
    )
    return model, Template(tokenizer, spec)


def load_data(
    config: TrainConfig, template: Template
) -> tuple[PreferenceData, PreferenceData | None]:
    """Return training and held-out groups as ids; a node's first rank encodes for all its ranks."""
    if get_context().get_local_rank() > 0:
        dist.barrier()
    data, loss = config.data, config.loss
    encoded = []
    for paths, split in ((data.train, "train"), (data.eval, "test")):
        if paths:
            training = split == "train"
            groups, read = read_groups(
                paths, split=split, on_bad_record=data.on_bad_record, ties=loss.uses_ties
            )
            limit = config.train.pairs_per_group if training else None
            if loss.ranks:
                check_ranked(groups, limit, loss.objective)
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
            f"{', '.join(data.eval)}: no held-out pair has a winner (every label is 0.5), so "
            f"train.keep_best = {config.train.keep_best!r} cannot be computed: remove it, or give "
            "other data in data.eval"
        )
    return encoded[0], held_out


def check_ids(data: Sequence[PreferenceData | None], model: PreTrainedModel, path: str) -> None:
    """Raise ModelError if encoded rows hold ids that the model has no embedding for."""
    largest = max(d.largest_id for d in data if d)
    embeddings = model.config.vocab_size
    if largest >= embeddings:
        raise ModelError(
            f"the tokenizer of {path} encodes the data with token id {largest}; the model has "
            f"embeddings for {embeddings} tokens: use the tokenizer that it was trained with"
        )


def check_ranked(groups: Sequence[Group], limit: int | None, objective: str) -> None:
    """Raise DataError if a preference has a margin or label, since a ranking is only an order.

    Also if a choice has more pairs than `limit`, since a choice cannot be split over groups.
    """
    for group in groups:
        pairs = max(Counter(p.choice for p in group.preferences).values())
        if limit is not None and pairs > limit:
            raise DataError(
                f"{group.source}: a record of this prompt ranks a response above {pairs} others, "
                f"and train.pairs_per_group is {limit}: loss.objective = {objective!r} cannot "
                f"split this; set train.pairs_per_group to {pairs} or more"
            )
        for preference in group.preferences:
            if preference.margin != 0.0 or preference.label != 1.0:
                raise DataError(
                    f"{group.source}: a record of this prompt has margin {preference.margin:g} and "
                    f"label {preference.label:g}, which loss.objective = {objective!r} does not "
                    "use: remove the columns, or train with bradley_terry"
                )


def start_engine(config: TrainConfig, model: PreTrainedModel) -> deepspeed.DeepSpeedEngine:
    """Wrap the model in DeepSpeed: fp32 weights and optimizer state, autocast inside the forward.

    DeepSpeed's own bf16 mode would cast the head to bf16, whose values are 0.0625 apart at 8.
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
    # Only inference uses it, but DeepSpeed compiles it at start. A worker killed meanwhile would
    # leave a lock that blocks every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=RewardNet(model, autocast),
        optimizer=optimizer,
        config=merge(settings, config.deepspeed.overrides),
    )
    return engine


def merge(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return settings with overrides merged in, section by section."""
    merged = dict(settings)
    for key, value in overrides.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merge(inner, value)
        merged[key] = value
    return merged
