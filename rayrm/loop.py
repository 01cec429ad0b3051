"""What every rank of a training run does: set up, resume, step, evaluate, save.

All ranks compute the same plan (which groups make a step, which rank takes which) and never send
each other data; they meet in DeepSpeed's gradients, in one all-reduce of a step's figures, and in
Ray Train's report. Knows nothing of how the run is started or exported.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train import (
    Checkpoint,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    get_all_reported_checkpoints,
    get_checkpoint,
    get_context,
    report,
)
from torch import Tensor
from transformers import PreTrainedModel

from rayrm.checkpoint import load_shards, save_shards
from rayrm.config import TrainConfig, TrainSection
from rayrm.data import Group, read_groups
from rayrm.dataset import PreferenceData, PreferenceGroup, Schedule, encode_groups
from rayrm.errors import ConfigError, DataError, TrainingError
from rayrm.evaluate import ScoredGroup, summarize
from rayrm.lora import add_adapters, check_frozen, hash_frozen
from rayrm.loss import Pairs, bradley_terry, plackett_luce
from rayrm.metrics import TrainMetrics
from rayrm.model import (
    RewardNet,
    check_max_length,
    find_model,
    load_base,
    pack_tensors,
    read_ends,
)
from rayrm.packing import Pack, share_packs
from rayrm.rendering import ChatTemplate
from rayrm.template import Template, TemplateSpec

log = logging.getLogger(__name__)

Figures = dict[str, Any]

# Elements. DeepSpeed's default of 5e8 is a buffer of 2 GB for every rank, however small the model.
BUCKET = 50_000_000


def train_loop(values: dict[str, Any], steps: Any) -> Figures:
    """One rank of the run, which tells `steps` how far it is. Returns its history and its data."""
    config = TrainConfig(**values)
    rank = Rank(config)
    while rank.step < rank.schedule.steps:
        rank.train_step()
        if rank.rank == 0:
            loss = f"loss {rank.history[-1]['loss']:.3f}"
            steps.put.remote(rank.step, rank.schedule.steps, loss)
        last = rank.step == rank.schedule.steps
        if rank.due(config.train.eval_every) or (last and config.train.keep_best):
            rank.evaluate()
        if rank.due(config.train.checkpoint_every) or last:
            rank.save()
    if rank.metrics:
        rank.metrics.close()
    return {
        "history": rank.history,
        "data": str(rank.train.report),
        "data_fingerprint": rank.train.fingerprint,
        "frozen_sha256": rank.frozen_sha256,
    }


class Rank:
    """A rank's model shards, its view of the data, and how far the run is."""

    def __init__(self, config: TrainConfig) -> None:
        context = get_context()
        self.config = config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        if config.cluster.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        model, template = load_model(config)
        self.frozen_sha256 = hash_frozen(model)
        self.train, self.held_out = load_data(config, template)
        self.schedule = Schedule(
            len(self.train),
            config.train.groups_per_step,
            config.train.epochs,
            config.train.seed,
            self.train.fingerprint,
        )
        self.engine = start_engine(config, model)
        self.device = self.engine.device
        self.step = 0
        self.history: list[Figures] = []
        if checkpoint := get_checkpoint():
            with checkpoint.as_directory() as directory:
                dist.barrier()  # a rank that came later would download over what others read
                state = load_shards(self.engine, directory, self.world_size)
            if state["data_fingerprint"] != self.train.fingerprint:
                raise TrainingError(
                    f"the checkpoint of step {state['step']} was trained on other data: data.train "
                    "has changed since the run was started; give this run another name"
                )
            check_frozen(self.frozen_sha256, state["frozen_sha256"], config.model.path)
            self.step, self.history = state["step"], state["history"]
        events = f"{config.storage}/{config.name}/tensorboard" if config.train.tensorboard else None
        self.metrics = TrainMetrics(config.name, events, self.step) if self.rank == 0 else None

    def train_step(self) -> None:
        """One optimizer step: this rank's packs forward and backward, then everyone's update."""
        started = time.perf_counter()
        self.engine.train()
        # Dropout is drawn by step, so that a resumed run draws what it would have drawn.
        torch.manual_seed(seed_of(self.config.train.seed, self.step, self.rank))
        groups = [self.train[i] for i in self.schedule[self.step]]
        pairs = sum(group.pairs for group in groups)
        weight = sum(self.weight(group) for group in groups)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        scored: list[tuple[list[PreferenceGroup], Tensor]] = []
        for share in self.share(groups):
            rewards = self.forward(share or groups[:1])
            loss, share_sums = self.loss(rewards, share)
            # DeepSpeed averages over ranks; the loss is the mean over what all of them compare.
            self.engine.backward(loss / weight * self.world_size, scale_wrt_gas=False)
            sums += share_sums
            scored.append((share, rewards.detach()))
        dist.all_reduce(sums)
        loss_sum, right, margin = sums.tolist()
        if not math.isfinite(loss_sum):
            self.stop_at_bad_rows(scored)
        rate = learning_rate(self.config.train, self.step, self.schedule.steps)
        for param_group in self.engine.optimizer.param_groups:
            param_group["lr"] = rate
        self.engine.step()
        # ZeRO 0 clips without telling the norm; its NaN shows in the next step's loss.
        told = self.engine.get_global_grad_norm()
        grad_norm = None if told is None else float(told)
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise TrainingError(f"step {self.step + 1}: the gradient's norm is {grad_norm}")
        self.step += 1
        tokens = sum(group.tokens.tokens for group in groups)
        self.history.append(
            {
                "step": self.step,
                "loss": loss_sum / weight,
                "accuracy": right / pairs,
                "margin": margin / pairs,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "pairs": pairs,
                "tokens": tokens,
                "tokens_unshared": sum(group.tokens.tokens_unshared for group in groups),
                "seconds": time.perf_counter() - started,
            }
        )
        if self.metrics:
            self.metrics.step(self.history[-1])

    def share(self, groups: Sequence[PreferenceGroup]) -> list[list[PreferenceGroup]]:
        """This rank's micro-batches, as many as every other rank's; some may be empty."""
        costs = [group.tokens.tokens for group in groups]
        plan = share_packs(costs, self.world_size, self.config.train.tokens_per_micro_batch)
        return [[groups[i] for i in indices] for indices in plan[self.rank]]

    def forward(self, groups: Sequence[PreferenceGroup]) -> Tensor:
        """Rewards [K] of the groups' responses, in order."""
        pack = Pack.from_groups([group.tokens for group in groups])
        rewards: Tensor = self.engine(*pack_tensors(pack, self.device))
        return rewards

    def loss(self, rewards: Tensor, groups: Sequence[PreferenceGroup]) -> tuple[Tensor, Tensor]:
        """Summed loss of a micro-batch and [loss, pairs ranked right, margins], summed, fp64.

        Without groups (another rank has more of them) the loss is 0 and keeps the graph.
        """
        if not groups:
            return rewards.sum() * 0.0, rewards.new_zeros(3, dtype=torch.float64)
        weights = [self.weight(group) / self.comparisons(group) for group in groups]
        pairs = collate_pairs(groups, weights, self.device)
        if self.config.loss.objective == "plackett_luce":
            loss = plackett_luce(rewards, pairs)
        else:
            loss = bradley_terry(
                rewards,
                pairs,
                centering=self.config.loss.centering,
                label_smoothing=self.config.loss.label_smoothing,
            )
        margins = (rewards[pairs.chosen] - rewards[pairs.rejected]).detach()
        margins = torch.where(pairs.label < 0.5, -margins, margins)
        return loss, torch.stack([loss.detach(), (margins > 0).sum(), margins.sum()]).double()

    def comparisons(self, group: PreferenceGroup) -> int:
        """What the objective sums over in a group: its pairs, or its choices."""
        ranked = self.config.loss.objective == "plackett_luce"
        return group.choices if ranked else group.pairs

    def weight(self, group: PreferenceGroup) -> int:
        """What a group counts for in its step, and its comparisons together."""
        return 1 if self.config.loss.weighting == "prompt" else self.comparisons(group)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Score the held-out groups with all ranks, and add the figures to the step's."""
        self.engine.eval()
        assert self.held_out is not None
        groups = [self.held_out[i] for i in range(len(self.held_out))]
        mine: list[ScoredGroup] = []
        for share in self.share(groups):
            rewards = self.forward(share or groups[:1]).cpu().numpy()
            for group in share:
                count = len(group.tokens.suffixes)
                mine.append(scored_group(group, rewards[:count]))
                rewards = rewards[count:]
        everyone: list[list[ScoredGroup]] = [[]] * self.world_size
        dist.all_gather_object(everyone, mine)
        figures = summarize([group for part in everyone for group in part])
        for key in ("accuracy", "loss", "margin"):
            self.history[-1][f"eval_{key}"] = figures[key]
        if self.metrics:
            self.metrics.evaluation(self.history[-1])

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Write this rank's shards, to be uploaded while the steps go on; all ranks meet here.

        Ray Train counts a checkpoint when every rank has uploaded, and resumes from the last that
        counts. One upload at a time: the next waits here until the one before counts.
        """
        started = time.perf_counter()
        get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        name = f"checkpoint_step_{self.step:06d}"
        storage = get_context().get_storage()
        place = storage.build_checkpoint_path_from_name(name)
        directory = shard_directory(storage.experiment_fs_path, self.rank)
        # Both may hold what was written up to a kill, by another number of workers perhaps.
        shutil.rmtree(directory, ignore_errors=True)
        if self.rank == 0:
            storage.storage_filesystem.delete_dir_contents(place, missing_dir_ok=True)
        save_shards(self.engine, str(directory), self.state())
        report(
            self.history[-1],
            checkpoint=Checkpoint.from_directory(directory),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # removes the directory afterwards
        )
        if self.metrics:
            self.metrics.checkpoint(time.perf_counter() - started, self.step)

    def state(self) -> Figures:
        """What a checkpoint holds beside weights and optimizer: how far the run is, and on what."""
        return {
            "step": self.step,
            "history": self.history,
            "data_fingerprint": self.train.fingerprint,
            "frozen_sha256": self.frozen_sha256,
        }

    def stop_at_bad_rows(self, scored: Sequence[tuple[list[PreferenceGroup], Tensor]]) -> None:
        """Raise the same TrainingError on every rank, naming step, ranks and rows."""
        bad: list[str] = []
        for share, rewards in scored:
            counts = [len(group.tokens.suffixes) for group in share]
            for group, part in zip(share, rewards[: sum(counts)].split(counts), strict=True):
                if not part.isfinite().all():
                    bad.append(group.source)
        everyone: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(everyone, bad)
        where = "; ".join(f"rank {r}: {', '.join(rows)}" for r, rows in enumerate(everyone) if rows)
        raise TrainingError(
            f"step {self.step + 1}: the loss is not finite; rewards of these rows are NaN or "
            f"infinite: {where or 'none, so a margin or label is'}"
        )


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, Template]:
    """The base model with its head and adapters, and the template its rows are built by."""
    model, tokenizer, made_by = load_base(
        config.model.path,
        seed=config.train.seed,
        dropout=config.model.dropout,
        chat_template=config.data.chat_template,
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
            groups, read = read_groups(paths, split=split, on_bad_record=data.on_bad_record)
            if config.loss.objective == "plackett_luce" and split == "train":
                check_ranked(groups)
            encoded.append(
                encode_groups(
                    groups, template, data.overlong_rows, on_bad_record=data.on_bad_record
                )
            )
            log.info("%s: %s; %s", split, read, encoded[-1].report)
    if get_context().get_local_rank() == 0:
        dist.barrier()
    return encoded[0], encoded[1] if data.eval else None


def check_ranked(groups: Sequence[Group]) -> None:
    """Raises DataError where a preference is more than an order, which is all a ranking has."""
    for group in groups:
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


def seed_of(seed: int, step: int, rank: int) -> int:
    return int(np.random.default_rng([seed, step, rank]).integers(2**63))


def shard_directory(run: str, rank: int) -> Path:
    """Where a rank of a run writes its shards on its node: the same place after a kill."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"rayrm-{name}-rank{rank}"


