"""Serve an export: python jobs/serve.py EXPORT [--field value …], or CONFIG.yaml instead of EXPORT.

Deploys the application on the running Ray cluster (RAY_ADDRESS, or the one on this machine) and
returns; without a cluster it starts one here and serves until Ctrl-C. Where the application runs,
another EXPORT takes over without a pause. The fields are those of rayrm.ServeConfig, e.g.
--replicas 2 --gpus_per_replica 1.

    python jobs/serve.py --canary SHARE EXPORT [APP]   let it score that share of the callers
    python jobs/serve.py --shadow EXPORT [APP]         let it score what the served one has answered
    python jobs/serve.py --compare [APP]               how rewards in the shadow differ
    python jobs/serve.py --promote [APP]               let what is on trial score all callers
    python jobs/serve.py --rollback [APP]              end the trial, or serve the version before
    python jobs/serve.py --delete [APP]                end it, and forget what it served and tried
"""

from __future__ import annotations

import argparse
import signal
import sys

from rayrm.config import describe
from rayrm.errors import RayrmError
from rayrm.serving.config import ServeConfig

OPERATIONS = ("--canary", "--shadow", "--compare", "--promote", "--rollback", "--delete")


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        print(describe(ServeConfig))
        return
    if arguments[0] in OPERATIONS:
        print(operate(arguments[0], arguments[1:]), flush=True)
        return
    config = ServeConfig.load(arguments[0], arguments[1:])

    import ray

    from rayrm.serving.locate import locate_export
    from rayrm.serving.operations import delete, deploy

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
            delete(config.app)


def operate(verb: str, words: list[str]) -> str:
    """What was done to an application that runs, in a line."""
    parser = argparse.ArgumentParser(prog=f"jobs/serve.py {verb}")
    if verb == "--canary":
        parser.add_argument("share", type=float, help="of the callers, 0 to 1")
    if verb in ("--canary", "--shadow"):
        parser.add_argument("export")
    parser.add_argument("app", nargs="?", default="rayrm")
    args = parser.parse_args(words)

    import ray

    from rayrm.serving.operations import compare, delete, promote, rollback, try_out

    ray.init()
    match verb:
        case "--canary":
            served = try_out(args.app, args.export, args.share)
            return f"{served.version} scores {args.share:.0%} of the callers of {args.app!r}"
        case "--shadow":
            return f"{try_out(args.app, args.export).version} scores what {args.app!r} has answered"
        case "--compare":
            return str(compare(args.app))
        case "--promote":
            return f"application {args.app!r} serves {promote(args.app).version}"
        case "--delete":
            delete(args.app)
            return f"application {args.app!r} is deleted"
        case _:
            return f"application {args.app!r} serves {rollback(args.app).version} again"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RayrmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
