"""What every rank of a training run does: set up, resume, step, evaluate, save.

All ranks compute the same plan (which groups make a step, which rank takes which) and never send
each other data; they meet in DeepSpeed's gradients, in one all-reduce of a step's figures, and in
Ray Train's report. Knows nothing of how the run is started or exported.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from rayrm.evaluation.evaluate import ScoredGroup, equal_for_equals, summarize
from rayrm.model.net import (
    pack_tensors,
)
from rayrm.packing import Pack, TokenGroup, by_group, share_packs, split_group
from rayrm.training.checkpoint import load_shards, save_shards
from rayrm.training.config import TrainConfig, TrainSection
from rayrm.training.dataset import PreferenceGroup, Schedule
from rayrm.training.lora import check_frozen, hash_frozen
from rayrm.training.loss import LOSSES, Pairs
from rayrm.training.metrics import TrainMetrics
from rayrm.training.setup import check_ids, decide_dtype, load_data, load_model, start_engine

Figures = dict[str, Any]


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
        "dtype": rank.config.train.dtype,
    }


class Rank:
    """A rank's model shards, its view of the data, and how far the run is."""

    def __init__(self, config: TrainConfig) -> None:
        context = get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config = config = decide_dtype(config, self.rank)
        if config.cluster.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        model, template = load_model(config)
        self.frozen_sha256 = hash_frozen(model)
        self.train, self.held_out = load_data(config, template)
        check_ids([self.train, self.held_out], model, config.model.path)
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
            if state.get("text_to_ids", self.train.text_to_ids) != self.train.text_to_ids:
                raise TrainingError(
                    f"the checkpoint of step {state['step']} was trained on other ids: tokenizer "
                    f"or chat template of {config.model.path} have changed since the run was "
                    "started; put them back, or give this run another name"
                )
            # One that does not say was trained with every prompt as one group.
            if state.get("groups", self.train.report.groups) != len(self.train):
                raise TrainingError(
                    f"the checkpoint of step {state['step']} was trained with other groups: "
                    "train.pairs_per_group has changed since the run was started; set it back "
                    "(null: every prompt is one group), or give this run another name"
                )
            check_frozen(self.frozen_sha256, state["frozen_sha256"], config.model.path)
            self.step, self.history = state["step"], state["history"]
        events = f"{config.storage}/{config.name}/tensorboard" if config.train.tensorboard else None
        self.metrics = TrainMetrics(config.name, events, self.step) if self.rank == 0 else None

    def train_step(self) -> None:
        """One optimizer step: this rank's packs forward and backward, then everyone's update.

        A group above the budget of a micro-batch is cut where no pair connects its responses, and
        what is above it still by responses.
        """
        started = time.perf_counter()
        self.engine.train()
        # Dropout is drawn by step, so that a resumed run draws what it would have drawn.
        torch.manual_seed(seed_of(self.config.train.seed, self.step, self.rank))
        groups = [self.train[i] for i in self.schedule[self.step]]
        weight = sum(self.weight(group) for group in groups)
        budget = self.config.train.tokens_per_micro_batch
        pieces = [piece for group in groups for piece in group.pieces(budget)]
        small = [piece for piece in pieces if piece.tokens.tokens <= budget]
        large = [piece for piece in pieces if piece.tokens.tokens > budget]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        scored: list[tuple[list[str], Tensor]] = []
        for indices in self.share([piece.tokens for piece in small]):
            share = [small[i] for i in indices]
            rewards = self.forward([piece.tokens for piece in share] or one_row(groups))
            loss, share_sums = self.loss(rewards, share)
            # DeepSpeed averages over ranks; the loss is the mean over what all of them compare.
            self.engine.backward(loss / weight * self.world_size, scale_wrt_gas=False)
            sums += share_sums
            scored.append((sources(share), rewards.detach()))
        if large:
            large_sums, mine = self.train_large(large, weight)
            sums += large_sums
            scored.append(mine)
        dist.all_reduce(sums)
        loss_sum, right, margin = sums.tolist()
        if not math.isfinite(loss_sum):
            self.stop_at_bad_rows(scored)
        decided = sum(int((group.label != 0.5).sum()) for group in groups)
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
        """Forward and backward of groups above the budget, in pieces that all ranks share.

        The loss couples the responses of a group. So their rewards come first, without a graph;
        with the loss's gradient by reward each piece is computed again and goes backward: the same
        gradients as of the whole, at a forward more (gradient caching, Gao et al. 2021,
        arXiv:2101.06983). Returns the sums of `loss`, once for all ranks, and the rewards that this
        rank computed, with the sources of their rows.
        """
        pieces = self.cut([group.tokens for group in groups])
        plan = self.share([piece.tokens for piece in pieces])
        rewards = self.score(pieces, plan).requires_grad_()
        loss, sums = self.loss(rewards, groups)
        (gradient,) = torch.autograd.grad(loss / weight * self.world_size, rewards)
        for micro_batch, indices in enumerate(plan):
            share = [pieces[i] for i in indices]
            self.seed_piece(micro_batch)
            again = self.forward([piece.tokens for piece in share] or one_row(groups))
            at = places(share)
            pulled = (again * gradient[at]).sum() if share else again.sum() * 0.0
            self.engine.backward(pulled, scale_wrt_gas=False)
        at = places([pieces[i] for indices in plan for i in indices])
        names = sources(groups)
        mine = [names[i] for i in at], rewards.detach()[at]
        return (sums if self.rank == 0 else torch.zeros_like(sums)), mine

    @torch.no_grad()
    def score(self, pieces: Sequence[Piece], plan: Sequence[Sequence[int]]) -> Tensor:
        """Rewards [K] of all pieces, of which this rank computes those of its plan, on every rank.

        Dropout is what it will be when train_large computes the same micro-batch again.
        """
        computed = []
        for micro_batch, indices in enumerate(plan):
            self.seed_piece(micro_batch)
            computed.append(self.forward([pieces[i].tokens for i in indices or [0]]))
        rewards = computed[0].new_zeros(sum(len(piece.tokens.suffixes) for piece in pieces))
        for indices, found in zip(plan, computed, strict=True):
            if indices:
                rewards[places([pieces[i] for i in indices])] = found
        dist.all_reduce(rewards)
        return rewards

    def seed_piece(self, micro_batch: int) -> None:
        torch.manual_seed(seed_of(self.config.train.seed, self.step, self.rank, micro_batch))

    def cut(self, groups: Sequence[TokenGroup]) -> list[Piece]:
        """The groups in pieces of at most the budget of a micro-batch, or of one row."""
        budget, pieces, start = self.config.train.tokens_per_micro_batch, [], 0
        for group in groups:
            for responses in split_group(group, budget):
                pieces.append(Piece(group.part(responses), start + responses.start))
            start += len(group.suffixes)
        return pieces

    def share(self, groups: Sequence[TokenGroup]) -> list[list[int]]:
        """This rank's micro-batches, as many as every other rank's, by index; some may be empty."""
        costs = [group.tokens for group in groups]
        budget = self.config.train.tokens_per_micro_batch
        return share_packs(costs, self.world_size, budget)[self.rank]

    def forward(self, groups: Sequence[TokenGroup]) -> Tensor:
        """Rewards [K] of the groups' responses, in order."""
        rewards: Tensor = self.engine(*pack_tensors(Pack.from_groups(groups), self.device))
        return rewards

    def loss(self, rewards: Tensor, groups: Sequence[PreferenceGroup]) -> tuple[Tensor, Tensor]:
        """Summed loss of a micro-batch and [loss, pairs ranked right, margins], summed, fp64.

        A tie is half right; a pair whose label is a half has no winner and counts in the loss
        alone, as in an evaluation. Without groups (another rank has more of them) the loss is 0 and
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
        """What the objective sums over in a group: its pairs, or its choices."""
        return group.choices if self.config.loss.ranks else group.pairs

    def weight(self, group: PreferenceGroup) -> float:
        """What a group counts for in its step, and its comparisons together.

        Weighted by prompt, a part of one counts for its share of the prompt's comparisons.
        """
        if self.config.loss.weighting == "pair":
            return self.comparisons(group)
        prompt = group.prompt_choices if self.config.loss.ranks else group.prompt_pairs
        return self.comparisons(group) / prompt

    @torch.no_grad()
    def evaluate(self) -> None:
        """Score the held-out groups with all ranks, and add the figures to the step's."""
        self.engine.eval()
        assert self.held_out is not None
        groups = [self.held_out[i] for i in range(len(self.held_out))]
        pieces = self.cut([group.tokens for group in groups])
        rewards = self.score(pieces, self.share([piece.tokens for piece in pieces])).cpu().numpy()
        by_groups = by_group(rewards, [len(group.tokens.suffixes) for group in groups])
        scored = [*map(scored_group, groups, by_groups)]
        figures = summarize(scored)
        for key in ("accuracy", "margin"):
            self.history[-1][f"eval_{key}"] = figures[key]
        self.history[-1]["eval_loss"] = self.held_out_loss(groups, scored)
        if self.metrics:
            self.metrics.evaluation(self.history[-1])

    def held_out_loss(
        self, groups: Sequence[PreferenceGroup], scored: Sequence[ScoredGroup]
    ) -> float | None:
        """The objective that is trained, in fp64, over the groups whose responses have rewards.

        As in the figures beside it, of pairs that have a winner; and of ties, where it uses them.
        """
        compared = [(group.decided(), of.rewards) for group, of in zip(groups, scored, strict=True)]
        known = [(g, rewards) for g, rewards in compared if g.pairs and np.isfinite(rewards).all()]
        if not known:
            return None
        rewards = torch.from_numpy(np.concatenate([rewards for _, rewards in known]))
        loss, _ = self.loss(rewards.double(), [group for group, _ in known])
        return float(loss) / sum(self.weight(group) for group, _ in known)

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
            "text_to_ids": self.train.text_to_ids,
            "groups": len(self.train),
            "frozen_sha256": self.frozen_sha256,
        }

    def stop_at_bad_rows(self, scored: Sequence[tuple[list[str], Tensor]]) -> None:
        """Raise the same TrainingError on every rank, naming step, ranks and rows."""
        found: dict[str, None] = {}
        for rows, rewards in scored:
            # Without rows the reward is of a row that stands in for a micro-batch.
            finite = rewards[: len(rows)].isfinite().tolist()
            found |= {row: None for row, known in zip(rows, finite, strict=True) if not known}
        bad = list(found)
        everyone: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(everyone, bad)
        where = "; ".join(f"rank {r}: {', '.join(rows)}" for r, rows in enumerate(everyone) if rows)
        raise TrainingError(
            f"step {self.step + 1}: the loss is not finite; rewards of these rows are NaN or "
            f"infinite: {where or 'none, so a margin or label is'}"
        )


