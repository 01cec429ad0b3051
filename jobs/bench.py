"""Benchmark rayrm against TRL, vLLM and transformers on the same work, and print ratios.

    jobs/bench.py [WORKLOAD …] [--pairs FILE] [--ranked FILE] [--repeats 3] [--device cuda]

Each side runs in a separate process, so that its peak memory is measured alone. The sides take
turns, and a figure is the median of the repeats. The scripts of the peers are in jobs/peers/;
`make bench` creates a separate environment for those that need one. A ratio is given only if the
peer's rewards or losses agree with rayrm's; a peer that is missing or fails is reported as absent.
Prints tables, and writes figures.json and bench.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from ray import serve
from transformers import AutoConfig

from rayrm import RewardClient, RewardModel, ServeConfig, TrainConfig, deploy, fit
from rayrm.config import at_home, local_path
from rayrm.data.records import read_groups
from rayrm.data.sample import generate
from rayrm.data.sources import open_sources
from rayrm.model.net import RewardNet, load_base, pack_tensors, save_weights
from rayrm.packing import Pack, TokenGroup, share_packs
from rayrm.rows import Rewards, Row
from rayrm.serving import application
from rayrm.serving import operations as service
from rayrm.serving.callers import this_caller
from rayrm.serving.chunk import Chunk
from rayrm.serving.chunk import Step as ChunkStep
from rayrm.serving.replica import Replica
from rayrm.serving.ticket import Ticket
from rayrm.serving.transports.handle import REPLICA
from rayrm.training.dataset import PreferenceData, PreferenceGroup, encode_groups
from rayrm.training.loop import collate_pairs
from rayrm.training.loss import BradleyTerry, bradley_terry
from rayrm.training.setup import load_model

HERE = Path(__file__).parent
BASE = "SmolLM2-135M-Instruct"
PYTHON = {peer: HERE.parent / f".venv-{peer}" / "bin" / "python" for peer in ("trl", "vllm")}
# Minimum correlation of rewards that agree. In bf16 they differ by some hundredths of a standard
# deviation; the reward of a wrong row differs by a whole one.
AGREE = 0.99
# Maximum difference of the losses before any update: bf16 moves a mean over 6 to 16 pairs by about
# 0.01.
SAME_LOSS = 0.03
TOKENS_PER_MICRO_BATCH = 2048
TOKENS_OF_CEILING = 2048
STEPS_OF_A_FIT = 5
SLEEPING_TOKENS_PER_S = 20_000

Ids = list[int]
Figures = dict[str, Any]


@dataclass
class Side:
    """A process that answers each question with a line of JSON, and its answers so far."""

    name: str
    process: subprocess.Popen[str]
    answers: list[Figures] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, python: Path, arguments: Sequence[object], directory: Path) -> Side:
        command = [str(python), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        log = open(directory / f"{name}.log", "w")  # noqa: SIM115 lives as long as the process
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment
        )
        return cls(name, process)

    def ask(self, question: Figures) -> bool:
        """Send a question and store the answer; return False if the process has ended."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return False
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print other lines
                self.answers.append(json.loads(line))
                return True
        return False

    def seconds(self) -> float:
        return float(statistics.median(answer["seconds"] for answer in self.answers))


# Scoring


@dataclass(frozen=True)
class Step:
    """Rows of a scoring workload as token ids.

    prompts: the prompt of each row. rows: prompt and response of each row.
    """

    name: str
    prompts: list[Ids]
    rows: list[Ids]

    @property
    def unique_tokens(self) -> int:
        return sum(group.tokens for group in self.groups())

    def groups(self) -> list[TokenGroup]:
        families: dict[tuple[int, ...], list[Ids]] = {}
        for prompt, row in zip(self.prompts, self.rows, strict=True):
            families.setdefault(tuple(prompt), []).append(row)
        return [
            TokenGroup.from_rows([np.array(row, dtype=np.int32) for row in rows])
            for rows in families.values()
        ]

    def save(self, directory: Path) -> Figures:
        """Write the rows to files, and return the question to a side: the files' paths."""
        question = {}
        for key, value in (("rows", self.rows), ("prompts", self.prompts)):
            file = directory / f"{self.name}.{key}.json"
            file.write_text(json.dumps(value))
            question[key] = str(file.resolve())
        return question

    def first(self, rows: int) -> Step:
        return Step("warm-up", self.prompts[:rows], self.rows[:rows])


