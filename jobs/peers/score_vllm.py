"""Score rows of ids with vLLM's pooling runner, step by step.

Runs in a separate environment (jobs/peers/vllm.txt) and does not import rayrm. For each step it
reads a line {"rows": FILE.json} and answers {"rewards": […], "seconds": …, "peak_bytes": …}. The
prefix cache is on, so that a group shares its prompt, and is reset before each step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a sequence-classification directory")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # keep vLLM's output apart from the answers
    if args.device == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm.config import PoolerConfig

    llm = LLM(
        args.model,
        runner="pooling",
        dtype="bfloat16",
        max_model_len=args.max_length,
        enable_prefix_caching=True,
        # Raw rewards: no sigmoid over the single label.
        pooler_config=PoolerConfig(use_activation=False),
        disable_log_stats=True,
    )
    for line in sys.stdin:
        rows = json.loads(Path(json.loads(line)["rows"]).read_text())
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.classify([{"prompt_token_ids": ids} for ids in rows], use_tqdm=False)
        seconds = time.perf_counter() - started
        rewards = [output.outputs.probs[0] for output in outputs]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"rewards": rewards, "seconds": seconds, "peak_bytes": peak}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