@dataclass(frozen=True)
class Piece:
    """Some of a group's responses, and where among those of all groups the first of them is."""

    tokens: TokenGroup
    start: int


def places(pieces: Sequence[Piece]) -> list[int]:
    """Where among those of all groups the pieces' responses are."""
    return [p.start + i for p in pieces for i in range(len(p.tokens.suffixes))]


def one_row(groups: Sequence[PreferenceGroup]) -> list[TokenGroup]:
    """What a rank computes for nothing where the others have one more micro-batch."""
    return [groups[0].tokens.part(range(1))]


def sources(groups: Sequence[PreferenceGroup]) -> list[str]:
    """Where each response comes from."""
    return [group.source for group in groups for _ in group.tokens.suffixes]


def seed_of(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**63))


def shard_directory(run: str, rank: int) -> Path:
    """Where a rank of a run writes its shards on its node: the same place after a kill."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"rayrm-{name}-rank{rank}"


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
        np.concatenate([g.tie for g in groups]),
    )
    return Pairs(*(torch.from_numpy(column).to(device) for column in columns))


def scored_group(group: PreferenceGroup, rewards: NDArray[np.floating]) -> ScoredGroup:
    lengths = np.array([len(suffix) for suffix in group.tokens.suffixes], dtype=np.float64)
    pairs = np.stack([group.chosen, group.rejected], axis=1)
    rewards = equal_for_equals(group.tokens.rows, rewards)
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
