"""A replica: merge chunks of several callers into full packs, score them, and answer the callers.

It holds the models (loaded_models.py) and remembers rewards, which it does not compute again; a
TokenQueue decides what is computed next. Does not know how a step is cut into chunks, or about
training.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from ray import serve

from rayrm.config import OWN
from rayrm.errors import Overloaded, ServiceError, UnknownReward, VersionGone
from rayrm.model.engine import Encoded, RewardModel
from rayrm.packing import TokenGroup
from rayrm.rows import Rewards
from rayrm.serving.callers import CallsInProgress
from rayrm.serving.chunk import Chunk
from rayrm.serving.config import ServeConfig
from rayrm.serving.demand import Demand
from rayrm.serving.loaded_models import Models
from rayrm.serving.metrics import ServeMetrics
from rayrm.serving.queue import ModelBroken, TokenQueue
from rayrm.serving.record import Trial
from rayrm.serving.reward_cache import RewardCache
from rayrm.serving.shadow import Comparison, Difference
from rayrm.serving.ticket import Caller, Ticket

logger = logging.getLogger("ray.serve")

# Maximum number of answered chunks that wait for the shadow to score them too.
CHUNKS_SHADOWED = 16


class Replica:
    """One copy of the model behind a Serve handle; it holds two versions during a hot swap."""

    def __init__(self, config: ServeConfig) -> None:
        app = serve.get_replica_context().app_name
        self.config = config
        self.calls = self.refused = 0
        self.metrics = ServeMetrics()
        self.in_progress = CallsInProgress()
        self.demand = Demand()
        self.queue = TokenQueue(config.tokens_per_pack, config.max_queue_tokens)
        self.cache = RewardCache(config.cache_bytes)
        self.models = Models(app, config, self._load, self.metrics.holds)
        self.shadowing: set[asyncio.Task[None]] = set()
        self.compared: tuple[Trial | None, Comparison] = None, Comparison()
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    async def score(
        self, chunk: Chunk, ticket: Ticket
    ) -> dict[str, Rewards] | Overloaded | VersionGone | UnknownReward:
        """Return the rewards of a chunk's rows by name, in its order; or why it is refused."""
        self.calls += 1
        cost = chunk.cost * len(ticket.rewards)
        try:
            with self.demand.chunk(ticket, cost):
                self.queue.own, self.queue.share, self.queue.outstanding = self.demand.wanted()
                with self.queue.admit(ticket.caller, cost), self.in_progress.call(ticket):
                    model = await self.models.get(ticket.version)
                    rewards = await self._answer(model, chunk, ticket)
        except (Overloaded, VersionGone, UnknownReward) as refusal:
            self.refused += 1
            self.metrics.refused(refusal)
            return refusal  # Serve would log a raised one with its traceback
        except ModelBroken:
            logger.exception(f"step={ticket.step} part={ticket.part} model broken, replica exits")
            os._exit(1)  # Serve starts another replica, and callers resend this one's chunks
        trial = self.models.shadow
        if trial and OWN in rewards and ticket.version in ("", self.models.current):
            self._shadow(trial, chunk, rewards[OWN])
        return rewards

    async def _answer(self, model: RewardModel, chunk: Chunk, ticket: Ticket) -> dict[str, Rewards]:
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        models = {name: model.named(name) for name in ticket.rewards}
        with self.metrics.request(len(chunk.finished)):
            encoded = await loop.run_in_executor(self._tokenizing, encode, model, chunk)
            tokens = sum(group.tokens for group in encoded.groups) * len(models)
            unshared = sum(group.tokens_unshared for group in encoded.groups) * len(models)
            with self.metrics.waiting(tokens, unshared):
                scored = await asyncio.gather(
                    *(self._rewards_by(m, encoded, ticket.caller) for m in models.values())
                )
            self.metrics.found(self.cache.rows_found)
            self.metrics.failed(scored)
            rewards = dict(zip(models, scored, strict=True))
            for name, named_rewards in rewards.items():
                self.metrics.scored(name, named_rewards, chunk)
        errors = sum(len(r) - r.errors.count(None) for r in scored)
        logger.info(
            f"step={ticket.step} part={ticket.part} caller={ticket.caller.name} "
            f"version={model.version} rewards={','.join(models)} rows={len(scored[0])} "
            f"tokens={tokens} errors={errors} took={time.perf_counter() - started:.3f}s"
        )
        return rewards

    async def _rewards_by(
        self, model: RewardModel, encoded: Encoded, caller: Caller | None
    ) -> Rewards:
        compute = partial(self.queue.score, compute=model.score_groups, caller=caller)
        scored = await self.cache.score(model.version, encoded.groups, compute)
        return model.collect(encoded, [s.values for s in scored], [s.errors for s in scored])

    def _shadow(self, trial: Trial, chunk: Chunk, rewards: Rewards) -> None:
        """Let the shadow score the chunk too when nothing else waits; skip it if many wait."""
        if len(self.shadowing) >= CHUNKS_SHADOWED:
            self.metrics.unshadowed.inc(len(rewards))
            return
        task = asyncio.create_task(self._compare(trial, chunk, rewards))
        self.shadowing.add(task)
        task.add_done_callback(self.shadowing.discard)

    async def _compare(self, trial: Trial, chunk: Chunk, rewards: Rewards) -> None:
        try:
            model = await self.models.get(trial.served.pin)
            encoded = await asyncio.to_thread(encode, model, chunk)
            tried = await self._rewards_by(model, encoded, None)
        except (VersionGone, ModelBroken):
            logger.exception(f"version={trial.served.pin} could not score a chunk as the shadow")
            return
        if self.compared[0] != trial:
            self.compared = trial, Comparison()
        self.compared[1].add(chunk.prompt_of, rewards, tried)
        self.metrics.compared(self.difference())

    def difference(self) -> Difference:
        """Return how the shadow's rewards differ from the current ones on this replica's rows."""
        trial, comparison = self.compared
        if trial != self.models.shadow:
            comparison = Comparison()  # what was compared belongs to an earlier trial
        return comparison.difference()

    def _load(self, config: ServeConfig) -> RewardModel:
        model = load_replica(config)
        self.queue.between_packs(lambda: warm_up(model))
        return model

    def check_health(self) -> None:
        """Raise ServiceError if a pack has computed for longer than hang_timeout_s.

        Serve calls this every few seconds and replaces a replica that keeps raising.
        """
        if self.queue.seconds_per_pack > self.config.hang_timeout_s:
            raise ServiceError(
                f"a pack has been computing for {self.queue.seconds_per_pack:.0f} s, "
                f"hang_timeout_s is {self.config.hang_timeout_s:g}; waiting: {self.in_progress}"
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this replica's demand for Serve's autoscaling policy (autoscale.py)."""
        return self.demand.report()

    def request_compare(self) -> dict[str, Any]:
        """Trigger a comparison with the record, without waiting for it; return stats."""
        self.models.compare_soon()
        return self.stats()

    def stats(self) -> dict[str, Any]:
        """Return the loaded versions, counts since this replica started, and queue lengths."""
        model, staged = self.models.model, self.models.record.staged
        return {
            "pid": os.getpid(),
            "version": model.version,
            "versions": sorted(self.models.held),
            "dtype": model.dtype,
            "failed": {version: failure.why for version, failure in self.models.failed.items()},
            "staged": staged.id if staged else "",
            "shadow": self.models.shadow.served.pin if self.models.shadow else "",
            "calls": self.calls,
            "refused": self.refused,
            "forwards": sum(reward.forwards for reward in model.rewards.values()),
            "computed_tokens": self.queue.computed_tokens,
            "queued_tokens": self.queue.queued_tokens,
            "admitted_tokens": self.queue.admitted_tokens,
            "rows_found": self.cache.rows_found,
        }


def encode(model: RewardModel, chunk: Chunk) -> Encoded:
    """Return the chunk's rows as token ids of that model."""
    return model.encode(chunk.rows(), chunk.tokenizer)


def load_replica(config: ServeConfig) -> RewardModel:
    """Load one copy of the model, on the device and the CPU threads that the config names."""
    if not config.gpus_per_replica:
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
    return RewardModel.load(
        config.export,
        "cuda" if config.gpus_per_replica else "cpu",
        config.dtype,
        adapters=config.adapters,
        max_length=config.max_length,
        overlong=config.overlong,
        tokens_per_pack=config.tokens_per_pack,
        deterministic=config.deterministic,
    )


def warm_up(model: RewardModel) -> None:
    """Run the template, the kernels and the largest pack once, so that they fail at start."""
    for reward in model.rewards.values():
        reward.score(["Hello"] * 2, ["Yes.", "No, not at all."])
    longest = min(model.template.spec.max_length, model.tokens_per_pack)
    row = np.zeros(longest, dtype=np.int32)
    model.score_groups([TokenGroup(row[:0], (row,))] * (model.tokens_per_pack // longest))
    for reward in model.rewards.values():
        reward.forwards = 0
