"""What a training run is configured by: TrainConfig and its sections.

Imports neither torch nor Ray, so that --help is instant.
"""

from __future__ import annotations

import datetime
from importlib.util import find_spec
from typing import Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from rayrm.config import (
    Config,
    Location,
    Locations,
    Names,
    Section,
)
from rayrm.training.loss import BradleyTerry, Loss


class ModelSection(Section):
    path: Location = "SmolLM2-135M-Instruct"
    """Base model: a directory, a hub name, or the default that ships as a package."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of embeddings and residuals; attention weights are never dropped."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code that the model's repository ships."""


class LoraSection(Section):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): the head and two thin matrices a layer are trained,
    everything else is frozen; merged into the weights in fp32 before the export, which holds the
    adapter by itself as well."""

    rank: int = Field(0, ge=0)
    """Of the adapters; 0 trains all weights. Above 0 needs the package peft: rayrm[lora]."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of what goes into the adapters."""
    targets: Names = Field(["all-linear"], min_length=1)
    """Names of the layers that get adapters; all-linear: every linear layer of the backbone."""


class DataSection(Section):
    train: Locations = Field(min_length=1)
    """Files, globs, directories or datasets on the hub, of preference records. A dataset on the hub
    is OWNER/NAME[/CONFIGURATION][@SPLIT], by itself split train; behind "hub:" it is one also where
    a local path has that name."""
    eval: Locations = Field([])
    """Held-out records, named as in train (hub: by itself split test): evaluation during the run,
    and the export's reward mean and std."""
    max_length: int = Field(1024, ge=8)
    """Longest row in tokens, prompt and response."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """An over-long row: cut its prompt from the left, or drop it. Responses are never cut."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be read, or a response that the chat template refuses or loses something
    of: stop, or count it and go on."""
    format: Literal["auto", "chat", "text"] = "auto"
    """Rendered by the chat template, or prompt + separator + response + EOS; auto: chat where
    there is a template."""
    separator: str = "\n"
    """Between prompt and response in the text format."""
    chat_template: str | None = None
    """A Jinja chat template to use (and export) instead of the tokenizer's."""
    date: datetime.date | None = None
    """The day that a chat template's clock shows (Llama 3's writes it into the system message); by
    default that of the run's first start. The exported template has it in place of the clock."""
    rule: Literal["auto", "template", "continue"] = "auto"
    """Who writes a response into a chat row: the chat template, or nobody (the prompt is rendered
    with its generation prompt and the response's own text follows). auto: continue where the
    template rewrites answers, as Qwen3's and DeepSeek-R1's do; elsewhere both are the same."""
    thoughts: Literal["keep", "drop"] = "keep"
    """drop: judge a response without the <think>…</think> that it begins with."""

    @property
    def overlong_rows(self) -> Literal["truncate", "error"]:
        """overlong, as scoring names it: a dropped row is one with an error."""
        return "truncate" if self.overlong == "truncate" else "error"


class TrainSection(Section):
    epochs: float = Field(1.0, gt=0)
    """Passes over the training groups; a fraction stops early."""
    groups_per_step: int = Field(16, ge=1)
    """Groups in one optimizer step, over all workers. For pair data: pairs."""
    pairs_per_group: int | None = Field(64, ge=1)
    """Most pairs of one group: a prompt with more is split into several, if possible so that none
    of its responses is in two. null: a prompt is one group whatever its size."""
    tokens_per_micro_batch: int = Field(4096, ge=8)
    """Token budget of a pack; a group above it is computed in pieces, down to one row. Changes
    speed and memory, never the result."""
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; cosine and linear fall to 0."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 turns clipping off."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; weights, head and optimizer state are fp32 either way. auto: bfloat16
    where the first worker's machine multiplies it in hardware, else float32, for the whole run."""
    seed: int = Field(0, ge=0)
    """Of the head's first weights and of the order of groups."""
    eval_every: int = Field(0, ge=0)
    """Optimizer steps between evaluations on held-out groups; 0: only the export is evaluated."""
    checkpoint_every: int = Field(0, ge=0)
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = Field(1, ge=1)
    """How many checkpoints are kept: the latest, or by keep_best the best ones and the latest."""
    keep_best: Literal["accuracy", "loss", "margin"] | None = None
    """The held-out figure that tells the best checkpoints; every checkpoint is then evaluated."""
    export_checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint becomes the export; best: by keep_best, the later one of equals."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the exported backbone; the head is always exported in fp32."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the run's directory."""


class DeepSpeedSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is sharded: nothing, optimizer state, + gradients, + weights."""
    offload_optimizer: bool = False
    """Optimizer state and update in CPU memory. Needs ZeRO 1 to 3."""
    offload_param: bool = False
    """Weights in CPU memory between uses. Needs ZeRO 3."""
    overrides: dict[str, Any] = Field({})
    """Merged into the DeepSpeed config as it is."""


class ClusterSection(Section):
    workers: int = Field(1, ge=1)
    """Ray Train workers, one rank each."""
    gpus_per_worker: float = Field(0, ge=0)
    """0 trains on CPU."""
    cpus_per_worker: float = Field(1, gt=0)
    """Also the number of torch threads of a CPU worker."""
    labels: dict[str, str] = Field({})
    """Ray node labels that workers must land on, e.g. {"rayrm/group": "train"}."""
    retries: int = Field(0, ge=0)
    """How often Ray Train restarts the workers from the latest checkpoint after a failure."""


class TrainConfig(Config):
    """One training run."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """The run: the same name under the same storage resumes."""
    storage: Location = "runs"
    """Where the run's directory lies: a local path, or s3://… or gs://…"""
    data: DataSection
    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    loss: Loss = Field(default_factory=BradleyTerry)
    train: TrainSection = Field(default_factory=TrainSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)

    @model_validator(mode="after")
    def _evaluates_on_something(self) -> Self:
        if self.train.eval_every and not self.data.eval:
            raise ValueError("train.eval_every is set, but data.eval names no held-out records")
        return self

    @model_validator(mode="after")
    def _has_checkpoints_to_compare(self) -> Self:
        train = self.train
        if train.export_checkpoint == "best" and train.keep_best is None:
            raise ValueError(
                "train.export_checkpoint is best: set train.keep_best to the figure that says which"
            )
        evaluated = train.eval_every and train.checkpoint_every % train.eval_every == 0
        if train.keep_best and not (train.checkpoint_every and evaluated):
            raise ValueError(
                "train.keep_best compares the evaluations of checkpoints: set "
                "train.checkpoint_every to a multiple of train.eval_every, both above 0 (they are "
                f"{train.checkpoint_every} and {train.eval_every})"
            )
        return self

    @model_validator(mode="after")
    def _has_peft(self) -> Self:
        if self.lora.rank and find_spec("peft") is None:
            raise ValueError(
                f"lora.rank = {self.lora.rank} needs the package peft, which is not installed: "
                "pip install 'rayrm[lora]', or set lora.rank to 0 to train all weights"
            )
        return self

    @model_validator(mode="after")
    def _can_write_events(self) -> Self:
        if self.train.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(
                "train.tensorboard is set, but tensorboard is not installed here: "
                "pip install 'rayrm[tensorboard]'"
            )
        return self

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> Self:
        zero = self.deepspeed
        if zero.offload_optimizer and zero.zero_stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if zero.offload_param and zero.zero_stage != 3:
            raise ValueError(
                f"deepspeed.offload_param needs deepspeed.zero_stage 3, not {zero.zero_stage}"
            )
        return self