def merge(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """overrides into settings, section by section."""
    merged = dict(settings)
    for key, value in overrides.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merge(inner, value)
        merged[key] = value
    return merged


def collate_pairs(
    groups: Sequence[PreferenceGroup], weights: Sequence[float], device: torch.device
) -> Pairs:
    """The pairs of several groups, indexing the rewards of all of them; weights are by group."""
    starts = np.cumsum([0, *(len(group.tokens.suffixes) for group in groups)])
    choices = np.cumsum([0, *(group.choices for group in groups)])
    counts = [group.pairs for group in groups]
    columns = (
        np.concatenate([g.chosen + start for g, start in zip(groups, starts[:-1], strict=True)]),
        np.concatenate([g.rejected + start for g, start in zip(groups, starts[:-1], strict=True)]),
        np.concatenate([g.margin for g in groups]),
        np.concatenate([g.label for g in groups]),
        np.concatenate([g.choice + start for g, start in zip(groups, choices[:-1], strict=True)]),
        np.repeat(np.array(weights, dtype=np.float32), counts),
    )
    return Pairs(*(torch.from_numpy(column).to(device) for column in columns))


def scored_group(group: PreferenceGroup, rewards: NDArray[np.float32]) -> ScoredGroup:
    lengths = np.array([len(suffix) for suffix in group.tokens.suffixes], dtype=np.float64)
    pairs = np.stack([group.chosen, group.rejected], axis=1)
    return ScoredGroup(rewards, lengths, pairs, group.label, group.subset)


def learning_rate(train: TrainSection, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`, as transformers' schedules give it."""
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    falling = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.learning_rate * falling
