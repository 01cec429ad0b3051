"""Define the configuration of a training run: TrainConfig and its sections.

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
    """Base model: a directory, a hub name, or the default, which is installed as a package."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability for embeddings and residuals; attention weights are never dropped."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""


class LoraSection(Section):
    """LoRA (Hu et al. 2021, arXiv:2106.09685) trains the head and two low-rank matrices per
    adapted layer, and freezes all other weights. The export holds the adapter merged into the
    weights in fp32, and also as separate files."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains all weights. Above 0 needs the package peft: rayrm[lora]."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability for the input of the adapters."""
    targets: Names = Field(["all-linear"], min_length=1)
    """Names of the layers that get adapters; all-linear: every linear layer of the backbone."""


class DataSection(Section):
    train: Locations = Field(min_length=1)
    """Preference records: files, globs, directories or hub datasets. A hub dataset is
    OWNER/NAME[/CONFIGURATION][@SPLIT], with split train by default; the prefix "hub:" reads the hub
    even if a local path has the same name."""
    eval: Locations = Field([])
    """Held-out records, named as in train (default split of a hub dataset: test). Used for
    evaluation during the run and for the export's reward mean and std."""
    max_length: int = Field(1024, ge=8)
    """Maximum length of a row in tokens, prompt and response together."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """Truncate the prompt of an over-long row from the left, or drop the row. Responses are never
    truncated."""
    on_bad_record: Literal["error", "skip"] = "error"
    """error: stop at a record that cannot be read, or a response that the chat template refuses or
    partly drops. skip: count it and leave it out."""
    format: Literal["auto", "chat", "text"] = "auto"
    """chat: rows are rendered by the chat template. text: prompt + separator + response + EOS.
    auto: chat if the tokenizer has a chat template, else text."""
    separator: str = "\n"
    """Text between prompt and response in the text format."""
    chat_template: str | None = None
    """A Jinja chat template to use (and export) instead of the tokenizer's."""
    date: datetime.date | None = None
    """Date that a chat template's clock shows (Llama 3's writes it into the system message);
    default: the day of the run's first start. The exported template has this date fixed."""
    rule: Literal["auto", "template", "continue"] = "auto"
    """How a response enters a chat row. template: rendered by the chat template. continue: appended
    unchanged to the prompt rendered with its generation prompt. auto: continue if the template
    rewrites answers, as Qwen3's and DeepSeek-R1's do; for other templates both are the same."""
    thoughts: Literal["keep", "drop"] = "keep"
    """drop: score a response without the <think>…</think> block that it begins with."""

    @property
    def overlong_rows(self) -> Literal["truncate", "error"]:
        """Return overlong as the setting of scoring, where "drop" is called "error"."""
        return "truncate" if self.overlong == "truncate" else "error"


class TrainSection(Section):
    epochs: float = Field(1.0, gt=0)
    """Number of passes over the training groups; may be fractional."""
    groups_per_step: int = Field(16, ge=1)
    """Groups in one optimizer step, over all workers. With one pair per prompt, a group is a
    pair."""
    pairs_per_group: int | None = Field(64, ge=1)
    """Maximum number of pairs in a group. A prompt with more is split into several groups, if
    possible without a response in two of them. null: one group per prompt, whatever its size."""
    tokens_per_micro_batch: int = Field(4096, ge=8)
    """Token budget of a pack; a larger group is computed in pieces, down to one row. Changes speed
    and memory, never the result."""
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine and linear fall to 0."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, ge=0)
    """Maximum gradient norm; 0 turns clipping off."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the computation; weights, head and optimizer state are always fp32. auto: bfloat16
    if the first worker's hardware supports it, else float32; the same for the whole run."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights of head and adapters, of dropout, and of the order of groups."""
    eval_every: int = Field(0, ge=0)
    """Optimizer steps between evaluations on held-out groups; 0 evaluates only the export."""
    checkpoint_every: int = Field(0, ge=0)
    """Optimizer steps between checkpoints; 0 writes only one, at the end."""
    keep_checkpoints: int = Field(1, ge=1)
    """Number of checkpoints kept: the latest ones, or with keep_best the best ones and the
    latest."""
    keep_best: Literal["accuracy", "loss", "margin"] | None = None
    """Held-out metric that ranks checkpoints; every checkpoint must then be evaluated."""
    export_checkpoint: Literal["last", "best"] = "last"
    """Checkpoint that is exported. best: the best by keep_best; of equal ones the latest."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the exported backbone; the head is always exported in fp32."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the run's directory."""


class DeepSpeedSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the weights."""
    offload_optimizer: bool = False
    """Keep the optimizer state, and run its update, on the CPU. Needs ZeRO 1, 2 or 3."""
    offload_param: bool = False
    """Keep weights in CPU memory between uses. Needs ZeRO 3."""
    overrides: dict[str, Any] = Field({})
    """Settings merged into the DeepSpeed config unchanged."""


class ClusterSection(Section):
    workers: int = Field(1, ge=1)
    """Number of Ray Train workers; each is one rank."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs per worker; 0 trains on CPU."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs per worker; also the number of torch threads of a CPU worker."""
    labels: dict[str, str] = Field({})
    """Labels that a Ray node must have to run workers, e.g. {"rayrm/group": "train"}."""
    retries: int = Field(0, ge=0)
    """Number of times that Ray Train restarts the workers from the latest checkpoint after a
    failure."""


class TrainConfig(Config):
    """The configuration of one training run."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the run; the same name in the same storage resumes it."""
    storage: Location = "runs"
    """Where the run's directory is created: a local path, or s3://… or gs://…"""
    data: DataSection
    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    loss: Loss = Field(default_factory=BradleyTerry)
    train: TrainSection = Field(default_factory=TrainSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        if self.train.eval_every and not self.data.eval:
            raise ValueError("train.eval_every is set, but data.eval names no held-out records")
        return self

    @model_validator(mode="after")
    def _check_best_checkpoint(self) -> Self:
        train = self.train
        if train.export_checkpoint == "best" and train.keep_best is None:
            raise ValueError(
                "train.export_checkpoint is 'best': set train.keep_best to the metric that decides"
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
    def _check_peft(self) -> Self:
        if self.lora.rank and find_spec("peft") is None:
            raise ValueError(
                f"lora.rank = {self.lora.rank} needs the package peft, which is not installed: "
                "pip install 'rayrm[lora]', or set lora.rank to 0 to train all weights"
            )
        return self

    @model_validator(mode="after")
    def _check_tensorboard(self) -> Self:
        if self.train.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(
                "train.tensorboard is set, but the package tensorboard is not installed: "
                "pip install 'rayrm[tensorboard]'"
            )
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        zero = self.deepspeed
        if zero.offload_optimizer and zero.zero_stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if zero.offload_param and zero.zero_stage != 3:
            raise ValueError(
                f"deepspeed.offload_param needs deepspeed.zero_stage 3, not {zero.zero_stage}"
            )
        return self
