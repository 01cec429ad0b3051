"""Define the configuration of a served reward model: ServeConfig and its sections.

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
    """Also serve over HTTP: POST /score and /get_reward, GET /health and /docs."""
    host: str = "127.0.0.1"
    """Address that Serve's proxies listen on, one per node; 0.0.0.0 is every interface."""
    port: int = Field(8000, ge=1, le=65535)
    route_prefix: str = Field("/", pattern=r"^/")
    """Prefix of this application's paths; every application needs a different one."""
    token_env: str | None = None
    """Environment variable, on the serving nodes, with the bearer token that scoring requires."""
    token_file: Annotated[str | None, AfterValidator(lambda path: path and at_home(path))] = None
    """File on the serving nodes that holds the token; an alternative to token_env."""
    max_bytes: int = Field(32 * 2**20, ge=1)
    """Maximum size of a request's body in bytes; a larger one is not read to its end."""
    max_rows: int = Field(8192, ge=1)
    """Maximum number of rows in a request."""

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if self.token_env and self.token_file:
            raise ValueError("token_env and token_file are both set: set only one")
        return self


class AutoscaleSection(Section):
    max_replicas: int | None = Field(None, ge=1)
    """Maximum number of replicas. If set, the number follows the outstanding tokens; if not, it is
    `replicas`."""
    min_replicas: int = Field(1, ge=0)
    """Minimum number of replicas. With 0 the first step after a pause waits for one to start."""
    tokens_per_replica: int = Field(65536, ge=1)
    """Outstanding tokens per replica, over the steps of all callers."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds for which more replicas must be needed before they are started."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Seconds for which fewer must be enough before replicas are drained and stopped."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(
                f"autoscale.min_replicas ({self.min_replicas}) is above autoscale.max_replicas "
                f"({self.max_replicas})"
            )
        return self


class ServeConfig(Config):
    """Configuration of one served reward model."""

    export: Location
    """Export directory or URI that every serving node can read; or the directory or hub name of a
    third-party sequence-classification reward model."""
    adapters: NamedLocations = Field({})
    """Further rewards by name: exports of LoRA runs with the base model and template of `export`,
    which must be one too. A replica loads the base once and applies each adapter to it."""
    app: str = "rayrm"
    """Name of the Serve application; clients call it by this name."""
    replicas: int = Field(1, ge=1)
    """Number of replicas; ignored if autoscale.max_replicas is set."""
    autoscale: AutoscaleSection = Field(default_factory=AutoscaleSection)
    gpus_per_replica: float = Field(0, ge=0)
    """0: serve on CPU; 1: a whole GPU; between: a share, for several replicas on one GPU."""
    cpus_per_replica: float = Field(1, gt=0)
    """CPUs per replica; on CPU, also its number of torch threads."""
    labels: dict[str, str] = Field({})
    """Ray node labels that the nodes of replicas must have."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the backbone. auto: bfloat16 if the first replica's hardware supports it, else
    float32; the same for all replicas until the application is deleted."""
    max_length: int | None = Field(None, ge=8)
    """Maximum length of a row in tokens; default: as in training."""
    overlong: Literal["error", "truncate"] = "error"
    """error: an over-long row gets RowTooLong. truncate: its prompt is cut from the left, and
    `truncated` is set in the result."""
    tokens_per_pack: int = Field(8192, ge=8)
    """Token budget of one forward pass."""
    deterministic: bool = False
    """A row's reward has the same bits whatever other rows are scored, in whatever order and on
    whichever replica, given the same hardware and versions. Slower: every row is a separate pack,
    on CPU on one thread, so prompts are not shared."""
    max_queue_tokens: int = Field(1_000_000, ge=8)
    """Upper bound of the tokens waiting at a replica, which refuses more. The limit in effect is
    usually lower: four packs or half a second of work, whichever is more."""
    cache_bytes: int = Field(64 * 2**20, ge=0)
    """Size of a replica's reward cache in bytes; a row takes about 256."""
    hang_timeout_s: float = Field(300.0, gt=0)
    """Seconds after which a pack that still computes fails the replica's health check; Serve then
    replaces the replica."""
    http: HttpSection = Field(default_factory=HttpSection)

    @model_validator(mode="after")
    def _runs_on_one_gpu(self) -> Self:
        if self.gpus_per_replica > 1:
            raise ValueError(
                f"gpus_per_replica = {self.gpus_per_replica:g}: a replica computes on one GPU, "
                "and more would stay idle; set at most 1, and more replicas"
            )
        return self

    @model_validator(mode="after")
    def _names_its_own_reward_once(self) -> Self:
        if OWN in self.adapters:
            raise ValueError(f"adapters.{OWN}: this name is reserved for `export`'s own reward")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, or use any other path as the export; then apply overrides.

        overrides: ["--field", "value", …]. Raises ConfigError for a wrong key or value.
        """
        is_yaml = Path(path).suffix in (".yaml", ".yml")
        values = read_yaml(path) if is_yaml else {"export": str(path)}
        return cls(**override(cls, values, overrides))
