"""Score rows of ids with transformers in padded batches, in the order given, as most trainers do.

Does not import rayrm. For each step it reads a line {"rows": FILE.json} and answers
{"rewards": […], "seconds": …, "peak_bytes": …}.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a sequence-classification directory")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    )
    model = model.to(args.device).eval()
    for line in sys.stdin:
        rows = json.loads(Path(json.loads(line)["rows"]).read_text())
        started = time.perf_counter()
        rewards = [
            r
            for at in range(0, len(rows), args.batch)
            for r in score(model, rows[at : at + args.batch])
        ]
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rewards": rewards, "seconds": seconds, "peak_bytes": peak}), flush=True)


@torch.inference_mode()
def score(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    """Return the rewards of a batch, padded on the right."""
    pad = model.config.pad_token_id
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    lengths = torch.tensor(list(map(len, rows)))
    mask = (torch.arange(longest) < lengths[:, None]).long()
    logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits
    rewards: list[float] = logits[:, 0].float().tolist()
    return rewards


if __name__ == "__main__":
    main()