def grpo(name: str, groups: int, responses: int, vocabulary: int) -> Step:
    """Return random ids with lognormal lengths: prompts around 256 tokens, responses around 128."""
    rng = np.random.default_rng(7)
    prompts, rows = [], []
    for _ in range(groups):
        prompt = rng.integers(0, vocabulary, int(max(16, rng.lognormal(np.log(256), 0.5)))).tolist()
        for _ in range(responses):
            length = int(max(8, rng.lognormal(np.log(128), 0.6)))
            prompts.append(prompt)
            rows.append([*prompt, *rng.integers(0, vocabulary, length).tolist()])
    return Step(name, prompts, rows)


def long_prompts(name: str, groups: int, responses: int, vocabulary: int) -> Step:
    """Return random ids: prompts of 1024 tokens, responses of 256."""
    rng = np.random.default_rng(7)
    prompts, rows = [], []
    for _ in range(groups):
        prompt = rng.integers(0, vocabulary, 1024).tolist()
        for _ in range(responses):
            prompts.append(prompt)
            rows.append([*prompt, *rng.integers(0, vocabulary, 256).tolist()])
    return Step(name, prompts, rows)


STEPS = {
    "score-grpo-16x8": lambda v: grpo("score-grpo-16x8", 16, 8, v),
    "score-grpo-64x8": lambda v: grpo("score-grpo-64x8", 64, 8, v),
    "score-single-64": lambda v: grpo("score-single-64", 64, 1, v),
    "score-long-4x16": lambda v: long_prompts("score-long-4x16", 4, 16, v),
}


def bench_scoring(names: Sequence[str], model: Path, args: argparse.Namespace) -> Figures:
    sides = [
        Side.start(
            "rayrm", Path(sys.executable), [__file__, "--side", "score", model], args.directory
        ),
        Side.start("vllm", PYTHON["vllm"], [HERE / "peers/score_vllm.py", model], args.directory)
        if PYTHON["vllm"].exists()
        else None,
        Side.start(
            "padded", Path(sys.executable), [HERE / "peers/score_padded.py", model], args.directory
        ),
    ]
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    figures = {}
    for name in names:
        step = STEPS[name](vocabulary)
        warm_up, question = (s.save(args.directory) for s in (step.first(8), step))
        present = [side for side in sides if side and side.ask(warm_up)]
        for side in present:
            side.answers.clear()
        for _ in range(args.repeats):
            present = [side for side in present if side.ask(question)]
        ceiling = matrix_products(model, step.unique_tokens, passes=1)
        figures[name] = scoring_figures(step, present, ceiling)
        show(name, figures[name])
    for side in filter(None, sides):
        side.process.kill()
    return figures


def scoring_figures(step: Step, present: Sequence[Side], ceiling: float) -> Figures:
    ours = present[0]
    assert ours.name == "rayrm", "rayrm itself did not answer: see rayrm.log"
    rewards = ours.answers[-1]["rewards"]
    sides = {}
    for side in present:
        correlation = float(np.corrcoef(rewards, side.answers[-1]["rewards"])[0, 1])
        sides[side.name] = {
            "per_second": len(step.rows) / side.seconds(),
            "seconds": [answer["seconds"] for answer in side.answers],
            "ratio": side.seconds() / ours.seconds() if correlation > AGREE else None,
            "agreement": correlation,
            "of_ceiling": ceiling / side.seconds(),
            "peak_bytes": side.answers[-1]["peak_bytes"],
        }
    return {
        "unit": "rewards",
        "rows": len(step.rows),
        "tokens": sum(map(len, step.rows)),
        "unique_tokens": step.unique_tokens,
        "sides": sides,
    }


