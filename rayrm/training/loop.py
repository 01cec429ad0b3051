"""Run one rank of a training run: set up, resume, step, evaluate, save.

All ranks compute the same plan: which groups make a step (Schedule), and which rank takes which
(rank_shares.py). They synchronize in DeepSpeed's gradients, in all-reduces of rewards and of a
step's metrics, and in Ray Train's report. Does not know how the run is started or exported.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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

from rayrm.errors import TrainingError
from rayrm.evaluation.evaluate import ScoredGroup, summarize
from rayrm.model.net import (
    pack_tensors,
)
from rayrm.packing import Pack, TokenGroup, by_group
from rayrm.training.checkpoint import load_shards, save_shards
from rayrm.training.config import TrainConfig, TrainSection
from rayrm.training.dataset import PreferenceGroup, Schedule
from rayrm.training.inputs import Inputs
from rayrm.training.loss import LOSSES, Pairs
from rayrm.training.metrics import TrainMetrics
from rayrm.training.rank_shares import Piece, Shares, response_indices, stand_in
from rayrm.training.setup import check_ids, decide_dtype, load_data, load_model, start_engine

Figures = dict[str, Any]


def train_loop(values: dict[str, Any], steps: Any) -> Figures:
    """Run one rank, report progress to the actor `steps`, and return the run's history and data."""
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
        "dtype": rank.config.train.dtype,
        **asdict(rank.inputs),
    }


