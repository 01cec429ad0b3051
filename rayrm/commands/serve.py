"""Run `rayrm serve EXPORT [--field value …]`, or an operation on a running application."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from rayrm.commands.parser import errors_in_a_line, make_parser
from rayrm.serving.config import ServeConfig

DESCRIPTION = """Serve an export on the running Ray cluster (RAY_ADDRESS, or this machine's).

Returns when all replicas are ready; without a cluster it starts one here and serves until Ctrl-C.
If the application is running, EXPORT replaces the served one without downtime."""

OPERATIONS = {
    "--canary": ("SHARE EXPORT [APP]", "canary: let EXPORT score that share of the callers"),
    "--shadow": ("EXPORT [APP]", "shadow: let EXPORT score answered rows, unseen by callers"),
    "--compare": ("[APP]", "print how the shadow's rewards differ"),
    "--promote": ("[APP]", "let the version on trial score all callers"),
    "--rollback": ("[APP]", "end the trial, or serve the previous version"),
    "--delete": ("[APP]", "end the application, and delete its record"),
}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    with errors_in_a_line():
        if words and words[0] in OPERATIONS:
            print(operate(words[0], words[1:], prog), flush=True)
        else:
            serve(words, prog)


def serve(words: list[str], prog: str | None) -> None:
    """Deploy an export; on a cluster that this process starts, serve until Ctrl-C."""
    named = [(f"{flag} {args}", meaning) for flag, (args, meaning) in OPERATIONS.items()]
    operations = "\n".join(f"  {flag:32}{meaning}" for flag, meaning in named)
    parser = make_parser(prog, DESCRIPTION, ServeConfig, f"instead of EXPORT:\n{operations}")
    parser.add_argument("export", help="directory, URI or hub name, or a YAML file with all fields")
    args, overrides = parser.parse_known_args(words)
    config = ServeConfig.load(args.export, overrides)

    import ray  # imported here since it takes seconds

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
    if node is not None and node.is_head():  # this process started the cluster, which ends with it
        print("Ctrl-C stops it", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            delete(config.app)


def operate(verb: str, words: list[str], prog: str | None) -> str:
    """Run an operation on an application; return a message that says what was done."""
    parser = make_parser(f"{prog or 'jobs/serve.py'} {verb}", OPERATIONS[verb][1])
    if verb == "--canary":
        parser.add_argument("share", type=float, help="fraction of the callers, 0 to 1")
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