def matrix_products(model: Path, tokens: int, passes: int) -> float:
    """Return the seconds that the backbone's matrix products alone take for `tokens` in bf16.

    passes: 1 for a forward pass, 3 for a forward and a backward pass.
    """
    c = AutoConfig.from_pretrained(model)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    width, inner = c.hidden_size, c.intermediate_size
    heads, keys = c.num_attention_heads * head, c.num_key_value_heads * head
    shapes = [(width, heads + 2 * keys), (heads, width), (width, 2 * inner), (inner, width)]
    torch.set_num_threads(os.cpu_count() or 1)
    weights = [torch.randn(o, i).bfloat16() for i, o in shapes]
    inputs = [torch.randn(TOKENS_OF_CEILING, i).bfloat16() for i, _ in shapes]

    def layer() -> float:
        started = time.perf_counter()
        for x, w in zip(inputs, weights, strict=True):
            x @ w.mT
        return time.perf_counter() - started

    layer()
    seconds = statistics.median(layer() for _ in range(15))
    return float(seconds * c.num_hidden_layers * tokens / TOKENS_OF_CEILING * passes)


def side_score(model: str) -> None:
    """Score with RewardModel, in a separate process like the peers."""
    torch.set_num_threads(os.cpu_count() or 1)
    reward_model = RewardModel.load(model, "cpu", "bfloat16", max_length=2048)
    for line in sys.stdin:
        files = json.loads(line)
        rows, prompts = (json.loads(Path(files[key]).read_text()) for key in ("rows", "prompts"))
        responses = [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]
        started = time.perf_counter()
        rewards = reward_model.score(prompts, responses).values
        answer(seconds=time.perf_counter() - started, rewards=rewards.tolist())


# Training


def bench_training(
    name: str, file: str | None, per_step: int, start: Path, args: argparse.Namespace
) -> Figures:
    """Time optimizer steps of per_step groups; TRL pads the same pairs."""
    steps = 3
    data = preferences(file, name == "train-ranked", start, args.directory)
    groups = alike(data, ranked=name == "train-ranked")[: steps * per_step]
    ours, theirs = save_groups(groups, args.directory / name)
    pairs = [sum(g.pairs for g in groups[i * per_step : (i + 1) * per_step]) for i in range(steps)]
    trl = [PYTHON["trl"], HERE / "peers/train_trl.py", start, theirs, "--max-length", 2048]
    settings = {
        b: ["--pairs-per-step", pairs[0], "--micro-batch", b]
        for b in (1, 2, 4, 8)
        if pairs[0] % b == 0
    }
    fastest: int | None = None
    tried: dict[int, Figures | None] = {}
    if PYTHON["trl"].exists():
        tried = {
            b: run_once([*trl, *words, "--max-steps", 2], args.directory / f"{name}-trl-{b}.log")
            for b, words in settings.items()
        }
        rates = {b: t["seconds"][-1] for b, t in tried.items() if t}
        fastest = min(rates, key=lambda b: rates[b], default=None)
    rayrm = [sys.executable, __file__, "--side", "train", start, ours, str(per_step)]
    runs: dict[str, list[Figures]] = {"rayrm": [], "trl": []}
    for _ in range(args.repeats):
        if run := run_once(rayrm, args.directory / f"{name}-rayrm.log"):
            runs["rayrm"].append(run)
        if fastest and (run := run_once([*trl, *settings[fastest]], args.directory / "trl.log")):
            runs["trl"].append(run)
    tokens = sum(group.tokens.tokens for group in groups[per_step:])
    figures = training_figures(runs, pairs, matrix_products(start, tokens, passes=3))
    figures |= {"fingerprint": data.fingerprint, "micro_batch_of_trl": fastest}
    figures["trl_by_micro_batch"] = {
        b: t and {"seconds": t["seconds"][-1], "peak_bytes": t["peak_bytes"]}
        for b, t in tried.items()
    }
    show(name, figures)
    return figures


def alike(data: PreferenceData, ranked: bool) -> list[PreferenceGroup]:
    """Return the groups of one pair, or if `ranked` those of the most common larger number.

    TRL's steps then all have the same number of pairs.
    """
    groups = [data[i] for i in range(len(data))]
    counts = Counter(group.pairs for group in groups if (group.pairs > 1) == ranked)
    if not counts:
        sys.exit(f"no group of {'several pairs' if ranked else 'one pair'} in the data")
    usual = counts.most_common(1)[0][0]
    return [group for group in groups if group.pairs == usual]


