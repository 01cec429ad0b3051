"""Train a policy and a critic with PPO; rewards come from the service through RewardClient.

    jobs/ppo.py EXPORT [--policy BASE] [--seed 0] [--steps 20] [--directory runs/ppo]

Rollout workers sample responses to the questions of the quickstart, send the step to the service,
and sample the next step while its rewards are computed. So the samples are one update old, and the
probability ratio uses the log-probabilities that they were sampled with (Schulman et al. 2017,
arXiv:1707.06347). The critic starts from the reward model. Before and after training, responses to
held-out prompts are scored, and their latent quality is judged, which training does not use: see
jobs/ppo_report.py. Does not know how rewards are computed, that replicas die or versions change.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain, cycle
from statistics import fmean
from typing import Any

import ray
import torch
from ray import serve
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from rayrm import RewardClient, Rewards, ServeConfig, deploy
from rayrm.config import at_home, local_path
from rayrm.data.sample import Question, questions
from rayrm.errors import RayrmError
from rayrm.model.foreign import open_model
from rayrm.model.hardware import choose_dtype
from rayrm.model.net import DEFAULT_BASE, DTYPES, find_model

Figures = dict[str, Any]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Lengths are in tokens, rewards in standard deviations from the mean of the held-out rewards.
    """

    export: str
    policy: str = DEFAULT_BASE
    app: str = "ppo"
    seed: int = 0
    steps: int = 20
    workers: int = 2
    prompts_per_worker: int = 6
    responses_per_prompt: int = 4
    max_response: int = 24
    temperature: float = 0.7
    epochs: int = 2
    rows_per_minibatch: int = 24
    trained_layers: int = 8
    learning_rate: float = 1e-4
    clip: float = 0.2
    kl_penalty: float = 0.05
    unfinished_reward: float = -1.5  # reward models have only seen complete responses
    gae_lambda: float = 0.95
    held_out: int = 128
    device: str = "cpu"
    dtype: str = "auto"  # the dtype that the device is fast in
    reward_mean: float = 0.0  # of the raw held-out rewards, like reward_std
    reward_std: float = 1.0


@dataclass
class Rollout:
    """B rows: prompts padded on the left, then responses, padded on the right to R tokens.

    ids, mask: int64 [B, prompt + R]; mask is 0 at padding. kept: bool [B, R], mask of the
    responses. old, reference: float32 [B, R], log-probabilities under the sampling policy and the
    reference. finished: bool [B], False if cut off. waited: seconds spent only waiting for rewards.
    """

    ids: Tensor
    mask: Tensor
    old: Tensor
    reference: Tensor
    kept: Tensor
    finished: Tensor
    rewards: Rewards | None = None
    waited: float = 0.0

    def rows(self) -> list[list[list[int]]]:
        """Return prompts and responses as token ids, without padding."""
        ids = self.ids.where(self.mask.bool(), -1).tensor_split([-self.kept.shape[1]], dim=1)
        return [[row[row >= 0].tolist() for row in part] for part in ids]


def forward(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """Return the logits of every token, [B, T, outputs]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions, **options).logits


def autocast(settings: Settings) -> torch.autocast:
    """Return the context of a forward pass: bf16 autocast if settings.dtype is bfloat16."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16")


