"""What a served reward model is configured by: ServeConfig and its sections.

Imports neither torch nor Ray, so that --help is instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from rayrm.config import (
    OWN,
    Config,
    Location,
    NamedLocations,
    Section,
    at_home,
    override,
    read_yaml,
)


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
    adapters: NamedLocations = Field({})
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
    labels: dict[str, str] = Field({})
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
        values = read_yaml(path) if is_yaml else {"export": str(path)}
        return cls(**override(cls, values, overrides))