def training_figures(runs: dict[str, list[Figures]], pairs: list[int], ceiling: float) -> Figures:
    """Return the figures of each side; the first step of a run is warm-up and not counted."""
    sides = {}
    per_run = {name: [sum(run["seconds"][1:]) for run in r] for name, r in runs.items()}
    ours = statistics.median(per_run["rayrm"])
    for name, seconds in per_run.items():
        if not seconds:
            continue
        median = statistics.median(seconds)
        difference = abs(runs[name][-1]["loss"][0] - runs["rayrm"][-1]["loss"][0])
        sides[name] = {
            "per_second": sum(pairs[1:]) / median,
            "seconds": seconds,
            "ratio": median / ours if difference < SAME_LOSS else None,
            "agreement": difference,
            "of_ceiling": ceiling / median,
            "peak_bytes": max(run["peak_bytes"] for run in runs[name]),
        }
    return {"unit": "pairs", "pairs_per_step": pairs[0], "sides": sides}


def preferences(file: str | None, ranked: bool, start: Path, directory: Path) -> PreferenceData:
    """Encode a file of preferences, by default generated ones.

    ranked: generate all pairs of a prompt instead of one.
    """
    if file is None:
        records, _ = generate(0, 200, 0)
        if not ranked:
            first = {record["prompt"][0]["content"]: record for record in reversed(records)}
            records = list(first.values())
        generated = directory / "pairs.jsonl"
        generated.write_text("".join(json.dumps(record) + "\n" for record in records))
        file = str(generated)
    config = TrainConfig(
        name="bench", model={"path": str(start)}, data={"train": file, "max_length": 2048}
    )
    _, template = load_model(config)
    groups, _ = read_groups(file)
    return encode_groups(groups[:2000], template, "error")


def save_groups(groups: Sequence[PreferenceGroup], path: Path) -> tuple[Path, Path]:
    """Write the groups as rows and pairs of indices (rayrm), and as the rows of each pair (TRL)."""
    ours, theirs = path.with_suffix(".groups.jsonl"), path.with_suffix(".pairs.jsonl")
    with ours.open("w") as grouped, theirs.open("w") as paired:
        for group in groups:
            rows = [row.tolist() for row in group.tokens.rows]
            chosen, rejected = group.chosen.tolist(), group.rejected.tolist()
            print(json.dumps({"rows": rows, "chosen": chosen, "rejected": rejected}), file=grouped)
            for c, r in zip(chosen, rejected, strict=True):
                print(json.dumps({"chosen_ids": rows[c], "rejected_ids": rows[r]}), file=paired)
    return ours, theirs


