"""Serve an export: python jobs/serve.py EXPORT [--field value …], or CONFIG.yaml instead of EXPORT.

Deploys the application on the running Ray cluster (RAY_ADDRESS, or the one on this machine) and
returns; without a cluster it starts one here and serves until Ctrl-C. Where the application runs,
another EXPORT takes over without a pause. The fields are those of rayrm.config.ServeConfig, e.g.
--replicas 2 --gpus_per_replica 1.

    python jobs/serve.py --rollback [APP]

serves again what the application served before.
"""

from __future__ import annotations

import signal
import sys

from rayrm.config import ServeConfig, describe
from rayrm.errors import RayrmError


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        print(describe(ServeConfig))
        return
    if arguments[0] == "--rollback":
        roll_back(*arguments[1:])
        return
    config = ServeConfig.load(arguments[0], arguments[1:])

    import ray
    from ray import serve

    from rayrm.serve import deploy, locate_export

    _, served = locate_export(config)
    ray.init()
    deploy(config)
    print(f"application {config.app!r} serves {served.pin}", flush=True)
    if config.http.enabled:
        where = f"{config.http.host}:{config.http.port}{config.http.route_prefix.rstrip('/')}"
        print(f"HTTP on http://{where}/score, docs on http://{where}/docs", flush=True)
    node = ray._private.worker._global_node
    if node is not None and node.is_head():  # the cluster is ours and ends with this process
        print("Ctrl-C stops it", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            serve.delete(config.app)


def roll_back(app: str = "rayrm") -> None:
    import ray

    from rayrm.serve import rollback

    ray.init()
    print(f"application {app!r} serves {rollback(app).version} again", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RayrmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