def log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities, float32 [B, R], of tokens [B, R] by logits [B, R, vocabulary]."""
    flat = logits.flatten(0, 1).float() / temperature, tokens.flatten()
    return -torch.nn.functional.cross_entropy(*flat, reduction="none").view(tokens.shape)


class RolloutWorker:
    """A worker that samples a step while the rewards of the previous one are computed."""

    def __init__(self, settings: Settings, rank: int) -> None:
        torch.manual_seed(1000 * settings.seed + rank)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
        self.settings = settings
        path = find_model(settings.policy)
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        load: Callable[[], Any] = partial(
            AutoModelForCausalLM.from_pretrained, path, dtype=settings.dtype
        )
        self.policy, self.reference = (load().to(settings.device) for _ in range(2))
        ends = self.policy.generation_config.eos_token_id  # a chat model may have several
        self.ends = torch.tensor(ends, device=settings.device).flatten()
        asked = questions(settings.seed, "train", 1024)[rank :: settings.workers]
        self.prompts = cycle(question.prompt for question in asked)
        self.client = RewardClient(settings.app, caller=f"rollout-{rank}")
        self.pending: tuple[Rollout, Future[Rewards]] | None = None

    def rollout(self, weights: Weights) -> Rollout | None:
        """Sample a step and send it; return the previous step with its rewards, None at first."""
        self.policy.load_state_dict(weights)
        prompts = [next(self.prompts) for _ in range(self.settings.prompts_per_worker)]
        sampled = self.sample(prompts, self.settings.responses_per_prompt)
        before, self.pending = self.pending, (sampled, self.send([sampled]))
        if before is None:
            return None
        rollout, rewards = before
        started = time.perf_counter()
        rollout.rewards = rewards.result()
        rollout.waited = time.perf_counter() - started
        return rollout

    def evaluate(self, weights: Weights, asked: Sequence[Question]) -> list[Figures]:
        """Sample a response to each question with a fixed seed; return how each is judged.

        The keys are reward, quality (latent, 0 to 2) and finished.
        """
        self.policy.load_state_dict(weights)
        prompts = [question.prompt for question in asked]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            parts = [self.sample(prompts[i : i + 32], 1) for i in range(0, len(prompts), 32)]
        texts = [t for part in parts for t in self.tokenizer.batch_decode(part.rows()[1], True)]
        quality = [q.quality(text.strip()) for q, text in zip(asked, texts, strict=True)]
        finished = torch.cat([part.finished for part in parts])
        scores = score(self.send(parts).result(), finished, self.settings)
        judged = zip(scores.tolist(), quality, finished.tolist(), strict=True)
        return [{"reward": r, "quality": q, "finished": f} for r, q, f in judged]

    def send(self, parts: Sequence[Rollout]) -> Future[Rewards]:
        rows = zip(*(part.rows() for part in parts), strict=True)
        prompts, responses = ([*chain(*column)] for column in rows)
        finished = torch.cat([part.finished for part in parts]).tolist()
        return self.client.submit(prompts, responses, finished=finished, tokenizer=self.tokenizer)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[str], responses: int) -> Rollout:
        """Sample responses to each prompt.

        Samples without top-k and top-p, since the learner computes the whole distribution.
        """
        temperature = self.settings.temperature
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        form: dict[str, Any] = {"padding": True, "return_tensors": "pt", "return_dict": True}
        asked: Any = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, **form)
        sampled = self.policy.generate(
            **asked.to(self.settings.device),
            **{"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0},
            **{"output_logits": True, "return_dict_in_generate": True},
            num_return_sequences=responses,
            max_new_tokens=self.settings.max_response,
            pad_token_id=self.ends[0].item(),
        )
        ids, response = sampled.sequences, sampled.sequences[:, asked["input_ids"].shape[1] :]
        ends = torch.isin(response, self.ends)
        kept = ends.cumsum(1) - ends.long() == 0  # up to the first end, included
        mask = torch.cat([asked["attention_mask"].repeat_interleave(responses, 0), kept], 1)
        old = log_probs(torch.stack(sampled.logits, 1), response, temperature)
        logits = forward(self.reference, ids, mask, logits_to_keep=response.shape[1] + 1)
        reference = log_probs(logits[:, :-1], response, temperature)
        finished = ends.any(1).cpu()
        return Rollout(ids.cpu(), mask.cpu(), old.cpu(), reference.cpu(), kept.cpu(), finished)


class Learner:
    """The policy and the critic: fp32 weights, computed in settings.dtype."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        torch.set_num_threads(os.cpu_count() or 1)  # Ray sets one thread for an actor without CPUs
        self.settings = settings
        reward_model, _ = open_model(settings.export)
        path = find_model(settings.policy)
        policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        # The reward model, with its head applied at every token instead of the last one.
        critic = AutoModelForTokenClassification.from_pretrained(reward_model, dtype="float32")
        self.policy, self.critic = policy.to(settings.device), critic.to(settings.device)
        self.trained = [thaw(model, settings.trained_layers) for model in (policy, critic)]
        adamw = partial(torch.optim.AdamW, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        self.optimizer = adamw(chain(*self.trained))

    def weights(self) -> Weights:
        dtype = DTYPES[self.settings.dtype]
        return {k: v.to("cpu", dtype, copy=True) for k, v in self.policy.state_dict().items()}

    def update(self, *rollouts: Rollout) -> Figures:
        """Train settings.epochs on the rollouts; return figures averaged over optimizer steps."""
        batches = [self.estimate(rollout) for rollout in rollouts]
        tokens = torch.cat([b["advantages"][b["kept"]] for b in batches])
        for batch in batches:
            batch["advantages"] = (batch["advantages"] - tokens.mean()) / tokens.std()
        figures: list[Figures] = []
        for _ in range(self.settings.epochs):
            for batch in batches:
                order = torch.randperm(len(batch["ids"]))
                for rows in order.split(self.settings.rows_per_minibatch):
                    figures.append(self.step({k: v[rows] for k, v in batch.items()}))
        return {key: fmean(f[key] for f in figures) for key in figures[0]}

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return a batch of the rows that have a reward.

        Adds advantages and returns, float32 [B, R].
        """
        assert rollout.rewards is not None
        settings, mask = self.settings, rollout.kept
        rewards = -settings.kl_penalty * (rollout.old - rollout.reference) * mask
        scores = score(rollout.rewards, rollout.finished, settings)
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
        ids, every = rollout.ids.to(settings.device), rollout.mask.to(settings.device)
        values = self.values(ids, every, mask.shape[1]).cpu() * mask
        advantages = gae(rewards, values, settings.gae_lambda)
        batch = {"ids": rollout.ids, "mask": rollout.mask, "kept": mask, "old": rollout.old}
        batch |= {"advantages": advantages, "returns": advantages + values}
        return {key: value[scores.isfinite()] for key, value in batch.items()}

    def values(self, ids: Tensor, mask: Tensor, responses: int) -> Tensor:
        """Return the critic's values before each of the last `responses` tokens, float32 [B, R]."""
        with autocast(self.settings):
            values: Tensor = forward(self.critic, ids, mask)[:, -responses - 1 : -1, 0]
        return (values.float() - self.settings.reward_mean) / self.settings.reward_std

    def step(self, batch: dict[str, Tensor]) -> Figures:
        """Take an optimizer step on the clipped surrogate (PPO, eq. 7) and the value loss."""
        device, clip = self.settings.device, self.settings.clip
        ids, mask, kept, old, advantages, returns = (t.to(device) for t in batch.values())
        responses = old.shape[1]
        with autocast(self.settings):
            logits = forward(self.policy, ids, mask, logits_to_keep=responses + 1)
        new = log_probs(logits[:, :-1], ids[:, -responses:], self.settings.temperature)
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages)[kept].mean()
        value_loss = (self.values(ids, mask, responses) - returns).square()[kept].mean() / 2
        (policy_loss + value_loss).backward()
        for parameters in self.trained:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        outside = (ratio != clipped)[kept].float().mean()
        return {"clipped": outside.item(), "value_loss": value_loss.item()}


