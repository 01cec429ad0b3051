"""What a run is configured by: Pydantic sections, two levels deep, from YAML and dotted overrides.

A wrong key or value is a ConfigError that names the key, the value and what is allowed, before any
model loads. Imports neither torch nor Ray, so that --help is instant.
"""

from __future__ import annotations

import datetime
import difflib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from rayrm.errors import ConfigError

# What the reward of a model or an application is called beside those of its adapters.
OWN = "default"


def at_home(path: str) -> str:
    """A path from ~, the home of whoever says it; URIs, hub names and other paths as they are."""
    return os.path.expanduser(path)


def local_path(path: str | Path) -> Path:
    """A path on this machine's disks, as a user gives it."""
    return Path(at_home(str(path)))


Names = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Location = Annotated[str, AfterValidator(at_home)]
Locations = Annotated[Names, AfterValidator(lambda paths: [at_home(path) for path in paths])]
NamedLocations = Annotated[
    dict[str, str], AfterValidator(lambda paths: {k: at_home(path) for k, path in paths.items()})
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Config(Section):
    """A whole configuration: what is wrong with it is raised as ConfigError, key by key."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read YAML, then apply overrides ["--section.field", "value", …].

        A value is YAML; of a field that is text it is the text as it stands, unless YAML's quotes
        are around it.
        """
        return cls(**_override(cls, _read_yaml(path), overrides))


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
    eval: Locations = []
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


class LossSection(Section):
    objective: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    """Each pair by itself, or each response against all that its record ranks below it."""
    weighting: Literal["pair", "prompt"] = "pair"
    """What weighs the same in a step: every pair (in plackett_luce every choice of one response
    out of several), or every prompt, whose pairs are averaged."""
    centering: float = Field(0.0, ge=0)
    """Coefficient of (r_chosen + r_rejected)², which keeps rewards around 0; bradley_terry only."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be flipped; bradley_terry only."""


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
    overrides: dict[str, Any] = {}
    """Merged into the DeepSpeed config as it is."""


class ClusterSection(Section):
    workers: int = Field(1, ge=1)
    """Ray Train workers, one rank each."""
    gpus_per_worker: float = Field(0, ge=0)
    """0 trains on CPU."""
    cpus_per_worker: float = Field(1, gt=0)
    """Also the number of torch threads of a CPU worker."""
    labels: dict[str, str] = {}
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
    loss: LossSection = Field(default_factory=LossSection)
    train: TrainSection = Field(default_factory=TrainSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)

    @model_validator(mode="after")
    def _evaluates_on_something(self) -> Self:
        if self.train.eval_every and not self.data.eval:
            raise ValueError("train.eval_every is set, but data.eval names no held-out records")
        return self

    @model_validator(mode="after")
    def _rankings_have_no_terms_of_pairs(self) -> Self:
        terms = {name: getattr(self.loss, name) for name in ("centering", "label_smoothing")}
        if self.loss.objective == "plackett_luce" and any(terms.values()):
            given = " and ".join(f"loss.{name} = {value}" for name, value in terms.items() if value)
            raise ValueError(f"{given}: of pairs, so only for loss.objective = 'bradley_terry'")
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


class HttpSection(Section):
    enabled: bool = False
    """Answer HTTP beside the handle: POST /score and /get_reward, GET /health and /docs."""
    host: str = "127.0.0.1"
    """Where Serve's proxies listen, one on each node; 0.0.0.0 is every interface."""
    port: int = Field(8000, ge=1, le=65535)
    route_prefix: str = Field("/", pattern=r"^/")
    """Path in front of this application's; a second application needs one of its own."""
    token_env: str | None = None
    """Environment variable, on the serving nodes, of the bearer token that scoring asks for."""
    token_file: Annotated[str | None, AfterValidator(lambda path: path and at_home(path))] = None
    """Instead of token_env: a file on the serving nodes that holds the token."""
    max_bytes: int = Field(32 * 2**20, ge=1)
    """Largest body of a request; a larger one is refused before it is read."""
    max_rows: int = Field(8192, ge=1)
    """Most rows of a request."""

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if self.token_env and self.token_file:
            raise ValueError("token_env and token_file are both set: one token is asked for")
        return self


class AutoscaleSection(Section):
    max_replicas: int | None = Field(None, ge=1)
    """Set it to have as many replicas as callers' outstanding tokens need, up to so many."""
    min_replicas: int = Field(1, ge=0)
    """With 0 the first step after a pause waits for a replica to start."""
    tokens_per_replica: int = Field(65536, ge=1)
    """Tokens without a reward, of all callers' steps, for which there is to be a replica."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """How long more replicas must be needed before they are started."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """How long fewer must do before replicas are drained and stopped."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(
                f"autoscale.min_replicas ({self.min_replicas}) is above autoscale.max_replicas "
                f"({self.max_replicas})"
            )
        return self


