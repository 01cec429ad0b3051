"""Save and load ZeRO shards as Ray Train checkpoints, and merge them into one fp32 state dict.

Every rank writes its shards into a separate directory; Ray Train merges the directories in the
run's storage. Shards omit frozen weights, which are those of the base model. Does not know about
the training loop.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from rayrm.errors import TrainingError

SHARDS_TAG = "shards"


def save_shards(engine: DeepSpeedEngine, directory: str, state: dict[str, Any]) -> None:
    """Write this rank's trained weights, optimizer state and `state` (JSON-like) to directory."""
    # Otherwise shards hold frozen weights in full, which consolidation would drop under ZeRO 1.
    engine.save_checkpoint(
        directory, tag=SHARDS_TAG, client_state={"rayrm": state}, exclude_frozen_parameters=True
    )


def load_shards(engine: DeepSpeedEngine, directory: str, world_size: int) -> dict[str, Any]:
    """Restore this rank's weights and optimizer state, and return the saved `state`.

    Raises TrainingError if the checkpoint was written by a different number of workers.
    """
    written_by = len(list((Path(directory) / SHARDS_TAG).glob("*optim_states.pt"))) or world_size
    if written_by != world_size:
        raise TrainingError(
            f"the checkpoint holds the shards of {written_by} workers, not {world_size}: resume "
            f"with cluster.workers {written_by}, or give this run another name"
        )
    _, client_state = engine.load_checkpoint(directory, tag=SHARDS_TAG, custom_load_fn=load_trained)
    state: dict[str, Any] = client_state["rayrm"]
    return state


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load src into the trained weights and buffers of dst; leave its frozen weights unchanged.

    Raises TrainingError if src lacks one of them, or has one that dst lacks.
    """
    missing, unexpected = dst.load_state_dict(src, strict=False)
    frozen = {name for name, weight in dst.named_parameters() if not weight.requires_grad}
    wrong = sorted({*missing, *unexpected} - frozen)
    if wrong:
        raise TrainingError(
            f"the checkpoint is of another model: it differs in {len(wrong)} weights "
            f"({', '.join(wrong[:5])})"
        )


def consolidate(directory: str) -> dict[str, Tensor]:
    """Return all trained weights in fp32, by name, from the shards of any ZeRO stage."""
    shards = Path(directory) / SHARDS_TAG
    if any(shards.glob("*optim_states.pt")):
        # DeepSpeed prints file names and a progress bar.
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            state = get_fp32_state_dict_from_zero_checkpoint(directory, tag=SHARDS_TAG)
    else:  # ZeRO 0: every rank holds all weights
        file = shards / "mp_rank_00_model_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return {name: tensor.detach() for name, tensor in state.items()}