class Rank:
    """One rank: its model shards, its view of the data, and the run's progress."""

    def __init__(self, config: TrainConfig) -> None:
        context = get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config = config = decide_dtype(config, self.rank)
        self.shares = Shares(self.rank, self.world_size, config.train.tokens_per_micro_batch)
        if config.cluster.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        model, template = load_model(config)
        self.train, self.held_out = load_data(config, template)
        check_ids([self.train, self.held_out], model, config.model.path)
        self.inputs = Inputs.of(model, template, self.train)
        self.inputs.check_ranks()
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
                dist.barrier()  # a late rank would overwrite files that others read
                state = load_shards(self.engine, directory, self.world_size)
            self.inputs.check_resumed(state, config.model.path)
            self.step, self.history = state["step"], state["history"]
        events = f"{config.storage}/{config.name}/tensorboard" if config.train.tensorboard else None
        self.metrics = TrainMetrics(config.name, events, self.step) if self.rank == 0 else None

    def train_step(self) -> None:
        """Take one optimizer step: run this rank's packs forward and backward, then update.

        A group above the micro-batch budget is split into parts that no pair connects; parts that
        are still above it are computed in pieces by train_large.
        """
        started = time.perf_counter()
        self.engine.train()
        # Seed dropout by step, so that a resumed run draws the same masks.
        torch.manual_seed(seed_of(self.config.train.seed, self.step, self.rank))
        groups = [self.train[i] for i in self.schedule[self.step]]
        weight = sum(self.weight(group) for group in groups)
        budget = self.shares.budget
        pieces = [piece for group in groups for piece in group.pieces(budget)]
        small = [piece for piece in pieces if piece.tokens.tokens <= budget]
        large = [piece for piece in pieces if piece.tokens.tokens > budget]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        scored: list[tuple[list[str], Tensor]] = []
        for indices in self.shares.of_rank([piece.tokens for piece in small]):
            share = [small[i] for i in indices]
            batch = [piece.tokens for piece in share] or stand_in(groups[0].tokens)
            rewards = self.forward(batch)
            loss, share_sums = self.loss(rewards, share)
            # DeepSpeed averages over ranks; the loss is the mean over the comparisons of all ranks.
            self.engine.backward(loss / weight * self.world_size, scale_wrt_gas=False)
            sums += share_sums
            scored.append((sources(share), rewards.detach()))
        if large:
            large_sums, large_scored = self.train_large(large, weight)
            sums += large_sums
            scored.append(large_scored)
        dist.all_reduce(sums)
        loss_sum, right, margin = sums.tolist()
        if not math.isfinite(loss_sum):
            self.stop_at_bad_rows(scored)
        decided = sum(int((group.label != 0.5).sum()) for group in groups)
        rate = learning_rate(self.config.train, self.step, self.schedule.steps)
        for param_group in self.engine.optimizer.param_groups:
            param_group["lr"] = rate
        self.engine.step()
        # ZeRO 0 clips without reporting the norm; a NaN in it shows in the next step's loss.
        norm = self.engine.get_global_grad_norm()
        grad_norm = None if norm is None else float(norm)
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise TrainingError(f"step {self.step + 1}: the gradient's norm is {grad_norm}")
        self.step += 1
        tokens = sum(group.tokens.tokens for group in groups)
        self.history.append(
            {
                "step": self.step,
                "loss": loss_sum / weight,
                "accuracy": right / decided if decided else None,
                "margin": margin / decided if decided else None,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "pairs": sum(group.pairs for group in groups),
                "tokens": tokens,
                "tokens_unshared": sum(group.tokens.tokens_unshared for group in groups),
                "seconds": time.perf_counter() - started,
            }
        )
        if self.metrics:
            self.metrics.step(self.history[-1])

    def train_large(
        self, groups: Sequence[PreferenceGroup], weight: float
    ) -> tuple[Tensor, tuple[list[str], Tensor]]:
        """Run forward and backward of groups above the budget, in pieces split over all ranks.

        The loss couples the responses of a group, so their rewards are computed first, without a
        graph. Then each piece is computed again and goes backward from the loss's gradient with
        respect to its rewards. The gradients are those of the whole group, for one more forward
        (gradient caching, Gao et al. 2021, arXiv:2101.06983). Returns the sums of `loss` (0 except
        on rank 0), and the sources and rewards of the rows that this rank computed.
        """
        pieces = self.shares.cut([group.tokens for group in groups])
        plan = self.shares.of_rank([piece.tokens for piece in pieces])
        rewards = self.score(pieces, plan).requires_grad_()
        loss, sums = self.loss(rewards, groups)
        (gradient,) = torch.autograd.grad(loss / weight * self.world_size, rewards)
        for micro_batch, indices in enumerate(plan):
            share = [pieces[i] for i in indices]
            self.seed_piece(micro_batch)
            batch = [piece.tokens for piece in share] or stand_in(groups[0].tokens)
            recomputed = self.forward(batch)
            if share:
                surrogate = (recomputed * gradient[response_indices(share)]).sum()
            else:
                surrogate = recomputed.sum() * 0.0
            self.engine.backward(surrogate, scale_wrt_gas=False)
        if self.rank > 0:
            sums = torch.zeros_like(sums)  # the caller adds up the sums of all ranks
        computed = response_indices([pieces[i] for indices in plan for i in indices])
        names = sources(groups)
        return sums, ([names[i] for i in computed], rewards.detach()[computed])

    @torch.no_grad()
    def score(self, pieces: Sequence[Piece], plan: Sequence[Sequence[int]]) -> Tensor:
        """Return the rewards [K] of all pieces, on every rank; this rank computes its plan's share.

        Dropout is the same as when train_large computes the micro-batch again.
        """
        computed = []
        for micro_batch, indices in enumerate(plan):
            self.seed_piece(micro_batch)
            # All ranks must call forward equally often: piece 0 stands in for an empty micro-batch.
            computed.append(self.forward([pieces[i].tokens for i in indices or [0]]))
        rewards = computed[0].new_zeros(sum(len(piece.tokens.suffixes) for piece in pieces))
        for indices, values in zip(plan, computed, strict=True):
            if indices:
                rewards[response_indices([pieces[i] for i in indices])] = values
        dist.all_reduce(rewards)
        return rewards

    def seed_piece(self, micro_batch: int) -> None:
        torch.manual_seed(seed_of(self.config.train.seed, self.step, self.rank, micro_batch))

    def forward(self, groups: Sequence[TokenGroup]) -> Tensor:
        """Return the rewards [K] of the groups' responses, in order."""
        rewards: Tensor = self.engine(*pack_tensors(Pack.from_groups(groups), self.device))
        return rewards

    def loss(self, rewards: Tensor, groups: Sequence[PreferenceGroup]) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's summed loss, and fp64 sums of [loss, correct pairs, margins].

        Equal rewards count as half correct. A pair with label 0.5 has no winner and counts in the
        loss only, as in an evaluation. Without groups (an empty micro-batch) the loss is 0 and
        keeps the graph.
        """
        if not groups:
            return rewards.sum() * 0.0, rewards.new_zeros(3, dtype=torch.float64)
        weights = [self.weight(group) / self.comparisons(group) for group in groups]
        pairs = collate_pairs(groups, weights, rewards.device)
        objective = self.config.loss
        loss = LOSSES[objective.objective](rewards, pairs, objective)
        margins = (rewards[pairs.chosen] - rewards[pairs.rejected]).detach()
        winner = (pairs.label - 0.5).sign()  # 1 chosen, -1 rejected, 0 neither
        margins = margins * winner
        right = (margins.sign() + 1) / 2 * winner.abs()
        return loss, torch.stack([loss.detach(), right.sum(), margins.sum()]).double()

    def comparisons(self, group: PreferenceGroup) -> int:
        """Return the number of terms of the objective in a group: its pairs, or its choices."""
        return group.choices if self.config.loss.ranks else group.pairs

    def weight(self, group: PreferenceGroup) -> float:
        """Return the total weight of a group's comparisons in its step.

        With weighting "prompt" a prompt weighs 1; a part of one weighs its share of comparisons.
        """
        if self.config.loss.weighting == "pair":
            return self.comparisons(group)
        prompt = group.prompt_choices if self.config.loss.ranks else group.prompt_pairs
        return self.comparisons(group) / prompt

    @torch.no_grad()
    def evaluate(self) -> None:
        """Score the held-out groups on all ranks, and add the metrics to the step's history."""
        self.engine.eval()
        assert self.held_out is not None
        groups = [self.held_out[i] for i in range(len(self.held_out))]
        pieces = self.shares.cut([group.tokens for group in groups])
        plan = self.shares.of_rank([piece.tokens for piece in pieces])
        rewards = self.score(pieces, plan).cpu().numpy()
        by_groups = by_group(rewards, [len(group.tokens.suffixes) for group in groups])
        scored = [
            scored_group(group, group_rewards)
            for group, group_rewards in zip(groups, by_groups, strict=True)
        ]
        figures = summarize(scored)
        for key in ("accuracy", "margin"):
            self.history[-1][f"eval_{key}"] = figures[key]
        self.history[-1]["eval_loss"] = self.held_out_loss(groups, scored)
        if self.metrics:
            self.metrics.evaluation(self.history[-1])

    def held_out_loss(
        self, groups: Sequence[PreferenceGroup], scored: Sequence[ScoredGroup]
    ) -> float | None:
        """Return the mean of the trained objective, in fp64, over groups whose rewards are finite.

        Like the other held-out metrics, over pairs that have a winner; also over ties if the
        objective uses them. None if no group is left.
        """
        compared: list[PreferenceGroup] = []
        rewards: list[NDArray[np.floating]] = []
        for group, result in zip(groups, scored, strict=True):
            decided = group.decided()
            if decided.pairs and np.isfinite(result.rewards).all():
                compared.append(decided)
                rewards.append(result.rewards)
        if not compared:
            return None
        loss, _ = self.loss(torch.from_numpy(np.concatenate(rewards)).double(), compared)
        return float(loss) / sum(self.weight(group) for group in compared)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Write this rank's shards and upload them while training continues; every rank must call.

        Ray Train commits a checkpoint once every rank has uploaded, and resumes from the last
        committed one. Waits for the previous upload, so that only one runs at a time.
        """
        started = time.perf_counter()
        get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        name = f"checkpoint_step_{self.step:06d}"
        storage = get_context().get_storage()
        place = storage.build_checkpoint_path_from_name(name)
        directory = shard_directory(storage.experiment_fs_path, self.rank)
        # Both may hold files of a killed attempt, perhaps with another number of workers.
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
        """Return what a checkpoint holds next to the shards: progress and hashes of its inputs."""
        return {"step": self.step, "history": self.history, **asdict(self.inputs)}

    def stop_at_bad_rows(self, scored: Sequence[tuple[list[str], Tensor]]) -> None:
        """Raise the same TrainingError on every rank, naming step, ranks and rows."""
        bad: list[str] = []
        for rows, rewards in scored:
            # An empty micro-batch has no rows, but the reward of a row that stands in.
            finite = rewards[: len(rows)].isfinite().tolist()
            bad += [row for row, is_finite in zip(rows, finite, strict=True) if not is_finite]
        bad_by_rank: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(bad_by_rank, list(dict.fromkeys(bad)))
        where = [f"rank {r}: {', '.join(rows)}" for r, rows in enumerate(bad_by_rank) if rows]
        raise TrainingError(
            f"step {self.step + 1}: the loss is not finite; rewards of these rows are NaN or "
            f"infinite: {'; '.join(where) or 'none, so a margin or label is'}"
        )


def sources(groups: Sequence[PreferenceGroup]) -> list[str]:
    """Return the source of each response."""
    return [group.source for group in groups for _ in group.tokens.suffixes]


def seed_of(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**63))


def shard_directory(run: str, rank: int) -> Path:
    """Return where a rank writes its shards on its node; the same directory after a restart."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"rayrm-{name}-rank{rank}"


