"""Train on pairs of ids with TRL's RewardTrainer, in the order of the file.

Runs in a separate environment (jobs/peers/trl.txt) and does not import rayrm. Prints one line of
JSON: loss and seconds of each step, peak resident bytes and, with --score, the trained model's
rewards of every pair, each row scored alone in fp32.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer


class Losses(RewardTrainer):  # type: ignore[misc]  # trl is only in a separate environment
    """A RewardTrainer that records the unrounded loss of each micro-batch."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self.model.training:
            self.losses.append(loss.detach())
        return result


class Clock(TrainerCallback):
    """A callback that records the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.at = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.at = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a sequence-classification directory, head included")
    parser.add_argument("pairs", help="JSONL of chosen_ids and rejected_ids")
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after this many steps")
    parser.add_argument(
        "--score", action="store_true", help="score the pairs with the trained model"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        config = RewardConfig(
            output_dir=directory,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.pairs_per_step // args.micro_batch,
            num_train_epochs=1,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            lr_scheduler_type="cosine",
            max_length=args.max_length,
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
        )
        trainer = Losses(
            model,
            config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[clock],
        )
        trainer.losses = []
        trainer.train()
    micro = args.pairs_per_step // args.micro_batch
    losses = torch.stack(trainer.losses).view(-1, micro).mean(1).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"loss": losses, "seconds": clock.seconds, "peak_bytes": peak}
    if args.score:
        figures["rewards"] = [
            [score(model, p[k]) for k in ("chosen_ids", "rejected_ids")] for p in pairs
        ]
    print(json.dumps(figures), file=sys.__stdout__)


@torch.no_grad()
def score(model: Any, ids: list[int]) -> float:
    model.eval()
    return float(model(torch.tensor([ids], device=model.device)).logits)


if __name__ == "__main__":
    main()