def score(rewards: Rewards, finished: Tensor, settings: Settings) -> Tensor:
    """Return normalized rewards, float32 [B], NaN for a row without one.

    A response that was cut off gets settings.unfinished_reward.
    """
    scores = (torch.tensor(rewards.values) - settings.reward_mean) / settings.reward_std
    return scores.where(finished | scores.isnan(), settings.unfinished_reward)


def thaw(model: Any, layers: int) -> list[torch.nn.Parameter]:
    """Freeze all but the last layers, the final norm and `score`; return the trained weights."""
    model.requires_grad_(False)
    base, head = model.base_model, getattr(model, "score", None)
    for part in (*base.layers[-layers:], base.norm, *([head] if head else [])):
        part.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def gae(rewards: Tensor, values: Tensor, lam: float) -> Tensor:
    """Return advantages [B, R] (GAE, Schulman et al. 2016, eq. 16, without discount).

    rewards, values: [B, R], 0 after the end of a response.
    """
    advantages = torch.zeros_like(rewards)
    advantage = value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + value + lam * advantage - values[:, t]
        advantages[:, t], value = advantage, values[:, t]
    return advantages


def train(settings: Settings) -> Figures:
    """Run PPO; return the settings, the history, and held-out responses judged before and after."""
    actor: Any = ray.remote(num_cpus=0, num_gpus=settings.device == "cuda")  # cores are shared
    dtype = ray.get(actor(choose_dtype).remote(settings.dtype, settings.device))
    settings = replace(settings, dtype=dtype)
    print(f"computes in {dtype}", flush=True)
    learner = actor(Learner).remote(settings)
    workers = [actor(RolloutWorker).remote(settings, rank) for rank in range(settings.workers)]
    weights = learner.weights.remote()
    test = questions(settings.seed, "test", settings.held_out)
    asked = [(worker, test[rank :: len(workers)]) for rank, worker in enumerate(workers)]
    before = [*chain(*ray.get([w.evaluate.remote(weights, share) for w, share in asked]))]
    ray.get([worker.rollout.remote(weights) for worker in workers])
    history: list[Figures] = []
    for step in range(1, settings.steps + 1):
        started = time.perf_counter()
        rollouts = ray.get([worker.rollout.remote(weights) for worker in workers])
        losses = ray.get(learner.update.remote(*rollouts))
        weights = learner.weights.remote()
        losses["seconds"] = time.perf_counter() - started
        history.append({"step": step, **losses, **summarize(rollouts, settings)})
        print({k: v if k == "version" else round(v, 3) for k, v in history[-1].items()}, flush=True)
    after = [*chain(*ray.get([w.evaluate.remote(weights, share) for w, share in asked]))]
    return {"settings": asdict(settings), "history": history, "before": before, "after": after}