class ServeConfig(Config):
    """One served reward model."""

    export: Location
    """The export directory, readable from every serving node; or a directory or hub name of
    another sequence-classification reward model."""
    adapters: NamedLocations = {}
    """More rewards, by name: exports of LoRA runs from the base and with the template of `export`,
    itself one. A replica loads that base once and runs each reward as an adapter on it."""
    app: str = "rayrm"
    """Name of the Serve application, which clients call."""
    replicas: int = Field(1, ge=1)
    """Without effect where autoscale.max_replicas is set."""
    autoscale: AutoscaleSection = Field(default_factory=AutoscaleSection)
    gpus_per_replica: float = Field(0, ge=0)
    """0 serves on CPU; 1, or a share of one GPU for several replicas on it."""
    cpus_per_replica: float = Field(1, gt=0)
    """Also the number of torch threads of a CPU replica."""
    labels: dict[str, str] = {}
    """Ray node labels that replicas must land on."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the backbone; auto: bfloat16 where the first replica's machine multiplies it in hardware,
    else float32, for as long as the application is there."""
    max_length: int | None = Field(None, ge=8)
    """Longest row in tokens; by default as in training."""
    overlong: Literal["error", "truncate"] = "error"
    """An over-long row gets a typed error, or its prompt's left is cut and the result says so."""
    tokens_per_pack: int = Field(8192, ge=8)
    """Token budget of one forward."""
    deterministic: bool = False
    """A row's reward is the same bit for bit whatever rows are beside it, in whatever order, and
    whichever replica scores it, given the same hardware and versions: every row is computed by
    itself, on CPU on one thread. Costs the sharing of prompts and the filling of packs."""
    max_queue_tokens: int = Field(1_000_000, ge=8)
    """Most tokens that a replica lets wait before it refuses more; it takes a few packs, or what it
    computes in half a second, where that is less."""
    cache_bytes: int = Field(64 * 2**20, ge=0)
    """What a replica may spend on remembering rewards of rows: about 256 bytes a row."""
    hang_timeout_s: float = Field(300.0, gt=0)
    """A pack that computes for longer fails the replica's health check, and Serve replaces it."""
    http: HttpSection = Field(default_factory=HttpSection)

    @model_validator(mode="after")
    def _runs_on_one_gpu(self) -> Self:
        if self.gpus_per_replica > 1:
            raise ValueError(
                f"gpus_per_replica = {self.gpus_per_replica:g}: a replica computes on one GPU, the "
                "others would be reserved and stay idle; give 1, or a share of one, and more "
                "replicas"
            )
        return self

    @model_validator(mode="after")
    def _names_its_own_reward_once(self) -> Self:
        if OWN in self.adapters:
            raise ValueError(f"adapters.{OWN}: that is the name of `export`'s own reward")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read YAML, or take path for the export; then apply overrides ["--field", "value", …]."""
        is_yaml = Path(path).suffix in (".yaml", ".yml")
        values = _read_yaml(path) if is_yaml else {"export": str(path)}
        return cls(**_override(cls, values, overrides))


def describe(section: type[BaseModel], prefix: str = "--") -> str:
    """Every field as a command-line override: its flag, default and meaning, one a line."""
    lines = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines.append(describe(inner, f"{prefix}{name}."))
            continue
        default = "required" if field.is_required() else repr(field.get_default())
        meaning = " ".join((field.description or "").split())
        lines.append(f"  {prefix}{name} ({default})  {meaning}".rstrip())
    return "\n".join(lines)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = local_path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no config file {path.resolve()}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    return values


def _override(
    model: type[BaseModel], values: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    pairs = [p for word in overrides for p in (word.split("=", 1) if word[:2] == "--" else [word])]
    if len(pairs) % 2:
        raise ConfigError(f"override {pairs[-1]!r} has no value: write --section.field value")
    for flag, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not flag.startswith("--"):
            raise ConfigError(f"override {flag!r} must be --section.field, followed by its value")
        *sections, field = flag.removeprefix("--").split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{flag}: {section!r} is a value, not a section")
        at[field] = _parse(value, _type_at(model, [*sections, field]))
    return values


def _type_at(model: Any, keys: Sequence[str]) -> Any:
    """The type of the field below those keys, None where there is no such field."""
    for key in keys:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(key)
            model = field.annotation if field else None
        else:
            model = get_args(model)[1] if get_origin(model) is dict else None
    return model


def _parse(value: str, kind: Any) -> Any:
    """YAML, or the word as it stands: "*.jsonl" begins as an alias would, and is a glob.

    kind: the field's type. In YAML 2026, on, null and 2026-01-01 are no text, "a: b" is a mapping,
    and "# " a comment; of a field that is text, all of them are text.
    """
    texts = kind in (list[str], dict[str, str])
    try:
        # The base loader leaves every word in a list or mapping the text that it is.
        parsed = yaml.load(value, yaml.BaseLoader if texts else yaml.SafeLoader)
    except yaml.YAMLError:
        return value
    if texts:
        return parsed if isinstance(parsed, get_origin(kind)) else _text(value)
    if kind is str:
        return _text(value)
    if kind == str | None:
        return None if value == "null" else _text(value)
    return parsed


def _text(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    try:
        parsed = yaml.safe_load(value) if quoted else value
    except yaml.YAMLError:
        return value
    return parsed if isinstance(parsed, str) else value


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            allowed = _fields_at(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"unknown key {key!r}{hint} (allowed: {', '.join(allowed)})")
        elif problem["type"] == "missing":
            lines.append(f"{key} is required")
        elif key:
            lines.append(f"{key} = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return "; ".join(lines)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(model.model_fields)
