"""Build the Serve application: replicas, their autoscaling, and an HTTP endpoint for them.

build() is the entry point of a Serve config. Does not know what is served already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from rayrm.errors import ConfigError
from rayrm.serving.autoscale import LOOK_BACK_S, REPORT_S, OutstandingTokens
from rayrm.serving.config import ServeConfig
from rayrm.serving.http.endpoint import Endpoint
from rayrm.serving.replica import Replica
from rayrm.serving.transports.handle import REPLICA

# Serve's default of 5 would leave a replica nothing to merge; its own queue counts tokens instead.
MAX_ONGOING_REQUESTS = 1024

# Fields of ServeConfig that a Serve config sets elsewhere, and where.
ELSEWHERE = {
    "app": "the application's name",
    "http.host": "http_options.host",
    "http.port": "http_options.port",
    "http.route_prefix": "the application's route_prefix",
}


def build(args: dict[str, Any]) -> Application:
    """Build the application from a Serve config's args, which are ServeConfig's fields.

    Used as `import_path: rayrm.serving.application:build`. Raises ConfigError, also for a field
    that a Serve config sets elsewhere and that has no effect here.
    """
    config = ServeConfig(**args)
    given = config.model_fields_set | {f"http.{key}" for key in config.http.model_fields_set}
    misplaced = sorted(given & ELSEWHERE.keys())
    if misplaced:
        raise ConfigError(
            f"{misplaced[0]} has no effect in args: set {ELSEWHERE[misplaced[0]]} in the Serve "
            "config"
        )
    named = {f"adapters.{name}": path for name, path in config.adapters.items()}
    for key, path in {"export": config.export, **named}.items():
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(f"{key} = {path!r}: must be absolute or a URI in args")
    return application(config)


def application(config: ServeConfig) -> Application:
    """Return the application, not yet deployed."""
    actor_options: dict[str, Any] = {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica,
        "label_selector": config.labels,
    }
    deployment = serve.deployment(
        name=REPLICA,
        **scale(config),
        ray_actor_options=actor_options,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=min(10.0, config.hang_timeout_s),
        # A pack that is still running by then has hung; clients resend dropped chunks.
        graceful_shutdown_timeout_s=min(20.0, config.hang_timeout_s),
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},  # one line per chunk
    )
    replicas = deployment(Replica).bind(config)
    if not config.http.enabled:
        return replicas
    # It reads the export's tokenizer, so it runs where replicas do; it needs almost no CPU.
    endpoint = serve.deployment(
        ray_actor_options={"num_cpus": 0, "label_selector": config.labels},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        logging_config={"enable_access_log": False},
    )
    return endpoint(Endpoint).bind(config, replicas)


def scale(config: ServeConfig) -> dict[str, Any]:
    """Return Serve's options for the number of replicas."""
    wanted = config.autoscale
    if wanted.max_replicas is None:
        return {"num_replicas": config.replicas}
    policy = AutoscalingPolicy(
        policy_function=OutstandingTokens,
        policy_kwargs={"tokens_per_replica": wanted.tokens_per_replica},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=wanted.min_replicas,
            max_replicas=wanted.max_replicas,
            upscale_delay_s=wanted.upscale_delay_s,
            downscale_delay_s=wanted.downscale_delay_s,
            metrics_interval_s=REPORT_S,
            look_back_period_s=LOOK_BACK_S,
            policy=policy,
        )
    }