def summarize(rollouts: Sequence[Rollout], settings: Settings) -> Figures:
    scored = [(r, r.rewards) for r in rollouts if r.rewards]
    scores = torch.cat([score(rewards, r.finished, settings) for r, rewards in scored])
    return {
        "reward": scores.nanmean().item(),
        "kl": torch.cat([((r.old - r.reference) * r.kept).sum(1) for r in rollouts]).mean().item(),
        "tokens": torch.cat([r.kept.sum(1) for r in rollouts]).float().mean().item(),
        "unfinished": 1 - torch.cat([r.finished for r in rollouts]).float().mean().item(),
        "waited": max(rollout.waited for rollout in rollouts),
        "version": ", ".join(sorted({v for _, rewards in scored for v in rewards.versions})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    start = "export that the critic starts from; it is deployed if --app does not run"
    parser.add_argument("export", type=at_home, help=start)
    parser.add_argument("--directory", type=local_path, default="runs/ppo", help="for ppo.json")
    for field in fields(Settings)[1:-2]:
        kind = at_home if isinstance(field.default, str) else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    args = vars(parser.parse_args())
    directory, (_, record) = args.pop("directory"), open_model(args["export"])
    settings = Settings(
        **args, reward_mean=record.reward_mean or 0, reward_std=record.reward_std or 1
    )
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    if settings.app not in serve.status().applications:
        gpus = settings.device == "cuda"
        deploy(ServeConfig(export=settings.export, app=settings.app, gpus_per_replica=gpus))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ppo.json").write_text(json.dumps(train(settings), indent=1))


if __name__ == "__main__":
    try:
        main()
    except RayrmError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