def run_once(command: Sequence[object], log: Path) -> Figures | None:
    """Run a program and return the JSON in its last line, None if it fails."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with log.open("w") as errors:
        run = subprocess.run(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    return None if run.returncode else json.loads(run.stdout.splitlines()[-1])


def side_train(start: str, file: str, per_step: str) -> None:
    """Train in a bare loop: a rank's packs, loss and optimizer, without Ray and DeepSpeed."""
    torch.set_num_threads(os.cpu_count() or 1)
    model, _, _ = load_base(start)
    net = RewardNet(model, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    groups = [read_group(json.loads(line)) for line in Path(file).read_text().splitlines()]
    losses, seconds = [], []
    for at in range(0, len(groups), int(per_step)):
        started = time.perf_counter()
        losses.append(bare_step(net, optimizer, groups[at : at + int(per_step)]))
        seconds.append(time.perf_counter() - started)
    answer(loss=losses, seconds=seconds)


def bare_step(
    net: RewardNet, optimizer: torch.optim.Optimizer, groups: Sequence[PreferenceGroup]
) -> float:
    total = 0.0
    pairs = sum(group.pairs for group in groups)
    costs = [group.tokens.tokens for group in groups]
    for plan in share_packs(costs, 1, TOKENS_PER_MICRO_BATCH)[0]:
        part = [groups[i] for i in plan]
        pack = Pack.from_groups([group.tokens for group in part])
        rewards = net(*pack_tensors(pack, torch.device("cpu")))
        compared = collate_pairs(part, [1.0] * len(part), torch.device("cpu"))
        loss = bradley_terry(rewards, compared, BradleyTerry()) / pairs
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def read_group(record: Figures) -> PreferenceGroup:
    chosen, rejected = (np.array(record[key], dtype=np.int64) for key in ("chosen", "rejected"))
    zeros = np.zeros(len(chosen), dtype=np.float32)
    rows = [np.array(row, dtype=np.int32) for row in record["rows"]]
    choice = np.arange(len(chosen), dtype=np.int64)
    tokens = TokenGroup.from_rows(rows)
    n = len(chosen)
    return PreferenceGroup(
        tokens, chosen, rejected, zeros, zeros + 1, choice, zeros > 0, n, n, "", ""
    )


# Ray Train and ZeRO


def bench_zero(start: Path, args: argparse.Namespace) -> Figures:
    """Time the bare loop, one Ray Train worker, and two workers with ZeRO 1 to 3, on equal batches.

    A run takes the same pairs in another order, so the mean over all its steps is compared.
    """
    file = head_of(args.pairs, 16 * STEPS_OF_A_FIT, args.directory) if args.pairs else None
    data = preferences(file, False, start, args.directory)
    groups = alike(data, ranked=False)
    ours, _ = save_groups(groups, args.directory / "train-zero")
    bare = [sys.executable, __file__, "--side", "train", start, ours, "16"]
    variants = {
        "one worker": (1, 0),
        "ZeRO-1 x 2": (2, 1),
        "ZeRO-2 x 2": (2, 2),
        "ZeRO-3 x 2": (2, 3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("bare loop", *variants)}
    for repeat in range(args.repeats):
        if run := run_once(bare, args.directory / "bare.log"):
            seconds["bare loop"].append(statistics.fmean(run["seconds"]))
        for name, (workers, stage) in variants.items():
            command = [sys.executable, __file__, "--side", "fit", start, file or ""]
            command += [
                str(workers),
                str(stage),
                str(args.directory / f"fit-{repeat}-{workers}-{stage}"),
            ]
            if run := run_once(command, args.directory / f"fit-{workers}-{stage}.log"):
                seconds[name].append(statistics.fmean(run["seconds"]))
    figures: Figures = {
        name: {"seconds_per_step": statistics.median(s), "seconds": s}
        for name, s in seconds.items()
        if s
    }
    base = figures["bare loop"]["seconds_per_step"]
    print("\ntrain-zero: seconds of a step of 16 pairs")
    for name, figure in figures.items():
        figure["of_bare_loop"] = figure["seconds_per_step"] / base
        print(
            f"  {name:12}{figure['seconds_per_step']:8.2f}{figure['of_bare_loop']:8.2f} x bare loop"
        )
    return figures


def head_of(file: str, records: int, directory: Path) -> str:
    """Write the first `records` of a file to another file, and return its path."""
    [(_, rows)] = open_sources(file, "train", [])
    head = directory / "head.jsonl"
    head.write_text("".join(json.dumps(row) + "\n" for _, row in islice(rows, records)))
    return str(head)


def side_fit(start: str, file: str, workers: str, stage: str, run: str) -> None:
    """Train with `fit` on the same pairs."""
    shutil.rmtree(run, ignore_errors=True)
    config = TrainConfig(
        name="fit",
        storage=run,
        model={"path": start},
        data={"train": file or str(Path(run).parent / "pairs.jsonl"), "max_length": 2048},
        train={"groups_per_step": 16, "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH},
        deepspeed={"zero_stage": int(stage)},
        cluster={"workers": int(workers), "cpus_per_worker": (os.cpu_count() or 2) // int(workers)},
    )
    ray.init(num_cpus=os.cpu_count(), log_to_driver=False, logging_level=logging.ERROR)
    result = fit(config)
    answer(seconds=[step["seconds"] for step in result.history])


# Deterministic scoring


def bench_strict(start: Path, args: argparse.Namespace) -> Figures:
    """Measure what `deterministic` costs on score-grpo-16x8, and count rewards that change."""
    command = [sys.executable, __file__, "--side", "strict", start, str(args.repeats)]
    figures = run_once(command, args.directory / "strict.log")
    if figures is None:
        print("\nstrict  failed: see strict.log")
        return {}
    loose, strict = (statistics.median(figures["seconds"][m]) for m in ("loose", "strict"))
    figures["ratio"] = strict / loose
    print(
        f"\nstrict  deterministic takes {figures['ratio']:.2f} x the seconds ({strict:.1f} instead "
        f"of {loose:.1f}); with rows reordered, the bits of {figures['moved']['strict']} of "
        f"{figures['rows']} rewards change, without deterministic {figures['moved']['loose']}",
        flush=True,
    )
    return figures


def side_strict(start: str, repeats: str) -> None:
    """Score the same rows in a new order each time, with and without `deterministic`."""
    torch.set_num_threads(os.cpu_count() or 1)
    models = {
        name: RewardModel.load(start, "cpu", "bfloat16", max_length=2048, deterministic=mode)
        for name, mode in (("loose", False), ("strict", True))
    }
    config = models["strict"].net.model.config
    step = STEPS["score-grpo-16x8"](config.vocab_size)
    made_by = models["strict"].template.spec.fingerprint
    responses = [row[len(p) :] for row, p in zip(step.rows, step.prompts, strict=True)]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    values: dict[str, list[Any]] = {name: [] for name in models}
    for model in models.values():
        model.score(step.prompts[:8], responses[:8], tokenizer=made_by)
    rng = np.random.default_rng(0)
    for _ in range(max(2, int(repeats))):
        order = rng.permutation(len(responses))
        prompts, shuffled = [step.prompts[i] for i in order], [responses[i] for i in order]
        for name, model in models.items():
            started = time.perf_counter()
            rewards = model.score(prompts, shuffled, tokenizer=made_by)
            seconds[name].append(time.perf_counter() - started)
            values[name].append(rewards.values[order.argsort()])
    moved = {name: int((np.ptp(found, axis=0) > 0).sum()) for name, found in values.items()}
    answer(seconds=seconds, rows=len(responses), moved=moved)


# Serving


def bench_serving(start: Path, args: argparse.Namespace) -> Figures:
    """Time a step through RewardClient and one replica, and in process, alternately."""
    command = [sys.executable, __file__, "--side", "serve", start, str(args.repeats)]
    figures = run_once(command, args.directory / "serve.log")
    if figures is None:
        print("\nserve-path  failed: see serve.log")
        return {}
    medians = {key: statistics.median(values) for key, values in figures["served"].items()}
    figures["share"] = medians["in process"] / medians["one replica"]
    print(
        f"\nserve-path  one replica: {figures['share']:.2f} of the rewards/s in process; 1024 rows "
        f"of 1000 ids to a stub in chunks: {1000 * medians['stub']:.0f} ms; with one call per row: "
        f"{medians['stub, one call per row'] / medians['stub']:.0f} x that"
    )
    return figures


def side_serve(start: str, repeats: str) -> None:
    ray.init(num_cpus=os.cpu_count(), log_to_driver=False, logging_level=logging.ERROR)
    cpus = os.cpu_count() or 1
    torch.set_num_threads(cpus)
    model = RewardModel.load(start, "cpu", "bfloat16", max_length=2048)
    deploy(
        ServeConfig(
            export=start,
            dtype="bfloat16",
            max_length=2048,
            cpus_per_replica=cpus,
            hang_timeout_s=600,
            cache_bytes=0,  # the same rows are sent several times
        )
    )
    step = grpo("serve-path", 8, 8, model.net.model.config.vocab_size)
    responses = [row[len(p) :] for row, p in zip(step.rows, step.prompts, strict=True)]
    client, made_by = RewardClient(), model.template.spec.fingerprint
    served: dict[str, list[float]] = {"in process": [], "one replica": []}
    for scorer in (model, client):
        scorer.score(step.prompts[:8], responses[:8], tokenizer=made_by)
    for _ in range(int(repeats)):
        for scorer, name in ((model, "in process"), (client, "one replica")):
            started = time.perf_counter()
            rewards = scorer.score(step.prompts, responses, tokenizer=made_by)
            served[name].append(time.perf_counter() - started)
            assert np.isfinite(rewards.values).all()
    serve.shutdown()
    served |= stub_seconds(int(repeats))
    answer(served=served)


class Sleeping(Replica):
    """A replica whose model sleeps instead of computing."""

    def _load(self, config: ServeConfig) -> RewardModel:
        model = super()._load(config)

        def sleep(groups: Sequence[TokenGroup], **_: Any) -> list[Any]:
            time.sleep(sum(group.tokens for group in groups) / SLEEPING_TOKENS_PER_S)
            return [np.zeros(len(group.suffixes), dtype=np.float32) for group in groups]

        model.score_groups = sleep  # type: ignore[method-assign]
        return model


def bench_replicas(start: Path, args: argparse.Namespace) -> Figures:
    """Time equal work per replica: up to two replicas that compute, up to eight that sleep."""
    command = [sys.executable, __file__, "--side", "replicas", start, str(args.repeats)]
    figures = run_once(command, args.directory / "replicas.log")
    if figures is None:
        print("\nserve-replicas  failed: see replicas.log")
        return {}
    for kind, seconds in figures["seconds"].items():
        medians = {int(n): statistics.median(s) for n, s in seconds.items()}
        speedups = {n: n * medians[1] / s for n, s in medians.items()}
        figures[kind] = speedups
        line = ", ".join(f"{n}: {speedup:.2f} x" for n, speedup in speedups.items())
        print(f"\nserve-replicas  {kind}  {line} the rewards/s of one", flush=True)
    return figures


def side_replicas(start: str, repeats: str) -> None:
    ray.init(num_cpus=8, log_to_driver=False, logging_level=logging.ERROR)
    seconds: dict[str, dict[int, list[float]]] = {}
    for kind, counts, groups in (("compute", (1, 2), 8), ("sleep", (1, 2, 4, 8), 160)):
        application.Replica = Sleeping if kind == "sleep" else Replica  # type: ignore[attr-defined]
        seconds[kind] = {n: [] for n in counts}
        for n in counts:
            config = {"dtype": "bfloat16", "max_length": 2048, "cache_bytes": 0}
            service.deploy(
                ServeConfig(export=start, app=kind, replicas=n, hang_timeout_s=600, **config)
            )
            step = grpo("replicas", n * groups, 8, 49152)
            responses = [row[len(p) :] for row, p in zip(step.rows, step.prompts, strict=True)]
            client = RewardClient(kind)
            with warnings.catch_warnings(action="ignore"):
                client.score(step.prompts[:64], responses[:64])
                for _ in range(int(repeats)):
                    started = time.perf_counter()
                    client.score(step.prompts, responses)
                    seconds[kind][n].append(time.perf_counter() - started)
        serve.delete(kind)
    answer(seconds=seconds)


class Stub:
    """A replica that returns zeros at once."""

    async def score(self, chunk: Chunk, ticket: Ticket) -> dict[str, Rewards]:
        n = len(chunk.rows())
        none, zeros = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.float32)
        rewards = Rewards(zeros, [None] * n, none, none, ["stub"] * n)
        return dict.fromkeys(ticket.rewards, rewards)


def stub_seconds(repeats: int) -> dict[str, list[float]]:
    """Time sending 1024 rows of 1000 ids to a Stub: the overhead of the transport."""
    stub: Any = serve.deployment(name=REPLICA, max_ongoing_requests=10_000)(Stub)
    serve.run(stub.bind(), name="stub", route_prefix=None)
    client = RewardClient("stub")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 49152, 800).astype(np.int32) for _ in range(1024)]
    responses = [rng.integers(0, 49152, 200).astype(np.int32) for _ in range(1024)]
    handle = serve.get_app_handle("stub")
    ticket = Ticket("step", "0", this_caller())
    client.score(prompts[:8], responses[:8], tokenizer="stub")
    seconds: dict[str, list[float]] = {"stub": [], "stub, one call per row": []}
    for _ in range(5 * repeats):  # each takes milliseconds, and the first ones hit a cold process
        started = time.perf_counter()
        client.score(prompts, responses, tokenizer="stub")
        seconds["stub"].append(time.perf_counter() - started)
        started = time.perf_counter()
        calls = [
            handle.score.remote(single_row(p, r), ticket)
            for p, r in zip(prompts, responses, strict=True)
        ]
        for call in calls:
            call.result()
        seconds["stub, one call per row"].append(time.perf_counter() - started)
    ray.shutdown()
    return seconds


def single_row(prompt: Any, response: Any) -> Chunk:
    step = ChunkStep([Row(prompt, response)])
    return step.chunk(step.cut(1, 0)[0], "stub")


# A GPU


def bench_on_gpu(args: argparse.Namespace) -> None:
    """Run jobs/bench_gpu.py on the rows of score-grpo-16x8."""
    question = STEPS["score-grpo-16x8"](49152).save(args.directory)
    figures = args.directory / "figures-gpu.json"
    command = [
        sys.executable,
        HERE / "bench_gpu.py",
        question["rows"],
        question["prompts"],
        figures,
    ]
    command += ["--repeats", str(args.repeats)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    subprocess.run(command, env=environment, check=True)


# Shared by all sides and workloads


def answer(**figures: Any) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures | {"peak_bytes": peak}), flush=True)