def collate_pairs(
    groups: Sequence[PreferenceGroup], weights: Sequence[float], device: torch.device
) -> Pairs:
    """Return the pairs of all groups, indexing their concatenated rewards; one weight per group."""
    # The numbers of responses and of choices in the groups before each group.
    responses = np.cumsum([0, *(len(group.tokens.suffixes) for group in groups)])[:-1]
    choices = np.cumsum([0, *(group.choices for group in groups)])[:-1]
    counts = [group.pairs for group in groups]
    columns: dict[str, NDArray[Any]] = {
        "chosen": np.concatenate([g.chosen + n for g, n in zip(groups, responses, strict=True)]),
        "rejected": np.concatenate(
            [g.rejected + n for g, n in zip(groups, responses, strict=True)]
        ),
        "margin": np.concatenate([g.margin for g in groups]),
        "label": np.concatenate([g.label for g in groups]),
        "choice": np.concatenate([g.choice + n for g, n in zip(groups, choices, strict=True)]),
        "weight": np.repeat(np.array(weights, dtype=np.float32), counts),
        "tie": np.concatenate([g.tie for g in groups]),
    }
    tensors = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
    return Pairs(**tensors)


def scored_group(group: PreferenceGroup, rewards: NDArray[np.floating]) -> ScoredGroup:
    lengths = np.array([len(suffix) for suffix in group.tokens.suffixes], dtype=np.float64)
    rows = group.tokens.rows
    pairs = group.chosen, group.rejected
    return ScoredGroup.of(rows, rewards, lengths, *pairs, group.label, group.subset)


def learning_rate(train: TrainSection, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`, as transformers computes it."""
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    falling = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.learning_rate * falling