def write_start(base: str, directory: Path) -> Path:
    """Write the model of all sides, the base with a new head in fp32; they round it to bf16."""
    start = directory / "start"
    model, tokenizer, _ = load_base(base)
    save_weights(model, model.state_dict(), start, torch.float32)
    tokenizer.save_pretrained(start)
    return start.resolve()


def show(name: str, figures: Figures) -> None:
    print(
        f"\n{name:20}{'ratio':>8}{figures['unit'] + '/s':>12}{'of ceiling':>12}{'agree':>9}"
        f"{'peak GB':>9}"
    )
    for side in ("rayrm", "vllm", "padded") if figures["unit"] == "rewards" else ("rayrm", "trl"):
        if side not in figures["sides"]:
            print(f"  {side:18}{'absent':>8}")
            continue
        f = figures["sides"][side]
        ratio = "differs" if f["ratio"] is None else f"{f['ratio']:.2f} x"
        print(
            f"  {side:18}{ratio:>8}{f['per_second']:>12.2f}{f['of_ceiling']:>12.2f}"
            f"{f['agreement']:>9.4f}{f['peak_bytes'] / 2**30:>9.2f}",
            flush=True,
        )


def plot(workloads: Figures, file: Path) -> None:
    bars = [
        (name, side, f["sides"][side]["ratio"])
        for name, f in workloads.items()
        for side in f.get("sides", {})
        if side != "rayrm" and f["sides"][side]["ratio"]
    ]
    if not bars:
        return
    figure = Figure(figsize=(8, 0.5 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{name} against {side}" for name, side, _ in bars]
    drawn = axes.barh(labels, [ratio for *_, ratio in bars], color="#4878a8")
    axes.bar_label(drawn, fmt="%.2f x", padding=3)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to the peer, in the same run")
    figure.savefig(file, dpi=120)


TRAINING = {"train-pairs": 16, "train-ranked": 1}
WORKLOADS = [*STEPS, *TRAINING, "train-zero", "strict", "serve-path", "serve-replicas"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--model", type=at_home, default=BASE, help="base model of all sides")
    parser.add_argument(
        "--pairs", type=at_home, help="preference file for train-pairs and train-zero"
    )
    parser.add_argument("--ranked", type=at_home, help="ranking file for train-ranked")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=local_path, default=Path("runs/bench"))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: run bench_gpu.py"
    )
    args = parser.parse_args()
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(
            f"unknown workload {', '.join(sorted(unknown))}; known: {', '.join(WORKLOADS)}"
        )
    names = args.workloads or WORKLOADS
    args.directory.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        bench_on_gpu(args)
        return
    start = write_start(args.model, args.directory)
    workloads: Figures = {}
    if scoring := [name for name in names if name in STEPS]:
        workloads |= bench_scoring(scoring, start, args)
    for name in set(names) & TRAINING.keys():
        file = args.ranked if name == "train-ranked" else args.pairs
        workloads[name] = bench_training(name, file, TRAINING[name], start, args)
    if "train-zero" in names:
        workloads["train-zero"] = bench_zero(start, args)
    if "strict" in names:
        workloads["strict"] = bench_strict(start, args)
    if "serve-path" in names:
        workloads["serve-path"] = bench_serving(start, args)
    if "serve-replicas" in names:
        workloads["serve-replicas"] = bench_replicas(start, args)
    result = {"machine": platform.processor(), "cores": os.cpu_count(), "workloads": workloads}
    (args.directory / "figures.json").write_text(json.dumps(result, indent=2))
    plot(workloads, args.directory / "bench.png")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--side"]:
        sides = {
            "score": side_score,
            "train": side_train,
            "fit": side_fit,
            "strict": side_strict,
            "serve": side_serve,
            "replicas": side_replicas,
        }
        sides[sys.argv[2]](*sys.argv[3:])  # type: ignore[operator]
    else:
        main()
